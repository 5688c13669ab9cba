"""The jobs that a compute node has seen: whose each of them is, and which attempts of its shards were offered.

Theory of operation. The id of a job is no secret, so another node may use it too, by malice: what is held here for a
job (its cell, its containers, its secrets) must never serve two requesters. A job is that of the requester for which
something of it is held, and for `HANDOVER` seconds more, as what was held is put away meanwhile; nobody else's offers
of it are taken. With nothing held it is whoever's comes next.

Of each shard the highest attempt is remembered, for the last jobs and for so many shards that no stranger fills the
memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from bacalhau_node.ids import Execution, JobId, NodeId

REMEMBERED: Final = 256
"""Jobs without held executions whose attempts are remembered (a guess)."""

MOST_SHARDS: Final = 400_000
"""Shards of all of them together: four of the largest jobs, some 40 MB."""

HANDOVER: Final = 10.0
"""Seconds that a job's slots and folders need at most to be put away (a guess: a container is removed in two)."""


@dataclass(slots=True, eq=False, repr=False)
class _Job:
    """`held`: so many executions; `until`: when it is nobody's, if none is; `seen`: each shard's highest attempt."""

    requester: NodeId
    held: int = 0
    until: float = 0.0
    seen: dict[int, int] = field(default_factory=dict)


class JobsHere:
    """The jobs of one compute node."""

    def __init__(self) -> None:
        self._jobs: dict[JobId, _Job] = {}
        self._shards = 0

    @property
    def held(self) -> int:
        """How many executions are held, of all jobs."""
        return sum(job.held for job in self._jobs.values())

    def is_anothers(self, job: JobId, requester: NodeId, now: float) -> bool:
        """Whether something is held, or was a moment ago, for another node's job of this id."""
        here = self._jobs.get(job)
        return here is not None and here.requester != requester and (here.held > 0 or now < here.until)

    def is_new(self, execution: Execution, requester: NodeId) -> bool:
        """Whether no such attempt of this requester, and none after it, has been seen."""
        here = self._jobs.get(execution.job)
        return here is None or here.requester != requester or here.seen.get(execution.shard, 0) < execution.attempt

    def see(self, execution: Execution, requester: NodeId) -> None:
        """Remember an attempt; one of a job that is another's must not come here."""
        here = self._jobs.get(execution.job)
        if here is None or here.requester != requester:
            self._forget(execution.job)
            here = self._jobs[execution.job] = _Job(requester)
        self._shards += execution.shard not in here.seen
        here.seen[execution.shard] = max(execution.attempt, here.seen.get(execution.shard, 0))
        while len(self._jobs) > REMEMBERED or self._shards > MOST_SHARDS:
            oldest = next((job for job, one in self._jobs.items() if not one.held and one is not here), None)
            if oldest is None:
                break
            self._forget(oldest)

    def hold(self, execution: Execution, requester: NodeId) -> None:
        """An execution is held from now on."""
        self.see(execution, requester)
        self._jobs[execution.job].held += 1

    def let_go(self, job: JobId, now: float) -> bool:
        """An execution is held no more; whether it was the last one of its job."""
        here = self._jobs[job]
        here.held -= 1
        here.until = now + HANDOVER
        return here.held == 0

    def _forget(self, job: JobId) -> None:
        if (gone := self._jobs.pop(job, None)) is not None:
            self._shards -= len(gone.seen)
