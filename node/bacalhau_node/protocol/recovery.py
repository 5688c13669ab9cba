"""From the rows of a journal back to the requester's records.

Only jobs that have something left to do come back: those without a final state, and those whose
end was decided (a final state in the row) but whose kept shards were not sealed yet. A shard
that had no outcome when the process died has the attempts that were live then, with the same numbers and
with new leases, and knows the nodes of those that were lost, so their late results still count. Votes
are not journaled: a node that waits for an answer proposes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.protocol.events import FINAL_JOB, JobRow, Row, ShardRow
from bacalhau_node.protocol.records import Attempt, Ended, Job, Node, Shard

DECIDED: Final = frozenset(("accepted", "kept", "failed"))


def jobs(
    rows: Iterable[Row],
    *,
    blocks: Mapping[JobId, tuple[str, ...]],
    now: float,
    know: Callable[[NodeId], Node],
) -> list[Job]:
    """The unfinished jobs of these rows, in their order; `blocks` holds the plan's blocks of those to go on with.

    `know` makes the record of a node, or finds it.
    """
    found: dict[JobId, Job] = {}
    for row in rows:
        if isinstance(row, JobRow) and not (row.state in FINAL_JOB and row.cid):
            found[row.job] = _job(row, blocks.get(row.job, ()))
        elif isinstance(row, ShardRow) and row.job in found:
            _restore(found[row.job], row)
            _revive(found[row.job], row, now=now, know=know)
    return [job for job in found.values() if _unfinished(job)]


def distrusted(rows: Iterable[Row]) -> list[NodeId]:
    """The nodes that were outvoted, as far as the journal reaches back; each once, the first one first."""
    return list(dict.fromkeys(node for row in rows if isinstance(row, ShardRow) for node in row.disagreed))


def _job(row: JobRow, blocks: tuple[str, ...]) -> Job:
    shards = [Shard(index, blocks[index] if blocks else "") for index in range(row.count)]
    job = Job(row.job, row.spec, row.plan, row.created, shards, state=row.state, reason=row.reason)
    if row.state in FINAL_JOB:
        job.closing = (row.state, row.reason)
    return job


def _restore(job: Job, row: ShardRow) -> None:
    shard = job.shards[row.shard]
    shard.attempts = row.attempts
    shard.lost, shard.killed, shard.failed = row.lost, row.killed, row.failed
    if row.outcome is not None and row.node is not None and row.state in DECIDED:
        shard.tried = {row.attempt: row.node}
        shard.accepted = Ended(Execution(row.job, row.shard, row.attempt), row.node, row.outcome)
        shard.state, shard.disagreed = row.state, row.disagreed
    else:
        shard.tried = {one.attempt: one.node for one in row.tried}


def _revive(job: Job, row: ShardRow, *, now: float, know: Callable[[NodeId], Node]) -> None:
    """Go on with the attempts of a shard. Some may have ended: those over the limits are late ones from now on."""
    shard = job.shards[row.shard]
    if shard.accepted is not None or job.closing is not None:
        return
    for one in row.tried:
        if one.live and job.free and len(shard.live) <= job.spec.replicas:
            execution, node = Execution(row.job, row.shard, one.attempt), know(one.node)
            attempt = Attempt(execution, job, shard, node, heard=now, offered=now, since=now)
            job.live[execution] = node.live[execution] = shard.live[one.attempt] = attempt
            node.unanswered += 1
            shard.state = "offered"


def _unfinished(job: Job) -> bool:
    """Fill the counters; False for a job that ended without anything to seal."""
    for shard in job.shards:
        if shard.state not in DECIDED and job.closing is not None:
            shard.state = "stopped"
        job.counts[shard.state] += 1
    return job.closing is None or job.counts["accepted"] + job.counts["kept"] > 0
