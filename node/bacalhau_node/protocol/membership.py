"""Who is there: how nodes find each other, compare what they know, and let the dead go. Sans-IO.

Theory of operation. Every node signs a **record** of itself (addresses, engines, room, neighbours) with a version that
only grows. Records spread by **anti-entropy**: every 20 to 30 s a node sends a digest of its view to one **neighbour**,
which answers with what is newer and asks for what is newer there. A new record is everywhere after a few periods, in
proportion to the logarithm of the network's size; nothing is told to everybody, and no message grows with the network
once views are full. A node that learns much at once (it has just joined, a partition has healed) compares every second,
then ever more slowly, the sooner the more it still learns; with a small view, which costs little to compare, sooner.

**Joining.** `Join` names one node, or several. Whoever opens is sent a digest, which asks to be neighbours. A node with
`high` neighbours answers with some nodes by lot and the word `parting`, and asks for the other's record, as one that
has room, to tell of it those who come next; that one hangs up and dials those that it was told of. A node with less
than `low` neighbours dials nodes of its view; with nobody to dial it asks for some (`PeersWanted`). A node whose
view has grown by half dials one more: two networks that meet by one link become one mesh, not two with a bridge.

**Death.** Nobody is told of a suspicion (`circle.py`), as it would be slander: those who deal with a node find out
themselves that it is dead, as their links to it break; all others when its last record is stale.

**Misbehaviour.** A record that was not signed by its node, or is malformed, and a flood of messages end the link of
whoever sent them, with a reason, and nobody listens to that node for ten minutes. An old record changes nothing. A
record from the future is not taken; its sender is at fault only if it is its own, as clocks differ. A node that hears
of a newer record of itself (from before a restart, by a faster clock) makes one that is newer still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from msgspec import structs

from bacalhau_node.errors import ProtocolError
from bacalhau_node.ids import NodeId
from bacalhau_node.messages import Copy, Digest, Message, NodeRecord, PeersWanted, Records
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.archive import Archive, Held, Sign, key
from bacalhau_node.protocol.chance import Chance
from bacalhau_node.protocol.circle import Circle
from bacalhau_node.protocol.circle import Settings as Settings
from bacalhau_node.protocol.neighbours import FLOOD, FLOOD_TIME, Peer, Watch
from bacalhau_node.protocol.own import OwnRecord, lasting
from bacalhau_node.protocol.view import MAX_RECORDS, PASSABLE, View, checked

FAST: Final = 1.0
FASTEST: Final = 0.1
FAST_VIEW: Final = 500
"""Seconds until the next comparison after one that brought much, with so many known nodes, and in proportion fewer
with less (a comparison costs a millisecond for 1,000 nodes); doubled with each that brings nothing."""

MUCH: Final = 10
"""One new node for so many known ones is much; less of that makes the next comparison later in proportion. So the last
few nodes that a view lacks come in seconds, and one that joins a large network hurries nobody."""

SERVED: Final = 0.5
"""Two digests of one node are both answered with records after this part of these seconds."""

OFFERED: Final = 32
"""Records of nodes to dial, in one answer."""

ANSWER: Final = 10.0
"""Seconds after which a digest counts as not answered; `STRIKES` of those in a row end a link."""

STRIKES: Final = 3
REMEMBERED: Final = 50
"""Addresses that are worth remembering for the next life."""

SOON: Final = 0.05


class Entry(msgspec.Struct, frozen=True):
    """A node as it is known here, for people. `age`: seconds since its record was made."""

    record: NodeRecord
    state: str
    age: float


class Membership:
    """The machine. `record`: what this node says about itself; its version and neighbours are set here.

    `archive` is best shared by all nodes of a process. `sign` signs with this node's key. `seed` decides whom it
    picks. `epoch_ns`: the wall clock at `now`, in nanoseconds since 1970, so that versions grow over restarts.
    """

    def __init__(
        self,
        record: NodeRecord,
        *,
        archive: Archive,
        sign: Sign,
        seed: int,
        epoch_ns: int,
        now: float,
        settings: Settings | None = None,
    ) -> None:
        self.node, self.settings = record.node, settings or Settings()
        self._archive, self._chance = archive, Chance(seed)
        self._own = OwnRecord(record, archive=archive, sign=sign, chance=self._chance, epoch_ns=epoch_ns, now=now)
        self.view = View(self._own.held, now, bound=self.settings.view, chance=self._chance)
        self._circle = Circle(self.view, settings=self.settings, chance=self._chance, now=now)
        self._others = self._circle.others
        self._now, self._pause, self._compare_at = now, FASTEST, now + FASTEST
        self._asked_for_peers, self._armed = float("-inf"), float("inf")
        self._left = False

    def step(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """Take note of what happened, and say what to do. The first event is `Join`."""
        self._now = self._circle.now = now
        out = self._circle.out = []
        if not self._left:
            self._handle(event)
            self._own.changed, self._circle.moved = self._own.changed or self._circle.moved, False
            self._arm()
        return out

    def look_after(self, works_with: Callable[[NodeId], bool]) -> None:
        """Be told with which nodes executions are under way: their links count."""
        self._circle.works_with = works_with

    # --- what others may ask; nothing changes ---

    @property
    def neighbours(self) -> tuple[NodeId, ...]:
        """The nodes with which this one compares views, sorted."""
        return tuple(sorted(peer.id for peer in self._others.near))

    @property
    def age(self) -> float:
        """Median seconds that a message between this node and a neighbour took lately; 0: none was measured yet."""
        return self._own.age

    def __len__(self) -> int:
        """How many other nodes are known."""
        return len(self.view.held)

    def addresses(self, node: NodeId) -> tuple[str, ...]:
        """Where a node can be dialled, as far as is known."""
        held = self.view.held.get(node)
        return held.record.addresses if held else ()

    def nodes(self) -> Iterator[ev.NodeSeen]:
        """Every known node as a requester is told of it, for one that begins now."""
        return map(self._circle.seen, self.view.held.values())

    def entries(self, now: float) -> Iterator[Entry]:
        """This node and every known one, for people."""
        yield Entry(self._own.held.record, "self", now - self._own.made)
        for node, held in self.view.held.items():
            yield Entry(held.record, self._circle.state(node), self.view.age(node, now))

    def peers(self) -> tuple[str, ...]:
        """Addresses worth remembering for `Join.remembered`: those of neighbours, then of others."""
        near = [self.addresses(node) for node in self.neighbours]
        rest = [held.record.addresses for held in self.view.held.values() if not self._others.is_near(held.node)]
        return tuple(addresses[0] for addresses in [*near, *rest] if addresses)[:REMEMBERED]

    def check(self) -> None:
        """Raise `BugError` if a rule of the machine is broken."""
        self._circle.check()

    # --- events ---

    def _handle(self, event: ev.Event) -> None:
        match event:
            case ev.Received(sender, message):
                self._received(sender, message)
            case ev.TimerFired(ev.ExchangeTimer()):
                self._armed = float("inf")
                self._tick()
            case ev.LinkUp(node):
                self._circle.linked(node)
            case ev.LinkDown(node):
                self._circle.unlinked(node)
            case ev.Dialled(address, node):
                self._dialled(address, node)
            case ev.DialFailed(address, node):
                self._circle.failed(address, node)
            case ev.LoadChanged(record):
                self._own.describe(record, self._now)
                self._renew()
            case ev.Join(addresses, remembered):
                self._circle.doors.name(addresses, self._now)
                self._circle.remembered += remembered
                self._tick()
            case ev.Leave():
                self._leave()
        self._circle.seek()

    def _received(self, sender: NodeId, message: Message) -> None:
        if sender == self.node or self._others.is_banned(sender, self._now):
            return
        watch = self._others.watch(sender, self._now)
        if watch.count > FLOOD:
            self._circle.punish(sender, f"it sent more than {FLOOD} messages about nodes in {FLOOD_TIME:.0f} s")
            return
        try:
            match message:
                case Digest():
                    self._answer(sender, message, watch)
                case Records():
                    self._take(sender, message)
                case PeersWanted(count):
                    self._letters(sender, self._circle.some(min(count, OFFERED), sender))
        except ProtocolError as error:
            self._circle.punish(sender, str(error))

    def _dialled(self, address: str, node: NodeId) -> None:
        circle = self._circle
        attempt = circle.doors.opened(address, node)
        if attempt is not None and attempt.node not in (None, node):
            circle.unreached(attempt.node or node)
        if node == self.node:
            circle.doors.doors.pop(address, None)
        elif self._others.is_banned(node, self._now):
            circle.hang_up(node)
        elif not self._others.is_near(node):
            self._meet(node)

    def _meet(self, node: NodeId) -> None:
        """A node that was dialled has opened: compare, and be neighbours where there is room."""
        if not self._circle.full:
            self._ask(self._circle.befriend(node))
            return
        self._circle.alive(node)
        self._send(node, self.view.digest())
        self._circle.part(node)

    def _leave(self) -> None:
        self._make(leaving=True)
        for peer in self._others.near:
            self._letters(peer.id, [self._own.held])
        self._left = True

    # --- comparing views ---

    def _ask(self, peer: Peer) -> None:
        peer.asked, peer.owed = self._now, True
        peer.silent += 1
        self._send(peer.id, self.view.digest())

    def _answer(self, sender: NodeId, digest: Digest, watch: Watch) -> None:
        checked(digest)
        if not self._others.is_near(sender):
            if self._circle.full:
                self._turn_away(sender)
                return
            self._circle.befriend(sender)
        if self._now - watch.served < SERVED * self._fast():
            self._send(sender, Records(()))
            return
        watch.served = self._now
        newer, wanted = self.view.compare(digest, self._own.latest(self._now))
        self._letters(sender, newer, wanted=wanted)

    def _turn_away(self, sender: NodeId) -> None:
        """Have no room for it; want its record, as it has room, which is what those who come next will need."""
        some = [self._own.held, *self._circle.some(OFFERED, sender)]
        for letter in self.view.letters(some, self._now, wanted=key(sender)):
            self._send(sender, structs.replace(letter, parting=True))
        self._circle.part(sender)

    def _take(self, sender: NodeId, letter: Records) -> None:
        if len(letter.records) > MAX_RECORDS:
            raise ProtocolError(f"{len(letter.records)} records in one message (at most {MAX_RECORDS} are allowed)")
        if (peer := self._others.peers.get(sender)) is not None:
            if peer.silent == 1:  # of several questions this may be the answer to any
                self._own.ages.append((self._now - peer.asked) / 2)
            peer.silent = 0
        fresh = self._hear_all(sender, letter.records)
        if peer is not None and peer.owed and letter.wanted:
            peer.owed = False
            self._letters(sender, self.view.wanted(letter.wanted))
        if letter.parting and self._others.is_near(sender):
            self._circle.part(sender)
        if fresh and not self.view.full:
            self._hasten(self._fast() * max(1.0, len(self.view.held) / fresh / MUCH))

    def _hasten(self, pause: float) -> None:
        """Compare as soon as that, and then ever more slowly again."""
        if pause < self._pause:
            self._pause = pause
            self._compare_at = min(self._compare_at, self._now + pause * self._chance.between(0.5, 1.5))

    def _fast(self) -> float:
        return max(FASTEST, FAST * min(1.0, len(self.view.held) / FAST_VIEW))

    def _hear_all(self, sender: NodeId, copies: tuple[Copy, ...]) -> int:
        """Take the records that are good and newer; how many are of nodes that were not known."""
        room, fresh = self.view.room(), 0
        latest = self._own.latest(self._now)
        for copy in copies:
            held = self._archive.open(copy.signed)
            if held.node == self.node:
                self._echo(held, self._now - copy.age)
            elif held.stamp > latest:
                if held.node == sender:
                    raise ProtocolError("its record is of tomorrow: its clock, or the one here, is wrong by a day")
            elif copy.age <= PASSABLE and not self.view.outdated(held):
                if held.record.leaving:
                    self._bid_farewell(held)
                else:
                    fresh += self._learn(held, copy.age, new=fresh < room)
        return fresh

    def _learn(self, held: Held, age: float, *, new: bool) -> bool:
        """Take a record; whether it is of a node that was not known, one of which may be taken if `new`."""
        node, state, born = held.node, self._circle.state(held.node), self._now - age
        proven = state == "left" or (state in ("suspect", "dead") and self._circle.proves_life(node, born))
        if state == "dead" and not proven:
            self._circle.rumour(held, age)
            return False
        unknown = node not in self.view.held
        strange = unknown and state == "known"
        if (strange and not new) or (unknown and not self._circle.make_room()):
            return False
        if proven:
            self._circle.move(node, "hear")
            self._circle.doors.found(node)
        old = self.view.put(held, age, self._now)
        if old is None or proven or old.record.room != held.record.room or lasting(old.record) != lasting(held.record):
            self._circle.told(node)
        return strange

    def _bid_farewell(self, held: Held) -> None:
        node, state = held.node, self._circle.state(held.node)
        if state == "known" and node not in self.view.held:
            return
        if state != "left":
            self._circle.move(node, "leave")
        self.view.bury(held, born=self._now, since=self._now)
        self._circle.doors.found(node)
        if state not in ("dead", "left"):
            self._circle.out.append(ev.NodeGone(node))

    # --- time ---

    def _tick(self) -> None:
        self._circle.tick()
        self._renew()
        if self._now >= self._compare_at:
            self._compare()

    def _compare(self) -> None:
        """Send a digest to a neighbour by lot, before others to one that has not answered the last."""
        self._pause = min(2 * self._pause, self._chance.between(*self.settings.period))
        self._compare_at = self._now + self._pause * self._chance.between(0.9, 1.1)
        near = [peer for peer in self._others.near if not peer.silent or self._now - peer.asked >= ANSWER]
        for peer in [peer for peer in near if peer.silent >= STRIKES]:
            self._circle.hang_up(peer.id, f"it did not answer {STRIKES} questions about nodes")
            self._circle.lose(peer.id)
        near = [peer for peer in near if peer.silent < STRIKES]
        if near:
            self._ask(self._chance.pick([peer for peer in near if peer.silent] or near))
            self._ask_for_peers()

    def _ask_for_peers(self) -> None:
        if self._circle.lacks and not self._circle.doors.dials:
            self._send(self._chance.pick(self._others.near).id, PeersWanted(OFFERED))

    def _arm(self) -> None:
        """Have the timer fire when there is something to do; one that fires too early does no harm."""
        at = max(min(self._compare_at, self._circle.next(), self._own.due(len(self))), self._now + SOON)
        if at < self._armed:
            self._armed = at
            self._circle.out.append(ev.SetTimer(ev.ExchangeTimer(), at))

    # --- this node's record ---

    def _renew(self) -> None:
        if self._now >= self._own.due(len(self)):
            self._make()

    def _make(self, *, leaving: bool = False) -> None:
        self.view.renew(self._own.make(self.neighbours, self._now, leaving=leaving), self._now)

    def _echo(self, held: Held, born: float) -> None:
        """A record of this very node came back; if it is newer than the last one, it is of another life."""
        if not self._own.met(held, born):
            return
        if self._own.clashes < STRIKES:
            self._make()
            self._hasten(FASTEST)  # so that the other one, if it lives, soon has to do the same
        if self._own.clashes == STRIKES:
            reason = "another process makes records with the key of this node: end one, or give it a folder of its own"
            self._circle.out.append(ev.Complain(self.node, reason))

    # --- sending ---

    def _letters(self, to: NodeId, records: list[Held], *, wanted: bytes = b"") -> None:
        for letter in self.view.letters(records, self._now, wanted=wanted):
            self._send(to, letter)

    def _send(self, to: NodeId, message: Message) -> None:
        self._circle.out.append(ev.Send(to, message))
