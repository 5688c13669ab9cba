"""What a hostile node may try on the machines of another: numbers, ids of others' jobs, and never an end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bacalhau_node import wire
from bacalhau_node.errors import ProtocolError
from bacalhau_node.ids import Execution
from bacalhau_node.machines import Machines
from bacalhau_node.messages import Announce, Bid, Cancel, Grant, Message, Offer, Recall, Refuse, ShardOffer, Take
from bacalhau_node.protocol import announcing, compute, here
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.announcing import delay
from bacalhau_node.protocol.compute import Compute
from bacalhau_node.protocol.requester import Requester
from bacalhau_node.testing.builders import a_job, a_job_id, a_result, a_spec, an_execution, matching, sent


def a_node(*, slots: int = 4) -> Compute:
    return Compute("cmp", slots=slots, refuse=lambda _requester, _spec: None)


def offer(machine: Compute, *executions: Execution, sender: str, now: float = 0.0) -> list[ev.Effect]:
    shards = tuple(ShardOffer(one.shard, one.attempt, "block") for one in executions)
    effects = machine.step(ev.Received(sender, Offer(executions[0].job, a_spec(), shards, 10)), now)
    machine.check()
    return effects


def hear(machine: Compute, message: Message, *, sender: str, now: float = 0.0) -> list[ev.Effect]:
    effects = machine.step(ev.Received(sender, message), now)
    machine.check()
    return effects


def news(**fields: Any) -> Announce:
    usual = {"job": a_job_id(), "requester": "req", "addresses": (), "spec": a_spec(), "wanted": 1, "round": 1}
    return Announce(**{**usual, **fields})


# --- numbers ---

OUT_OF_BOUNDS: list[Message] = [
    news(round=2**40),
    news(round=-1),
    news(wanted=-5),
    news(wanted=2**62),
    news(addresses=("/ip4/192.0.2.1/tcp/1",) * 1000),
    Bid(a_job_id(), -1),
    Take((), 2**62),
    Cancel((an_execution(shard=-1),)),
    Offer(a_job_id(), a_spec(), (ShardOffer(-1, 1, "block"),), 1),
    Offer(a_job_id(), a_spec(), (ShardOffer(10**9, 1, "block"),), 1),
    Offer(a_job_id(), a_spec(), (ShardOffer(0, 0, "block"),), 1),
    Offer(a_job_id(), a_spec(), (ShardOffer(0, 1, "block"),), 10**9),
    Offer(a_job_id(), a_spec(), (ShardOffer(0, 1, "block"),), 1, Grant("t" * 1000)),
    Offer(a_job_id(), a_spec(), (ShardOffer(0, 1, "block"),), 1, Grant("t", ("http://192.0.2.1",) * 100)),
]


@pytest.mark.parametrize("message", OUT_OF_BOUNDS)
def test_a_number_that_no_honest_node_sends_is_no_message(message: Message) -> None:
    """A round of 2**40 would be a power of two with as many digits, on every node that hears of the job."""
    data = bytes((wire.VERSION,)) + msgspec.msgpack.encode(message)
    with pytest.raises(ProtocolError, match="not a message"):
        wire.decode(data)


def test_whatever_an_announcement_may_say_the_wait_for_a_bid_is_a_number() -> None:
    for turn in (1, 16):
        for wanted in (1, 2**31 - 1):
            assert 0 <= delay(a_job_id(), "n-1", nodes=1_000_000, wanted=wanted, turn=turn) < 1e15


# --- jobs of others ---


def test_a_job_that_is_at_work_for_one_node_is_taken_from_no_other() -> None:
    """Else the second one's cell would run with what is here of the first one's: its folder, containers, secrets."""
    machine = a_node()
    assert sent(offer(machine, an_execution(0), sender="req"), Take)
    effects = offer(machine, an_execution(1, 7), sender="mallory")
    assert not matching(effects, ev.Run)
    (refusal,) = sent(effects, Refuse, to="mallory")
    assert (refusal.kind, refusal.reason) == ("busy", compute.FOREIGN)


def test_the_offers_of_a_stranger_do_not_make_those_of_the_requester_old() -> None:
    machine = a_node()
    offer(machine, an_execution(0), sender="req")
    offer(machine, an_execution(1, 1_000_000), sender="mallory")
    assert matching(offer(machine, an_execution(1), sender="req"), ev.Run)
    idle = a_node(slots=1)
    offer(idle, an_execution(5, job=1), sender="req")
    offer(idle, an_execution(0, 1_000_000), sender="mallory")  # refused: the slot is in use
    idle.step(ev.ExecutionEnded(an_execution(5, job=1), a_result()), 1.0)
    assert matching(offer(idle, an_execution(0), sender="req", now=2.0), ev.Run)


def test_a_job_is_free_for_others_when_what_was_here_has_been_put_away() -> None:
    machine = a_node()
    offer(machine, an_execution(0), sender="mallory")
    assert not matching(offer(machine, an_execution(0), sender="req"), ev.Run)
    hear(machine, Cancel((an_execution(0),)), sender="mallory")
    soon, later = here.HANDOVER / 2, here.HANDOVER
    assert not matching(offer(machine, an_execution(0), sender="req", now=soon), ev.Run)
    assert matching(offer(machine, an_execution(0), sender="req", now=later), ev.Run)


@pytest.mark.parametrize("message", [Cancel((an_execution(),)), Recall((an_execution(),))])
def test_nobody_ends_the_work_for_another_node(message: Message) -> None:
    machine = a_node()
    offer(machine, an_execution(), sender="req")
    assert hear(machine, message, sender="mallory") == []
    assert machine.requester(an_execution()) == "req"


# --- what is held ---


def test_a_requester_that_keeps_no_results_is_given_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are."""
    monkeypatch.setattr(compute, "MAX_HELD", 3)
    machine = a_node(slots=1)
    for shard in range(3):
        assert matching(offer(machine, an_execution(shard), sender="mallory"), ev.Run)
        machine.step(ev.ExecutionEnded(an_execution(shard), a_result(seconds=1.0)), 0.0)
    assert sent(offer(machine, an_execution(3), sender="mallory"), Refuse)
    assert matching(offer(machine, an_execution(0, job=1), sender="req"), ev.Run)


def test_what_is_remembered_of_offers_is_bounded_however_many_shards_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "MOST_SHARDS", 100)
    machine = a_node(slots=1)
    offer(machine, an_execution(0, job=999), sender="req")
    for job in range(20):
        offer(machine, *(an_execution(shard, job=job) for shard in range(30)), sender="mallory")
    assert machine._jobs._shards <= 100
    assert machine._jobs._shards == sum(len(job.seen) for job in machine._jobs._jobs.values())


# --- faults ---


def test_a_message_of_another_node_that_breaks_a_machine_costs_only_itself() -> None:
    """What a turn has decided for others must not go with it; our own faults are told."""

    def refuse(requester: str, _spec: object) -> str | None:
        raise ValueError(f"nobody foresaw what {requester} says")

    node = Compute("cmp", slots=1, refuse=refuse)
    machines = Machines(Requester("cmp"), node, None)
    message = Offer(a_job_id(), a_spec(), (ShardOffer(0, 1, "block"),), 1)
    assert machines.step(ev.Received("mallory", message), 0.0) == []
    with pytest.raises(ValueError, match="nobody foresaw"):
        machines.step(ev.Received("cmp", message), 0.0)


def test_bids_make_a_bounded_number_of_nodes_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Identities cost nothing."""
    monkeypatch.setattr(announcing, "MAX_BIDS", 5)
    machine = Requester("req")
    machine.book.addresses = ()
    machine.step(a_job(), 0.0)
    for number in range(20):
        machine.step(ev.Received(f"n-{number}", Bid(a_job_id(), 1)), 0.0)
    assert len(machine.book.placement.nodes) == 5
