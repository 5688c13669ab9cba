"""What the requester remembers: one mutable record a job, shard, attempt and node.

The records hold each other and counters, so that no event walks over all shards of a job: a shard
that wants an attempt lies in a queue, a live attempt is listed with its job, its shard and its
node, and each job counts its shards by state and those that want attempts. `move` keeps the counters.

A shard that has no outcome yet is in the state of its most advanced live attempt, or `waiting`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, cast, get_args

from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import NodeRecord, Outcome
from bacalhau_node.protocol.events import JobRow, JobState, ShardRow, ShardState, Tried
from bacalhau_node.protocol.tables import SHARD, Story, illegal, remember
from bacalhau_node.spec import JobSpec

STATES: Final[tuple[ShardState, ...]] = get_args(ShardState)
PHASES: Final = ("offered", "taken", "running")
"""How far a live attempt is, and so its shard: the least first."""

LIVE: Final = frozenset(PHASES)
MAX_TRIED: Final = 16
"""Attempts without an end of which a shard remembers the node: a later result of an older one is refused (a guess)."""

DURATIONS: Final = 101
"""So many of a job's latest durations are kept, for their median (a guess)."""


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """A compute node as this requester sees it.

    `room`: how many more shards to offer it now. `unanswered` of our offers are neither taken nor
    refused yet: what it reports as room was counted without them. `suspect`: it was silent for a
    lease, or dialled in vain, and has not been heard since. `distrusted`: its answer was outvoted; never forgotten.
    `record`: what it says about itself, None for this node and for one that only bid. `faults`: so many executions
    in a row have failed by its own fault; it gets no more before `rest`.
    """

    id: NodeId
    room: int = 0
    record: NodeRecord | None = None
    faults: int = 0
    rest: float = 0.0
    unanswered: int = 0
    suspect: bool = False
    distrusted: bool = False
    live: dict[Execution, Attempt] = field(default_factory=dict)


@dataclass(slots=True, eq=False, repr=False)
class Attempt:
    """An execution that may still end well: its lease is not over. `phase` is one of `PHASES`."""

    execution: Execution
    job: Job
    shard: Shard
    node: Node
    heard: float
    offered: float
    """When the offer was last sent."""
    since: float
    """When it came into its phase."""
    phase: str = "offered"
    recalled: float | None = None
    """When it was last asked back."""
    packing: bool = False
    """Its offer is not on its way yet: nothing can be heard of it."""
    coming: bool = False
    """It has ended, and the bytes of its result are on their way here."""


@dataclass(slots=True, eq=False, repr=False)
class Ended:
    """An execution that has ended: how, and on which node. A vote for its outcome, or the one that counts."""

    execution: Execution
    node: NodeId
    outcome: Outcome


@dataclass(slots=True, eq=False, repr=False)
class Shard:
    """One shard of a job. `attempts`: how many offers were made.

    `tried`: the nodes of those attempts whose result would still count: live, lost, given back, or
    a vote. `home`: the node that ranks highest for it, if there were several. `wants`: how many attempts
    it wants beyond the live ones. `queued`: it lies in `fresh` or `again` of its job. `extra`: a second
    try for a slow attempt was made.
    """

    index: int
    block: str
    state: ShardState = "waiting"
    attempts: int = 0
    tried: dict[int, NodeId] = field(default_factory=dict)
    live: dict[int, Attempt] = field(default_factory=dict)
    home: NodeId | None = None
    votes: tuple[Ended, ...] = ()
    accepted: Ended | None = None
    disagreed: tuple[NodeId, ...] = ()
    wants: int = 0
    queued: bool = False
    extra: bool = False
    since: float = 0.0
    """Since when it waits, once it had been offered."""
    lost: int = 0
    killed: int = 0
    failed: int = 0
    story: Story = ()

    @property
    def reached(self) -> str:
        """The phase of its most advanced live attempt, or "waiting"."""
        return max((attempt.phase for attempt in self.live.values()), key=PHASES.index, default="waiting")

    def had(self, node: NodeId) -> bool:
        """Whether the node has tried it: others come first."""
        return node in self.tried.values()

    def forget_old(self) -> None:
        """Bound what is remembered of attempts that ended without an end."""
        held = {vote.execution.attempt for vote in self.votes} | set(self.live)
        spare = [attempt for attempt in self.tried if attempt not in held]
        for attempt in spare[: max(0, len(spare) - MAX_TRIED)]:
            del self.tried[attempt]


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
    """Shards that want their first attempts. Entries whose shard wants none any more are skipped."""
    again: deque[Shard] = field(default_factory=deque)
    """Shards that want an attempt and were tried by some node."""
    homes: dict[NodeId, deque[Shard]] = field(default_factory=dict)
    """The same shards once more, by the nodes that they should go to."""
    wanting: int = 0
    """How many shards want an attempt."""
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=DURATIONS))
    live: dict[Execution, Attempt] = field(default_factory=dict)
    never: dict[NodeId, str] = field(default_factory=dict)
    """Nodes that have refused it for good, and why."""
    unfit: dict[NodeId, str] = field(default_factory=dict)
    """Nodes that can't run it by what they say about themselves, and why."""
    few: bool = False
    """Fewer nodes are known that could run it than it has replicas."""
    announced: int = 0
    """How often it was announced."""
    bids: int = 0
    """How many nodes have answered the last time."""
    busy: str = ""
    ringed: bool = False
    lease_armed: bool = False
    retry_armed: bool = False
    watch_armed: bool = False
    announce_armed: bool = False
    patience: float = 0.0
    """Seconds until busy nodes are tried again; 0: none was yet."""

    def excludes(self, node: NodeId) -> str:
        """Why this node gets none of its shards; "" if it may."""
        return self.never.get(node) or self.unfit.get(node, "")

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
        return self.wanting > 0 and self.free

    @property
    def free(self) -> bool:
        """Whether one more live attempt is allowed."""
        return self.spec.parallel is None or len(self.live) < self.spec.parallel

    def move(self, shard: Shard, verb: str, now: float, detail: str = "") -> None:
        """Change the shard's state by `verb`; raises `BugError` with its story when it may not happen."""
        after = SHARD[shard.state].get(verb)
        if after is None:
            raise illegal(f"shard {shard.index} of job {self.id}", shard.state, verb, shard.story)
        self.counts[shard.state] -= 1
        shard.state = cast("ShardState", after)
        self.counts[shard.state] += 1
        shard.story = remember(shard.story, now, verb, detail)

    def row(self, *, cid: str = "", published: tuple[str, ...] = ()) -> JobRow:
        """The job for the journal; a decision to end it counts as its state."""
        state, reason = self.closing or (self.state, self.reason)
        return JobRow(self.id, state, self.spec, self.plan, len(self.shards), self.created, reason, cid, published)

    def rate(self, shard: Shard, wants: int) -> None:
        """The shard wants so many attempts now."""
        self.wanting += (wants > 0) - (shard.wants > 0)
        shard.wants = wants

    def shard_row(self, shard: Shard) -> ShardRow:
        """One of its shards for the journal."""
        accepted = shard.accepted
        tried: tuple[Tried, ...] = ()
        if accepted is None:
            going = {*shard.live, *(vote.execution.attempt for vote in shard.votes)}
            tried = tuple([Tried(attempt, node, attempt in going) for attempt, node in shard.tried.items()])
        last = tried[-1].node if tried else None
        return ShardRow(
            job=self.id,
            shard=shard.index,
            state=shard.state,
            attempts=shard.attempts,
            attempt=accepted.execution.attempt if accepted else 0,
            node=accepted.node if accepted else last,
            outcome=accepted.outcome if accepted else None,
            tried=tried,
            lost=shard.lost,
            killed=shard.killed,
            failed=shard.failed,
            disagreed=shard.disagreed,
        )
