"""Holds machines to what the protocol promises, seen from outside: by journal rows and messages alone.

The machines' own `check()` looks at their records; the referee does not trust those. It survives
the crashes of the nodes it watches, so it also sees what a restart forgets.
"""

from __future__ import annotations

import msgspec

from bacalhau_node.errors import BugError
from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import Accept, Cancel, Message, Offer, Outcome, Reject
from bacalhau_node.protocol.events import JobChanged, JobRow, Row, ShardChanged, ShardRow

DECIDED = frozenset(("accepted", "kept", "failed", "stopped"))


class Referee:
    """Raises `BugError` for the first promise that is broken."""

    def __init__(self) -> None:
        self.jobs: dict[JobId, JobRow] = {}
        self._decided: dict[tuple[JobId, int], ShardRow] = {}
        self._offered: dict[Execution, NodeId] = {}
        self.outvoted: dict[NodeId, None] = {}
        """The nodes that a journal says have disagreed."""
        self._outcomes: set[tuple[Execution, str]] = set()
        self._answers: dict[tuple[JobId, int, str], set[int]] = {}
        """For each answer of a shard, the attempts that gave it."""
        self._ended: dict[JobId, JobChanged] = {}

    @property
    def runs(self) -> int:
        """How many executions came to an end, whichever counted."""
        return len(self._outcomes)

    def accepted(self, job: JobId) -> int:
        """How many of a job's shards have an outcome that counts, as journaled."""
        return sum(row.outcome is not None for (owner, _), row in self._decided.items() if owner == job)

    def ran(self, execution: Execution, outcome: Outcome) -> None:
        """An executor reports this end; nobody else makes outcomes."""
        self._outcomes.add((execution, outcome.record))
        if outcome.ok:
            self._answers.setdefault((execution.job, execution.shard, outcome.answer), set()).add(execution.attempt)

    def row(self, row: Row) -> None:
        """A requester journals: what is decided never changes, but from accepted to kept or failed."""
        if isinstance(row, JobRow):
            self.jobs[row.job] = row
        if not isinstance(row, ShardRow):
            return
        before = self._decided.get((row.job, row.shard))
        if before is not None and before != row:
            after = "kept" if before.outcome and before.outcome.ok else "failed"
            self._hold(before.state == "accepted", f"a decided shard changed: {before} became {row}")
            self._hold(row == msgspec.structs.replace(before, state=after), f"{row} came after {before}")
        if row.state in DECIDED:
            self._decided[(row.job, row.shard)] = row
        self.outvoted.update(dict.fromkeys(row.disagreed))
        if row.outcome is not None and row.outcome.ok:
            execution = Execution(row.job, row.shard, row.attempt)
            self._hold((execution, row.outcome.record) in self._outcomes, f"nobody made the result of {row}")
            agreed, wanted = self._answers[(row.job, row.shard, row.outcome.answer)], self.jobs[row.job].spec.agree
            self._hold(len(agreed) >= wanted, f"{len(agreed)} executions agreed on {row}, {wanted} should have")

    def sent(self, to: NodeId, message: Message) -> None:
        """A node speaks: what it may say depends on what is journaled."""
        match message:
            case Offer():
                for one in message.shards:
                    execution = Execution(message.job, one.shard, one.attempt)
                    first = self._offered.setdefault(execution, to)
                    self._hold(first == to, f"{execution} was offered to {first} and to {to}")
                    self._hold((message.job, one.shard) not in self._decided, f"{execution} was offered after its end")
            case Accept(execution=execution):
                self._hold(self.counts(execution, "accepted"), f"{execution} was accepted, and that was not journaled")
            case Reject(execution=execution):
                self._hold(not self.counts(execution, "accepted"), f"{execution} is not stored yet, and was rejected")
            case Cancel(executions=executions):
                wrong = [str(one) for one in executions if self.counts(one, "accepted")]
                self._hold(not wrong, f"{wrong} are not stored yet, and were cancelled")

    def forgotten(self, execution: Execution) -> None:
        """A compute node forgets a result because it was told so."""
        self._hold(not self.counts(execution, "accepted"), f"{execution} was forgotten before it was kept")

    def told(self, update: ShardChanged | JobChanged) -> None:
        """Clients are told: nothing new comes after the end of a job, and no outcome before it was decided."""
        ended = self._ended.get(update.job)
        if isinstance(update, ShardChanged):
            decided = (update.job, update.shard) in self._decided
            self._hold(decided or (update.error is None and update.state not in DECIDED), f"{update} is not decided")
        self._hold(ended is None or update == ended, f"{update} came after {ended}")
        if isinstance(update, JobChanged) and update.state in ("Completed", "Failed", "Stopped"):
            self._ended[update.job] = update

    def records(self, job: JobId) -> tuple[tuple[int, str], ...]:
        """What a seal of the job must hold now."""
        rows = [row for (owner, _), row in sorted(self._decided.items()) if owner == job]
        return tuple((row.shard, row.outcome.record) for row in rows if row.state == "kept" and row.outcome)

    def counts(self, execution: Execution, *states: str) -> bool:
        """Whether this execution's outcome is the one that counts, and its shard in one of the states."""
        row = self._decided.get((execution.job, execution.shard))
        return row is not None and row.attempt == execution.attempt and row.state in states

    def _hold(self, promise: bool, broken: str) -> None:  # noqa: FBT001 - reads as an assertion
        if not promise:
            raise BugError(broken)
