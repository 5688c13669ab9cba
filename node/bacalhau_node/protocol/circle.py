"""The neighbours of a node: whom it dials, whom it suspects, whom it gives up.

Theory of operation. A **link** is a connection of whatever use; a **neighbour** is a node with which both sides agreed
to compare views. The state of a node changes in one place (`move`), by the table `MEMBER`.

*Seeking.* With fewer than `low` neighbours a node dials as many of its view, by lot, as it lacks; once a minute one
more up to `target`, one more when its view has grown by half, and one whose record should have been renewed: where a
mesh has fallen into two parts without any link that broke, this joins them. Two neighbours that both have more than
`target` part, one pair a minute, else a network whose nodes are all full would let nobody in. With nobody to dial a
node tries neighbours of its last life; the doors that a person named are knocked at until they have opened, and
whenever a node is alone.

*Suspicion.* A neighbour whose link breaks, and a node to which nothing can be sent, is a suspect, which has no room for
work. It is dialled a few times, and dead when nobody has opened for `PATIENCE` seconds. It is alive as soon as it has
a link, or a record that was made since. A dead node has a grave, and its door is knocked at for long.

*Work.* A node with which executions are under way keeps its link. When that breaks the node is dialled at once, and
when nobody opens the requester is told, which tries its shards elsewhere. Only this node's own link and dial count:
others are not asked, so nobody can have a node shunned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from bacalhau_node.ids import NodeId
from bacalhau_node.messages import Records
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.archive import Held
from bacalhau_node.protocol.chance import Chance
from bacalhau_node.protocol.doors import Doors
from bacalhau_node.protocol.invariants import check_circle
from bacalhau_node.protocol.neighbours import Neighbours, Peer
from bacalhau_node.protocol.view import DOUBT, LIFE, STALE, View

PATIENCE: Final = 10.0
TRIES: Final = 3
"""A suspect is dead when so many dials have failed, and `PATIENCE` seconds are over."""

UNDIALABLE: Final = 120.0
"""Seconds after which a suspect without addresses is dead: only it can dial, and its new record has to come around."""

SOUGHT: Final = 30.0
"""Seconds until a node that was dialled, to be a neighbour, is dialled for that again."""

FAREWELL: Final = 5.0
"""Seconds until a link is closed that nobody needs: what was sent last should arrive."""

FADING: Final = 1.5 * LIFE
"""Seconds after which a record should have been renewed, and the new one be here."""

PROBE: Final = 60.0
SWEEP: Final = 60.0
MESHED: Final = 8
"""Views smaller than this are meshed anyway."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How many neighbours: fewer than `low` are too few, `target` is aimed at, more than `high` are not taken.

    `view`: so many nodes are known at most. `period`: seconds between comparisons, drawn from this range.
    """

    low: int = 3
    target: int = 5
    high: int = 12
    view: int = 1024
    period: tuple[float, float] = (20.0, 30.0)


class Circle:
    """The others, as this node deals with them. `now` and `out` are those of the step.

    `moved`: somebody has become a neighbour, or is none any more. `works_with` says of a node whether executions are
    under way between it and this one.
    """

    def __init__(self, view: View, *, settings: Settings, chance: Chance, now: float) -> None:
        self.view, self.others, self.doors = view, Neighbours(), Doors(chance)
        self.settings, self._chance, self.now = settings, chance, now
        self.out: list[ev.Effect] = []
        self.moved = False
        self.works_with: Callable[[NodeId], bool] = lambda _: False
        self.remembered: list[str] = []
        self._farewells: dict[NodeId, float] = {}
        self._sought: dict[NodeId, float] = {}
        self._meshed = MESHED
        self._sweep_at = now + SWEEP

    @property
    def full(self) -> bool:
        """Whether there are neighbours enough."""
        return len(self.others.near) >= self.settings.high

    @property
    def lacks(self) -> bool:
        """Whether there are too few neighbours."""
        return len(self.others.near) < self.settings.low

    # --- states ---

    def state(self, node: NodeId) -> str:
        """The node's state; "known" also of one that is not."""
        if (peer := self.others.peers.get(node)) is not None:
            return peer.state
        if (grave := self.view.graves.get(node)) is not None:
            return "left" if grave.left else "dead"
        return "known"

    def move(self, node: NodeId, verb: str) -> None:
        """Change the node's state by `verb`; raises `BugError` with its story when it may not happen."""
        state = self.state(node)
        peer = self.others.move(node, state, verb, self.now)
        self.moved = self.moved or "neighbour" in (state, peer.state if peer else "")
        if state in ("dead", "left") and verb != "link":  # the last record of one that left stays the last one
            del self.view.graves[node]

    def is_suspect(self, node: NodeId) -> bool:
        """Whether the node may be dead."""
        peer = self.others.peers.get(node)
        return peer is not None and peer.state == "suspect"

    def proves_life(self, node: NodeId, born: float) -> bool:
        """Whether a suspect or dead node must be alive, as it has made a record at `born`."""
        grave, peer = self.view.graves.get(node), self.others.peers.get(node)
        since = grave.since if grave else peer.since if peer else 0.0
        return born > since + DOUBT

    def is_spared(self, node: NodeId) -> bool:
        """Whether the node is of use, and must not be forgotten for want of room."""
        return node in self.others.peers or node in self.others.links

    def make_room(self) -> bool:
        """Whether there is a place for one more node in the view, perhaps because another was forgotten."""
        if self.view.full:
            lot = self.view.lot(self.is_spared)
            if lot is None:
                return False
            self.move(lot, "evict")
            self.view.drop(lot)
            self.out.append(ev.NodeGone(lot))
        return True

    def seen(self, held: Held) -> ev.NodeSeen:
        """A known node, for a requester."""
        peer = self.others.peers.get(held.node)
        suspect = peer is not None and peer.state == "suspect"
        unreached = suspect and peer is not None and peer.tries > 0
        return ev.NodeSeen(held.node, 0 if suspect else held.record.room, held.record, unreached=unreached)

    def told(self, node: NodeId) -> None:
        """Tell the requester how the node is now, if there is a record of it."""
        if (held := self.view.held.get(node)) is not None:
            self.out.append(self.seen(held))

    # --- links ---

    def linked(self, node: NodeId) -> None:
        """There is a link to the node."""
        self.others.links[node] = None
        if self.others.is_banned(node, self.now):
            self.hang_up(node)
        else:
            self.alive(node)

    def unlinked(self, node: NodeId) -> None:
        """There is none any more."""
        self.others.links.pop(node, None)
        self._farewells.pop(node, None)
        if self.others.is_near(node):
            self.lose(node)
        if self.works_with(node):
            self._look_for(node)

    def failed(self, address: str, node: NodeId | None) -> None:
        """A dial has failed, or nothing could be sent to the node."""
        attempt = self.doors.dials.pop(address, None)
        target = attempt.node if attempt else node
        if attempt and attempt.rest:
            self.dial(attempt.rest, attempt.node)
        elif target is not None and target not in self.others.links:
            self.unreached(target)

    def rumour(self, held: Held, age: float) -> None:
        """A dead node has a newer record, from about the time of its death: it may have been out of reach only."""
        if self.make_room():
            self.move(held.node, "rumour")
            self.view.put(held, age, self.now)
            self.told(held.node)

    def befriend(self, node: NodeId) -> Peer:
        """Be neighbours from now on."""
        self.alive(node)
        self._farewells.pop(node, None)
        self.doors.found(node)
        self.move(node, "link")
        return self.others.peers[node]

    def part(self, node: NodeId) -> None:
        """Be neighbours no more, with no ill feelings: the link is closed soon."""
        if self.others.is_near(node):
            self.move(node, "part")
        self._farewells[node] = self.now + FAREWELL

    def punish(self, node: NodeId, reason: str) -> None:
        """The node did wrong: nothing is heard of it for a while."""
        self.others.ban(node, self.now)
        if self.others.is_near(node):
            self.move(node, "part")
        self.hang_up(node, reason)

    def hang_up(self, node: NodeId, reason: str = "") -> None:
        """Close the links to the node."""
        self.out.append(ev.HangUp(node, reason))

    # --- suspicion ---

    def alive(self, node: NodeId) -> None:
        """The node itself has been heard: it is neither suspect nor dead."""
        state = self.state(node)
        if state == "dead":
            held = self.view.graves[node].held
            self.move(node, "hear")
            if self.make_room():
                self.view.put(held, 0, self.now)
        elif state == "suspect":
            self.move(node, "hear")
        else:
            return
        self.told(node)

    def lose(self, node: NodeId) -> None:
        """A neighbour's link broke, or it answers nothing."""
        self.move(node, "lose")
        dialable = bool(self._addresses(node))
        self.others.peers[node].due = self.now + (self._chance.between(0, 1) if dialable else UNDIALABLE)
        self.told(node)
        if not self.others.near:
            self.doors.hasten(self.now)

    def unreached(self, node: NodeId) -> None:
        """Nobody opens at the node's addresses."""
        match self.state(node):
            case "neighbour":
                self.lose(node)
            case "known" if node in self.view.held:
                self.move(node, "fail")
                self._again(self.others.peers[node])
            case "suspect":
                self._again(self.others.peers[node])

    def _again(self, peer: Peer) -> None:
        peer.tries += 1
        if peer.tries == 1:
            self.told(peer.id)
        peer.due = self.now + 2.0**peer.tries * self._chance.between(0.75, 1.25)
        if peer.tries >= TRIES and self.now - peer.since >= PATIENCE:
            self._die(peer)

    def _die(self, peer: Peer) -> None:
        node, held = peer.id, self.view.held.get(peer.id)
        self.move(node, "die")
        if held is None:
            return
        self.view.bury(held, born=self.view.born[node], since=peer.since)
        self.out.append(ev.NodeGone(node))
        if held.record.addresses:
            self.doors.lose(held.record.addresses[0], node, self.now)

    def _probe(self, peer: Peer) -> None:
        addresses = self._addresses(peer.id)
        if addresses:
            peer.due = self.now + PROBE
            self.dial(addresses, peer.id)
        elif self.now - peer.since >= UNDIALABLE:
            self._die(peer)
        else:
            peer.due = peer.since + UNDIALABLE

    def _look_for(self, node: NodeId) -> None:
        """The link to a node at work broke: find out now whether it lives."""
        if (peer := self.others.peers.get(node)) is not None:
            self._probe(peer)
        elif addresses := self._addresses(node):
            self.dial(addresses, node)

    # --- seeking ---

    def seek(self) -> None:
        """Dial others, if there are too few neighbours."""
        if self.lacks:
            self._dial_strangers(self.settings.low)
            if self.remembered and not self.doors.dials:
                for address in self.remembered[:2]:
                    self.dial((address,), None)
                del self.remembered[:2]

    def some(self, count: int, sender: NodeId) -> list[Held]:
        """Nodes that the sender could dial, by lot."""
        return self.view.dialable(count, lambda node: node == sender or self.is_suspect(node))

    def dial(self, addresses: tuple[str, ...], node: NodeId | None) -> None:
        """Try the addresses of a node, one after the other."""
        if dial := self.doors.dial(addresses, node, self.now):
            self.out.append(dial)

    def _dial_strangers(self, wanted: int) -> None:
        """Dial known nodes, so that there will be so many neighbours; none of them again for a while."""
        dials = self.doors.dials.values()
        going = sum(one.node is None or not self.is_suspect(one.node) for one in dials)
        lacking = wanted - len(self.others.near) - going
        if lacking > 0:
            for held in self.view.dialable(lacking, self._is_no_stranger):
                self._sought[held.node] = self.now
                self.dial(held.record.addresses, held.node)

    def _trim(self) -> None:
        """Part with a neighbour that has more than it aims at as well, so that whoever comes finds room."""
        most = self.settings.target
        held = [self.view.held.get(peer.id) for peer in self.others.near]
        rich = [one.node for one in held if one is not None and len(one.record.neighbours) > most]
        if rich:
            node = self._chance.pick(rich)
            self.out.append(ev.Send(node, Records((), parting=True)))
            self.part(node)

    def _is_no_stranger(self, node: NodeId) -> bool:
        return node in self.others.peers or self.now - self._sought.get(node, float("-inf")) < SOUGHT

    def _addresses(self, node: NodeId) -> tuple[str, ...]:
        held = self.view.held.get(node)
        return held.record.addresses if held else ()

    # --- time ---

    def next(self) -> float:
        """When to look after all this again."""
        dues = [self._sweep_at, self.doors.next(), *self._farewells.values()]
        return min([*dues, *(peer.due for peer in self.others.suspects)])

    def tick(self) -> None:
        """Do what is due."""
        if self.now >= self._sweep_at:
            self._sweep()
        for peer in self.others.suspects:
            if self.now >= peer.due:
                self._probe(peer)
        self.out += self.doors.due(self.now, alone=not self.others.near, here=self._is_here)
        for node in [node for node, at in self._farewells.items() if at <= self.now]:
            del self._farewells[node]
            if node in self.others.links and not self.others.is_near(node) and not self.works_with(node):
                self.hang_up(node)

    def _is_here(self, node: NodeId) -> bool:
        return node in self.others.links or (node in self.view.held and not self.is_suspect(node))

    def _sweep(self) -> None:
        self._sweep_at = self.now + SWEEP * self._chance.between(0.9, 1.1)
        for node in self.view.older(STALE, self.now):
            if node not in self.others.links and not self.others.is_near(node):
                self.move(node, "fade")
                self.view.drop(node)
                self.out.append(ev.NodeGone(node))
        for node in self.view.expired(self.now):
            if node in self.others.peers:
                del self.view.graves[node]
            else:
                self.move(node, "expire")
        self.others.tidy(self.now)
        self._sought = {node: at for node, at in self._sought.items() if self.now - at < SOUGHT}
        for address in self.doors.overdue(self.now):
            self.failed(address, None)
        self._look_after_old()
        self._mesh()

    def _look_after_old(self) -> None:
        """Dial a node whose record should have been renewed by now: it is dead, or the mesh is in two parts."""
        old = self.view.older(FADING, self.now)
        quiet = [node for node in old if not self.is_spared(node) and self._addresses(node)]
        if quiet:
            node = self._chance.pick(quiet)
            self.dial(self._addresses(node), node)

    def _mesh(self) -> None:
        near, known = len(self.others.near), len(self.view.held)
        if near < self.settings.target:
            self._dial_strangers(near + 1)
        elif near > self.settings.target:
            self._trim()
        elif 2 * known >= 3 * self._meshed:
            self._meshed = known
            self._dial_strangers(near + 1)

    def check(self) -> None:
        """Raise `BugError` if a rule is broken."""
        check_circle(self.view, self.others, most=self.settings.high, now=self.now)
