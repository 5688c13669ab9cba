"""Each rule of the protocol on its own: one machine, a few events, partial matching on the effects."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import msgspec
import pytest

from bacalhau_node.errors import BugError
from bacalhau_node.ids import Execution
from bacalhau_node.messages import (
    Accept,
    Cancel,
    Heartbeat,
    Kept,
    Lines,
    Message,
    Offer,
    Propose,
    Recall,
    Refuse,
    Reject,
    ShardOffer,
    Started,
    Take,
)
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.compute import HEARTBEAT, MAX_PREFETCH, ORPHAN_GRACE, PROPOSE_AGAIN, Compute
from bacalhau_node.protocol.placement import LEASE, LONGEST_REST, MAX_OFFER
from bacalhau_node.protocol.requester import Requester
from bacalhau_node.protocol.watch import LEASE_CHECK
from bacalhau_node.testing.builders import a_failure, a_job, a_job_id, a_result, a_spec, an_execution, matching, sent


class Desk:
    """A requester under test: keeps the clock, checks the invariants, and knows how its nodes answer."""

    def __init__(self, *nodes: str, room: int = 1, now: float = 0.0) -> None:
        self.machine = Requester("req")
        self.now = now
        self.journal: dict[Any, ev.Row] = {}
        self.packs = True
        """Offers are packed at once."""
        for node in nodes:
            self(ev.NodeSeen(node, room))

    def __call__(self, event: ev.Event) -> list[ev.Effect]:
        effects = self.machine.step(event, self.now)
        self.machine.check()
        writes = matching(effects, ev.Write)
        assert effects[: len(writes)] == writes, "rows come first"
        for write in writes:
            row = write.row
            self.journal[(type(row), row.job, getattr(row, "shard", None))] = row
        if self.packs and (packed := offers(effects)):
            effects += self(ev.OfferPacked(tuple(packed)))
        return effects

    def hear(self, sender: str, message: Message) -> list[ev.Effect]:
        return self(ev.Received(sender, message))

    def later(self, seconds: float, timer: ev.Timer) -> list[ev.Effect]:
        self.now += seconds
        return self(ev.TimerFired(timer))

    def take(self, sender: str, *executions: Execution, room: int = 0) -> list[ev.Effect]:
        return self.hear(sender, Take(executions, room))

    def propose(self, sender: str, execution: Execution, outcome: Any = None, *, room: int = 0) -> list[ev.Effect]:
        return self.hear(sender, Propose(execution, outcome or a_result(), room))

    def row(self, shard: int) -> ev.ShardRow:
        row = self.journal[(ev.ShardRow, a_job_id(), shard)]
        assert isinstance(row, ev.ShardRow)
        return row


def offers(effects: list[ev.Effect], to: str | None = None) -> list[Execution]:
    return [
        Execution(offer.job, one.shard, one.attempt) for offer in sent(effects, Offer, to=to) for one in offer.shards
    ]


def states(effects: list[ev.Effect]) -> list[str]:
    return [one.update.state for one in matching(effects, ev.Notify)]


def job_end(effects: list[ev.Effect]) -> ev.JobChanged | None:
    found = [one.update for one in matching(effects, ev.Notify) if isinstance(one.update, ev.JobChanged)]
    return found[-1] if found and found[-1].state in ev.FINAL_JOB else None


# --- the straight way ---


def test_a_job_goes_from_offer_to_completed() -> None:
    """Every decision is journaled, told and stored, in the order of the protocol."""
    desk, e = Desk("n-1"), an_execution()
    assert offers(desk(a_job())) == [e]
    assert states(desk.take("n-1", e)) == ["taken", "Running"]
    assert states(desk.hear("n-1", Started(e))) == ["running"]
    effects = desk.propose("n-1", e)
    assert sent(effects, Accept, to="n-1") == [Accept(e)]
    assert matching(effects, ev.Keep, execution=e, node="n-1")
    effects = desk(ev.ResultKept(e))
    assert sent(effects, Kept, to="n-1") == [Kept(e)]
    assert matching(effects, ev.Seal) == [ev.Seal(a_job_id(), ((0, "record"),))]
    end = job_end(desk(ev.JobSealed(a_job_id(), "cid")))
    assert end == ev.JobChanged(a_job_id(), "Completed", "", "cid")
    assert desk.row(0).state == "kept"


def test_offers_of_one_job_to_one_node_travel_together() -> None:
    """One offer a node, with as many shards as the node has room for, and at most MAX_OFFER."""
    desk = Desk("n-1", "n-2", room=400)
    effects = desk(a_job(shards=1000))
    assert [len(offer.shards) for offer in sent(effects, Offer)] == [MAX_OFFER, MAX_OFFER]


def test_no_node_gets_more_than_it_has_room_for() -> None:
    """What a node reports counts without the offers that it has not answered."""
    desk = Desk("n-1", room=2)
    assert len(offers(desk(a_job(shards=9)))) == 2
    assert offers(desk.hear("n-1", Heartbeat((), (), room=2))) == []
    assert len(offers(desk.take("n-1", an_execution(0), an_execution(1), room=3))) == 3


def test_jobs_share_a_node_evenly() -> None:
    """Room goes round over the jobs that have waiting shards."""
    desk = Desk()
    desk(a_job(0, shards=50))
    desk(a_job(1, shards=50))
    effects = desk(ev.NodeSeen("n-1", 6))
    assert [len(offer.shards) for offer in sent(effects, Offer)] == [3, 3]


def test_nodes_fill_evenly() -> None:
    """Four shards over two nodes with room for more: two each."""
    effects = Desk("n-1", "n-2", room=10)(a_job(shards=4))
    assert [len(offer.shards) for offer in sent(effects, Offer)] == [2, 2]


def test_parallel_caps_the_executions_in_flight() -> None:
    """With --parallel 2 the third shard waits for an end."""
    desk = Desk("n-1", room=10)
    assert len(offers(desk(a_job(shards=4, parallel=2)))) == 2
    desk.take("n-1", an_execution(0), an_execution(1), room=8)
    assert offers(desk.propose("n-1", an_execution(0), room=9)) == [an_execution(2)]


# --- refusals ---


def test_a_busy_node_queues_the_job_and_is_tried_again() -> None:
    """Refusals spend nothing: the reason is shown, and the node is asked again when patience is over."""
    desk, e = Desk("n-1"), an_execution()
    desk(a_job())
    effects = desk.hear("n-1", Refuse((e,), "busy", "all 1 slots are in use", 0))
    queued = [one.update for one in matching(effects, ev.Notify) if isinstance(one.update, ev.JobChanged)]
    assert queued == [ev.JobChanged(a_job_id(), "Queued", "n-1: all 1 slots are in use")]
    assert offers(desk.later(1, ev.RetryTimer(a_job_id()))) == [an_execution(attempt=2)]


def test_a_job_that_no_node_can_run_fails_with_every_reason() -> None:
    """`never` excludes the node; when all have said so, the job has failed."""
    desk = Desk("n-1", "n-2")
    effects = desk(a_job(shards=2))
    first, second = offers(effects, to="n-1"), offers(effects, to="n-2")
    assert job_end(desk.hear("n-1", Refuse(tuple(first), "never", "has no GPU"))) is None
    effects = desk.hear("n-2", Refuse(tuple(second), "never", "needs Python 3.12"))
    end = job_end(effects)
    assert end is not None
    assert end.state == "Failed"
    assert "n-1: has no GPU; n-2: needs Python 3.12" in end.reason


def test_a_node_that_can_never_run_a_job_gets_no_more_of_it() -> None:
    """Its shards go to the others."""
    desk = Desk("n-1", "n-2")
    effects = desk(a_job(shards=2))
    (first,), (second,) = offers(effects, to="n-1"), offers(effects, to="n-2")
    desk.take("n-2", second)
    effects = desk.hear("n-1", Refuse((first,), "never", "has no GPU", room=5))
    assert offers(effects) == []
    assert offers(desk.propose("n-2", second, room=1), to="n-2") == [an_execution(first.shard, 2)]


def test_a_job_waits_for_the_first_node() -> None:
    """Without any node the job is queued and says so."""
    desk = Desk()
    effects = desk(a_job())
    assert "Queued" in states(effects)
    assert offers(desk(ev.NodeSeen("n-1", 1))) == [an_execution()]


# --- silence ---


def lose(desk: Desk) -> list[ev.Effect]:
    return desk.later(LEASE, ev.LeaseTimer(a_job_id()))


def test_an_unanswered_offer_is_sent_again() -> None:
    """The same execution, before its lease is over."""
    desk = Desk("n-1")
    desk(a_job())
    assert offers(desk.later(LEASE_CHECK, ev.LeaseTimer(a_job_id()))) == [an_execution()]


def test_a_silent_execution_is_lost_and_goes_to_another_node_first() -> None:
    """The node that lost it waits for its turn, though it reports room again."""
    desk = Desk("n-1")
    desk(a_job())
    desk.take("n-1", an_execution())
    desk(ev.NodeSeen("n-2", 0))
    assert "waiting" in states(lose(desk))
    assert offers(desk(ev.NodeSeen("n-1", 1))) == []
    assert offers(desk(ev.NodeSeen("n-2", 1)), to="n-2") == [an_execution(attempt=2)]


def test_a_lost_shard_goes_to_the_same_node_when_it_is_alone() -> None:
    """A node that was silent and comes back is asked again."""
    desk = Desk("n-1")
    desk(a_job())
    lose(desk)
    assert offers(desk(ev.NodeSeen("n-1", 1))) == [an_execution(attempt=2)]


def test_a_shard_fails_when_three_attempts_were_lost() -> None:
    """Each loss counts, by lease or because the node is gone; the error says so."""
    desk = Desk()
    desk(a_job())
    for n in (1, 2, 3):
        desk(ev.NodeSeen(f"n-{n}", 1))
        effects = desk(ev.NodeGone(f"n-{n}"))
    end = job_end(effects)
    assert end is not None
    assert end.reason == "1 of 1 shards failed"
    outcome = desk.row(0).outcome
    assert outcome is not None
    assert outcome.error is not None
    assert "3 attempts were lost" in outcome.error.message


def test_offers_that_nobody_answers_cost_a_shard_nothing_while_there_are_others() -> None:
    """Many nodes may have died at once: as long as there is one to try, no shard fails for them."""
    desk = Desk("n-1")
    desk(a_job())
    for n in (2, 3, 4, 5):
        desk(ev.NodeSeen(f"n-{n}", 1))
    for attempt in (2, 3, 4, 5):
        assert offers(lose(desk)) == [an_execution(attempt=attempt)]
        assert desk.row(0).lost == 0
    lose(desk)
    assert desk.row(0).lost == 1  # there is no other


def test_heartbeats_keep_an_execution_alive() -> None:
    """The lease counts from the last sign of life."""
    desk, e = Desk("n-1"), an_execution()
    desk(a_job())
    for _ in range(10):
        desk.now += LEASE - 1
        desk.hear("n-1", Heartbeat((e,), (e,), 0))
        assert "waiting" not in states(desk(ev.TimerFired(ev.LeaseTimer(a_job_id()))))


def test_a_heartbeat_is_answered_with_what_is_unwanted() -> None:
    """An empty answer says only that the requester is there; unknown work is cancelled."""
    desk, e, strange = Desk("n-1"), an_execution(), an_execution(job=7)
    desk(a_job())
    effects = desk.hear("n-1", Heartbeat((e, strange), (), 0))
    assert sent(effects, Cancel, to="n-1") == [Cancel((strange,))]
    assert sent(desk.hear("n-1", Heartbeat((e,), (), 0)), Cancel, to="n-1") == [Cancel(())]


def test_a_heartbeat_stands_for_a_lost_take() -> None:
    """What a node lists it has taken; what it lists as running has started."""
    desk, e = Desk("n-1"), an_execution()
    desk(a_job())
    assert states(desk.hear("n-1", Heartbeat((e,), (e,), 0))) == ["taken", "Running", "running"]


def test_a_late_result_counts_while_the_shard_wants_one() -> None:
    """The attempt that runs in its place is cancelled."""
    desk = Desk("n-1")
    desk(a_job())
    desk.take("n-1", an_execution())
    lose(desk)
    desk(ev.NodeSeen("n-2", 1))
    effects = desk.propose("n-1", an_execution())
    assert sent(effects, Accept, to="n-1") == [Accept(an_execution())]
    assert sent(effects, Cancel, to="n-2") == [Cancel((an_execution(attempt=2),))]
    assert desk.row(0).attempt == 1
    assert sent(desk.propose("n-2", an_execution(attempt=2)), Reject, to="n-2")


def test_a_late_failure_changes_nothing() -> None:
    """Another attempt is on its way already."""
    desk = Desk("n-1")
    desk(a_job())
    lose(desk)
    effects = desk.propose("n-1", an_execution(), a_failure())
    assert sent(effects, Reject, to="n-1")
    assert desk.machine.book.jobs[a_job_id()].shards[0].state == "waiting"


@pytest.mark.parametrize(
    "execution", [an_execution(job=1), an_execution(shard=9), an_execution(attempt=2), an_execution(shard=-1)]
)
def test_unknown_executions_change_nothing(execution: Execution) -> None:
    """A proposal of one is rejected, a take or heartbeat cancelled."""
    desk = Desk("n-1")
    desk(a_job())
    assert sent(desk.propose("n-1", execution), Reject, to="n-1")
    assert sent(desk.take("n-1", execution), Cancel, to="n-1") == [Cancel((execution,))]
    assert desk.machine.book.jobs[a_job_id()].shards[0].state == "offered"


def test_only_the_node_that_was_asked_may_answer() -> None:
    """The author of a message is the key of its connection."""
    desk = Desk("n-1")
    desk(a_job())
    assert sent(desk.propose("n-2", an_execution()), Reject, to="n-2")
    assert not desk.machine.live(an_execution(), "n-2")
    assert desk.machine.live(an_execution(), "n-1")


def test_a_repeated_proposal_gets_the_same_answer() -> None:
    """Accept until the result is stored, Kept from then on, whoever lost the first one."""
    desk, e = Desk("n-1"), an_execution()
    desk(a_job(shards=2))
    desk.propose("n-1", e)
    effects = desk.propose("n-1", e)
    assert sent(effects, Accept) == [Accept(e)]
    assert not matching(effects, ev.Keep)
    desk(ev.ResultKept(e))
    assert sent(desk.propose("n-1", e), Kept) == [Kept(e)]
    assert sent(desk.hear("n-1", Heartbeat((e,), (), 0)), Kept) == [Kept(e)]


# --- failures ---


def fail(desk: Desk, *kinds: Any, node: str = "n-1") -> list[ev.Effect]:
    effects: list[ev.Effect] = []
    for attempt, kind in enumerate(kinds, start=1):
        effects = desk.propose(node, an_execution(attempt=attempt), a_failure(kind), room=1)
        if kind == "node":
            desk.later(LONGEST_REST, ev.RetryTimer(a_job_id()))  # the node has rested
    return effects


@pytest.mark.parametrize(
    ("kinds", "retries"),
    [
        (["exception"], 0),
        (["exit", "timeout"], 1),
        (["signal", "signal"], 0),
        (["memory"], 5),
        (["node", "node", "node"], 0),
        (["signal", "exception"], 0),
    ],
)
def test_a_shard_fails_after_as_many_repeats_as_its_kind_of_error_has(kinds: list[str], retries: int) -> None:
    """Own failures: --retries; killed: one repeat; memory: none; the node's fault: three attempts."""
    desk = Desk("n-1")
    desk(a_job(retries=retries))
    if len(kinds) > 1:
        assert sent(fail(desk, *kinds[:-1]), Reject, to="n-1")
    effects = desk.propose("n-1", an_execution(attempt=len(kinds)), a_failure(kinds[-1]))  # type: ignore[arg-type]
    assert matching(effects, ev.Keep), "its output is stored too"
    effects = desk(ev.ResultKept(an_execution(attempt=len(kinds))))
    assert sent(effects, Kept, to="n-1")
    end = job_end(effects)
    assert end is not None
    assert end == ev.JobChanged(a_job_id(), "Failed", "1 of 1 shards failed")
    assert desk.row(0).state == "failed"
    assert desk.row(0).outcome == a_failure(kinds[-1])  # type: ignore[arg-type]


def test_a_repeated_shard_is_offered_before_its_failure_is_rejected() -> None:
    """So that the node holds its job all the time, and its warm containers with it."""
    desk = Desk("n-1")
    desk(a_job(retries=1))
    effects = matching(desk.propose("n-1", an_execution(), a_failure(), room=1), ev.Send)
    assert [type(one.message) for one in effects] == [Offer, Reject]


def test_failures_of_some_shards_do_not_stop_the_others() -> None:
    """The job ends Failed when all are final, sealed over those that were kept."""
    desk = Desk("n-1", room=2)
    desk(a_job(shards=2))
    desk.propose("n-1", an_execution(0), a_failure())
    assert job_end(desk(ev.ResultKept(an_execution(0)))) is None
    desk.propose("n-1", an_execution(1), a_result("r1"))
    assert matching(desk(ev.ResultKept(an_execution(1))), ev.Seal) == [ev.Seal(a_job_id(), ((1, "r1"),))]
    end = job_end(desk(ev.JobSealed(a_job_id(), "cid")))
    assert end == ev.JobChanged(a_job_id(), "Failed", "1 of 2 shards failed", "cid")


# --- publishing ---


def _sealing(desk: Desk) -> list[ev.Effect]:
    """The last steps of a job that is to be published: all of it is kept now."""
    desk(a_job(publish="s3://b/p"))
    desk.take("n-1", an_execution())
    desk.propose("n-1", an_execution())
    return desk(ev.ResultKept(an_execution()))


def test_the_result_of_a_job_is_published_as_it_is_sealed() -> None:
    """Meanwhile clients are told; where it lies is journaled and told with the end."""
    desk = Desk("n-1")
    effects = _sealing(desk)
    assert matching(effects, ev.Seal) == [ev.Seal(a_job_id(), ((0, "record"),), "s3://b/p")]
    told = [one.update for one in matching(effects, ev.Notify) if isinstance(one.update, ev.JobChanged)]
    assert told == [ev.JobChanged(a_job_id(), "Running", "publishing to s3://b/p")]
    end = job_end(desk(ev.JobSealed(a_job_id(), "cid", ("s3://b/p/x",))))
    assert end == ev.JobChanged(a_job_id(), "Completed", "", "cid", ("s3://b/p/x",))
    assert desk.journal[ev.JobRow, a_job_id(), None].published == ("s3://b/p/x",)


def test_a_result_that_was_not_published_is_no_failure() -> None:
    """The job completes, and says so."""
    desk = Desk("n-1")
    _sealing(desk)
    end = job_end(desk(ev.JobSealed(a_job_id(), "cid", problem="kept, not published")))
    assert end == ev.JobChanged(a_job_id(), "Completed", "kept, not published", "cid")


def test_a_crash_while_it_is_published_publishes_it_again() -> None:
    desk = Desk("n-1")
    seal = matching(_sealing(desk), ev.Seal)
    rows = list(desk.journal.values())
    for resume in (True, False):
        blocks = {a_job_id(): ("block-0",)}
        machine, effects = Requester.recover("req", rows, 0.0, resume=resume, blocks=blocks)
        assert matching(effects, ev.Seal) == seal
        end = job_end(machine.step(ev.JobSealed(a_job_id(), "cid", ("there",)), 0.0))
        assert end == ev.JobChanged(a_job_id(), "Completed", "", "cid", ("there",))


def test_what_was_stopped_is_published_nowhere() -> None:
    desk = Desk("n-1", room=2)
    desk(a_job(shards=2, publish="s3://b/p"))
    desk.propose("n-1", an_execution(0))
    desk(ev.CancelRequested(a_job_id()))
    assert [one.publish for one in matching(desk(ev.ResultKept(an_execution(0))), ev.Seal)] == ["store"]


# --- ends ---


def test_cancel_stops_what_runs_and_keeps_what_is_finished() -> None:
    """Accepted results are still stored and sealed; late ones are rejected."""
    desk = Desk("n-1", room=2)
    desk(a_job(shards=3))
    desk.take("n-1", an_execution(0), an_execution(1))
    desk.propose("n-1", an_execution(0))
    effects = desk(ev.CancelRequested(a_job_id()))
    assert sent(effects, Cancel, to="n-1") == [Cancel((an_execution(1),))]
    assert states(effects) == ["stopped", "stopped"]
    assert sent(desk.propose("n-1", an_execution(1)), Reject)
    assert matching(desk(ev.ResultKept(an_execution(0))), ev.Seal)
    end = job_end(desk(ev.JobSealed(a_job_id(), "cid")))
    assert end == ev.JobChanged(a_job_id(), "Stopped", "cancelled", "cid")


def test_a_cancel_after_the_last_result_changes_nothing() -> None:
    """Nothing is left to stop: the job completes."""
    desk = Desk("n-1")
    desk(a_job())
    desk.propose("n-1", an_execution())
    assert desk(ev.CancelRequested(a_job_id())) == []
    desk(ev.ResultKept(an_execution()))
    end = job_end(desk(ev.JobSealed(a_job_id(), "cid")))
    assert end is not None
    assert end.state == "Completed"


def test_a_job_that_runs_out_of_its_time_has_failed() -> None:
    """--job-timeout, by a timer that was set when it was submitted."""
    desk = Desk("n-1", now=100)
    timer = ev.JobDeadline(a_job_id())
    assert ev.SetTimer(timer, 160) in desk(a_job(job_timeout=60))
    effects = desk.later(60, timer)
    assert sent(effects, Cancel, to="n-1")
    end = job_end(effects)
    assert end is not None
    assert (end.state, end.reason) == ("Failed", "it ran longer than its --job-timeout of 60 s")


def test_a_job_needs_shards_and_an_id_of_its_own() -> None:
    """Neither happens but by a bug of the caller."""
    desk = Desk()
    with pytest.raises(BugError, match="without shards"):
        desk(a_job(shards=0))
    desk(a_job())
    with pytest.raises(BugError, match="twice"):
        desk(a_job())


# --- recovery of the requester ---


def a_dead_desk() -> Desk:
    """Of four shards: one kept, one accepted, one offered, one never offered."""
    desk = Desk("n-1", room=3)
    desk(a_job(shards=4))
    desk.propose("n-1", an_execution(0), a_result("r0"))
    desk(ev.ResultKept(an_execution(0)))
    desk.propose("n-1", an_execution(1), a_result("r1"))
    return desk


def test_a_dead_nodes_job_is_stopped_and_keeps_what_it_had() -> None:
    """Unless it is resumed: accepted results are stored after all, and the job is sealed."""
    rows = list(a_dead_desk().journal.values())
    machine, effects = Requester.recover("req", rows, 0.0, resume=False)
    assert [one.execution for one in matching(effects, ev.Keep)] == [an_execution(1)]
    assert [write.row.state for write in matching(effects, ev.Write)] == ["Stopped", "stopped", "stopped"]
    effects = machine.step(ev.ResultKept(an_execution(1)), 0.0)
    assert matching(effects, ev.Seal) == [ev.Seal(a_job_id(), ((0, "r0"), (1, "r1")))]
    end = job_end(machine.step(ev.JobSealed(a_job_id(), "cid"), 0.0))
    assert end == ev.JobChanged(a_job_id(), "Stopped", "the node stopped before the job had ended", "cid")


def test_a_resumed_job_goes_on_with_its_attempts() -> None:
    """They are offered again with their numbers; what was never offered waits; a late result still counts."""
    rows = list(a_dead_desk().journal.values())
    blocks = {a_job_id(): tuple(f"block-{n}" for n in range(4))}
    machine, effects = Requester.recover("req", rows, 0.0, resume=True, blocks=blocks)
    machine.check()
    assert offers(effects, to="n-1") == [an_execution(2)]
    assert offers(machine.step(ev.NodeSeen("n-1", 2), 0.0)) == [an_execution(3)]
    assert offers(machine.step(ev.Received("n-1", Refuse((an_execution(2),), "busy", "no", 2)), 1.0)) == [
        an_execution(2, 2)
    ]
    late = machine.step(ev.Received("n-1", Propose(an_execution(2, 2), a_result(), 0)), 2.0)
    assert sent(late, Accept) == [Accept(an_execution(2, 2))]


def test_a_decided_end_survives_the_node() -> None:
    """A job that was cancelled before the crash is not resumed, and gets its seal."""
    desk = a_dead_desk()
    desk(ev.CancelRequested(a_job_id()))
    machine, effects = Requester.recover("req", desk.journal.values(), 0.0, resume=True, blocks={})
    assert not sent(effects, Offer)
    machine.step(ev.ResultKept(an_execution(1)), 0.0)
    end = job_end(machine.step(ev.JobSealed(a_job_id(), "cid"), 0.0))
    assert end is not None
    assert (end.state, end.reason) == ("Stopped", "cancelled")


def test_ended_jobs_stay_ended() -> None:
    """Nothing is left to do for a job with a final row."""
    desk = Desk("n-1")
    desk(a_job())
    desk(ev.CancelRequested(a_job_id()))
    assert Requester.recover("req", desk.journal.values(), 0.0, resume=True)[1] == []


# --- the compute node ---


class Bench:
    """A compute node under test: keeps the clock and checks the invariants."""

    def __init__(self, *, slots: int = 1, refusal: str | None = None) -> None:
        self.machine = Compute("cmp", slots=slots, refuse=lambda _requester, _spec: refusal)
        self.now = 0.0

    def __call__(self, event: ev.Event) -> list[ev.Effect]:
        effects = self.machine.step(event, self.now)
        self.machine.check()
        return effects

    def hear(self, message: Message, sender: str = "req") -> list[ev.Effect]:
        return self(ev.Received(sender, message))

    def offer(self, *executions: Execution, sender: str = "req") -> list[ev.Effect]:
        shards = tuple(ShardOffer(one.shard, one.attempt, f"block-{one.shard}") for one in executions)
        return self.hear(Offer(executions[0].job, a_spec(), shards, 10), sender)

    def end(self, execution: Execution, *, seconds: float = 0.05) -> list[ev.Effect]:
        return self(ev.ExecutionEnded(execution, a_result(seconds=seconds)))


def test_a_node_takes_what_it_has_room_for_and_refuses_the_rest() -> None:
    """One answer each, and only what was taken runs."""
    effects = Bench(slots=2).offer(an_execution(0), an_execution(1), an_execution(2))
    assert sent(effects, Take) == [Take((an_execution(0), an_execution(1)), room=0)]
    assert sent(effects, Refuse) == [Refuse((an_execution(2),), "busy", "all 2 slots are in use", 0)]
    assert [(run.execution, run.block) for run in matching(effects, ev.Run)] == [
        (an_execution(0), "block-0"),
        (an_execution(1), "block-1"),
    ]


def test_a_node_that_can_not_run_a_job_says_never_and_why() -> None:
    """The reason is the executor's."""
    effects = Bench(refusal="has no GPU").offer(an_execution())
    assert sent(effects, Refuse) == [Refuse((an_execution(),), "never", "has no GPU", 1)]


def test_a_repeated_offer_is_answered_alike_and_run_once() -> None:
    """While it is held and after; an older attempt of the shard is not run either."""
    bench, e = Bench(slots=2), an_execution(attempt=3)
    bench.offer(e)
    effects = bench.offer(e)
    assert sent(effects, Take)
    assert not matching(effects, ev.Run)
    bench.end(e)
    bench.hear(Kept(e))
    effects = bench.offer(e, an_execution(attempt=2))
    assert sent(effects, Refuse)
    assert not matching(effects, ev.Run)


def test_a_result_is_journaled_and_proposed_until_it_is_answered() -> None:
    """Accept ends the repeating, Kept the owing."""
    bench, e = Bench(), an_execution()
    bench.offer(e)
    bench(ev.ExecutionStarted(e))
    effects = bench.end(e)
    assert isinstance(effects[0], ev.Write)
    assert sent(effects, Propose)
    bench.now += PROPOSE_AGAIN
    assert sent(bench(ev.TimerFired(ev.HeartbeatTimer("req"))), Propose)
    assert not sent(bench(ev.TimerFired(ev.HeartbeatTimer("req"))), Propose)
    bench.hear(Accept(e))
    bench.now += 2 * PROPOSE_AGAIN
    assert not sent(bench(ev.TimerFired(ev.HeartbeatTimer("req"))), Propose)
    assert bench.hear(Kept(e)) == [
        ev.Write(ev.ComputeRow(e, "req", None)),
        ev.Forget(e, a_result()),
        ev.ReleaseJob(a_job_id()),
    ]


def test_a_heartbeat_lists_what_is_held() -> None:
    """Results that are owed too; it ends when nothing is held."""
    bench = Bench(slots=3)
    bench.offer(an_execution(0), an_execution(1), an_execution(2))
    bench(ev.ExecutionStarted(an_execution(1)))
    bench.end(an_execution(2), seconds=1)
    effects = bench(ev.TimerFired(ev.HeartbeatTimer("req")))
    held = (an_execution(0), an_execution(1), an_execution(2))
    assert sent(effects, Heartbeat) == [Heartbeat(held, (an_execution(1),), 1)]
    bench.hear(Cancel(held))
    assert bench(ev.TimerFired(ev.HeartbeatTimer("req"))) == []


def prefetch_after(bench: Bench, *seconds: float, first: int) -> list[int]:
    """One shard after the other on a second slot; what is taken beyond the slots after each."""
    rooms = []
    for shard, each in enumerate(seconds, start=first):
        bench.offer(an_execution(shard))
        bench.end(an_execution(shard), seconds=each)
        rooms.append(bench.machine.room - 1)
    return rooms


def test_prefetch_follows_the_length_of_shards() -> None:
    """Doubled up to 64, as far as what waits is half a second's work."""
    bench = Bench(slots=2)
    bench.offer(an_execution(0))
    assert prefetch_after(bench, *[0.001] * 9, first=1) == [1, 2, 4, 8, 16, 32, MAX_PREFETCH, 64, 64]
    assert prefetch_after(bench, 0.03, 0.15, 0.3, 0.6, 0.05, 0.05, 0.05, first=10) == [16, 3, 1, 0, 1, 2, 4]


def test_an_idle_node_forgets_its_prefetch() -> None:
    """The next job may have long shards: they must not queue up here."""
    bench = Bench(slots=2)
    bench.offer(an_execution(0))
    prefetch_after(bench, *[0.001] * 9, first=1)
    effects = bench.end(an_execution(0), seconds=1)
    assert [one.room for one in sent(effects, Propose)] == [2]


def test_cancelled_work_is_stopped_and_forgotten() -> None:
    """What still runs is killed, what has ended is forgotten; then the job is released."""
    bench = Bench(slots=2)
    bench.offer(an_execution(0), an_execution(1))
    bench.end(an_execution(1))
    effects = bench.hear(Cancel((an_execution(0), an_execution(1), an_execution(5))))
    assert matching(effects, ev.Stop) == [ev.Stop(an_execution(0))]
    assert matching(effects, ev.Forget) == [ev.Forget(an_execution(1), a_result())]
    assert effects[-1] == ev.ReleaseJob(a_job_id())


def test_a_rejected_result_is_forgotten() -> None:
    """As if it had been kept elsewhere."""
    bench, e = Bench(), an_execution()
    bench.offer(e)
    bench.end(e)
    assert matching(bench.hear(Reject(e, "another one counts")), ev.Forget)


def test_only_what_has_not_started_is_given_back() -> None:
    """A recall is answered by a busy refusal of what was queued."""
    bench = Bench(slots=2)
    bench.offer(an_execution(0), an_execution(1))
    bench(ev.ExecutionStarted(an_execution(0)))
    effects = bench.hear(Recall((an_execution(0), an_execution(1))))
    assert matching(effects, ev.Stop) == [ev.Stop(an_execution(1))]
    assert [one.executions for one in sent(effects, Refuse)] == [(an_execution(1),)]


def test_nobody_disposes_of_another_requesters_work() -> None:
    """A cancel counts only from the one who offered."""
    bench = Bench()
    bench.offer(an_execution())
    assert bench.hear(Cancel((an_execution(),)), sender="mallory") == []


def test_the_work_of_a_silent_requester_is_given_up() -> None:
    """After the orphan grace; any message counts as a sign of life."""
    bench, timer = Bench(), ev.HeartbeatTimer("req")
    bench.offer(an_execution())
    bench.now = ORPHAN_GRACE - HEARTBEAT
    bench.hear(Cancel(()))
    bench.now = 2 * ORPHAN_GRACE - 2 * HEARTBEAT
    assert sent(bench(ev.TimerFired(timer)), Heartbeat)
    bench.now = 2 * ORPHAN_GRACE
    effects = bench(ev.TimerFired(timer))
    assert matching(effects, ev.Stop)
    assert not sent(effects, Heartbeat)


def test_a_restarted_node_proposes_what_it_owes() -> None:
    """And does not run it again when its old offer comes late."""
    e = an_execution()
    rows = [ev.ComputeRow(e, "req", a_result()), ev.ComputeRow(an_execution(1), "req", None)]
    machine, effects = Compute.recover("cmp", rows, 5.0, slots=1, refuse=lambda _requester, _spec: None)
    machine.check()
    assert [one.execution for one in sent(effects, Propose)] == [e]
    assert [type(one.timer) for one in matching(effects, ev.SetTimer)] == [ev.HeartbeatTimer]
    again = machine.step(ev.Received("req", Offer(e.job, a_spec(), (ShardOffer(0, 1, "block-0"),), 1)), 5.0)
    assert not matching(again, ev.Run)


def test_an_end_that_comes_after_a_stop_is_forgotten() -> None:
    """The executor may have been a moment faster than the kill."""
    assert Bench().end(an_execution()) == [ev.Forget(an_execution(), a_result())]


# --- cost ---


def calls_for(shards: int) -> int:
    """How many Python functions are called for a whole job of so many shards, on a node that runs them at once."""
    desk, bench = Requester("n-1"), Compute("n-1", slots=4, refuse=lambda _requester, _spec: None)
    inbox: deque[tuple[Requester | Compute, ev.Event]] = deque(
        [(desk, ev.NodeSeen("n-1", 4)), (desk, a_job(shards=shards))]
    )
    calls = 0

    def count(_frame: object, what: str, _argument: object) -> None:
        nonlocal calls
        calls += what == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    while inbox:
        machine, event = inbox.popleft()
        for effect in machine.step(event, 0.0):
            match effect:
                case ev.Send(message=message):
                    inbox.append((bench if machine is desk else desk, ev.Received("n-1", message)))
                case ev.Run(execution=execution):
                    inbox.append((bench, ev.ExecutionStarted(execution)))
                    inbox.append((bench, ev.ExecutionEnded(execution, a_result(seconds=0.001))))
                case ev.Keep(execution=execution):
                    inbox.append((desk, ev.ResultKept(execution)))
    sys.setprofile(before)
    assert all(shard.state == "kept" for shard in desk.book.jobs[a_job_id()].shards)
    return calls


def test_a_shard_costs_the_same_in_a_job_of_any_size() -> None:
    """No event walks over all shards but the first and the last."""
    assert calls_for(1600) < 4.4 * calls_for(400)


# --- bugs are loud ---


def test_an_illegal_transition_tells_the_story() -> None:
    """What happened to the record before is in the error."""
    bench, e = Bench(), an_execution()
    bench.offer(e)
    bench(ev.ExecutionStarted(e))
    with pytest.raises(BugError, match=r"is running: 'start' can't happen to it(.|\n)*start"):
        bench(ev.ExecutionStarted(e))


@pytest.mark.parametrize(
    "event",
    [
        ev.ExecutionStarted(an_execution()),
        ev.Received("n-1", Accept(an_execution())),
        ev.TimerFired(ev.HeartbeatTimer("n-1")),
    ],
)
def test_a_requester_refuses_what_is_not_for_it(event: ev.Event) -> None:
    """The engine is at fault, and hears so."""
    with pytest.raises(BugError, match="a requester was given"):
        Desk()(event)


@pytest.mark.parametrize(
    "event",
    [
        ev.NodeGone("n-1"),
        ev.Received("n-1", Lines(an_execution(), "stdout", "x")),
        ev.TimerFired(ev.LeaseTimer(a_job_id())),
    ],
)
def test_a_compute_node_refuses_what_is_not_for_it(event: ev.Event) -> None:
    """The engine is at fault, and hears so."""
    with pytest.raises(BugError, match="a compute node was given"):
        Bench()(event)


def test_effects_can_be_encoded() -> None:
    """Rows go to a journal as bytes and come back equal."""
    row = ev.ShardRow(a_job_id(), 0, "kept", 2, 1, node="n-1", outcome=a_result())
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=ev.Row) == row
