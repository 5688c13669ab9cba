"""Rules that need several nodes: replicas that agree, homes of shards, second tries, queues that are shared out."""

from __future__ import annotations

import pytest

from bacalhau_node import wire
from bacalhau_node.errors import ProtocolError, SpecError
from bacalhau_node.ids import Execution
from bacalhau_node.messages import (
    Accept,
    Cancel,
    Heartbeat,
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
from bacalhau_node.protocol.placement import LEASE
from bacalhau_node.protocol.requester import Requester
from bacalhau_node.protocol.watch import NEVER_STARTS, SLOW_AT_LEAST, WATCH
from bacalhau_node.testing.builders import a_failure, a_job, a_job_id, a_result, a_spec, an_execution, matching, sent
from tests.machine.test_rules import Desk, offers, states


def where(effects: list[ev.Effect]) -> dict[str, list[Execution]]:
    """Which node is offered what."""
    found: dict[str, list[Execution]] = {}
    for one in matching(effects, ev.Send):
        if isinstance(one.message, Offer):
            found.setdefault(one.to, []).extend(offers([one]))
    return found


# --- replicas ---


def three_replicas(*, agree: int = 2, nodes: int = 4) -> tuple[Desk, dict[str, Execution]]:
    """One shard on three of four nodes, and who runs which execution."""
    desk = Desk(*(f"n-{n}" for n in range(nodes)))
    runs = {node: executions[0] for node, executions in where(desk(a_job(replicas=3, agree=agree))).items()}
    for node, execution in runs.items():
        desk.take(node, execution)
    return desk, runs


def test_replicas_run_on_different_nodes() -> None:
    """As many attempts as replicas, each on a node of its own."""
    _, runs = three_replicas()
    assert sorted(one.attempt for one in runs.values()) == [1, 2, 3]


def test_a_proposal_waits_until_enough_agree_and_nobody_hears_of_it() -> None:
    """The first of two equal answers counts, the third execution is cancelled, the other equal one rejected."""
    desk, runs = three_replicas()
    (one, first), (two, second), (three, third) = runs.items()
    effects = desk.propose(one, first)
    assert not sent(effects, Accept)
    assert not states(effects)
    effects = desk.propose(two, second)
    assert sent(effects, Accept) == [Accept(first)]
    assert sent(effects, Reject, to=two)
    assert sent(effects, Cancel, to=three) == [Cancel((third,))]
    assert desk.row(0).disagreed == ()


def test_a_node_that_disagrees_is_named_and_avoided_also_after_a_restart() -> None:
    """The job's other shards and later jobs go elsewhere while there are others."""
    desk, runs = three_replicas()
    (one, first), (two, second), (three, third) = runs.items()
    desk.propose(one, first, a_result(answer="wrong"), room=1)
    desk.propose(two, second, room=1)
    desk.propose(three, third, room=1)
    assert desk.row(0).disagreed == (one,)
    assert one not in where(desk(a_job(1, shards=9)))
    machine, _ = Requester.recover("req", desk.journal.values(), 0.0, resume=False)
    for node in runs:
        machine.step(ev.NodeSeen(node, 1), 0.0)
    assert one not in where(machine.step(a_job(2, shards=9), 0.0))


def test_a_distrusted_node_that_is_alone_is_asked() -> None:
    """Better than nothing."""
    desk, runs = three_replicas(nodes=3)
    (one, first), (two, second), (three, third) = runs.items()
    for node, execution, answer in ((one, first, "wrong"), (two, second, "right"), (three, third, "right")):
        desk.propose(node, execution, a_result(answer=answer), room=1)
    desk(ev.NodeGone(two))
    desk(ev.NodeGone(three))
    assert list(where(desk(a_job(1)))) == [one]


def test_a_shard_whose_last_execution_comes_to_nothing_when_no_more_can_agree_has_failed() -> None:
    """Late results have used up what it may have: it must not wait for ever."""
    desk = Desk("n-1", "n-2")
    waiting = where(desk(a_job(replicas=2, agree=2)))
    for answer in ("one", "two"):
        node, (execution,) = waiting.popitem()
        waiting |= where(desk.propose(node, execution, a_result(answer=answer), room=1))
    for answer in ("three", "four"):
        node, (execution,) = waiting.popitem()
        waiting = where(desk.later(LEASE, ev.LeaseTimer(a_job_id())))
        for other in ("n-1", "n-2"):
            waiting |= where(desk(ev.NodeSeen(other, 1)))
        desk.propose(node, execution, a_result(answer=answer))
    node, (execution,) = waiting.popitem()
    desk.hear(node, Refuse((execution,), "busy", "full"))
    assert desk.row(0).state == "failed"
    error = desk.row(0).outcome.error  # type: ignore[union-attr]
    assert error is not None
    assert error.name == "Disagreement"


def test_different_answers_are_followed_by_a_bounded_number_of_others() -> None:
    """Then the shard has failed, and the error names every node with its answer."""
    desk = Desk(*(f"n-{n}" for n in range(9)))
    waiting = where(desk(a_job(replicas=2, agree=2)))
    given: list[str] = []
    while waiting:
        node = next(iter(waiting))
        for execution in waiting.pop(node):
            given.append(node)
            waiting |= where(desk.propose(node, execution, a_result(answer=f"says {node}")))
    assert len(set(given)) == 4
    outcome = desk.row(0).outcome
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.name == "Disagreement"
    assert "4 executions gave 4 different answers, and 2 equal ones are needed" in outcome.error.message


def test_failures_vote_only_for_failing() -> None:
    """Two that fail alike decide against one answer; one failure is outvoted by two answers."""
    desk, runs = three_replicas()
    (one, first), (two, second), (three, third) = runs.items()
    desk.propose(one, first, a_failure("exception"))
    desk.propose(two, second)
    assert matching(desk.propose(three, third, a_failure("exception")), ev.Keep)[0].outcome == a_failure("exception")
    desk, runs = three_replicas()
    (one, first), (two, second), (three, third) = runs.items()
    desk.propose(one, first, a_failure("memory"))
    desk.propose(two, second)
    assert sent(desk.propose(three, third), Accept) == [Accept(second)]
    assert desk.row(0).disagreed == (), "a node with little memory has not disagreed"


def test_a_node_that_is_alone_runs_all_replicas_and_the_job_says_so() -> None:
    """The same node only because there is no other."""
    desk = Desk("n-1", room=3)
    effects = desk(a_job(replicas=3, agree=2))
    assert where(effects) == {"n-1": [an_execution(attempt=n) for n in (1, 2, 3)]}
    told = [one.update for one in matching(desk.take("n-1", an_execution()), ev.Notify)]
    assert any("3 replicas, 1 node" in getattr(one, "reason", "") for one in told)
    desk.propose("n-1", an_execution())
    assert sent(desk.propose("n-1", an_execution(attempt=2)), Accept)


def test_a_node_does_not_outvote_another_by_repeating_itself() -> None:
    """As soon as somebody contradicts, each node has one vote."""
    desk = Desk("n-1", "n-2", room=2)
    runs = where(desk(a_job(replicas=3, agree=2)))
    twice, once = sorted(runs, key=lambda node: -len(runs[node]))
    desk.propose(once, runs[once][0], a_result(answer="right"))
    desk.propose(twice, runs[twice][0], a_result(answer="wrong"))
    assert not sent(desk.propose(twice, runs[twice][1], a_result(answer="wrong")), Accept)


@pytest.mark.parametrize(("replicas", "agree"), [(0, 1), (33, 1), (2, 3), (2, 0)])
def test_numbers_that_make_no_sense_never_become_a_job(replicas: int, agree: int) -> None:
    """Neither here nor in a message."""
    with pytest.raises(SpecError, match="are possible"):
        a_spec(replicas=replicas, agree=agree)
    data = wire.encode(Offer(a_job_id(), a_spec(replicas=3, agree=3), (ShardOffer(0, 1, "b"),), 1))
    with pytest.raises(ProtocolError, match="--agree"):
        wire.decode(data.replace(b"\xa8replicas\x03", b"\xa8replicas\x02"))


# --- homes ---


def test_a_rerun_goes_where_the_data_is() -> None:
    """Most shards go to the node that had them, also when a node has come or gone meanwhile."""

    def placed(nodes: range) -> dict[str, str]:
        desk = Desk(*(f"n-{n}" for n in nodes), room=50)
        return {f"{one.shard}": node for node, each in where(desk(a_job(shards=200))).items() for one in each}

    first, again, fewer = placed(range(10)), placed(range(10)), placed(range(9))
    assert first == again
    assert len(first) == 200
    assert sum(first[shard] == fewer[shard] for shard in first) > 120


def test_homes_hold_no_more_than_their_share() -> None:
    """Equal blocks too."""
    desk = Desk(*(f"n-{n}" for n in range(4)), room=100)
    job = a_job(shards=40)
    same = ev.Submitted(job.job, job.spec, job.plan, ("block",) * 40, 0.0)
    assert [len(each) for each in where(desk(same)).values()] == [10, 10, 10, 10]


# --- as time passes ---


def slow_job() -> tuple[Desk, Execution, str, str]:
    """Two shards on two nodes; one is done, the other goes on: its execution, its node, and the idle one."""
    desk = Desk("n-1", "n-2")
    runs = where(desk(a_job(shards=2)))
    (idle, (done,)), (busy, (slow,)) = runs.items()
    for node, execution in ((idle, done), (busy, slow)):
        desk.take(node, execution)
        desk.hear(node, Started(execution))
    desk.propose(idle, done, room=1)
    return desk, slow, busy, idle


def watch(desk: Desk, seconds: float) -> list[ev.Effect]:
    return desk.later(seconds, ev.WatchTimer(a_job_id()))


def test_a_slow_shard_gets_one_more_try_elsewhere_and_the_first_end_counts() -> None:
    """The other attempt is cancelled, and no third one is made."""
    desk, slow, busy, idle = slow_job()
    assert not offers(watch(desk, SLOW_AT_LEAST - 1))
    assert where(watch(desk, 2)) == {idle: [an_execution(slow.shard, 2)]}
    assert not desk.machine.live(an_execution(slow.shard, 2), idle), "its lines are not shown"
    desk(ev.NodeSeen("n-3", 1))
    assert not offers(watch(desk, 60))
    effects = desk.propose(idle, an_execution(slow.shard, 2))
    assert sent(effects, Cancel, to=busy) == [Cancel((slow,))]
    assert desk.row(slow.shard).attempt == 2


def test_a_queue_is_shared_with_an_idle_node_and_what_is_given_back_goes_there() -> None:
    """Half of it; nothing that runs, and nothing from a node where nothing runs."""
    desk = Desk("n-1", room=5)
    desk(a_job(shards=5))
    desk.take("n-1", *(an_execution(n) for n in range(5)))
    desk(ev.NodeSeen("n-2", 4))
    assert not sent(watch(desk, WATCH), Recall)
    desk.hear("n-1", Started(an_execution(0)))
    assert sent(watch(desk, WATCH), Recall, to="n-1") == [Recall((an_execution(3), an_execution(4)))]
    effects = desk.hear("n-1", Refuse((an_execution(3), an_execution(4)), "busy", "given back as asked", 2))
    assert where(effects) == {"n-2": [an_execution(3, 2), an_execution(4, 2)]}


def test_a_node_that_takes_and_never_starts_loses_what_it_took() -> None:
    """Though its heartbeats come."""
    desk = Desk("n-1")
    desk(a_job())
    desk.take("n-1", an_execution())
    desk.now += NEVER_STARTS
    desk.hear("n-1", Heartbeat((an_execution(),), (), 0))
    assert "waiting" in states(desk(ev.TimerFired(ev.LeaseTimer(a_job_id()))))


def test_losses_and_repeats_are_counted_across_restarts() -> None:
    """A shard that was lost twice fails with the third loss, whoever counts it."""
    desk = Desk("n-1", "n-2")
    desk(a_job())
    (node,) = {attempt.node.id for attempt in desk.machine.book.jobs[a_job_id()].live.values()}
    desk.take(node, an_execution())
    (other,) = {"n-1", "n-2"} - {node}
    desk(ev.NodeGone(node))
    blocks = {a_job_id(): ("block-0",)}
    machine, effects = Requester.recover("req", desk.journal.values(), 100.0, resume=True, blocks=blocks)
    assert offers(effects) == [an_execution(attempt=2)]
    machine.step(ev.OfferPacked((an_execution(attempt=2),)), 100.0)
    machine.step(ev.Received(other, Take((an_execution(attempt=2),), 0)), 100.0)
    machine.step(ev.TimerFired(ev.LeaseTimer(a_job_id())), 100.0 + LEASE)
    assert machine.book.jobs[a_job_id()].shards[0].lost == 2


def test_votes_are_asked_for_again_after_a_restart() -> None:
    """What waits for others is offered once more, under its number; its node proposes again."""
    desk, runs = three_replicas()
    (one, first), (two, second), *_ = runs.items()
    desk.propose(one, first)
    blocks = {a_job_id(): ("block-0",)}
    machine, effects = Requester.recover("req", desk.journal.values(), 0.0, resume=True, blocks=blocks)
    machine.check()
    assert offers(effects, to=one) == [first]
    machine.step(ev.Received(one, Propose(first, a_result(), 0)), 0.0)
    assert sent(machine.step(ev.Received(two, Propose(second, a_result(), 0)), 0.0), Accept) == [Accept(first)]
