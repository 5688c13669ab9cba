"""What has come for one node: filled on the network's thread, emptied on the node's asyncio loop.

Each side writes its own counters and only reads those of the other, so there is no lock. A full inbox makes those who
fill it wait: the other end's stream fills up, and in the end its `send` waits.
"""

from __future__ import annotations

import asyncio
from collections import deque

import trio

from bacalhau_node.ports import Arrival, Packet
from bacalhau_node.protocol.events import LinkDown, LinkUp
from bacalhau_node.transports.libp2p.thread import NetworkThread

MESSAGES = 1_024
BYTES = 16 * 1024 * 1024
"""What may wait in one inbox: four messages of the largest size, or many small ones."""


class Inbox:
    """A bounded queue from many on one thread to one on the other. Made on the node's loop."""

    def __init__(self, thread: NetworkThread) -> None:
        self._thread, self._shore = thread, thread.shore()
        self._waiting: deque[Arrival] = deque()
        self._changed = asyncio.Event()
        self.closed = False
        self._came, self._came_bytes = 0, 0  # written by the network's thread
        self._went, self._went_bytes = 0, 0  # written by the loop
        self._starved = False
        self._room = trio.Event()

    # --- on the network's thread ---

    def tell(self, news: LinkUp | LinkDown) -> None:
        """Add news of a link, for which there is always room: there are few for each node."""
        self._waiting.append(news)
        self._shore.post(self._changed.set)

    async def put(self, packet: Packet) -> None:
        """Add a message as soon as there is room; a closed inbox keeps nothing."""
        while self._full() and not self.closed:
            self._starved = True
            if self._full():  # the loop may have taken the last one before it could see that somebody waits
                await self._room.wait()
        if self.closed:
            return
        self._came += 1
        self._came_bytes += len(packet.data)
        self._waiting.append(packet)
        self._shore.post(self._changed.set)

    def _full(self) -> bool:
        return self._came - self._went >= MESSAGES or self._came_bytes - self._went_bytes >= BYTES

    def _let_go(self) -> None:
        self._room.set()
        self._room = trio.Event()

    # --- on the loop ---

    async def get(self) -> Arrival | None:
        """Take the next thing out, as soon as there is one; None once the inbox is closed."""
        while not self._waiting and not self.closed:
            self._changed.clear()
            if not self._waiting:  # nothing came between the look and the clearing
                await self._changed.wait()
        if self.closed:
            return None
        arrival = self._waiting.popleft()
        if isinstance(arrival, Packet):
            self._went += 1
            self._went_bytes += len(arrival.data)
            if self._starved and not self._full():
                self._starved = False
                self._thread.post(self._let_go)
        return arrival

    def close(self) -> None:
        """Let go of the reader and of everybody who waits for room."""
        self.closed = True
        self._changed.set()
        self._thread.post(self._let_go)
