"""From the rows of a journal back to the requester's records.

Only jobs that have something left to do come back: those without a final state, and those whose
end was decided (a final state in the row) but whose kept shards were not sealed yet. A shard
that had no outcome when the process died waits again, with the count of its offers, so that no
attempt's number is used twice; the last offer's node is known, so its late result still counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from bacalhau_node.ids import Execution, JobId
from bacalhau_node.protocol.events import FINAL_JOB, JobRow, Row, ShardRow
from bacalhau_node.protocol.records import Accepted, Job, Shard

DECIDED: Final = frozenset(("accepted", "kept", "failed"))


def jobs(rows: Iterable[Row], *, blocks: Mapping[JobId, tuple[str, ...]]) -> list[Job]:
    """The unfinished jobs of these rows, in their order; `blocks` holds the plan's blocks of those to go on with."""
    found: dict[JobId, Job] = {}
    for row in rows:
        if isinstance(row, JobRow) and not (row.state in FINAL_JOB and row.cid):
            found[row.job] = _job(row, blocks.get(row.job, ()))
        elif isinstance(row, ShardRow) and row.job in found:
            _restore(found[row.job], row)
    return [job for job in found.values() if _unfinished(job)]


def _job(row: JobRow, blocks: tuple[str, ...]) -> Job:
    shards = [Shard(index, blocks[index] if blocks else "") for index in range(row.count)]
    job = Job(row.job, row.spec, row.plan, row.created, shards, state=row.state, reason=row.reason)
    if row.state in FINAL_JOB:
        job.closing = (row.state, row.reason)
    return job


def _restore(job: Job, row: ShardRow) -> None:
    shard = job.shards[row.shard]
    shard.authors = [None] * row.attempts
    if row.outcome is not None and row.node is not None and row.state in DECIDED:
        shard.authors[row.attempt - 1] = row.node
        shard.accepted = Accepted(Execution(row.job, row.shard, row.attempt), row.node, row.outcome)
        shard.state = row.state
    elif row.attempts:
        shard.authors[-1] = row.node


def _unfinished(job: Job) -> bool:
    """Fill the queues and counters; False for a job that ended without anything to seal."""
    for shard in job.shards:
        if shard.state == "waiting" and job.closing is not None:
            shard.state = "stopped"
        job.counts[shard.state] += 1
    job.fresh.extend(shard for shard in job.shards if shard.state == "waiting")
    return job.closing is None or job.counts["accepted"] + job.counts["kept"] > 0
