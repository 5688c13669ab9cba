"""A link: the one stream on which two nodes exchange messages, kept open as long as their connection lives.

Theory of operation. Whoever dials opens the stream. Each end begins with a **hello**: a proof that it knows the key of
the network, made for just these two nodes, so it is of no use to anybody else; the keys of the nodes themselves were
proven by the connection. The dialler's comes first, and whoever finds a wrong one closes the connection. Then come
messages in both directions, each a frame. What is sent waits in a queue of `QUEUE` bytes; a full one makes senders
wait, and an inbox that is full stops the reader, so the other end's queue fills.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedStream

from bacalhau_node.errors import ProtocolError
from bacalhau_node.ids import NodeId
from bacalhau_node.ports import Packet
from bacalhau_node.transports.libp2p.streams import BROKEN, CHUNK, Frames, frame, read
from bacalhau_node.transports.libp2p.waiting import Waiting
from bacalhau_node.wire import MAX_MESSAGE

if TYPE_CHECKING:
    from bacalhau_node.transports.libp2p.inbox import Inbox

PROTOCOL = "/bacalhau-jupyter/link/1"
QUEUE = 1024 * 1024
"""Bytes that wait for one link: a few results, or thousands of heartbeats."""

FAREWELL_SECONDS = 1.0
"""For the other end to read what was sent before an end left."""

ANSWERS = 32
"""Requests of the other end that are answered at once; more wait."""

HELLO = b"bj1"
REFUSAL = b"another network"
STRANGER = "it belongs to another network: its network key is not ours"


class Link:
    """One end of a link, once both hellos were exchanged."""

    def __init__(self, node: NodeId, stream: IMuxedStream, frames: Frames, *, inbound: bool) -> None:
        self.node, self.conn, self.inbound = node, stream.muxed_conn, inbound
        self.host = (stream.get_remote_address() or ("", 0))[0].partition("%")[0]
        """The IP address of the other end; "" within this process."""
        self._stream, self._frames = stream, frames
        self._queue: deque[bytes] = deque()
        self.queued = 0
        self._writer = Waiting()
        self._room = trio.Event()
        self._scope = trio.CancelScope()
        self.answers = trio.CapacityLimiter(ANSWERS)
        self.ended = trio.Event()
        self._leaving = False

    @property
    def full(self) -> bool:
        """Whether senders have to wait."""
        return self.queued >= QUEUE

    def add(self, data: bytes) -> None:
        """Send a message after those that wait already."""
        self._queue.append(frame(data))
        self.queued += len(data)
        self._writer.wake()

    async def room(self) -> None:
        """Wait until it is no longer full, or has ended."""
        while self.full and not self.ended.is_set():
            await self._room.wait()

    async def run(self, inbox: Inbox, heard: Callable[[], None]) -> None:
        """Carry messages until either end closes; `heard` is called for each that came.

        Raises `ProtocolError` when the other end breaks the rules.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_on)
                    fault = await self._read_on(inbox, heard)
                    nursery.cancel_scope.cancel()
                if fault is not None:
                    raise fault
        finally:
            self.ended.set()
            self._room.set()

    def close(self) -> None:
        """End it at once; what still waits is lost."""
        self._scope.cancel()

    async def leave(self) -> None:
        """Send what waits, and end it when the other end has read it, or does not care to."""
        self._leaving = True
        self._writer.wake()
        with trio.move_on_after(FAREWELL_SECONDS):
            await self.ended.wait()
            return
        self.close()
        await self.ended.wait()

    async def _read_on(self, inbox: Inbox, heard: Callable[[], None]) -> ProtocolError | None:
        try:
            while (data := await self._frames.next()) is not None:
                heard()
                await inbox.put(Packet(self.node, data))
        except ProtocolError as error:
            return error
        except BROKEN:
            return None
        return None

    async def _write_on(self) -> None:
        try:
            while True:
                if self._queue:
                    await self._stream.write(self._batch())
                elif self._leaving:
                    await self._stream.close()
                    return
                else:
                    await self._writer.wait()
        except BROKEN:
            self._scope.cancel()

    def _batch(self) -> bytes:
        """What waits, up to a chunk or one message."""
        parts = [self._queue.popleft()]
        size = len(parts[0])
        while self._queue and size + len(self._queue[0]) <= CHUNK:
            parts.append(self._queue.popleft())
            size += len(parts[-1])
        was_full = self.full
        self.queued -= size - 4 * len(parts)
        if was_full and not self.full:
            self._room.set()
            self._room = trio.Event()
        return b"".join(parts)


class Greeter:
    """Makes and checks the hellos of one node."""

    def __init__(self, node: NodeId, network_key: str) -> None:
        self._node = node
        self._key = hashlib.sha256(b"bacalhau-jupyter network\n" + network_key.encode()).digest()

    async def dialled(self, stream: IMuxedStream, other: NodeId) -> Frames:
        """Exchange hellos on a stream that this end opened; raises `ProtocolError` when they don't fit."""
        await stream.write(frame(self._hello(self._node, other)))
        return await self._checked(stream, other)

    async def answered(self, stream: IMuxedStream, other: NodeId) -> Frames:
        """Check the hello of an end that dialled; the answer is up to `accept`, unless it is a refusal."""
        try:
            return await self._checked(stream, other)
        except ProtocolError:
            await stream.write(frame(REFUSAL))
            await stream.close()
            with trio.move_on_after(FAREWELL_SECONDS), contextlib.suppress(*BROKEN):
                await read(stream)  # until it has read the refusal and closed the connection
            raise

    async def accept(self, stream: IMuxedStream, other: NodeId) -> None:
        """Send this end's hello: from now on the other may send messages."""
        await stream.write(frame(self._hello(self._node, other)))

    async def _checked(self, stream: IMuxedStream, other: NodeId) -> Frames:
        frames = Frames(stream, limit=MAX_MESSAGE)
        hello = await frames.next()
        if hello is None:
            raise ProtocolError("it closed the connection instead of saying hello")
        if hello == REFUSAL:
            raise ProtocolError(STRANGER)
        if not hello.startswith(HELLO):
            raise ProtocolError(f"it did not say hello but {hello[:20]!r}")
        if not hmac.compare_digest(hello, self._hello(other, self._node)):
            raise ProtocolError(STRANGER)
        return frames

    def _hello(self, speaker: NodeId, hearer: NodeId) -> bytes:
        return HELLO + hmac.digest(self._key, f"{speaker}\n{hearer}".encode(), "sha256")
