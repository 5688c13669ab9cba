"""What a node keeps in the store for its jobs, and until when.

Every pin is made in the name of what it is for, and taken back by that name: once, whatever was pinned and however
often a restart has repeated it.

    node/NODE/JOB                         plan, bundle, what `--pin` names, records, result: until the job is forgotten
    node/NODE/JOB/inputs                  what its inputs name by CID: until it ends
    node/NODE/JOB/SHARD.ATTEMPT           the result of an execution: until its requester has kept or refused it
    node/NODE/JOB/SHARD.ATTEMPT/inputs    what an execution reads: while it runs

A pin is durable with the next commit of the node, a moment before or after the row that it belongs to. What a crash
leaves in between is a name that stands for nothing in the journal, and `tidy` takes it back when the node opens; never
a job without its blocks, as what was used within the hour is not collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from bacalhau_node.cid import Cid
from bacalhau_node.errors import SpecError
from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import Outcome
from bacalhau_node.ports import ContentStore
from bacalhau_node.protocol.events import FINAL_JOB, ComputeRow, JobRow, Row
from bacalhau_node.sharding import ContentRef, Entry
from bacalhau_node.spec import JobSpec, PythonCell

_PREFIX: Final = "node/"
_INPUTS: Final = "/inputs"


class Keeping:
    """The pins of one node (the name of its folder). Quick, on its loop; only `forgotten` and `tidy` write at once."""

    def __init__(self, node: NodeId, content: ContentStore) -> None:
        self._name, self._content = f"{_PREFIX}{node}", content
        self._reading: set[Execution] = set()
        """Executions for which inputs are pinned: most have none."""

    # --- jobs of this node ---

    def submitted(self, job: JobId, spec: JobSpec, plan: str) -> None:
        """Keep what the job needs to run, here or after a restart."""
        self._content.pin(plan, owner=self._job(job))
        if isinstance(spec.task, PythonCell) and self._content.has(spec.task.bundle):
            self._content.pin(spec.task.bundle, owner=self._job(job))
        for source in (*spec.inputs, *spec.shared):
            cid = _root_of(source.source)
            if cid is not None and self._content.has(cid):
                self._content.pin(cid, owner=self._job(job) if spec.pin else self._job(job) + _INPUTS)

    def kept(self, job: JobId, cid: str) -> None:
        """Keep a record, or the whole result."""
        self._content.pin(cid, owner=self._job(job))

    def ended(self, job: JobId) -> None:
        """The job runs no more: its inputs may go."""
        self._content.release(self._job(job) + _INPUTS)

    def forgotten(self, jobs: Iterable[JobId]) -> None:
        """Nobody will ask for these jobs again, or they never came to be."""
        for job in jobs:
            self._content.release(self._job(job))
            self._content.release(self._job(job) + _INPUTS)
        self._content.flush()

    # --- executions at this node ---

    def running(self, execution: Execution, entries: Iterable[Entry]) -> None:
        """Keep what an execution reads by CID, while it runs."""
        for entry in entries:
            if isinstance(entry.reference, ContentRef) and self._content.has(entry.reference.cid):
                self._reading.add(execution)
                self._content.pin(entry.reference.cid, owner=self._execution(execution) + _INPUTS)

    def ran(self, execution: Execution) -> None:
        """It runs no more."""
        if execution in self._reading:
            self._reading.discard(execution)
            self._content.release(self._execution(execution) + _INPUTS)

    def owed(self, execution: Execution, outcome: Outcome) -> None:
        """Keep its result until it is `settled`."""
        self._content.pin(outcome.record, owner=self._execution(execution))

    def settled(self, execution: Execution) -> None:
        """Its result is kept elsewhere, or unwanted."""
        self._content.release(self._execution(execution))

    # --- after a restart ---

    def tidy(self, rows: Iterable[Row], *, exists: Callable[[NodeId], bool]) -> None:
        """Take back the pins of what is in no row of the journal, and those of nodes that no longer exist."""
        known = set()
        for row in rows:
            match row:
                case JobRow():
                    known.add(self._job(row.job))
                    if row.state not in FINAL_JOB:
                        known.add(self._job(row.job) + _INPUTS)
                case ComputeRow():
                    known.add(self._execution(row.execution))
                case _:
                    pass
        for owner in self._content.owners():
            if owner.startswith(_PREFIX) and owner not in known:
                node = owner.removeprefix(_PREFIX).partition("/")[0]
                if f"{_PREFIX}{node}" == self._name or not exists(node):
                    self._content.release(owner)
        self._content.flush()

    def _job(self, job: JobId) -> str:
        return f"{self._name}/{job}"

    def _execution(self, execution: Execution) -> str:
        return f"{self._name}/{execution.job}/{execution.shard}.{execution.attempt}"


def _root_of(source: str) -> str | None:
    """The CID that an input names; None for one that lies elsewhere."""
    try:
        return str(Cid.parse(source.removeprefix("ipfs://").partition("/")[0]))
    except SpecError:
        return None
