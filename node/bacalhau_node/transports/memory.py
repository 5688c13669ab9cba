"""Nodes of one process, joined by queues: the transport of a kernel's own node, and of tests.

Theory of operation. A **hub** is the network: transports join it by their node's name. Every
transport has one inbox with room for `INBOX` messages; whoever sends to a full one waits, so
nothing is lost and memory stays bounded. For tests the hub can be told to be as bad as a real
network may be: to drop, repeat or reorder, at rates drawn from a seed, so a run can be had
again. Reordering takes a random one of the messages that wait, never a clock: no message is
held back.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Sequence

from bacalhau_node.errors import BugError, NodeUnreachable
from bacalhau_node.ids import NodeId

INBOX = 1_024
"""Messages that wait for one node before its senders wait. Each is at most `wire.MAX_MESSAGE`, most under 1 kB."""


class MemoryHub:
    """A network inside one event loop. `drop`, `repeat` and `reorder` are chances from 0 to 1 for each message."""

    def __init__(self, seed: int = 0, *, drop: float = 0.0, repeat: float = 0.0, reorder: float = 0.0) -> None:
        self.drop, self.repeat, self.reorder = drop, repeat, reorder
        self._random = random.Random(seed)  # noqa: S311 - faults that can be had again, no secret
        self._inboxes: dict[NodeId, _Inbox] = {}

    def join(self, node: NodeId) -> _Inbox:
        """Open an inbox for `node`; raises `BugError` when its name is taken."""
        if node in self._inboxes:
            raise BugError(f"two transports with the name {node} on one hub")
        inbox = self._inboxes[node] = _Inbox()
        return inbox

    def leave(self, node: NodeId) -> None:
        """Close the inbox of `node`: what waits in it is lost, as with a process that ends."""
        if inbox := self._inboxes.pop(node, None):
            inbox.close()

    def nodes(self) -> list[NodeId]:
        """Everybody who has joined, sorted."""
        return sorted(self._inboxes)

    async def deliver(self, sender: NodeId, to: NodeId, data: bytes) -> None:
        """Put a message into the inbox of `to`, as often as chance says; raises `NodeUnreachable` if there is none."""
        inbox = self._inboxes.get(to)
        if inbox is None:
            raise NodeUnreachable(f"node {to} is not on this network")
        times = 0 if self._chance(self.drop) else 2 if self._chance(self.repeat) else 1
        for _ in range(times):
            await inbox.put((sender, data))

    def pick(self, waiting: int) -> int:
        """Which of so many waiting messages comes next."""
        return self._random.randrange(waiting) if self._chance(self.reorder) else 0

    def _chance(self, rate: float) -> bool:
        return rate > 0 and self._random.random() < rate


class _Inbox:
    """A bounded queue with one reader."""

    def __init__(self) -> None:
        self._messages: deque[tuple[NodeId, bytes]] = deque()
        self._room = asyncio.Semaphore(INBOX)
        self._changed = asyncio.Event()
        self._closed = False

    async def put(self, message: tuple[NodeId, bytes]) -> None:
        """Add a message, as soon as there is room; a closed inbox keeps nothing."""
        await self._room.acquire()
        if self._closed:
            self._room.release()  # the next sender that waits is let go as well
            return
        self._messages.append(message)
        self._changed.set()

    async def get(self, hub: MemoryHub) -> tuple[NodeId, bytes] | None:
        """Take a message out, as soon as there is one; None once the inbox is closed."""
        while not self._messages and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        if self._closed:
            return None
        index = hub.pick(len(self._messages))
        message = self._messages[index]
        del self._messages[index]
        self._room.release()
        return message

    def close(self) -> None:
        """Let go of the reader and of every sender."""
        self._closed = True
        self._messages.clear()
        self._changed.set()
        self._room.release()


class MemoryTransport:
    """One node's place on a hub, from its making to `close`."""

    def __init__(self, hub: MemoryHub, node: NodeId) -> None:
        self._hub, self._node = hub, node
        self._inbox: _Inbox | None = hub.join(node)

    @property
    def node(self) -> NodeId:
        """The name that others see as the author of what is sent here."""
        return self._node

    async def send(self, to: NodeId, data: bytes) -> None:
        """Wait for room in the inbox of `to` and put `data` there; raises `NodeUnreachable` if it isn't there."""
        if self._inbox is None:
            raise NodeUnreachable(f"this node, {self._node}, has left the network")
        await self._hub.deliver(self._node, to, data)

    async def received(self) -> AsyncIterator[tuple[NodeId, bytes]]:
        """(author, bytes) as they come, until `close`."""
        while self._inbox is not None and (message := await self._inbox.get(self._hub)) is not None:
            yield message

    def peers(self) -> Sequence[NodeId]:
        """Everybody else on the hub, sorted; nobody after `close`."""
        return [] if self._inbox is None else [node for node in self._hub.nodes() if node != self._node]

    async def close(self) -> None:
        """Leave the hub; closing twice is closing once."""
        if self._inbox is not None:
            self._inbox = None
            self._hub.leave(self._node)
