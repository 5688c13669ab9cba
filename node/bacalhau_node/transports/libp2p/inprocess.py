"""Connections between hosts of one process: no sockets, no encryption, no muxer, the same streams above.

Theory of operation. A connection is two `Conn`s that know each other, a stream two `Stream`s; what one writes is
appended to the other's queue as it is. Who is at the other end needs no proof: both live in this process. A stream
that nobody reads takes `WINDOW` bytes, then its writer waits. Closing ends one direction, resetting both.
"""

from __future__ import annotations

from collections import deque
from typing import Self

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from bacalhau_node.transports.libp2p.waiting import Waiting

WINDOW = 256 * 1024
"""Bytes on their way within a stream, as with yamux."""


class _Pipe:
    """One direction of a stream: at most one task writes at a time, and one reads."""

    def __init__(self) -> None:
        self.ended = self.broken = False
        self._queue: deque[bytes] | None = None  # an empty one takes more than all else here, and most are empty
        self._held = 0
        self._reader, self._writer = Waiting(), Waiting()

    async def put(self, data: bytes) -> None:
        while self._held >= WINDOW and not self.ended and not self.broken:
            await self._writer.wait()
        if self.broken:
            raise MuxedStreamReset
        if self.ended:
            raise MuxedStreamClosed
        if data:
            if self._queue is None:
                self._queue = deque()
            self._queue.append(data)
            self._held += len(data)
            self._reader.wake()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def take(self, n: int | None) -> bytes:
        while not self._queue:
            if self.broken:
                raise MuxedStreamReset
            if self.ended:
                raise MuxedStreamEOF
            await self._reader.wait()
        data = self._queue.popleft()
        if n is not None and len(data) > n:
            self._queue.appendleft(data[n:])
            data = data[:n]
        if not self._queue:
            self._queue = None
        self._held -= len(data)
        if self._held < WINDOW:
            self._writer.wake()
        return data

    def end(self) -> None:
        """Nothing is written any more; what is in it can be read."""
        self.ended = True
        self._reader.wake()
        self._writer.wake()

    def break_off(self) -> None:
        """Nothing is written or read any more."""
        self.broken = True
        self._queue = None
        self.end()


class Stream(IMuxedStream):
    """One end of a stream."""

    def __init__(self, conn: Conn, *, inward: _Pipe, outward: _Pipe) -> None:
        self.muxed_conn, self._in, self._out = conn, inward, outward

    async def write(self, data: bytes) -> None:
        """Give `data` to the other end, once it has room."""
        await self._out.put(data)

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes, as soon as there are some; raises `MuxedStreamEOF` at the end."""
        return b"" if n == 0 else await self._in.take(n)

    async def close(self) -> None:
        """Write no more; the other end may go on."""
        self._out.end()

    async def reset(self) -> None:
        """Neither end reads or writes any more."""
        self._in.break_off()
        self._out.break_off()

    @property
    def over(self) -> bool:
        """Whether neither end writes any more."""
        return self._in.ended and self._out.ended

    def set_deadline(self, ttl: int) -> None:
        """Nothing: who waits here bounds its own time."""

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: there is no network in between."""
        return None

    async def __aenter__(self) -> Self:
        return self


class Conn(IMuxedConn):
    """One end of a connection; made by `connect`."""

    def __init__(self, peer_id: ID, *, initiator: bool) -> None:
        self.peer_id = peer_id
        self.other: Conn
        self._streams: list[Stream] = []
        self.event_started = trio.Event()
        self._initiator = initiator
        self._down = trio.Event()
        self._offered: list[Stream] = []  # few at any time, and an empty deque takes as much as two streams
        self._acceptor = Waiting()

    @property
    def is_initiator(self) -> bool:
        """Whether this end dialled."""
        return self._initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return not self.is_closed

    @property
    def is_closed(self) -> bool:
        """Whether either end closed it."""
        return self._down.is_set()

    async def start(self) -> None:
        """Live until it is closed."""
        self.event_started.set()
        await self._down.wait()

    async def open_stream(self) -> Stream:
        """A new stream, which the other end accepts."""
        if self.is_closed:
            raise MuxedConnUnavailable("the connection is closed")
        this_way, that_way = _Pipe(), _Pipe()
        self.other.offer(Stream(self.other, inward=that_way, outward=this_way))
        return self._keep(Stream(self, inward=this_way, outward=that_way))

    def offer(self, stream: Stream) -> None:
        """The other end has opened a stream."""
        self._offered.append(self._keep(stream))
        self._acceptor.wake()

    async def accept_stream(self) -> Stream:
        """The next stream that the other end opened."""
        while not self._offered:
            if self.is_closed:
                raise MuxedConnUnavailable("the connection is closed")
            await self._acceptor.wait()
        return self._offered.pop(0)

    async def close(self) -> None:
        """Close both ends, with all their streams."""
        await self._end()
        await self.other._end()  # noqa: SLF001 - the same class

    async def over(self) -> None:
        """Wait until it has ended."""
        await self._down.wait()

    async def _end(self) -> None:
        self._down.set()
        for stream in self._streams:
            await stream.reset()
        self._streams.clear()
        self._acceptor.wake()

    def _keep(self, stream: Stream) -> Stream:
        """Know of a stream as long as it lives."""
        self._streams = [one for one in self._streams if not one.over]
        self._streams.append(stream)
        return stream

    def get_transport_addresses(self) -> list[Multiaddr]:
        """None: it has no address on any network."""
        return []

    def get_connection_type(self) -> ConnectionType:
        """As direct as can be."""
        return ConnectionType.DIRECT


def connect(dialler: ID, listener: ID) -> tuple[Conn, Conn]:
    """A connection between two hosts: the dialler's end and the listener's."""
    here, there = Conn(listener, initiator=True), Conn(dialler, initiator=False)
    here.other, there.other = there, here
    return here, there
