"""The rules of jobs over a network: offers that are packed, results that have to come, nodes that don't fit, bids."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bacalhau_node.errors import SpecError
from bacalhau_node.ids import Execution
from bacalhau_node.machines import Machines
from bacalhau_node.messages import (
    Announce,
    Bid,
    Copy,
    Engine,
    Grant,
    NodeRecord,
    Offer,
    Records,
    Refuse,
    Reject,
    ShardError,
    ShardOffer,
    Signed,
)
from bacalhau_node.protocol import announcing
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.archive import Archive
from bacalhau_node.protocol.compute import Compute
from bacalhau_node.protocol.fitness import UNNAMED, parse_constraint, unfit
from bacalhau_node.protocol.membership import Membership, Settings
from bacalhau_node.protocol.placement import FIRST_REST, LEASE
from bacalhau_node.protocol.requester import Requester
from bacalhau_node.protocol.watch import LATE_START, OVERTIME
from bacalhau_node.spec import Command, InputSource, PythonCell, Resources
from bacalhau_node.testing.builders import a_failure, a_job, a_job_id, a_result, a_spec, an_execution, matching, sent
from bacalhau_node.testing.mesh import EPOCH, sign_as, verify
from tests.machine.test_rules import Desk, job_end, offers, states

GIB = 1024**3


def a_record(node: str = "n-1", **fields: Any) -> NodeRecord:
    engine = Engine("sandbox", "sandbox", "3.11.4", 2 * GIB)
    return NodeRecord(**{"node": node, "version": 1, "slots": 2, "room": 2, "engines": (engine,), **fields})


def check_leases(desk: Desk, seconds: float) -> list[ev.Effect]:
    return desk.later(seconds, ev.LeaseTimer(a_job_id()))


# --- packing ---


def test_an_offer_that_is_packed_has_no_lease_until_it_is_on_its_way() -> None:
    """However long it takes to hash the inputs; then the node has a whole lease to answer."""
    desk = Desk("n-1")
    desk.packs = False
    desk(a_job())
    assert not offers(check_leases(desk, 10 * LEASE)), "it was not sent, so it is not sent again"
    desk(ev.OfferPacked((an_execution(),)))
    assert states(check_leases(desk, LEASE - 1)) == []
    assert "waiting" in states(check_leases(desk, 1))


def test_an_offer_that_is_sent_once_more_does_not_keep_a_dead_node_alive() -> None:
    """Its lease began with the first one."""
    desk = Desk("n-1")
    desk(a_job())
    assert offers(check_leases(desk, LEASE - 1)) == [an_execution()]
    assert "waiting" in states(check_leases(desk, 1))


def test_an_offer_to_this_node_itself_needs_no_packing() -> None:
    desk = Desk()
    desk.packs = False
    desk(ev.NodeSeen("req", 1))
    desk(a_job())
    assert "waiting" in states(check_leases(desk, LEASE))


def test_an_input_that_cannot_be_offered_is_the_shards_own_error() -> None:
    """It is not tried elsewhere, and the other shards go on."""
    desk = Desk("n-1", room=2)
    desk.packs = False
    desk(a_job(shards=2, retries=3))
    effects = desk(ev.OfferFailed(an_execution(0), ShardError("input", message="a.csv is gone")))
    assert "failed" in states(effects)
    assert not offers(effects)
    outcome = desk.row(0).outcome
    assert outcome is not None
    assert outcome.error == ShardError("input", message="a.csv is gone")
    desk(ev.OfferPacked((an_execution(1),)))
    desk.propose("n-1", an_execution(1))
    assert matching(desk(ev.ResultKept(an_execution(1))), ev.Seal)


def test_a_node_that_cannot_be_reached_costs_nothing_and_is_asked_last() -> None:
    """The shard goes to another node at once, and back to this one when it is alone."""
    desk = Desk("n-1")
    desk(a_job())
    effects = desk(ev.OfferUnsent((an_execution(),), "no route"))
    assert "Queued" in states(effects)
    assert desk.row(0).lost == 0
    assert offers(desk.later(1, ev.RetryTimer(a_job_id()))) == [an_execution(attempt=2)]
    desk(ev.OfferUnsent((an_execution(attempt=2),), "no route"))
    assert offers(desk(ev.NodeSeen("n-2", 1)), to="n-2") == [an_execution(attempt=3)]


@pytest.mark.parametrize(
    "event",
    [
        ev.OfferPacked((an_execution(attempt=9),)),
        ev.OfferFailed(an_execution(job=5), ShardError("input")),
        ev.OfferUnsent((an_execution(attempt=9),), ""),
        ev.ResultComing(an_execution(attempt=9), "n-1"),
        ev.ResultMissing(an_execution(), "n-2", ""),
    ],
)
def test_what_moved_for_an_attempt_that_is_over_changes_nothing(event: ev.Event) -> None:
    desk = Desk("n-1")
    desk(a_job())
    assert desk(event) == []


# --- results on their way ---


def test_a_result_that_does_not_come_is_a_lost_attempt_and_counts_when_it_comes_later() -> None:
    """The node proposes it again, and it is as good as any late one."""
    desk = Desk("n-1")
    desk(a_job())
    desk.take("n-1", an_execution())
    assert desk.machine.wants(an_execution(), "n-1")
    desk(ev.ResultComing(an_execution(), "n-1"))
    assert "waiting" in states(desk(ev.ResultMissing(an_execution(), "n-1", "the connection broke")))
    assert desk.row(0).lost == 1
    assert desk.machine.wants(an_execution(), "n-1")
    assert matching(desk.propose("n-1", an_execution()), ev.Keep)
    assert not desk.machine.wants(an_execution(), "n-1")


def test_a_node_that_lies_about_a_result_is_told_so_and_asked_last() -> None:
    desk = Desk("n-1")
    desk(a_job())
    desk.take("n-1", an_execution())
    desk(ev.NodeSeen("n-2", 0))
    effects = desk(ev.ResultMissing(an_execution(), "n-1", "it is another one", lied=True))
    assert sent(effects, Reject, to="n-1") == [Reject(an_execution(), "it is another one")]
    assert not offers(desk(ev.NodeSeen("n-1", 5)))
    assert offers(desk(ev.NodeSeen("n-2", 1)), to="n-2") == [an_execution(attempt=2)]


def test_a_large_result_may_take_longer_than_its_shard_was_allowed_to() -> None:
    """What is on its way is not overtime; its node's heartbeats are enough."""
    desk, e = Desk("n-1"), an_execution()
    desk(a_job(timeout=1.0))
    desk.take("n-1", e)
    desk.machine.step(ev.Received("n-1", _beat(e)), desk.now)
    desk(ev.ResultComing(e, "n-1"))
    desk.now += 2 * OVERTIME
    desk.hear("n-1", _beat(e))
    assert states(check_leases(desk, 1)) == []


def _beat(execution: Execution) -> Any:
    from bacalhau_node.messages import Heartbeat  # noqa: PLC0415 - one use

    return Heartbeat((execution,), (execution,), 0)


# --- faults of a node ---


def test_a_node_with_faults_of_its_own_rests_longer_each_time() -> None:
    """A daemon that is away for a moment does not burn the attempts of a job."""
    desk = Desk("n-1")
    desk(a_job())
    assert not offers(desk.propose("n-1", an_execution(), a_failure("node"), room=1))
    assert not offers(desk.later(1, ev.RetryTimer(a_job_id())))
    assert offers(desk.later(FIRST_REST, ev.RetryTimer(a_job_id()))) == [an_execution(attempt=2)]
    assert not offers(desk.propose("n-1", an_execution(attempt=2), a_failure("node"), room=1))
    assert not offers(desk.later(FIRST_REST, ev.RetryTimer(a_job_id())))
    assert offers(desk.later(FIRST_REST, ev.RetryTimer(a_job_id()))) == [an_execution(attempt=3)]


def test_after_three_faults_in_a_row_a_node_gets_no_more_of_the_job_and_alone_it_ends_it() -> None:
    """A daemon that is away for good is told of in seconds, however many shards there are."""
    desk = Desk("n-1")
    desk(a_job(shards=9))
    execution, wait = an_execution(), FIRST_REST
    for _ in range(2):
        desk.propose("n-1", execution, a_failure("node"), room=1)
        assert not offers(desk.later(wait - 1, ev.RetryTimer(a_job_id())))
        [execution] = offers(desk.later(1, ev.RetryTimer(a_job_id())))
        wait *= 2
    effects = desk.propose("n-1", execution, a_failure("node"), room=1)
    assert not offers(effects)
    assert "no node can run it" in str(effects)


def test_shards_that_fail_side_by_side_are_one_fault_of_their_node() -> None:
    desk = Desk("n-1", room=2)
    desk(a_job(shards=2))
    desk.take("n-1", an_execution(0), an_execution(1))
    for shard in range(2):
        desk.propose("n-1", an_execution(shard), a_failure("node"))
    assert desk.machine.book.placement.nodes["n-1"].faults == 1


def test_a_shard_goes_elsewhere_at_once_when_its_node_has_a_fault() -> None:
    desk = Desk("n-1")
    desk(a_job())
    desk(ev.NodeSeen("n-2", 1))
    assert offers(desk.propose("n-1", an_execution(), a_failure("node"), room=1)) == [an_execution(attempt=2)]


def test_a_good_end_ends_the_distrust_in_a_nodes_daemon() -> None:
    desk = Desk("n-1", room=2)
    desk(a_job(shards=2))
    desk.take("n-1", an_execution(0), an_execution(1))
    desk.propose("n-1", an_execution(0), a_failure("node"))
    desk.propose("n-1", an_execution(1), a_result())
    assert desk.machine.book.placement.nodes["n-1"].faults == 0


# --- nodes that don't fit ---

CELL = PythonCell(bundle="b", python="3.12.1")


@pytest.mark.parametrize(
    ("spec", "record", "why"),
    [
        (a_spec(), a_record(), ""),
        (a_spec(), a_record(engines=()), "runs no jobs of others"),
        (a_spec(), a_record(leaving=True), "is leaving"),
        (a_spec(isolation="container"), a_record(), "isolates by sandbox"),
        (a_spec(image="python"), a_record(), "container is needed"),
        (a_spec(task=CELL), a_record(), "has Python 3.11.4, and the cell needs 3.12.1"),
        (a_spec(task=PythonCell(bundle="b", python="3.11.9")), a_record(), ""),
        (a_spec(resources=Resources(memory=3 * GIB)), a_record(), "bytes of memory"),
        (a_spec(resources=Resources(gpus=1)), a_record(), "has 0 GPUs, and --gpu asks for 1"),
        (a_spec(constraint="zone=eu"), a_record(labels={"zone": "us"}), "its labels: zone=us"),
        (a_spec(constraint="zone=eu"), a_record(labels={"zone": "eu"}), ""),
    ],
)
def test_a_node_that_says_it_cannot_is_not_asked(spec: Any, record: NodeRecord, why: str) -> None:
    assert (why in unfit(spec, record)) if why else not unfit(spec, record)


@pytest.mark.parametrize(
    ("text", "labels", "fits"),
    [
        ("", {}, True),
        ("fast", {"fast": ""}, True),
        ("fast", {}, False),
        ("!fast", {}, True),
        ("! fast", {"fast": "1"}, False),
        ("a=1,b!=2", {"a": "1"}, True),
        ("a == 1 , b != 2", {"a": "1", "b": "2"}, False),
        ("gpu in (a100, h100)", {"gpu": "h100"}, True),
        ("gpu in (a100,h100)", {"gpu": "t4"}, False),
        ("gpu notin (t4)", {}, True),
        ("example.org/zone=eu-1", {"example.org/zone": "eu-1"}, True),
    ],
)
def test_a_constraint_is_read_like_a_selector(text: str, labels: dict[str, str], *, fits: bool) -> None:
    assert all(one.holds(labels) for one in parse_constraint(text)) == fits


@pytest.mark.parametrize("text", ["=", "a=b c", "a in b", "a >", ",a", "a in (b", "a b"])
def test_a_constraint_that_cannot_be_read_says_where(text: str) -> None:
    with pytest.raises(SpecError, match="--constraint"):
        parse_constraint(text)


def test_a_job_goes_only_to_nodes_that_fit_and_to_others_when_they_change() -> None:
    desk = Desk()
    desk(ev.NodeSeen("n-1", 2, a_record("n-1", labels={"zone": "us"})))
    desk(ev.NodeSeen("n-2", 0, a_record("n-2", labels={"zone": "eu"})))
    assert not offers(desk(a_job(constraint="zone=eu")))
    assert offers(desk(ev.NodeSeen("n-1", 2, a_record("n-1", version=2, labels={"zone": "eu"})))) == [an_execution()]


def test_a_job_that_fits_no_node_fails_with_what_each_lacks() -> None:
    desk = Desk()
    desk(ev.NodeSeen("n-1", 2, a_record("n-1")))
    desk(ev.NodeSeen("n-2", 2, a_record("n-2", engines=())))
    end = job_end(desk(a_job(resources=Resources(gpus=1))))
    assert end is not None
    assert end.reason == "no node can run it: n-1: has 0 GPUs, and --gpu asks for 1; n-2: runs no jobs of others"


def test_a_record_does_not_overrule_what_a_working_node_says_itself() -> None:
    """It was made before; its room was counted without our offers."""
    desk = Desk()
    desk(ev.NodeSeen("n-1", 1, a_record()))
    desk(a_job(shards=3))
    assert not offers(desk(ev.NodeSeen("n-1", 5, a_record(version=2))))


def test_most_shards_go_to_nodes_that_have_the_image() -> None:
    desk = Desk()
    can = Engine("docker", "container", "3.11.4", 2 * GIB)
    desk(ev.NodeSeen("n-1", 20, a_record("n-1", engines=(can,), images=("other:1", "python:latest"))))
    desk(ev.NodeSeen("n-2", 20, a_record("n-2", engines=(can,))))
    given = desk(a_job(shards=20, image="python"))
    assert (len(offers(given, to="n-1")), len(offers(given, to="n-2"))) == (16, 4)
    given = desk(a_job(1, shards=4))
    assert len(offers(given, to="n-2")) >= 2, "the room that is left counts for others"


# --- announcements ---


def networked(*nodes: str, size: int = 100) -> Desk:
    desk = Desk(*nodes)
    desk.machine.book.addresses = ("/memory/req",)
    desk.machine.book.network = size
    return desk


def announced(effects: list[ev.Effect]) -> list[Announce]:
    return [one.message for one in matching(effects, ev.Publish) if isinstance(one.message, Announce)]


def test_a_job_that_no_known_node_can_run_is_announced_without_its_data_and_fails_when_nobody_bids() -> None:
    desk = networked("n-1")
    (first,) = offers(desk(a_job(constraint="gpu", inputs=(InputSource(source="/secret/data"),), env={"A": "b"})))
    desk.machine.book.jobs[a_job_id()].never["n-1"] = "has no such label"
    effects = desk(ev.OfferUnsent((first,), "away"))
    (news,) = announced(effects)
    assert (news.requester, news.addresses, news.wanted, news.round) == ("req", ("/memory/req",), 1, 1)
    assert news.spec == a_spec(constraint="gpu", task=Command(), inputs=(InputSource(source=UNNAMED),))
    assert job_end(effects) is None
    end = job_end(desk.later(60, ev.AnnounceTimer(a_job_id())))
    assert end is not None
    assert end.reason == "no node can run it: has no such label"


def test_a_bid_is_answered_by_an_offer() -> None:
    desk = networked()
    desk(ev.NodeSeen("n-1", 2, a_record("n-1")))
    assert announced(desk(a_job(resources=Resources(gpus=1))))
    assert offers(desk.hear("n-9", Bid(a_job_id(), 2)), to="n-9") == [an_execution()]
    assert announced(desk.later(0, ev.AnnounceTimer(a_job_id()))) == []


def test_when_all_is_placed_those_that_still_wait_to_bid_are_told() -> None:
    desk = networked()
    desk(ev.NodeSeen("n-1", 2, a_record("n-1")))
    desk(a_job(resources=Resources(gpus=1)))
    (news,) = announced(desk.hear("n-9", Bid(a_job_id(), 2)))
    assert news.wanted == 0


def test_more_replicas_than_nodes_are_announced_again_while_some_bid() -> None:
    desk = networked("n-1", size=3)
    (news,) = announced(desk(a_job(replicas=3, agree=2)))
    assert news.round == 1
    desk.hear("n-2", Bid(a_job_id(), 0))
    (news,) = announced(desk.later(5, ev.AnnounceTimer(a_job_id())))
    assert news.round == 2
    assert not announced(desk.later(50, ev.AnnounceTimer(a_job_id()))), "nobody has answered the second one"


def bidder(node: str = "n-1", *, slots: int = 2) -> Compute:
    compute = Compute(node, slots=slots, refuse=lambda _requester, spec: "no GPU" if spec.resources.gpus else None)
    compute.network = 1000
    return compute


def hear(compute: Compute, news: Announce, *, author: str = "req", now: float = 0.0) -> list[ev.SetTimer]:
    return matching(compute.step(ev.Received(author, news), now), ev.SetTimer)


def news(turn: int = 1, *, wanted: int = 1, **fields: Any) -> Announce:
    return Announce(a_job_id(), "req", ("/memory/req",), a_spec(**fields), wanted, turn)


def test_a_node_bids_once_a_round_when_its_turn_has_come() -> None:
    compute = bidder()
    (timer,) = hear(compute, news())
    assert not hear(compute, news())
    effects = compute.step(ev.TimerFired(timer.timer), timer.at)
    assert effects == [ev.Learn("req", ("/memory/req",)), ev.Send("req", Bid(a_job_id(), 2))]
    assert hear(compute, news(2))


def test_a_node_does_not_bid_for_what_it_cannot_run_nor_for_what_is_placed_nor_for_a_forged_author() -> None:
    assert not hear(bidder(), news(resources=Resources(gpus=1)))
    assert not hear(bidder(), news(), author="n-7")
    compute = bidder()
    (timer,) = hear(compute, news())
    hear(compute, news(wanted=0))
    assert compute.step(ev.TimerFired(timer.timer), timer.at) == []
    full = bidder(slots=1)
    (timer,) = hear(full, news())
    full.step(ev.Received("req", Offer(a_job_id(3), a_spec(), (ShardOffer(0, 1, "b"),), 1)), 0.0)
    assert full.step(ev.TimerFired(timer.timer), timer.at) == []


def test_few_nodes_bid_at_first_and_everybody_within_the_window() -> None:
    """Of a thousand nodes: two or so in the first half second, a half in the last."""
    waits = [announcing.delay(a_job_id(1), f"n-{n}", nodes=1000, wanted=1, turn=1) for n in range(1000)]
    assert sum(wait <= announcing.FIRST for wait in waits) <= 6
    assert sum(wait <= 2 * announcing.FIRST for wait in waits) <= 12
    assert max(waits) + announcing.TRAVEL <= announcing.window(nodes=1000, wanted=1, turn=1) < 6


# --- what a compute node owes ---


def test_a_result_is_journaled_with_what_its_requester_fetches_it_by() -> None:
    compute, grant = bidder(), Grant("token")
    offer = Offer(a_job_id(), a_spec(), (ShardOffer(0, 1, "b"),), 1, grant)
    (run,) = matching(compute.step(ev.Received("req", offer), 0.0), ev.Run)
    assert run.grant == grant
    (row,) = (one.row for one in matching(compute.step(ev.ExecutionEnded(an_execution(), a_result()), 1.0), ev.Write))
    assert row == ev.ComputeRow(an_execution(), "req", a_result(), grant)


def test_what_is_not_begun_is_tried_elsewhere_though_somebody_refused_to_before() -> None:
    """A second try that was refused was none."""
    desk = Desk("n-1", room=1)
    desk(a_job())
    desk.take("n-1", an_execution())
    desk(ev.NodeSeen("n-2", 1))
    late = desk.later(LATE_START + 1, ev.WatchTimer(a_job_id()))
    assert offers(late, to="n-2") == [an_execution(attempt=2)]
    desk.hear("n-2", Refuse((an_execution(attempt=2),), "never", "has no hands"))
    desk(ev.NodeSeen("n-3", 1))
    late = desk.later(1, ev.WatchTimer(a_job_id()))
    assert offers(late, to="n-3") == [an_execution(attempt=3)]


# --- nodes that die ---


def unreached(node: str) -> ev.NodeSeen:
    return ev.NodeSeen(node, 0, a_record(node), unreached=True)


def test_what_a_node_has_that_was_dialled_in_vain_is_tried_elsewhere_at_once_and_the_first_end_counts() -> None:
    """Its lease goes on: a link that broke for a moment costs no attempt, and no shard counts twice."""
    desk = Desk("n-1")
    desk(a_job(shards=1))
    desk.take("n-1", an_execution())
    desk(ev.NodeSeen("n-2", 1))
    assert offers(desk(unreached("n-1")), to="n-2") == [an_execution(attempt=2)]
    assert desk.row(0).lost == 0
    assert not offers(desk(unreached("n-1"))), "once for each shard"
    assert matching(desk.propose("n-1", an_execution()), ev.Keep), "it was out of reach only"
    assert sent(desk.propose("n-2", an_execution(attempt=2)), Reject, to="n-2")


def test_what_a_node_has_that_was_dialled_in_vain_waits_for_room_elsewhere() -> None:
    desk = Desk("n-1")
    desk(a_job(shards=1))
    desk.take("n-1", an_execution())
    desk(ev.NodeSeen("n-2", 0))
    assert not offers(desk(unreached("n-1")))
    desk(ev.NodeSeen("n-2", 1))
    assert offers(desk.later(1, ev.WatchTimer(a_job_id())), to="n-2") == [an_execution(attempt=2)]


def test_a_node_that_was_dialled_in_vain_gets_nothing_while_there_are_others() -> None:
    """Its record may say that it has room; whoever hears it again believes it again."""
    desk = Desk("n-1", "n-2")
    desk(unreached("n-1"))
    assert not offers(desk(a_job(shards=2)), to="n-1")
    assert offers(desk(ev.NodeSeen("n-1", 1, a_record("n-1", version=2))), to="n-1")


def test_a_shard_whose_nodes_all_die_fails_after_its_attempts() -> None:
    """A cell that kills whatever runs it must not go around the network."""
    desk = Desk("n-0")
    desk(a_job(shards=1))
    for n in range(1, 9):
        desk(ev.NodeSeen(f"n-{n}", 1))
    killed = 0
    while desk.machine.book.jobs:
        (attempt, *_) = desk.machine.book.jobs[a_job_id()].live.values()
        desk.take(attempt.node.id, attempt.execution)
        desk(unreached(attempt.node.id))
        desk(ev.NodeGone(attempt.node.id))
        killed += 1
        assert killed < 9
    assert desk.row(0).state == "failed"


def whole_node(*near: str) -> tuple[Machines, Requester]:
    """A node that knows some others."""
    requester = Requester("n-me")
    own = NodeRecord(node="n-me", version=0, addresses=("/memory/n-me",), slots=1)
    membership = Membership(
        own,
        archive=Archive(verify),
        sign=lambda data: sign_as("n-me", data),
        seed=1,
        epoch_ns=EPOCH,
        now=0.0,
        settings=Settings(low=0),
    )
    machines = Machines(requester, bidder("n-me"), membership)
    records = (a_record(node, version=EPOCH, addresses=(f"/memory/{node}",)) for node in near)
    encoded = [(one.node, msgspec.msgpack.encode(one)) for one in records]
    copies = tuple(Copy(Signed(data, sign_as(node, data)), 0) for node, data in encoded)
    machines.step(ev.Received("n-else", Records(copies)), 0.0)
    return machines, requester


def test_a_node_at_work_whose_link_breaks_is_dialled_at_once_though_it_is_no_neighbour() -> None:
    machines, requester = whole_node("n-1", "n-2")
    for node in ("n-1", "n-2"):
        machines.step(ev.LinkUp(node, inbound=False), 0.0)
    effects = machines.step(a_job(shards=1), 0.0)
    ((offered, execution),) = [(send.to, one) for send in matching(effects, ev.Send) for one in offers([send])]
    machines.step(ev.OfferPacked((execution,)), 0.0)
    idle = "n-2" if offered == "n-1" else "n-1"
    assert not matching(machines.step(ev.LinkDown(idle), 1.0), ev.Dial)
    (dial,) = matching(machines.step(ev.LinkDown(offered), 1.0), ev.Dial)
    (seen,) = matching(machines.step(ev.DialFailed(dial.address, offered, "refused"), 1.0), ev.NodeSeen)
    assert (seen.node, seen.room, seen.unreached) == (offered, 0, True)
    assert offers(machines.step(seen, 1.0), to=idle) == [an_execution(attempt=2)]
    requester.check()
