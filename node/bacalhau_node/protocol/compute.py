"""The compute node's half: takes what it has room for, runs it, and looks after the results until they are kept.

Theory of operation. `step` takes one event and returns the effects. An execution is **held** from the
moment it is taken until its requester has kept, refused or cancelled it; that is also how long
its job keeps its slots' containers here (`ReleaseJob` follows the last one).

**Room.** A node takes at most its free slots and a few more, so that a slot never waits for the
network, or for this node's own bookkeeping, between short shards: this prefetch is at most doubled with each
end, as far as what waits is half a second's work, and ends at 64. The executor queues what is beyond its
slots. A node that has nothing to do forgets its prefetch, so that the long shards of the next job don't queue up in
front of everybody else's.

**The same answer to the same question.** The transport may repeat and reorder. A repeated offer of what is
held is answered alike; one of what was refused or is over is refused as busy, never run again:
for each shard the highest attempt seen is remembered (of the last jobs, see `here`; a node
that was restarted remembers only results that it still owes).

**Owing a result.** When an execution ends its outcome is journaled, then proposed, again and again (with a heartbeat,
ever more seldom) until the answer comes, and at once when its offer comes again, as a restarted requester sends
it. `Accept` ends the repeating, `Kept` and `Reject` end the owing. If `Kept` is lost, the next heartbeat, which lists
everything held, is answered by it once more.

**Silence.** Any message of a requester shows that it is alive; it answers every heartbeat. After the orphan
grace its work is stopped and its results are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from bacalhau_node.errors import BugError
from bacalhau_node.ids import Execution, NodeId
from bacalhau_node.messages import (
    Accept,
    Announce,
    Cancel,
    Grant,
    Heartbeat,
    Kept,
    Message,
    Offer,
    Outcome,
    Propose,
    Recall,
    Refuse,
    Reject,
    Started,
    Take,
)
from bacalhau_node.protocol import invariants
from bacalhau_node.protocol.announcing import Bidder
from bacalhau_node.protocol.events import (
    BidTimer,
    ComputeRow,
    Effect,
    Event,
    ExecutionEnded,
    ExecutionStarted,
    Forget,
    HeartbeatTimer,
    Received,
    ReleaseJob,
    Row,
    Run,
    Send,
    SetTimer,
    Stop,
    TimerFired,
    Write,
)
from bacalhau_node.protocol.here import JobsHere
from bacalhau_node.protocol.placement import LEASE
from bacalhau_node.protocol.tables import EXECUTION, Story, illegal, remember
from bacalhau_node.spec import JobSpec

HEARTBEAT: Final = LEASE / 3
"""Seconds between heartbeats: two may be lost without harm."""

FOREIGN: Final = "a job of another node has this id, and is not over here"

PROPOSE_AGAIN: Final = HEARTBEAT / 2
PROPOSE_SELDOM: Final = 60.0
"""Seconds after which a proposal of up to 200 kB goes with the next heartbeat again, as it may wait for others to
agree; doubled (a guess)."""

ORPHAN_GRACE: Final = 600.0
"""Seconds of silence after which a requester's work is given up (DESIGN section 5)."""

MAX_PREFETCH: Final = 64
AHEAD: Final = 0.5
"""Prefetch beyond the free slots: so many executions (DESIGN section 5), and seconds of the last one's length (a node
takes some 10 ms from the end of one to the start of the next, measured, and a message to another node may take 50)."""

MAX_HELD: Final = 10_000
"""Executions that are held for one requester: one that never keeps results must not fill the disk (a guess)."""


@dataclass(slots=True, eq=False, repr=False)
class Held:
    """One execution and whose it is; `outcome` from its end on, and `grant` for its requester to fetch that."""

    execution: Execution
    requester: NodeId
    state: str = "taken"
    outcome: Outcome | None = None
    grant: Grant | None = None
    patience: float = PROPOSE_AGAIN
    """Seconds until it is proposed again, at the earliest."""
    due: float = 0.0
    """When that is."""
    story: Story = ()


@dataclass(slots=True, eq=False, repr=False)
class Owner:
    """A requester that this node works for. `beating`: its heartbeat timer is set."""

    heard: float
    held: dict[Execution, Held] = field(default_factory=dict)
    beating: bool = False


class Compute:
    """The machine of the work that one node does for requesters.

    `slots`: executions that run at once. `refuse` says why this node can never run a job of this requester, or None.
    """

    def __init__(self, node: NodeId, *, slots: int, refuse: Callable[[NodeId, JobSpec], str | None]) -> None:
        self.node = node
        self.slots = slots
        self.prefetch = 0
        self.network = 1
        """How many nodes there are, about."""
        self.active = 0
        """Executions taken or running."""
        self.held: dict[Execution, Held] = {}
        self._refuse = refuse
        self._bidder = Bidder(node)
        self._owners: dict[NodeId, Owner] = {}
        self._jobs = JobsHere()
        self._now = 0.0
        self._rows: list[Effect] = []
        self._out: list[Effect] = []

    # --- the way in ---

    def step(self, event: Event, now: float) -> list[Effect]:
        """What to do after `event`; `now` is monotonic, in seconds."""
        self._now = now
        match event:
            case Received():
                self._received(event.sender, event.message)
            case ExecutionStarted():
                self._started(event.execution)
            case ExecutionEnded():
                self._ended(event.execution, event.outcome)
            case TimerFired():
                self._fired(event)
            case _:
                raise BugError(f"a compute node was given {type(event).__name__}")
        return self._effects()

    @classmethod
    def recover(
        cls,
        node: NodeId,
        rows: Iterable[Row],
        now: float,
        *,
        slots: int,
        refuse: Callable[[NodeId, JobSpec], str | None],
    ) -> tuple[Compute, list[Effect]]:
        """A compute node that still owes the results of a journal, and what to do first: propose them."""
        self = cls(node, slots=slots, refuse=refuse)
        self._now = now
        for row in rows:
            if isinstance(row, ComputeRow) and row.outcome is not None:
                held = Held(row.execution, row.requester, state="proposed", outcome=row.outcome, grant=row.grant)
                self._hold(held)
                self._propose(held)
        return self, self._effects()

    @property
    def room(self) -> int:
        """How many more executions this node would take now."""
        return max(0, self.slots + self.prefetch - self.active)

    def serves(self, requester: NodeId) -> bool:
        """Whether something of this requester's is held."""
        return requester in self._owners

    def requester(self, execution: Execution) -> NodeId | None:
        """Whose execution this is, while it is held."""
        held = self.held.get(execution)
        return held.requester if held is not None else None

    def check(self) -> None:
        """Raise `BugError` if the records contradict each other or break a rule of the protocol."""
        owned = sum(len(owner.held) for owner in self._owners.values())
        counted = self._jobs.held
        if owned != len(self.held) or counted != owned:
            raise BugError(f"node {self.node}: {len(self.held)} executions held, {owned} owned, {counted} counted")
        invariants.check_held(self.held.values(), active=self.active, most=self.slots + MAX_PREFETCH)

    # --- messages ---

    def _received(self, sender: NodeId, message: Message) -> None:
        if (owner := self._owners.get(sender)) is not None:
            owner.heard = self._now
        match message:
            case Offer():
                self._offered(sender, message)
            case Accept():
                held = self._of(sender, message.execution)
                if held is not None and held.state == "proposed":
                    self._move(held, "accept")
            case Kept() | Reject():
                self._drop_all(sender, (message.execution,))
            case Cancel():
                self._drop_all(sender, message.executions)
            case Recall():
                self._recalled(sender, message)
            case Announce():
                if self._refuse(sender, message.spec) is None:
                    self._out += self._bidder.hear(sender, message, nodes=self.network, now=self._now)
            case _:
                raise BugError(f"a compute node was given the message {type(message).__name__}")

    def _offered(self, sender: NodeId, offer: Offer) -> None:
        executions = [Execution(offer.job, one.shard, one.attempt) for one in offer.shards]
        if (reason := self._refuse(sender, offer.spec)) is not None:
            self._out.append(Send(sender, Refuse(tuple(executions), "never", reason, self.room)))
            return
        if self._jobs.is_anothers(offer.job, sender, self._now):
            self._out.append(Send(sender, Refuse(tuple(executions), "busy", FOREIGN, self.room)))
            return
        taken: list[Execution] = []
        busy: list[Execution] = []
        runs: list[Effect] = []
        again: list[Held] = []
        for execution, one in zip(executions, offer.shards, strict=True):
            if (held := self._of(sender, execution)) is not None:
                taken.append(execution)
                again += [held] if held.state == "proposed" else []
            elif self._has_room(sender) and self._jobs.is_new(execution, sender):
                taken.append(execution)
                self._hold(Held(execution, sender, grant=offer.grant))
                runs.append(Run(execution, offer.spec, one.block, offer.count, sender, offer.grant, offer.secrets))
            else:
                self._jobs.see(execution, sender)
                busy.append(execution)
        if taken:
            self._out.append(Send(sender, Take(tuple(taken), self.room)))
        if busy:
            self._out.append(Send(sender, Refuse(tuple(busy), "busy", f"all {self.slots} slots are in use", self.room)))
        self._out.extend(runs)
        for held in again:
            self._propose(held)

    def _recalled(self, sender: NodeId, message: Recall) -> None:
        given = [one for one in message.executions if (held := self._of(sender, one)) and held.state == "taken"]
        self._drop_all(sender, tuple(given))
        if given:
            self._out.append(Send(sender, Refuse(tuple(given), "busy", "given back as asked", self.room)))

    def _of(self, sender: NodeId, execution: Execution) -> Held | None:
        """The held execution, if it is this requester's."""
        held = self.held.get(execution)
        return held if held is not None and held.requester == sender else None

    # --- executions ---

    def _started(self, execution: Execution) -> None:
        held = self.held.get(execution)
        if held is None:
            return  # it was stopped meanwhile
        self._move(held, "start")
        self._out.append(Send(held.requester, Started(execution)))

    def _ended(self, execution: Execution, outcome: Outcome) -> None:
        held = self.held.get(execution)
        if held is None:
            self._out.append(Forget(execution, outcome))  # it was stopped meanwhile
            return
        self._move(held, "end")
        self._free()
        self._adapt(outcome.seconds)
        held.outcome = outcome
        self._rows.append(Write(ComputeRow(execution, held.requester, outcome, held.grant)))
        self._propose(held)

    def _free(self) -> None:
        self.active -= 1
        if not self.active:
            self.prefetch = 0

    def _adapt(self, seconds: float) -> None:
        self.prefetch = min(2 * self.prefetch or 1, MAX_PREFETCH, int(AHEAD / max(seconds, AHEAD / MAX_PREFETCH)))

    def _propose(self, held: Held) -> None:
        assert held.outcome is not None, "only what has ended is proposed"
        self._out.append(Send(held.requester, Propose(held.execution, held.outcome, self.room)))
        held.due = self._now + held.patience

    # --- records ---

    def _has_room(self, requester: NodeId) -> bool:
        owner = self._owners.get(requester)
        return self.room > 0 and (owner is None or len(owner.held) < MAX_HELD)

    def _hold(self, held: Held) -> None:
        execution = held.execution
        self._jobs.hold(execution, held.requester)
        self.held[execution] = held
        if held.state == "taken":
            self.active += 1
        owner = self._owners.setdefault(held.requester, Owner(self._now))
        owner.held[execution] = held
        if not owner.beating:
            owner.beating = True
            self._out.append(SetTimer(HeartbeatTimer(held.requester), self._now + HEARTBEAT))

    def _move(self, held: Held, verb: str) -> None:
        after = EXECUTION[held.state].get(verb)
        if after is None:
            raise illegal(f"execution {held.execution}", held.state, verb, held.story)
        held.state = after
        held.story = remember(held.story, self._now, verb)

    def _drop_all(self, sender: NodeId, executions: Iterable[Execution]) -> None:
        for execution in executions:
            if (held := self._of(sender, execution)) is not None:
                self._drop(held)

    def _drop(self, held: Held) -> None:
        """Nobody wants this execution, or its result, any more."""
        execution = held.execution
        self._move(held, "drop")
        if held.outcome is None:
            self._free()
            self._out.append(Stop(execution))
        else:
            self._rows.append(Write(ComputeRow(execution, held.requester, None)))
            self._out.append(Forget(execution, held.outcome))
        del self.held[execution]
        del self._owners[held.requester].held[execution]
        if self._jobs.let_go(execution.job, self._now):
            self._out.append(ReleaseJob(execution.job))

    # --- time ---

    def _fired(self, event: TimerFired) -> None:
        match event.timer:
            case HeartbeatTimer() as timer:
                self._beat(timer.requester)
            case BidTimer() as timer:
                self._out += self._bidder.bid(timer.job, self.room)
            case _:
                raise BugError(f"a compute node was given the timer {type(event.timer).__name__}")

    def _beat(self, requester: NodeId) -> None:
        owner = self._owners.get(requester)
        if owner is None:
            return
        if self._now - owner.heard >= ORPHAN_GRACE:
            self._drop_all(requester, tuple(owner.held))
        if not owner.held:
            del self._owners[requester]
            return
        running = tuple(held.execution for held in owner.held.values() if held.state == "running")
        self._out.append(Send(requester, Heartbeat(tuple(owner.held), running, self.room)))
        for held in owner.held.values():
            if held.state == "proposed" and held.due <= self._now:
                held.patience = min(2 * held.patience, PROPOSE_SELDOM)
                self._propose(held)
        self._out.append(SetTimer(HeartbeatTimer(requester), self._now + HEARTBEAT))

    def _effects(self) -> list[Effect]:
        effects = self._rows + self._out
        self._rows, self._out = [], []
        return effects
