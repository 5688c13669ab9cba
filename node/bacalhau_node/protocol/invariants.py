"""The rules that must hold after every step, as code: tests and the simulator call them through `check()`.

They walk over everything, so the engine doesn't call them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from bacalhau_node.errors import BugError
from bacalhau_node.ids import Execution, NodeId
from bacalhau_node.messages import Outcome
from bacalhau_node.protocol.neighbours import Neighbours
from bacalhau_node.protocol.records import LIVE, Job, Node, Shard
from bacalhau_node.protocol.tables import Story, told
from bacalhau_node.protocol.view import View
from bacalhau_node.protocol.voting import winner

DECIDED = ("accepted", "kept", "failed")


def check_requester(jobs: Iterable[Job], nodes: Mapping[NodeId, Node]) -> None:
    """Raise `BugError` for the first rule that a job, shard or node breaks."""
    for job in jobs:
        _check_job(job)
        for shard in job.shards:
            _check_shard(job, shard)
    for node in nodes.values():
        unanswered = sum(attempt.phase == "offered" for attempt in node.live.values())
        if node.room < 0 or node.unanswered != unanswered:
            raise BugError(f"node {node.id}: room {node.room}, {node.unanswered} unanswered, counted {unanswered}")


def _check_job(job: Job) -> None:
    states = [shard.state for shard in job.shards]
    for state, count in job.counts.items():
        if states.count(state) != count:
            raise BugError(f"job {job.id} counts {count} shards {state}, there are {states.count(state)}")
    queued = Counter(shard.index for queue in (job.fresh, job.again) for shard in queue)
    lost = [shard.index for shard in job.shards if shard.wants and not queued[shard.index]]
    if lost or any(count > 1 for count in queued.values()):
        raise BugError(f"job {job.id}: shards {lost} want an attempt, but are in no queue; the queues hold {queued}")
    if job.wanting != sum(shard.wants > 0 for shard in job.shards):
        raise BugError(f"job {job.id} counts {job.wanting} shards that want an attempt")
    if job.closing is not None and job.unfinished:
        raise BugError(f"job {job.id} is ending, but {job.unfinished} shards go on")
    if job.spec.parallel is not None and len(job.live) > job.spec.parallel:
        raise BugError(f"job {job.id}: {len(job.live)} live executions, at most {job.spec.parallel} are allowed")


def _check_shard(job: Job, shard: Shard) -> None:
    wrong = ""
    if shard.state in ("waiting", *LIVE) and shard.state != shard.reached:
        wrong = f"{shard.state}, but its attempts are {shard.reached}"
    elif len(shard.live) > job.spec.replicas + 1 or (shard.live and shard.state not in LIVE):
        wrong = f"{len(shard.live)} live attempts of {job.spec.replicas} while {shard.state}"
    elif shard.votes and (shard.state in (*DECIDED, "stopped") or winner(shard.votes, agree=job.spec.agree)):
        wrong = f"{shard.state}, and {len(shard.votes)} votes are not counted"
    elif shard.state == "waiting" and not shard.wants:
        wrong = "waiting, but wants no attempt"
    elif (shard.state in DECIDED) != (shard.accepted is not None):
        wrong = f"{shard.state}, and its outcome is {'there' if shard.accepted else 'missing'}"
    elif any(job.live.get(attempt.execution) is not attempt for attempt in shard.live.values()):
        wrong = "a live attempt that its job does not know"
    elif shard.accepted is not None and (shard.state, shard.accepted.outcome.ok) in (("kept", False), ("failed", True)):
        wrong = f"{shard.state}, though its outcome was ok={shard.accepted.outcome.ok}"
    if wrong:
        raise BugError(f"shard {shard.index} of job {job.id}: {wrong}", story=told(shard.story))


class _Held(Protocol):
    execution: Execution
    state: str
    outcome: Outcome | None
    story: Story


def check_held(held: Iterable[_Held], *, active: int, most: int) -> None:
    """Raise `BugError` for the first rule that the executions of a compute node break."""
    found = 0
    for one in held:
        found += one.state in ("taken", "running")
        if (one.outcome is not None) != (one.state in ("proposed", "accepted")):
            raise BugError(f"execution {one.execution} is {one.state}", story=told(one.story))
    if found != active or found > most:
        raise BugError(f"{found} executions at work, counted {active}, at most {most} are possible")


def check_circle(view: View, others: Neighbours, *, most: int, now: float) -> None:
    """Raise `BugError` if a rule of membership is broken; `most`: neighbours that are allowed."""
    near = others.near
    node = view.own.node
    dead = [node for node, grave in view.graves.items() if not grave.left]
    rules = {
        "a view is within its bound": len(view.held) <= view.bound and len(view.graves) <= view.bound,
        "a node does not know itself": node not in view.held and node not in others.peers,
        "nobody is known and buried": not view.held.keys() & view.graves.keys(),
        "no neighbour or suspect is dead": not others.peers.keys() & set(dead),
        "every record has its time": view.held.keys() == view.born.keys(),
        "there are no more neighbours than allowed": len(near) <= most,
        "no neighbour did wrong lately": not any(others.is_banned(peer.id, now) for peer in near),
    }
    for rule, holds in rules.items():
        if not holds:
            raise BugError(f"membership of node {node}: {rule}, and now it is not so")
