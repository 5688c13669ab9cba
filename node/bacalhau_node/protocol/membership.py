"""Who is there: how nodes find each other, compare what they know, and let the dead go. Sans-IO.

Theory of operation. Every node signs a **record** of itself (addresses, engines, room, neighbours) with a version that
only grows. Records spread by **anti-entropy**: every 20 to 30 s a node sends a digest of its view to one **neighbour**,
which answers with what is newer and asks for what is newer there. A new record is everywhere after a few periods, in
proportion to the logarithm of the network's size; nothing is told to everybody, and no message grows with the network
once views are full. A node that learns much at once (it has just joined, a partition has healed) compares every second,
then ever more slowly.

A node makes a new record when it says something new, at least `GAP` seconds after the last one and so seldom that
nobody hears more than `RATE` records a second; otherwise every `LIFE` seconds, as a sign of life.

**Joining.** `Join` names one node, or several. Whoever opens is sent a digest, which asks to be neighbours. A node with
`high` neighbours answers with some nodes by lot and the word `parting`; the other hangs up and dials those. A node with
less than `low` neighbours dials nodes of its view by lot until it has `target`; with nobody to dial it asks
(`PeersWanted`), then it tries neighbours of its last life and the doors it was told of. A node whose view has grown by
half dials one more: two networks that meet by one link become one mesh, not two with a bridge.

**Death.** A node whose link breaks, that does not answer, or to which nothing can be sent, is a **suspect**, which has
no room. It is dialled a few times; it is dead when nobody opens for `PATIENCE` seconds, and alive at once when it has a
link or has made a record since. Nobody is told of a suspicion, as it would be slander; others find out themselves, or
when the last record is stale. A dead neighbour's door is knocked at for good.

**Misbehaviour.** A record that was not signed by its node, or is malformed, and a flood of messages end the link of
whoever sent them, with a reason, and nobody listens to that node for ten minutes. An old record changes nothing. A
record from the future is not taken; its sender is at fault only if it is its own, as clocks differ. A node that hears
of a newer record of itself (from before a restart, by a faster clock) makes one that is newer still.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec import structs

from bacalhau_node.errors import BugError, ProtocolError
from bacalhau_node.ids import NodeId
from bacalhau_node.messages import Copy, Digest, Message, NodeRecord, PeersWanted, Records
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.archive import Archive, Held, Sign, stamp
from bacalhau_node.protocol.chance import Chance
from bacalhau_node.protocol.doors import Doors
from bacalhau_node.protocol.neighbours import FLOOD, FLOOD_TIME, Neighbours, Peer
from bacalhau_node.protocol.view import LIFE, MAX_RECORDS, PASSABLE, View, checked

GAP: Final = 10.0
RATE: Final = 8.0
"""Records a second that a node hears at most, however many nodes it knows (a guess: 1 % of a core in Python)."""

FAST: Final = 1.0
"""Seconds until the next comparison after one that brought much; doubled with each that doesn't."""

SERVED: Final = 0.5
"""Seconds between two digests of one node that are both answered with records."""

OFFERED: Final = 32
"""Records of nodes to dial, in one answer."""

ANSWER: Final = 10.0
"""Seconds after which a digest counts as not answered; `STRIKES` of those in a row end a link."""

STRIKES: Final = 3
PATIENCE: Final = 10.0
TRIES: Final = 3
"""A suspect is dead when so many dials have failed within no less than `PATIENCE` seconds."""

UNDIALABLE: Final = 120.0
"""Seconds after which a suspect without addresses is dead: only it can dial, and its new record has to come around."""

SOUGHT: Final = 300.0
"""Seconds until a node that was dialled, to be a neighbour, is dialled for that again."""

SWEEP: Final = 60.0
FAREWELL: Final = 5.0
"""Seconds until a link is closed that nobody needs: what was sent last should arrive."""

FUTURE: Final = 24 * 3600 * 10**9
"""Nanoseconds: a clock that is wrong by a time zone is still believed."""

REMEMBERED: Final = 50
"""Addresses that are worth remembering for the next life."""

GROWN: Final = 8
"""Views smaller than this are meshed anyway."""

SOON: Final = 0.05


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How many neighbours: fewer than `low` are too few, `target` is aimed at, more than `high` are not taken.

    `view`: so many nodes are known at most. `period`: seconds between comparisons, drawn from this range.
    """

    low: int = 3
    target: int = 5
    high: int = 12
    view: int = 1024
    period: tuple[float, float] = (20.0, 30.0)


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
        self._archive, self._sign, self._chance = archive, sign, Chance(seed)
        self._epoch, self._start, self._now = epoch_ns, now, now
        self._out: list[ev.Effect] = []
        self._described, self._changed, self._floor, self._clashes = record, False, 0, 0
        self._others, self._doors = Neighbours(), Doors(self._chance)
        own = archive.own(structs.replace(record, version=max(1, epoch_ns), neighbours=()), sign)
        self.view = View(own, now, bound=self.settings.view, chance=self._chance)
        self._pause, self._compare_at, self._sweep_at = FAST, now + FAST, now + SWEEP
        self._life = LIFE * self._chance.between(0.8, 1.0)
        self._farewells: dict[NodeId, float] = {}
        self._sought: dict[NodeId, float] = {}
        self._remembered: list[str] = []
        self._asked_for_peers, self._grown, self._armed = now - SWEEP, GROWN, float("inf")
        self._left = False

    def step(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """Take note of what happened, and say what to do. The first event is `Join`."""
        self._now, self._out = now, []
        if not self._left:
            self._handle(event)
            self._arm()
        return self._out

    # --- what others may ask; nothing changes ---

    @property
    def neighbours(self) -> tuple[NodeId, ...]:
        """The nodes with which this one compares views, sorted."""
        return tuple(sorted(peer.id for peer in self._others.near))

    def __len__(self) -> int:
        """How many other nodes are known."""
        return len(self.view.held)

    def addresses(self, node: NodeId) -> tuple[str, ...]:
        """Where a node can be dialled, as far as is known."""
        held = self.view.held.get(node)
        return held.record.addresses if held else ()

    def nodes(self) -> Iterator[ev.NodeSeen]:
        """Every known node as a requester is told of it, for one that begins now."""
        for held in self.view.held.values():
            yield self._seen(held)

    def entries(self, now: float) -> Iterator[Entry]:
        """This node and every known one, for people."""
        yield Entry(self.view.own.record, "self", now - self.view.made)
        for node, held in self.view.held.items():
            yield Entry(held.record, self._state(node), self.view.age(node, now))

    def peers(self) -> tuple[str, ...]:
        """Addresses worth remembering for `Join.remembered`: those of neighbours, then of others."""
        near = [self.addresses(node) for node in self.neighbours]
        rest = [held.record.addresses for held in self.view.held.values() if not self._others.is_near(held.node)]
        return tuple(addresses[0] for addresses in [*near, *rest] if addresses)[:REMEMBERED]

    def check(self) -> None:
        """Raise `BugError` if a rule of the machine is broken."""
        view, others = self.view, self._others
        near = others.near
        rules = {
            "a view is within its bound": len(view.held) <= view.bound and len(view.graves) <= view.bound,
            "a node does not know itself": self.node not in view.held and self.node not in others.peers,
            "nobody is known and buried": not view.held.keys() & view.graves.keys(),
            "no neighbour or suspect is buried": not others.peers.keys() & view.graves.keys(),
            "every record has its time": view.held.keys() == view.born.keys(),
            "no more neighbours than allowed": len(near) <= self.settings.high,
            "nobody listens to a neighbour that did wrong": not any(others.is_banned(p.id, self._now) for p in near),
        }
        for rule, holds in rules.items():
            if not holds:
                raise BugError(f"membership of node {self.node}: {rule}, and now it is not so")

    # --- events ---

    def _handle(self, event: ev.Event) -> None:
        match event:
            case ev.Received(sender, message):
                self._received(sender, message)
            case ev.TimerFired(ev.ExchangeTimer()):
                self._armed = float("inf")
                self._tick()
            case ev.LinkUp(node):
                self._linked(node)
            case ev.LinkDown(node):
                self._unlinked(node)
            case ev.Dialled(address, node):
                self._dialled(address, node)
            case ev.DialFailed(address, node):
                self._failed(address, node)
            case ev.LoadChanged(record):
                self._describe(record)
            case ev.Join(addresses, remembered):
                self._doors.name(addresses, self._now)
                self._remembered += remembered
                self._tick()
            case ev.Leave():
                self._leave()

    def _received(self, sender: NodeId, message: Message) -> None:
        if sender == self.node or self._others.is_banned(sender, self._now):
            return
        watch = self._others.watch(sender, self._now)
        if watch.count > FLOOD:
            self._punish(sender, f"it sent more than {FLOOD} messages about nodes in {FLOOD_TIME:.0f} s")
            return
        try:
            match message:
                case Digest() if self._now - watch.served >= SERVED:
                    watch.served = self._now
                    self._answer(sender, message)
                case Digest():
                    self._send(sender, Records(()))
                case Records():
                    self._take(sender, message)
                case PeersWanted(count):
                    self._letters(sender, self._some(min(count, OFFERED), sender))
        except ProtocolError as error:
            self._punish(sender, str(error))

    def _linked(self, node: NodeId) -> None:
        self._others.links[node] = None
        if self._others.is_banned(node, self._now):
            self._hang_up(node)
        elif self._state(node) in ("suspect", "dead"):
            self._alive(node)

    def _unlinked(self, node: NodeId) -> None:
        self._others.links.pop(node, None)
        self._farewells.pop(node, None)
        if self._others.is_near(node):
            self._lose(node)
            self._seek()

    def _dialled(self, address: str, node: NodeId) -> None:
        attempt = self._doors.opened(address, node)
        if attempt is not None and attempt.node not in (None, node):
            self._unreached(attempt.node or node)
        if node == self.node:
            self._doors.doors.pop(address, None)
        elif self._others.is_banned(node, self._now):
            self._hang_up(node)
        elif not self._others.is_near(node):
            self._meet(node)

    def _failed(self, address: str, node: NodeId | None) -> None:
        attempt = self._doors.dials.pop(address, None)
        target = attempt.node if attempt else node
        if attempt and attempt.rest:
            self._dial(attempt.rest, attempt.node)
        elif target is not None and target not in self._others.links:
            self._unreached(target)
        self._seek()

    def _describe(self, record: NodeRecord) -> None:
        if record.version:
            self._epoch, self._start = record.version, self._now
        self._changed = self._changed or _noticeable(self.view.own.record, record)
        self._described = record
        self._renew()

    def _leave(self) -> None:
        self._make(leaving=True)
        for peer in self._others.near:
            self._letters(peer.id, [self.view.own])
        self._left = True

    # --- comparing views ---

    def _answer(self, sender: NodeId, digest: Digest) -> None:
        checked(digest)
        if not self._others.is_near(sender):
            if len(self._others.near) >= self.settings.high:
                self._turn_away(sender)
                return
            self._befriend(sender)
        newer, wanted = self.view.compare(digest, self._latest)
        self._letters(sender, newer, wanted=wanted)

    def _turn_away(self, sender: NodeId) -> None:
        first, *rest = self.view.letters([self.view.own, *self._some(OFFERED, sender)], self._now)
        for letter in (*rest, structs.replace(first, parting=True)):
            self._send(sender, letter)
        self._farewells[sender] = self._now + FAREWELL

    def _take(self, sender: NodeId, letter: Records) -> None:
        if len(letter.records) > MAX_RECORDS:
            raise ProtocolError(f"{len(letter.records)} records in one message (at most {MAX_RECORDS} are allowed)")
        peer = self._others.peers.get(sender)
        if peer is not None:
            peer.silent = 0
        room, fresh = self.view.room(), 0
        for copy in letter.records:
            fresh += self._hear(sender, copy, new=fresh < room)
        if peer is not None and peer.owed and letter.wanted:
            peer.owed = False
            self._letters(sender, self.view.wanted(letter.wanted))
        if letter.parting:
            self._parted(sender)
        if fresh * 10 > len(self.view.held):
            self._pause = FAST
            self._compare_at = min(self._compare_at, self._now + FAST * self._chance.between(0.5, 1.5))
        self._seek()

    def _parted(self, sender: NodeId) -> None:
        if self._others.is_near(sender):
            self._move(sender, "part")
            self._farewells[sender] = self._now + FAREWELL

    def _hear(self, sender: NodeId, copy: Copy, *, new: bool) -> bool:
        """Take a record, if it is good and newer; whether it is of a node that was not known. `new`: one may be."""
        held = self._archive.open(copy.signed)
        if held.node == self.node:
            self._echo(held)
            return False
        if held.stamp > self._latest:
            if held.node == sender:
                raise ProtocolError("its record is of tomorrow: its clock, or the one here, is wrong by a day")
            return False
        if self.view.outdated(held) or copy.age > PASSABLE:
            return False
        if held.record.leaving:
            self._bid_farewell(held)
            return False
        return self._learn(held, copy.age, new=new)

    def _learn(self, held: Held, age: float, *, new: bool) -> bool:
        node, state = held.node, self._state(held.node)
        born = self._now - age
        if state == "dead" and born <= self.view.graves[node].since:
            self.view.bury(held, born=born, since=self.view.graves[node].since)
            return False
        strange = node not in self.view.held and state == "known"
        if strange and not (new and self._make_room()):
            return False
        doubtful = state == "suspect" and born <= self._others.peers[node].since
        old = self.view.put(held, age, self._now)
        if state in ("suspect", "dead", "left") and not doubtful:
            self._move(node, "hear")
            self._doors.found(node)
        if not doubtful and (old is None or state == "suspect" or _noticeable(old.record, held.record)):
            self._out.append(self._seen(held))
        return strange

    def _make_room(self) -> bool:
        """Whether there is a place for one more node, perhaps because another was forgotten."""
        if len(self.view.held) < self.view.bound:
            return True
        lot = self.view.lot(lambda node: node in self._others.peers or node in self._others.links)
        if lot is None:
            return False
        self._move(lot, "evict")
        self.view.drop(lot)
        self._out.append(ev.NodeGone(lot))
        return True

    def _bid_farewell(self, held: Held) -> None:
        node, state = held.node, self._state(held.node)
        if node not in self.view.held and state == "known":
            return
        self._move(node, "leave")
        self.view.bury(held, born=self._now, since=self._now)
        self._doors.found(node)
        if state != "dead":
            self._out.append(ev.NodeGone(node))

    def _echo(self, held: Held) -> None:
        """A record of this very node came back: if it is newer than the last one, it is of another life."""
        if not held.beats(self.view.own):
            return
        self._floor, self._changed = max(self._floor, held.record.version), True
        self._clashes += 1
        if self._clashes == 1:
            self._make()
        if self._clashes == STRIKES:
            reason = "another process makes records with the key of this node: end one, or give it a folder of its own"
            self._out.append(ev.Complain(self.node, reason))

    # --- neighbours ---

    def _meet(self, node: NodeId) -> None:
        """A node that was dialled has opened: compare, and be neighbours where there is room."""
        if len(self._others.near) < self.settings.high:
            self._ask(self._befriend(node))
            return
        self._alive(node)
        self._send(node, self.view.digest())
        self._farewells[node] = self._now + FAREWELL

    def _befriend(self, node: NodeId) -> Peer:
        self._alive(node)
        self._farewells.pop(node, None)
        self._doors.found(node)
        peer = self._move(node, "link")
        assert peer is not None
        return peer

    def _alive(self, node: NodeId) -> None:
        """The node itself has been heard: it is neither suspect nor dead."""
        state = self._state(node)
        if state == "dead":
            grave = self.view.graves[node]
            self.view.put(grave.held, 0, self._now)
        if state in ("suspect", "dead"):
            self._move(node, "hear")
            if (held := self.view.held.get(node)) is not None:
                self._out.append(self._seen(held))

    def _lose(self, node: NodeId) -> None:
        peer = self._move(node, "lose")
        assert peer is not None
        dialable = bool(self.addresses(node))
        peer.due = self._now + (self._chance.between(0, FAST) if dialable else UNDIALABLE)
        self._doubt(node)
        if not self._others.near:
            self._doors.hasten(self._now)

    def _doubt(self, node: NodeId) -> None:
        """Nothing more should be offered to it for now."""
        if (held := self.view.held.get(node)) is not None:
            self._out.append(ev.NodeSeen(node, 0, held.record))

    def _unreached(self, node: NodeId) -> None:
        match self._state(node):
            case "known" if node in self.view.held:
                peer = self._move(node, "fail")
                assert peer is not None
                self._doubt(node)
                self._again(peer)
            case "neighbour":
                self._lose(node)
            case "suspect":
                self._again(self._others.peers[node])

    def _again(self, peer: Peer) -> None:
        """A dial to a suspect has failed."""
        peer.tries += 1
        peer.due = self._now + 2.0**peer.tries * self._chance.between(0.75, 1.25)
        if peer.tries >= TRIES and self._now - peer.since >= PATIENCE:
            self._die(peer)

    def _die(self, peer: Peer) -> None:
        node = peer.id
        held = self.view.held.get(node)
        self._move(node, "die")
        if held is None:
            return
        born = self.view.born[node]
        self.view.bury(held, born=born, since=peer.since)
        self._out.append(ev.NodeGone(node))
        if peer.close and held.record.addresses:
            self._doors.lose(held.record.addresses[0], node, self._now)

    def _punish(self, node: NodeId, reason: str) -> None:
        self._others.ban(node, self._now)
        if self._others.is_near(node):
            self._move(node, "part")
        self._hang_up(node, reason)
        self._seek()

    def _seek(self) -> None:
        """Dial others, if there are too few neighbours."""
        near = len(self._others.near)
        if near >= self.settings.low:
            return
        going = sum(not self._is_suspect(one.node) for one in self._doors.dials.values())
        for held in self._strangers(self.settings.target - near - going):
            self._dial(held.record.addresses, held.node)
            going += 1
        if going:
            return
        if self._remembered:
            for address in self._remembered[:2]:
                self._dial((address,), None)
            del self._remembered[:2]
        elif near and self._now - self._asked_for_peers >= self.settings.period[0]:
            self._asked_for_peers = self._now
            self._send(self._chance.pick(self._others.near).id, PeersWanted(OFFERED))

    def _strangers(self, count: int) -> list[Held]:
        """Nodes that could become neighbours, by lot; they are not drawn again for a while."""
        if count <= 0:
            return []
        drawn = self.view.dialable(count, lambda node: node in self._others.peers or node in self._sought)
        for held in drawn:
            self._sought[held.node] = self._now
        return drawn

    def _some(self, count: int, sender: NodeId) -> list[Held]:
        """Nodes that the sender could dial."""
        return self.view.dialable(count, lambda node: node == sender or self._is_suspect(node))

    # --- time ---

    def _tick(self) -> None:
        if self._now >= self._sweep_at:
            self._sweep()
        for peer in self._others.suspects:
            if self._now >= peer.due:
                self._probe(peer)
        for dial in self._doors.due(self._now, alone=not self._others.near, here=self._is_here):
            self._out.append(dial)
        for node in [node for node, at in self._farewells.items() if at <= self._now]:
            del self._farewells[node]
            if node in self._others.links and not self._others.is_near(node):
                self._hang_up(node)
        self._renew()
        if self._now >= self._compare_at:
            self._compare()
        self._seek()

    def _compare(self) -> None:
        """Send a digest to a neighbour by lot, before others to one that has not answered the last."""
        self._pause = min(2 * self._pause, self._chance.between(*self.settings.period))
        self._compare_at = self._now + self._pause * self._chance.between(0.9, 1.1)
        near = [peer for peer in self._others.near if not peer.silent or self._now - peer.asked >= ANSWER]
        for peer in [peer for peer in near if peer.silent >= STRIKES]:
            self._hang_up(peer.id, f"it did not answer {STRIKES} questions about nodes")
            self._lose(peer.id)
        near = [peer for peer in near if peer.silent < STRIKES]
        silent = [peer for peer in near if peer.silent]
        if near:
            self._ask(self._chance.pick(silent or near))

    def _ask(self, peer: Peer) -> None:
        peer.asked, peer.owed = self._now, True
        peer.silent += 1
        self._send(peer.id, self.view.digest())

    def _probe(self, peer: Peer) -> None:
        addresses = self.addresses(peer.id)
        if addresses:
            peer.due = self._now + SWEEP
            self._dial(addresses, peer.id)
        elif self._now - peer.since >= UNDIALABLE:
            self._die(peer)
        else:
            peer.due = peer.since + UNDIALABLE

    def _sweep(self) -> None:
        self._sweep_at = self._now + SWEEP * self._chance.between(0.9, 1.1)
        for node in self.view.stale(self._now):
            if node not in self._others.links and not self._others.is_near(node):
                self._move(node, "fade")
                self.view.drop(node)
                self._out.append(ev.NodeGone(node))
        for node in self.view.expired(self._now):
            self._move(node, "expire")
            del self.view.graves[node]
        self._others.tidy(self._now)
        self._sought = {node: at for node, at in self._sought.items() if self._now - at < SOUGHT}
        for address in self._doors.overdue(self._now):
            self._failed(address, None)
        if len(self.view.held) >= 1.5 * self._grown:
            self._grown = len(self.view.held)
            if len(self._others.near) < self.settings.high:
                for held in self._strangers(1):
                    self._dial(held.record.addresses, held.node)

    def _arm(self) -> None:
        """Have the timer fire when there is something to do; one that fires too early does no harm."""
        dues = [self._compare_at, self._sweep_at, self._doors.next(), self._renewal()]
        dues += [peer.due for peer in self._others.suspects]
        dues += self._farewells.values()
        at = max(min(dues), self._now + SOON)
        if at < self._armed:
            self._armed = at
            self._out.append(ev.SetTimer(ev.ExchangeTimer(), at))

    # --- this node's record ---

    def _renewal(self) -> float:
        """When the next record of this node is due."""
        if self._changed:
            return self.view.made + max(GAP, len(self.view.held) / RATE)
        return self.view.made + self._life

    def _renew(self) -> None:
        if self._now >= self._renewal():
            self._make()

    def _make(self, *, leaving: bool = False) -> None:
        version = max(self.view.own.record.version + 1, self._floor + 1, self._wall)
        record = structs.replace(self._described, version=version, neighbours=self.neighbours, leaving=leaving)
        self.view.renew(self._archive.own(record, self._sign), self._now)
        self._changed, self._life = False, LIFE * self._chance.between(0.8, 1.0)

    @property
    def _wall(self) -> int:
        return self._epoch + int((self._now - self._start) * 1e9)

    @property
    def _latest(self) -> bytes:
        """The newest version that is believed."""
        return stamp(self._wall + FUTURE)

    # --- small things ---

    def _state(self, node: NodeId) -> str:
        if (peer := self._others.peers.get(node)) is not None:
            return peer.state
        if (grave := self.view.graves.get(node)) is not None:
            return "left" if grave.left else "dead"
        return "known"

    def _move(self, node: NodeId, verb: str) -> Peer | None:
        state = self._state(node)
        peer = self._others.move(node, state, verb, self._now)
        if "neighbour" in (state, peer.state if peer else ""):
            self._changed = True
        if state in ("dead", "left"):
            self.view.graves.pop(node, None)
        return peer

    def _is_suspect(self, node: NodeId | None) -> bool:
        return node is not None and self._state(node) == "suspect"

    def _is_here(self, node: NodeId) -> bool:
        return node in self._others.links or (node in self.view.held and not self._is_suspect(node))

    def _seen(self, held: Held) -> ev.NodeSeen:
        return ev.NodeSeen(held.node, 0 if self._is_suspect(held.node) else held.record.room, held.record)

    def _dial(self, addresses: tuple[str, ...], node: NodeId | None) -> None:
        if dial := self._doors.dial(addresses, node, self._now):
            self._out.append(dial)

    def _hang_up(self, node: NodeId, reason: str = "") -> None:
        self._out.append(ev.HangUp(node, reason))

    def _letters(self, to: NodeId, records: list[Held], *, wanted: bytes = b"") -> None:
        for letter in self.view.letters(records, self._now, wanted=wanted):
            self._send(to, letter)

    def _send(self, to: NodeId, message: Message) -> None:
        self._out.append(ev.Send(to, message))


def _noticeable(old: NodeRecord, new: NodeRecord) -> bool:
    """Whether a record says something that others should know before long: more than a little change of load."""
    if (old.room == 0) != (new.room == 0) or 4 * abs(old.room - new.room) > max(1, new.slots):
        return True
    same = {"version": 0, "neighbours": (), "room": 0, "jobs": 0, "age": 0.0, "dropped": 0}
    return structs.replace(old, **same) != structs.replace(new, **same)
