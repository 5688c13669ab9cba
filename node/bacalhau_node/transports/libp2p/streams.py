"""Bytes below the protocols: a buffered socket, frames cut out of a stream, and the choice of a stream's protocol.

The choice is multistream-select 1.0.0 as everybody speaks it, done here because libp2p's own reads lines of any
length and raises on some garbage; the proposal goes out in one write with the handshake.
"""

from __future__ import annotations

import socket
from collections.abc import Collection

import trio
from libp2p.abc import IMuxedStream
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.utils.varint import encode_varint_prefixed

from bacalhau_node.errors import ProtocolError

BROKEN = (BaseLibp2pError, trio.BrokenResourceError, trio.ClosedResourceError, OSError)
"""What reading and writing raise when a connection or stream is gone."""

CHUNK = 64 * 1024
HANDSHAKE_BYTES = 256 * 1024
"""What a connection may send before it has proven who it is: noise and its negotiation need a few kB."""

DEAD_SECONDS = 30
"""A TCP connection whose other end acknowledges nothing for so long is dead."""

MULTISTREAM = b"/multistream/1.0.0"
LINE = 1024
LINES = 20
"""A proposal is at most so long, and a peer may make so many on one stream."""


class Socket(ReadWriteCloser):
    """A TCP connection with a read buffer, which trusts the other end with `HANDSHAKE_BYTES` until `trusted`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""
        self._allowance: int | None = HANDSHAKE_BYTES
        _detect_death(stream)

    def trusted(self) -> None:
        """The handshake is over: what comes is read as long as it comes."""
        self._allowance = None

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes, or what there is; `b""` at the end."""
        if not self._buffer:
            self._buffer = await self._receive()
        if n is None or n >= len(self._buffer):
            data, self._buffer = self._buffer, b""
        else:
            data, self._buffer = self._buffer[:n], self._buffer[n:]
        return data

    async def _receive(self) -> bytes:
        try:
            data = bytes(await self._stream.receive_some(CHUNK))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(str(error), transport="tcp") from error
        if self._allowance is not None:
            self._allowance -= len(data)
            if self._allowance < 0:
                raise ConnectionClosedError(f"sent more than {HANDSHAKE_BYTES} bytes before it said who it is")
        return data

    async def write(self, data: bytes) -> None:
        """Write all of it."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(str(error), transport="tcp") from error

    async def close(self) -> None:
        """Close both directions."""
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The other end's IP address and port."""
        try:
            host, port, *_ = self._stream.socket.getpeername()
        except OSError:
            return None
        return str(host), int(port)


def _detect_death(stream: trio.SocketStream) -> None:
    """Have the kernel notice an end that is gone without a word."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", DEAD_SECONDS // 2),
        ("TCP_KEEPINTVL", DEAD_SECONDS // 6),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", DEAD_SECONDS * 1000),
    ):
        if option := getattr(socket, name, None):  # Linux has them all
            stream.setsockopt(socket.IPPROTO_TCP, option, value)


class Frames:
    """Cuts frames out of a stream: four bytes of length, then so many bytes."""

    def __init__(self, stream: IMuxedStream, *, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._buffer = bytearray()

    async def next(self) -> bytes | None:
        """The next frame; None when the stream ends between two. Raises `ProtocolError` when it ends or goes wrong."""
        if not await self._fill(4):
            return None
        size = int.from_bytes(self._buffer[:4], "big")
        if size > self._limit:
            raise ProtocolError(f"a frame of {size} bytes, where {self._limit} are allowed")
        if not await self._fill(4 + size):
            raise ProtocolError(f"a frame of {size} bytes that ended after {len(self._buffer) - 4}")
        frame = bytes(memoryview(self._buffer)[4 : 4 + size])
        if len(self._buffer) == 4 + size:
            self._buffer = bytearray()  # a link is mostly idle: it need not hold the memory of its last frame
        else:
            del self._buffer[: 4 + size]
        return frame

    async def _fill(self, size: int) -> bool:
        """Have `size` bytes in the buffer; False when the stream ends before the first of them."""
        while len(self._buffer) < size:
            data = await read(self._stream)
            if not data:
                if self._buffer and size == 4:
                    raise ProtocolError(f"a stream that ended within a frame's length, after {len(self._buffer)} bytes")
                return False
            self._buffer += data
        return True


def frame(data: bytes) -> bytes:
    """`data` as a frame."""
    return len(data).to_bytes(4, "big") + data


async def read(stream: IMuxedStream) -> bytes:
    """What there is, at most `CHUNK` bytes; `b""` at the end of the stream."""
    try:
        return bytes(await stream.read(CHUNK))
    except EOFError:
        return b""


# --- which protocol a stream speaks ---


async def propose(stream: IMuxedStream, protocol: str) -> bool:
    """Ask for `protocol` on a stream that we opened; whether the other end speaks it."""
    await stream.write(_line(MULTISTREAM) + _line(protocol.encode()))
    if await _read_line(stream) != MULTISTREAM:
        raise ProtocolError("a stream that does not begin with multistream-select")
    return await _read_line(stream) == protocol.encode()


async def agree(stream: IMuxedStream, protocols: Collection[str]) -> str | None:
    """Let the other end, which opened the stream, choose one of `protocols`; None when it leaves without one."""
    await stream.write(_line(MULTISTREAM))
    if await _read_line(stream) != MULTISTREAM:
        raise ProtocolError("a stream that does not begin with multistream-select")
    for _ in range(LINES):
        wanted = await _read_line(stream)
        if not wanted:
            return None
        name = wanted.decode("utf-8", "replace")
        if name in protocols:
            await stream.write(_line(wanted))
            return name
        await stream.write(_listing(protocols) if name == "ls" else _line(b"na"))
    raise ProtocolError(f"a stream with more than {LINES} proposals")


def _line(text: bytes) -> bytes:
    return encode_varint_prefixed(text + b"\n")


def _listing(protocols: Collection[str]) -> bytes:
    return encode_varint_prefixed(b"".join(_line(name.encode()) for name in protocols) + b"\n")


async def _read_line(stream: IMuxedStream) -> bytes:
    """One line without its end; `b""` when the stream ends instead."""
    size = shift = 0
    while True:
        byte = await _exactly(stream, 1)
        if not byte:
            return b""
        size |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            break
        if shift > 14:
            raise ProtocolError("a protocol's name without end")
    if not 0 < size <= LINE:
        raise ProtocolError(f"a protocol's name of {size} bytes, where {LINE} are allowed")
    return (await _exactly(stream, size)).removesuffix(b"\n")


async def _exactly(stream: IMuxedStream, size: int) -> bytes:
    """So many bytes; fewer when the stream ends."""
    data = b""
    while len(data) < size:
        try:
            more = bytes(await stream.read(size - len(data)))
        except EOFError:
            break
        if not more:
            break
        data += more
    return data
