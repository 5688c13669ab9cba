"""Yamux 1.0.0: many streams over one connection, as stock py-libp2p and go-libp2p speak it.

libp2p's own class reads each header and body by itself, sends a credit for every read, runs four tasks a connection,
and gives a writer up after five seconds without credit; a published message to 100 hosts over TCP then takes more
than ten times as long. Here one task reads whole buffers, frames that are written while another is on its way go out
together, credit goes back when half a window was read, and a writer waits as long as its stream lives.

The other end is not believed: a frame that breaks the rules (credit overrun, a stream opened twice or with the wrong
parity, more streams than `STREAMS`, an unknown type) ends the connection, and nothing else.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Self

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from multiaddr import Multiaddr
from noise.exceptions import NoiseInvalidMessage, NoiseMaxNonceError  # type: ignore[import-untyped]

from bacalhau_node.errors import ProtocolError
from bacalhau_node.transports.libp2p.streams import BROKEN
from bacalhau_node.transports.libp2p.waiting import Waiting

PROTOCOL = TProtocol("/yamux/1.0.0")
WINDOW = 256 * 1024
"""Bytes that a stream may have on their way: what the specification begins with."""

PIECE = 64 * 1024 - 64
"""Of a long write, so much goes into one frame: with its header and the cipher's tag it fits one noise message."""

BACKLOG = 1024 * 1024
"""Bytes that may wait for the connection to be written; whoever adds to more waits."""

PATIENCE = 4
"""So many times `BACKLOG` may wait of what nobody waits for: answers to pings, credit."""

STREAMS = 1_024
"""Streams that the other end may have open at once."""

DATA, CREDIT, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER = struct.Struct("!BBHII")


class Stream(IMuxedStream):
    """One stream of a connection."""

    def __init__(self, conn: Conn, number: int) -> None:
        self.muxed_conn, self._conn, self.number = conn, conn, number
        self.credit = WINDOW
        self._queue: deque[bytes] = deque()
        self._held = self._read = 0
        self._ended = self._closed = self._reset = False
        self._reader = Waiting()
        self._room = trio.Event()

    # --- for its users ---

    async def write(self, data: bytes) -> None:
        """Send all of `data`, as the other end gives credit."""
        done = 0
        while done < len(data):
            self._check_writable()
            if not self.credit:
                if self._room.is_set():
                    self._room = trio.Event()
                await self._room.wait()
                continue
            piece = data[done : done + min(self.credit, PIECE)]
            self.credit -= len(piece)
            done += len(piece)
            await self._conn.send(HEADER.pack(0, DATA, 0, self.number, len(piece)) + piece)

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes, as soon as there are some; raises `MuxedStreamEOF` at the end."""
        if n == 0:
            return b""
        while not self._queue:
            if self._reset:
                raise MuxedStreamReset
            if self._ended:
                raise MuxedStreamEOF
            await self._reader.wait()
        data = self._queue.popleft()
        if n is not None and len(data) > n:
            self._queue.appendleft(data[n:])
            data = data[:n]
        self._give_credit(len(data))
        return data

    async def close(self) -> None:
        """Write no more; the other end may go on."""
        if not self._closed:
            self._closed = True
            self._room.set()
            self._conn.tell(HEADER.pack(0, CREDIT, FIN, self.number, 0))
        if self._ended:
            self._conn.forget(self.number)

    async def reset(self) -> None:
        """Neither end reads or writes any more."""
        if not self._reset:
            self.broken()
            self._conn.forget(self.number)
            self._conn.tell(HEADER.pack(0, CREDIT, RST, self.number, 0))

    def set_deadline(self, ttl: int) -> None:
        """Nothing: who waits here bounds its own time."""

    def get_remote_address(self) -> tuple[str, int] | None:
        """The other end's IP address and port."""
        return self._conn.get_remote_address()

    async def __aenter__(self) -> Self:
        return self

    def _check_writable(self) -> None:
        if self._reset:
            raise MuxedStreamReset
        if self._closed:
            raise MuxedStreamClosed

    def _give_credit(self, size: int) -> None:
        self._held -= size
        self._read += size
        if self._read >= WINDOW // 2 and not self._ended:
            read, self._read = self._read, 0
            self._conn.tell(HEADER.pack(0, CREDIT, 0, self.number, read))

    # --- for the connection's reader ---

    def arrived(self, data: bytes) -> None:
        """More data; raises `ProtocolError` when it is more than was granted."""
        self._held += len(data)
        if self._held + self._read > WINDOW or self._ended:
            raise ProtocolError(f"more data on stream {self.number} than it had credit for")
        self._queue.append(data)
        self._reader.wake()

    def credited(self, size: int) -> None:
        """The other end has room for so much more."""
        self.credit += size
        self._room.set()

    def ended(self) -> None:
        """The other end writes no more."""
        self._ended = True
        self._reader.wake()
        if self._closed:
            self._conn.forget(self.number)

    def broken(self) -> None:
        """The other end, or the connection, is gone; what was not read is lost."""
        self._reset = self._ended = self._closed = True
        self._queue.clear()
        self._reader.wake()
        self._room.set()


class Conn(IMuxedConn):
    """A connection with streams on it. `blame` hears of a rule that the other end broke."""

    def __init__(
        self, conn: ISecureConn, peer_id: ID, *, blame: Callable[[ID, ProtocolError], None] | None = None
    ) -> None:
        self.secured_conn, self.peer_id = conn, peer_id
        self.event_started = trio.Event()
        self._blamed = blame
        self._initiator = conn.is_initiator
        self._next = 1 if conn.is_initiator else 2
        self._streams: dict[int, Stream] = {}
        self._down = trio.Event()
        self._offered: deque[Stream] = deque()
        self._acceptor = Waiting()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._writer = Waiting()
        self._drained = trio.Event()

    @property
    def is_initiator(self) -> bool:
        """Whether this end dialled."""
        return self._initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and not self.is_closed

    @property
    def is_closed(self) -> bool:
        """Whether it is over."""
        return self._down.is_set()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The other end's IP address and port."""
        return self.secured_conn.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The other end's address."""
        return list(self.secured_conn.get_transport_addresses())

    def get_connection_type(self) -> ConnectionType:
        """As the connection below says."""
        return self.secured_conn.get_connection_type()

    # --- streams ---

    async def open_stream(self) -> Stream:
        """A new stream, which the other end accepts."""
        if self.is_closed:
            raise MuxedConnUnavailable("the connection is closed")
        stream = self._streams[self._next] = Stream(self, self._next)
        self._next += 2
        await self.send(HEADER.pack(0, CREDIT, SYN, stream.number, 0))
        return stream

    async def accept_stream(self) -> Stream:
        """The next stream that the other end opened."""
        while not self._offered:
            if self.is_closed:
                raise MuxedConnUnavailable("the connection is closed")
            await self._acceptor.wait()
        return self._offered.popleft()

    def forget(self, number: int) -> None:
        """A stream is over on both ends."""
        self._streams.pop(number, None)

    async def close(self) -> None:
        """End the connection, and all its streams."""
        if self.is_closed:
            return
        self._down.set()
        for stream in list(self._streams.values()):
            stream.broken()
        self._streams.clear()
        self._acceptor.wake()
        self._writer.wake()
        self._drained.set()
        try:
            await self.secured_conn.close()
        except BROKEN:  # it was gone before
            return

    # --- writing ---

    async def send(self, frame: bytes) -> None:
        """Have a frame written, together with those that others add meanwhile; waits while too much is on its way."""
        while self._out_bytes > BACKLOG and not self.is_closed:
            await self._drained.wait()
        if self.is_closed:
            raise MuxedConnUnavailable("the connection is closed")
        self._add(frame)

    def tell(self, frame: bytes) -> None:
        """`send` without waiting: readers that wait for their writers could wait for each other."""
        if not self.is_closed:
            self._add(frame)
            if self._out_bytes > PATIENCE * BACKLOG:
                raise ProtocolError("it asks for answers and takes none")

    def _add(self, frame: bytes) -> None:
        self._out.append(frame)
        self._out_bytes += len(frame)
        self._writer.wake()

    async def _write_on(self) -> None:
        try:
            while not self.is_closed:
                if not self._out:
                    await self._writer.wait()
                    continue
                batch, self._out, self._out_bytes = b"".join(self._out), [], 0
                self._drained.set()
                self._drained = trio.Event()
                await self.secured_conn.write(batch)
        except BROKEN:
            await self.close()

    # --- reading ---

    async def start(self) -> None:
        """Read and write until the connection ends, whoever ends it; never raises."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_on)
            self.event_started.set()
            try:
                await self._read_on()
            except ProtocolError as error:
                self._blame(error)
            except (NoiseInvalidMessage, NoiseMaxNonceError) as error:
                self._blame(ProtocolError(f"a message that noise does not decrypt: {error}"))
            except BROKEN:
                pass  # the other end is gone
            finally:
                with trio.CancelScope(shield=True):
                    await self.close()

    async def over(self) -> None:
        """Wait until it has ended."""
        await self._down.wait()

    def _blame(self, error: ProtocolError) -> None:
        if self._blamed is not None:
            self._blamed(self.peer_id, error)

    async def _read_on(self) -> None:
        rest = b""
        while not self.is_closed:
            data = await self.secured_conn.read(None)
            if not data:
                return
            rest = self._take(rest + data if rest else data)

    def _take(self, data: bytes) -> bytes:
        """Act on every whole frame; what is left of the last one comes back."""
        at = 0
        while len(data) - at >= HEADER.size:
            version, kind, flags, number, length = HEADER.unpack_from(data, at)
            body = at + HEADER.size
            if version or kind > GO_AWAY or (kind == DATA and length > WINDOW):
                raise ProtocolError(f"not a yamux frame: version {version}, type {kind}, length {length}")
            if kind != DATA:
                at = body
                self._control(kind, flags, number, length)
            elif len(data) - body >= length:
                at = body + length
                self._stream_frame(flags, number, data=data[body:at])
            else:
                break
        return data[at:] if at else data

    def _control(self, kind: int, flags: int, number: int, length: int) -> None:
        if kind == CREDIT:
            self._stream_frame(flags, number, credit=length)
        elif kind == GO_AWAY:
            raise MuxedConnUnavailable("the other end closes the connection")
        elif flags & SYN:
            self.tell(HEADER.pack(0, PING, ACK, 0, length))

    def _stream_frame(self, flags: int, number: int, *, data: bytes = b"", credit: int = 0) -> None:
        if flags & SYN:
            self._opened(number)
        stream = self._streams.get(number)
        if stream is None:
            return  # it was reset here, and the other end did not know yet
        if data:
            stream.arrived(data)
        if credit:
            stream.credited(credit)
        if flags & RST:
            stream.broken()
            self.forget(number)
        elif flags & FIN:
            stream.ended()

    def _opened(self, number: int) -> None:
        """The other end has opened a stream."""
        if number in self._streams or number % 2 == self._next % 2 or not number:
            raise ProtocolError(f"stream {number} can't be opened by this end, or is open already")
        if len(self._streams) >= STREAMS:
            raise ProtocolError(f"more than {STREAMS} streams at once")
        stream = self._streams[number] = Stream(self, number)
        self._offered.append(stream)
        self._acceptor.wake()
        self.tell(HEADER.pack(0, CREDIT, ACK, number, 0))
