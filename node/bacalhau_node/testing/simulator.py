"""Many nodes in virtual time: the real machines, an imagined network, executor and disk.

Theory of operation. A `Host` is one node: both machines and a journal that survives its crashes. A
`Simulation` owns a clock, one queue of what happens when, and one generator of chance; an hour
with fifty nodes takes seconds. Everything that happens is hashed into a trace: equal seeds give
equal traces, bit for bit and on every run of Python, so a failing seed is a regression test.

The network delays every message by chance (which reorders them), loses some and repeats some;
messages of a node to itself arrive at once. A crash takes a node's memory, its work and its
timers; what it had journaled is there when it comes back. A `partition` loses everything between two parts
of the network. A `Referee` watches rows and messages.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import Accept, Cancel, ErrorKind, Kept, Message, Offer, Outcome, Recall, Reject, ShardError
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.compute import Compute
from bacalhau_node.protocol.requester import Requester
from bacalhau_node.spec import JobSpec
from bacalhau_node.testing.fakes import MemoryJournal
from bacalhau_node.testing.referee import Referee

STORING: Final = 0.002
"""Seconds to keep a result or to seal a job."""

_TO_COMPUTE: Final = (Offer, Accept, Reject, Kept, Cancel, Recall)


def runs_everything(_requester: NodeId, _spec: JobSpec) -> str | None:
    """The `refuse` of a node that can run every job."""
    return None


class Host:
    """One node: its two machines, and its journal, which survives `restart`.

    `blocks` stands for the content store: the plan's blocks of its own jobs. `referee` sees every row.
    """

    def __init__(
        self,
        node: NodeId,
        *,
        slots: int,
        referee: Referee,
        refuse: Callable[[NodeId, JobSpec], str | None] = runs_everything,
    ) -> None:
        self.node, self.slots, self.refuse, self.referee = node, slots, refuse, referee
        self.journal = MemoryJournal()
        self.blocks: dict[JobId, tuple[str, ...]] = {}
        self.requester = Requester(node)
        self.compute = Compute(node, slots=slots, refuse=refuse)

    def step(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """One turn: step, commit the rows, and return the effects that are left to carry out."""
        if isinstance(event, ev.Submitted):
            self.blocks[event.job] = event.blocks
        machine: Requester | Compute = self.compute if _for_compute(event) else self.requester
        return self._commit(machine.step(event, now))

    def restart(self, now: float, *, resume: bool = True) -> list[ev.Effect]:
        """Come back after a crash with what the journal holds."""
        rows = self.journal.load()
        self.requester, first = Requester.recover(self.node, rows, now, resume=resume, blocks=self.blocks)
        self.compute, second = Compute.recover(self.node, rows, now, slots=self.slots, refuse=self.refuse)
        return self._commit([*first, *second])

    def check(self) -> None:
        """Raise `BugError` if a machine breaks a rule."""
        self.requester.check()
        self.compute.check()

    def _commit(self, effects: list[ev.Effect]) -> list[ev.Effect]:
        rows = [effect.row for effect in effects if isinstance(effect, ev.Write)]
        self.journal.commit(rows)
        for row in rows:
            self.referee.row(row)
        return [effect for effect in effects if not isinstance(effect, ev.Write)]


def _for_compute(event: ev.Event) -> bool:
    match event:
        case ev.Received(message=message):
            return isinstance(message, _TO_COMPUTE)
        case ev.TimerFired(timer=timer):
            return isinstance(timer, ev.HeartbeatTimer)
        case _:
            return isinstance(event, ev.ExecutionStarted | ev.ExecutionEnded)


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What the network and the shards are like. Times in seconds; shares between 0 and 1."""

    latency: tuple[float, float] = (0.01, 0.1)
    lost: float = 0.0
    repeated: float = 0.0
    shard: tuple[float, float] = (0.5, 2.0)
    failing: float = 0.0
    """The share of executions that end with a random error."""


@dataclass(eq=False)
class _Place:
    """A host in the simulation. `life` counts its restarts: what was meant for an earlier life never happens."""

    host: Host
    life: int = 0
    up: bool = True
    turns: int = 0
    broken: dict[int, float] = field(default_factory=dict)
    """In which turns it dies between commit and effects, and for how long."""
    queue: deque[ev.Run] = field(default_factory=deque)
    running: dict[Execution, ev.Run] = field(default_factory=dict)
    timers: dict[ev.Timer, float] = field(default_factory=dict)


class Simulation:
    """`nodes` hosts, which those that submit jobs all know. `ends` holds how each job ended, `trace` what happened."""

    def __init__(self, *, nodes: int, seed: int, slots: int = 2, weather: Weather | None = None) -> None:
        self.now = 0.0
        self.steps = 0
        self.messages = 0
        self.received: Counter[NodeId] = Counter()
        """How many messages each node got from others."""
        self.finished: dict[JobId, float] = {}
        """When each job ended."""
        self.referee = Referee()
        self.ends: dict[JobId, ev.JobChanged] = {}
        self._weather = weather or Weather()
        self._chance = random.Random(seed)  # noqa: S311 - chance that repeats, not secrets
        self._hash = hashlib.sha256()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        names = [f"n-{n:04d}" for n in range(nodes)]
        self._places = {name: _Place(Host(name, slots=slots, referee=self.referee)) for name in names}
        self._requesters: dict[NodeId, None] = {}
        self._apart: frozenset[NodeId] = frozenset()

    @property
    def nodes(self) -> list[NodeId]:
        """The names of all hosts."""
        return list(self._places)

    @property
    def trace(self) -> str:
        """The hash of everything that has happened so far."""
        return self._hash.hexdigest()

    def host(self, node: NodeId) -> Host:
        """One of the hosts."""
        return self._places[node].host

    def submit(self, node: NodeId, job: ev.Submitted, *, at: float = 0.0) -> None:
        """Let a client of `node` submit this job."""
        self._later(at, partial(self._hand_in, node, job))

    def cancel(self, node: NodeId, job: JobId, *, at: float) -> None:
        """Let the client cancel it."""
        self._later(at, lambda: self._feed(node, ev.CancelRequested(job)))

    def crash(self, node: NodeId, *, at: float, back: float) -> None:
        """Let a node die at `at` and come back at `back`."""
        self._later(at, lambda: self._die(node))
        self._later(back, lambda: self._return(node))

    def crash_in_turn(self, node: NodeId, turn: int, *, down: float) -> None:
        """Let a node die in its turn number `turn` (from 1), after the commit and before any effect."""
        self._places[node].broken[turn] = down

    def partition(self, nodes: Iterable[NodeId], *, at: float, until: float) -> None:
        """Lose all messages between these nodes and the others for a while."""
        part = frozenset(nodes)
        self._later(at, partial(self._divide, part))
        self._later(until, partial(self._divide, frozenset()))

    def turns(self, node: NodeId) -> int:
        """How many events the node has handled."""
        return self._places[node].turns

    def run(self, *, until: float) -> None:
        """Let time pass until `until`, or until nothing is left to happen."""
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, action = heapq.heappop(self._agenda)
            action()
        for place in self._places.values():
            place.host.check()

    # --- inside ---

    def _later(self, at: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._agenda, (max(at, self.now), self._count, action))

    def _divide(self, part: frozenset[NodeId]) -> None:
        self._apart = part

    def _hand_in(self, node: NodeId, job: ev.Submitted) -> None:
        if node not in self._requesters:
            self._requesters[node] = None
            self._introduce_all(node)
        self._feed(node, job)

    def _introduce_all(self, requester: NodeId) -> None:
        for node, place in self._places.items():
            self._feed(requester, ev.NodeSeen(node, place.host.slots))

    def _soon(self, node: NodeId, event: ev.Event, *, after: float = 0.0) -> None:
        """Give a node an event, if it lives that long."""
        place = self._places[node]
        life = place.life

        def happen() -> None:
            if place.life == life:
                self._feed(node, event)

        self._later(self.now + after, happen)

    def _feed(self, node: NodeId, event: ev.Event) -> None:
        place = self._places[node]
        if not place.up:
            return
        self.steps += 1
        place.turns += 1
        self._hash.update(repr((self.now, node, event)).encode())
        effects = place.host.step(event, self.now)
        if (down := place.broken.get(place.turns)) is not None:
            self._die(node)
            self._later(self.now + down, partial(self._return, node))
            return
        self._perform(node, effects)

    def _perform(self, node: NodeId, effects: Iterable[ev.Effect]) -> None:
        place = self._places[node]
        for effect in effects:
            match effect:
                case ev.Send(to=to, message=message):
                    self._post(node, to, message)
                    if isinstance(message, Offer) and to != node:
                        packed = tuple(Execution(message.job, one.shard, one.attempt) for one in message.shards)
                        self._soon(node, ev.OfferPacked(packed))
                case ev.SetTimer(timer=timer, at=at):
                    place.timers[timer] = at
                    self._later(at, partial(self._ring, node, timer, at=at, life=place.life))
                case ev.Run():
                    place.queue.append(effect)
                    self._work(node)
                case ev.Stop(execution=execution):
                    self._stop(node, execution)
                case ev.Keep(execution=execution):
                    self._soon(node, ev.ResultKept(execution), after=STORING)
                case ev.Seal(job=job):
                    self._soon(node, ev.JobSealed(job, f"cid-of-{job}"), after=STORING)
                case ev.Notify(update=update):
                    self._told(update)

    def _told(self, update: ev.ShardChanged | ev.JobChanged) -> None:
        self.referee.told(update)
        if isinstance(update, ev.JobChanged) and update.state in ev.FINAL_JOB:
            self.ends[update.job] = update
            self.finished.setdefault(update.job, self.now)

    def _ring(self, node: NodeId, timer: ev.Timer, *, at: float, life: int) -> None:
        place = self._places[node]
        if place.life == life and place.timers.get(timer) == at:
            del place.timers[timer]
            self._feed(node, ev.TimerFired(timer))

    def _post(self, sender: NodeId, to: NodeId, message: Message) -> None:
        self.messages += 1
        self.referee.sent(to, message)
        event = ev.Received(sender, message)
        if to == sender:
            self._soon(to, event)
            return
        if (sender in self._apart) != (to in self._apart):
            return
        weather = self._weather
        copies = (self._chance.random() >= weather.lost) + (self._chance.random() < weather.repeated)
        for _ in range(copies):
            self.received[to] += 1
            self._later(self.now + self._chance.uniform(*weather.latency), lambda: self._feed(to, event))

    def _work(self, node: NodeId) -> None:
        place = self._places[node]
        while place.queue and len(place.running) < place.host.slots:
            run = place.queue.popleft()
            execution = run.execution
            place.running[execution] = run
            self._soon(node, ev.ExecutionStarted(execution))
            seconds = self._chance.uniform(*self._weather.shard)
            outcome = self._outcome(execution, seconds)
            self._later(self.now + seconds, partial(self._finish, node, execution, outcome, life=place.life))

    def _outcome(self, execution: Execution, seconds: float) -> Outcome:
        if self._chance.random() < self._weather.failing:
            kinds: tuple[ErrorKind, ...] = ("exception", "signal", "node")
            kind = self._chance.choice(kinds)
            return Outcome(ok=False, exit_code=1, error=ShardError(kind), record=f"error-{execution}", seconds=seconds)
        return Outcome(ok=True, record=f"record-{execution}", answer=f"{execution.shard}", seconds=seconds)

    def _finish(self, node: NodeId, execution: Execution, outcome: Outcome, *, life: int) -> None:
        place = self._places[node]
        if place.life == life and place.running.pop(execution, None) is not None:
            self.referee.ran(execution, outcome)
            self._feed(node, ev.ExecutionEnded(execution, outcome))
            self._work(node)

    def _stop(self, node: NodeId, execution: Execution) -> None:
        place = self._places[node]
        place.running.pop(execution, None)
        place.queue = deque(run for run in place.queue if run.execution != execution)
        self._work(node)

    def _die(self, node: NodeId) -> None:
        place = self._places[node]
        place.up = False
        place.life += 1
        place.queue.clear()
        place.running.clear()
        place.timers.clear()

    def _return(self, node: NodeId) -> None:
        """It remembers what it had journaled; it and the others learn of each other again."""
        place = self._places[node]
        place.up = True
        self._perform(node, place.host.restart(self.now))
        for requester in self._requesters:
            self._soon(requester, ev.NodeSeen(node, place.host.slots))
        if node in self._requesters:
            self._introduce_all(node)
