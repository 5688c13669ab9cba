"""What the requester remembers: one mutable record a job, shard, attempt and node.

The records hold each other and counters, so that no event walks over all shards of a job: a
shard in the state `waiting` lies in one of two queues, a live attempt is listed with its job,
its shard and its node, and each job counts its shards by state. `move` keeps the counters.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, cast, get_args

from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import Outcome
from bacalhau_node.protocol.events import JobRow, JobState, ShardRow, ShardState
from bacalhau_node.protocol.tables import SHARD, Story, illegal, remember
from bacalhau_node.spec import JobSpec

STATES: Final[tuple[ShardState, ...]] = get_args(ShardState)
LIVE: Final = frozenset(("offered", "taken", "running"))
"""The states of a shard that has a live attempt."""


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """A compute node as this requester sees it.

    `room`: how many more shards to offer it now. `unanswered` of our offers are neither taken nor
    refused yet: what it reports as room was counted without them. `suspect`: it was silent for a
    lease and has not been heard since.
    """

    id: NodeId
    room: int = 0
    unanswered: int = 0
    suspect: bool = False
    live: dict[Execution, Attempt] = field(default_factory=dict)


@dataclass(slots=True, eq=False, repr=False)
class Attempt:
    """An execution that may still end well: offered, taken or running, and its lease is not over."""

    execution: Execution
    job: Job
    shard: Shard
    node: Node
    heard: float
    offered: float
    """When the offer was last sent."""
    answered: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Accepted:
    """The outcome of a shard that counts, and whose it is."""

    execution: Execution
    node: NodeId
    outcome: Outcome


@dataclass(slots=True, eq=False, repr=False)
class Shard:
    """One shard of a job. `authors[n - 1]` is the node that attempt n was offered to (None: not known any more)."""

    index: int
    block: str
    state: ShardState = "waiting"
    authors: list[NodeId | None] = field(default_factory=list)
    live: dict[int, Attempt] = field(default_factory=dict)
    accepted: Accepted | None = None
    avoid: tuple[NodeId, ...] = ()
    """Nodes that lost it: others come first."""
    since: float = 0.0
    """Since when it waits, once it had been offered."""
    lost: int = 0
    killed: int = 0
    failed: int = 0
    story: Story = ()

    @property
    def attempts(self) -> int:
        """How many offers were made."""
        return len(self.authors)


@dataclass(slots=True, eq=False, repr=False)
class Job:
    """One unfinished job. `closing`: how it will end, decided before all its shards are final."""

    id: JobId
    spec: JobSpec
    plan: str
    created: float
    shards: list[Shard]
    state: JobState = "Pending"
    reason: str = ""
    closing: tuple[JobState, str] | None = None
    sealing: bool = False
    counts: dict[ShardState, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))
    fresh: deque[Shard] = field(default_factory=deque)
    """Waiting shards that may go anywhere. Entries whose shard waits no more are skipped."""
    again: deque[Shard] = field(default_factory=deque)
    """Waiting shards that avoid some node."""
    live: dict[Execution, Attempt] = field(default_factory=dict)
    never: dict[NodeId, str] = field(default_factory=dict)
    busy: str = ""
    ringed: bool = False
    lease_armed: bool = False
    retry_armed: bool = False
    patience: float = 0.0
    """Seconds until busy nodes are tried again; 0: none was yet."""

    @property
    def unfinished(self) -> int:
        """How many shards have no outcome yet and are not stopped."""
        counts = self.counts
        return counts["waiting"] + counts["offered"] + counts["taken"] + counts["running"]

    @property
    def final(self) -> bool:
        """Whether nothing can happen to any shard any more."""
        return self.unfinished + self.counts["accepted"] == 0

    @property
    def offerable(self) -> bool:
        """Whether a shard may be offered now."""
        parallel = self.spec.parallel
        return self.counts["waiting"] > 0 and (parallel is None or len(self.live) < parallel)

    def move(self, shard: Shard, verb: str, now: float, detail: str = "") -> None:
        """Change the shard's state by `verb`; raises `BugError` with its story when it may not happen."""
        after = SHARD[shard.state].get(verb)
        if after is None:
            raise illegal(f"shard {shard.index} of job {self.id}", shard.state, verb, shard.story)
        self.counts[shard.state] -= 1
        shard.state = cast("ShardState", after)
        self.counts[shard.state] += 1
        shard.story = remember(shard.story, now, verb, detail)

    def row(self, *, cid: str = "") -> JobRow:
        """The job for the journal; a decision to end it counts as its state."""
        state, reason = self.closing or (self.state, self.reason)
        return JobRow(self.id, state, self.spec, self.plan, len(self.shards), self.created, reason, cid)

    def shard_row(self, shard: Shard) -> ShardRow:
        """One of its shards for the journal."""
        if (accepted := shard.accepted) is None:
            last = shard.authors[-1] if shard.authors else None
            return ShardRow(self.id, shard.index, shard.state, shard.attempts, node=last)
        attempt = accepted.execution.attempt
        return ShardRow(
            self.id, shard.index, shard.state, shard.attempts, attempt, node=accepted.node, outcome=accepted.outcome
        )
