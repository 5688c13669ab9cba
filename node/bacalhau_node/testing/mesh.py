"""Membership of many nodes in virtual time: the real machines, imagined links.

Theory of operation. A `Mesh` owns a clock, a queue of what happens when, and one generator of chance, like
`Simulation`; equal seeds give equal runs. Links are opened by dials and by sending, take a delay, and break when an end
dies. A `partition` breaks links between two parts and loses all that is sent between them. The network loses
messages, never news of links. Signatures are keyed hashes: nobody can forge them by accident.

What is counted: messages and bytes (as they would be on the wire) by receiver, digests by sender.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from bacalhau_node import wire
from bacalhau_node.ids import NodeId
from bacalhau_node.messages import Digest, Message, NodeRecord, Signed
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.archive import Archive
from bacalhau_node.protocol.membership import Membership, Settings

EPOCH: Final = 1_700_000_000 * 10**9
"""The wall clock when a simulation begins."""

REFUSED: Final = 0.05
UNANSWERED: Final = 10.0
"""Seconds until a dial fails: nobody is at the address, or nothing gets through."""


def sign_as(node: NodeId, data: bytes) -> bytes:
    """The signature of `node` over `data`, for tests."""
    return hashlib.blake2b(data, key=node.encode()[:64], digest_size=16).digest()


def verify(node: NodeId, data: bytes, signature: bytes) -> bool:
    """Whether `sign_as` made it."""
    return sign_as(node, data) == signature


def address_of(node: NodeId) -> str:
    """Where a node of a mesh can be dialled."""
    return f"/memory/{node}"


@dataclass(eq=False)
class _Member:
    """A node in the mesh. `life` counts its restarts."""

    machine: Membership
    life: int = 0
    up: bool = True
    links: dict[NodeId, None] = field(default_factory=dict)
    timer: float = -1.0
    frozen: bool = False
    backlog: list[ev.Event] = field(default_factory=list)


class Mesh:
    """A network of machines. `archive` is shared by all; `told` is what each would tell its requester.

    `made`: every record that was signed, and when. `lost`: the share of messages that get lost, from now on. `weigh`:
    count bytes, which takes time; `checked`: look at each machine's rules after each of its steps, and not only at the
    end of `run`.
    """

    def __init__(
        self,
        *,
        seed: int,
        settings: Settings | None = None,
        latency: tuple[float, float] = (0.01, 0.1),
        lost: float = 0.0,
        weigh: bool = True,
        checked: bool = False,
    ) -> None:
        self.now = 0.0
        self.archive = Archive(verify)
        self.members: dict[NodeId, _Member] = {}
        self.messages: Counter[NodeId] = Counter()
        self.bytes: Counter[NodeId] = Counter()
        self.digests: Counter[NodeId] = Counter()
        self.dials = 0
        self.told: dict[NodeId, dict[NodeId, int]] = {}
        self.complaints: list[tuple[NodeId, NodeId, str]] = []
        """(who tells, of whom, what)"""
        self.made: dict[tuple[NodeId, bytes], tuple[Signed, float]] = {}
        self.lost = lost
        self._settings, self._latency, self._weigh, self._checked = settings, latency, weigh, checked
        self._chance = random.Random(seed)  # noqa: S311 - chance that repeats, no secret
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._apart: frozenset[NodeId] = frozenset()

    # --- what a test does ---

    def start(
        self,
        node: NodeId,
        join: Iterable[NodeId] = (),
        *,
        at: float = 0.0,
        slow: float = 0.0,
        dialable: bool = True,
        remembered: Iterable[NodeId] = (),
    ) -> None:
        """Let a node begin at `at`, and join by the addresses of these others; its clock is slow by so many seconds."""
        event = ev.Join(tuple(map(address_of, join)), tuple(map(address_of, remembered)))
        self._later(at, partial(self._begin, node, event, slow=slow, dialable=dialable))

    def kill(self, nodes: Iterable[NodeId], *, at: float) -> None:
        """Let nodes die without a word."""
        for node in nodes:
            self._later(at, partial(self._die, node))

    def leave(self, node: NodeId, *, at: float) -> None:
        """Let a node say farewell, and end half a second later."""
        self._later(at, lambda: self.feed(node, ev.Leave()))
        self._later(at + 0.5, partial(self._die, node))

    def partition(self, nodes: Iterable[NodeId], *, at: float, until: float) -> None:
        """Keep these nodes and the others apart for a while."""
        self._later(at, partial(self._divide, frozenset(nodes)))
        self._later(until, partial(self._divide, frozenset()))

    def cut(self, one: NodeId, other: NodeId) -> None:
        """Break the link between two nodes now, if there is one."""
        if other in self.members[one].links:
            self._break(one, other)

    def freeze(self, node: NodeId, *, until: float) -> None:
        """Let a node hear and do nothing for a while; its links stay."""
        member = self.members[node]
        member.frozen = True
        self._later(until, partial(self._thaw, node, member))

    def run(self, *, until: float) -> None:
        """Let time pass."""
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, action = heapq.heappop(self._agenda)
            action()
        self.now = until
        for member in self.members.values():
            member.machine.check()

    def feed(self, node: NodeId, event: ev.Event) -> None:
        """Give an event to a node, now."""
        member = self.members[node]
        if member.up and member.frozen:
            member.backlog += () if isinstance(event, ev.Received) else (event,)
        elif member.up:
            self._perform(node, member.machine.step(event, self.now))
            if self._checked:
                member.machine.check()

    # --- what a test looks at ---

    @property
    def alive(self) -> list[NodeId]:
        """The nodes that are up."""
        return [node for node, member in self.members.items() if member.up]

    def machine(self, node: NodeId) -> Membership:
        """The machine of a node."""
        return self.members[node].machine

    def knowing(self, node: NodeId, version: int) -> float:
        """The share of living nodes that know this version of a node's record, or a later one; the node left out."""
        views = [self.members[other].machine.view for other in self.alive if other != node]
        known = sum((held := view.held.get(node)) is not None and held.record.version >= version for view in views)
        return known / len(views)

    def parts(self) -> list[int]:
        """The sizes of the connected parts that living neighbours form, the largest first."""
        left, sizes = set(self.alive), []
        near = {node: set(self.machine(node).neighbours) for node in left}
        for node, others in list(near.items()):
            for other in others & near.keys():
                near[other].add(node)
        while left:
            part, edge = set(), [left.pop()]
            while edge:
                node = edge.pop()
                part.add(node)
                edge += [other for other in near[node] if other in left]
                left.difference_update(near[node])
            sizes.append(len(part))
        return sorted(sizes, reverse=True)

    # --- inside ---

    def _later(self, at: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._agenda, (max(at, self.now), self._count, action))

    def _delay(self) -> float:
        return self.now + self._chance.uniform(*self._latency)

    def _begin(self, node: NodeId, event: ev.Join, *, slow: float, dialable: bool) -> None:
        before = self.members.get(node)
        record = NodeRecord(
            node=node, version=0, addresses=(address_of(node),) if dialable else (), agent="mesh", slots=4, room=4
        )
        machine = Membership(
            record,
            archive=self.archive,
            sign=partial(self._sign, node),
            seed=self._chance.getrandbits(64),
            epoch_ns=EPOCH + int((self.now - slow) * 1e9),
            now=self.now,
            settings=self._settings,
        )
        self.members[node] = _Member(machine, life=before.life + 1 if before else 0)
        self.told[node] = {}
        self.feed(node, event)

    def _sign(self, node: NodeId, data: bytes) -> bytes:
        signature = sign_as(node, data)
        self.made[node, data] = Signed(data, signature), self.now
        return signature

    def _thaw(self, node: NodeId, member: _Member) -> None:
        member.frozen = False
        backlog, member.backlog = member.backlog, []
        if self.members[node] is member:
            for event in backlog:
                self.feed(node, event)

    def _die(self, node: NodeId) -> None:
        member = self.members[node]
        member.up = False
        member.life += 1
        for other in list(member.links):
            self._break(node, other)

    def _divide(self, part: frozenset[NodeId]) -> None:
        self._apart = part
        for node, member in self.members.items():
            for other in [other for other in member.links if self._is_apart(node, other)]:
                self._break(node, other)

    def _is_apart(self, one: NodeId, other: NodeId) -> bool:
        return (one in self._apart) != (other in self._apart)

    def _break(self, one: NodeId, other: NodeId) -> None:
        for node, gone in ((one, other), (other, one)):
            if node in self.members and self.members[node].links.pop(gone, self) is None:
                self._soon(node, ev.LinkDown(gone))

    def _soon(self, node: NodeId, event: ev.Event, *, after: float = 0.0) -> None:
        """Give a node an event, if it lives that long."""
        member = self.members[node]
        life = member.life

        def happen() -> None:
            if self.members[node].life == life:
                self.feed(node, event)

        self._later(self.now + after, happen)

    def _perform(self, node: NodeId, effects: Iterable[ev.Effect]) -> None:
        told = self.told[node]
        for effect in effects:
            match effect:
                case ev.NodeSeen(other, room):
                    told[other] = room
                case ev.NodeGone(other):
                    told.pop(other, None)
                case ev.Send(to, message):
                    self._post(node, to, message)
                case ev.SetTimer(_, at):
                    member = self.members[node]
                    member.timer = at
                    self._later(at, partial(self._ring, node, at, member.life))
                case ev.Dial(address):
                    self._later(self._delay(), partial(self._dial, node, address, self.members[node].life))
                case ev.HangUp(other, reason):
                    if reason:
                        self.complaints.append((node, other, reason))
                    self._later(self._delay(), partial(self._break, node, other))
                case ev.Complain(other, reason):
                    self.complaints.append((node, other, reason))

    def _ring(self, node: NodeId, at: float, life: int) -> None:
        member = self.members[node]
        if member.life == life and member.timer == at:
            self.feed(node, ev.TimerFired(ev.ExchangeTimer()))

    def _link(self, one: NodeId, other: NodeId) -> bool:
        """Whether there is a link now."""
        there = self.members.get(other)
        if there is None or not there.up or self._is_apart(one, other):
            return False
        here = self.members[one]
        if one != other and other not in here.links:
            here.links[other] = there.links[one] = None
            self._soon(one, ev.LinkUp(other, inbound=False))
            self._soon(other, ev.LinkUp(one, inbound=True))
        return True

    def _dial(self, node: NodeId, address: str, life: int) -> None:
        if self.members[node].life != life:
            return
        self.dials += 1
        other = address.removeprefix("/memory/")
        if self._link(node, other):
            self._soon(node, ev.Dialled(address, other))
        else:
            after = UNANSWERED if self._is_apart(node, other) else REFUSED
            self._soon(node, ev.DialFailed(address, None, "nobody is there"), after=after)

    def _post(self, sender: NodeId, to: NodeId, message: Message) -> None:
        self.digests[sender] += isinstance(message, Digest)
        if not self._link(sender, to):
            self._soon(sender, ev.DialFailed("", to, "nobody is there"), after=REFUSED)
            return
        if self._chance.random() < self.lost:
            return
        self.messages[to] += 1
        if self._weigh:
            self.bytes[to] += len(wire.encode(message))
        life = self.members[to].life

        def arrive() -> None:
            if self.members[to].life == life and not self._is_apart(sender, to):
                self.feed(to, ev.Received(sender, message))

        self._later(self._delay(), arrive)
