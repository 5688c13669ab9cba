"""Nodes of one process, joined by queues: the transport of a kernel's own node, and of tests.

Theory of operation. A **hub** is the network: transports join it by their node's name. Every
transport has one inbox with room for `INBOX` messages; whoever sends to a full one waits, so
nothing is lost and memory stays bounded. For tests the hub can be told to be as bad as a real
network may be: to drop, repeat or reorder, at rates drawn from a seed, so a run can be had
again. Reordering takes a random one of the messages that wait, never a clock: no message is
held back.

A **link** is only known to its two ends: it is opened by the first message between them or by `dial`, whose address is
`/memory/NODE`. What was published goes to everybody on the hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import cast

from bacalhau_node.errors import BacalhauError, BugError, NodeUnreachable, SpecError
from bacalhau_node.ids import NodeId
from bacalhau_node.ports import Answering, Arrival, Packet, Waiting
from bacalhau_node.protocol.events import LinkDown, LinkUp

INBOX = 1_024
"""Messages that wait for one node before its senders wait. Each is at most `wire.MAX_MESSAGE`, most under 1 kB."""


ADDRESS = "/memory/"


class MemoryHub:
    """A network inside one event loop. `drop`, `repeat` and `reorder` are chances from 0 to 1 for each message."""

    def __init__(self, seed: int = 0, *, drop: float = 0.0, repeat: float = 0.0, reorder: float = 0.0) -> None:
        self.drop, self.repeat, self.reorder = drop, repeat, reorder
        self._random = random.Random(seed)  # noqa: S311 - faults that can be had again, no secret
        self._places: dict[NodeId, _Place] = {}

    def join(self, node: NodeId) -> _Place:
        """Open a place for `node`; raises `BugError` when its name is taken."""
        if node in self._places:
            raise BugError(f"two transports with the name {node} on one hub")
        place = self._places[node] = _Place()
        return place

    def leave(self, node: NodeId) -> None:
        """Close the place of `node`: what waits in it is lost, as with a process that ends."""
        if place := self._places.pop(node, None):
            for other in sorted(place.links):
                self._down(other, node)
            place.inbox.close()

    def nodes(self) -> list[NodeId]:
        """Everybody who has joined, sorted."""
        return sorted(self._places)

    def place(self, node: NodeId) -> _Place:
        """The place of a node; raises `NodeUnreachable` when it has none."""
        place = self._places.get(node)
        if place is None:
            raise NodeUnreachable(f"node {node} is not on this network")
        return place

    def link(self, one: NodeId, other: NodeId) -> None:
        """Open a link from one node to another, if there is none; raises `NodeUnreachable`."""
        here, there = self.place(one), self.place(other)
        if one != other and other not in here.links:
            here.links.add(other)
            there.links.add(one)
            here.inbox.tell(LinkUp(other, inbound=False))
            there.inbox.tell(LinkUp(one, inbound=True))

    def cut(self, one: NodeId, other: NodeId) -> None:
        """Close the link between two nodes, if there is one."""
        self._down(one, other)
        self._down(other, one)

    def _down(self, node: NodeId, gone: NodeId) -> None:
        place = self._places.get(node)
        if place is not None and gone in place.links:
            place.links.remove(gone)
            place.inbox.tell(LinkDown(gone))

    async def deliver(self, sender: NodeId, to: NodeId, data: bytes) -> None:
        """Put a message into the inbox of `to`, as often as chance says; raises `NodeUnreachable` if there is none."""
        inbox = self.place(to).inbox
        times = 0 if self._chance(self.drop) else 2 if self._chance(self.repeat) else 1
        for _ in range(times):
            await inbox.put(Packet(sender, data))

    def pick(self, waiting: int) -> int:
        """Which of so many waiting messages comes next."""
        return self._random.randrange(waiting) if self._chance(self.reorder) else 0

    def _chance(self, rate: float) -> bool:
        return rate > 0 and self._random.random() < rate


class _Inbox:
    """A bounded queue with one reader."""

    def __init__(self) -> None:
        self._waiting: deque[Arrival] = deque()
        self._room = asyncio.Semaphore(INBOX)
        self._changed = asyncio.Event()
        self._closed = False

    def tell(self, news: LinkUp | LinkDown) -> None:
        """Add news of a link, which has always room: there are at most two for each message or node."""
        if not self._closed:
            self._waiting.append(news)
            self._changed.set()

    async def put(self, packet: Packet) -> None:
        """Add a message, as soon as there is room; a closed inbox keeps nothing."""
        await self._room.acquire()
        if self._closed:
            self._room.release()  # the next sender that waits is let go as well
            return
        self._waiting.append(packet)
        self._changed.set()

    async def get(self, hub: MemoryHub) -> Arrival | None:
        """Take something out, as soon as there is something; None once the inbox is closed."""
        while not self._waiting and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        if self._closed:
            return None
        index = hub.pick(len(self._waiting))
        if not isinstance(self._waiting[index], Packet):
            index = 0  # news of links keep their order
        arrival = self._waiting[index]
        del self._waiting[index]
        if isinstance(arrival, Packet):
            self._room.release()
        return arrival

    def close(self) -> None:
        """Let go of the reader and of every sender."""
        self._closed = True
        self._waiting.clear()
        self._changed.set()
        self._room.release()


class _Place:
    """What the hub holds of one node."""

    def __init__(self) -> None:
        self.inbox = _Inbox()
        self.links: set[NodeId] = set()
        self.handler: Answering | None = None


class MemoryTransport:
    """One node's place on a hub, from its making to `close`."""

    def __init__(self, hub: MemoryHub, node: NodeId) -> None:
        self._hub, self._node = hub, node
        self._place: _Place | None = hub.join(node)

    @property
    def node(self) -> NodeId:
        """The name that others see as the author of what is sent here."""
        return self._node

    def addresses(self) -> Sequence[str]:
        """The one address of this node on its hub."""
        return [] if self._place is None else [f"{ADDRESS}{self._node}"]

    @property
    def dropped(self) -> int:
        """None: all that comes is taken, in its time."""
        return 0

    @property
    def waiting(self) -> Waiting:
        """Nothing: senders wait themselves."""
        return Waiting()

    async def send(self, to: NodeId, data: bytes) -> None:
        """Wait for room in the inbox of `to` and put `data` there; raises `NodeUnreachable` if it isn't there."""
        self._check_open()
        self._hub.link(self._node, to)
        await self._hub.deliver(self._node, to, data)

    async def publish(self, data: bytes) -> None:
        """Put `data` into the inbox of everybody else on the hub."""
        self._check_open()
        for node in self._hub.nodes():
            if node != self._node:
                with contextlib.suppress(NodeUnreachable):  # it left while others had no room
                    await self._hub.deliver(self._node, node, data)

    async def received(self) -> AsyncIterator[Arrival]:
        """What comes, until `close`."""
        while self._place is not None and (arrival := await self._place.inbox.get(self._hub)) is not None:
            yield arrival

    def peers(self) -> Sequence[NodeId]:
        """Nodes to which there is a link, sorted; nobody after `close`."""
        return [] if self._place is None else sorted(self._place.links)

    def host_of(self, node: NodeId) -> str:  # noqa: ARG002 - the port's
        """None: all are in this process."""
        return ""

    async def dial(self, address: str) -> NodeId:
        """Open a link to `/memory/NODE` on the same hub."""
        self._check_open()
        if not address.startswith(ADDRESS):
            raise SpecError(f"{address}: not an address of this network, which has {ADDRESS}NODE")
        node = address.removeprefix(ADDRESS)
        self._hub.link(self._node, node)
        return node

    def learn(self, node: NodeId, addresses: Sequence[str]) -> None:
        """Nothing to remember: the hub knows everybody."""

    async def hang_up(self, node: NodeId) -> None:
        """Close the link to `node`."""
        self._hub.cut(self._node, node)

    def serve(self, handler: Answering) -> None:
        """Answer requests by `handler`."""
        if self._place is not None:
            self._place.handler = handler

    async def request(self, to: NodeId, question: bytes) -> AsyncIterator[bytes]:
        """The answer of the other's handler; `NodeUnreachable` when it has none, leaves, or raises."""
        self._check_open()
        self._hub.link(self._node, to)
        place = self._hub.place(to)
        if place.handler is None:
            raise NodeUnreachable(f"node {to} answers no requests")
        try:
            async with contextlib.aclosing(
                cast("AsyncGenerator[bytes, None]", place.handler(self._node, question))
            ) as parts:
                async for part in parts:
                    yield part
                    self._hub.place(to)
        except BacalhauError as error:
            raise NodeUnreachable(f"node {to} broke its answer off: {error}") from error

    async def close(self) -> None:
        """Leave the hub; closing twice is closing once."""
        if self._place is not None:
            self._place = None
            self._hub.leave(self._node)

    def _check_open(self) -> None:
        if self._place is None:
            raise NodeUnreachable(f"this node, {self._node}, has left the network")
