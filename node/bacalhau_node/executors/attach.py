"""One container's stdin, stdout and stderr as one upgraded HTTP connection on the asyncio loop.

Theory of operation. The stream must be opened before the container starts, or its first lines
are lost; and it must always be read: an unread one stops the container, and even its removal.
So every chunk is handed on at once and there is no buffer that could fill. The daemon sends
chunks with a head of 8 bytes: the channel, three zeros, the size in four bytes, big end first.
The `docker` package would give a blocking socket in a thread of its own: hence this.
"""

from __future__ import annotations

import asyncio
import socket
import traceback
from typing import TYPE_CHECKING, Final, cast

from bacalhau_node.errors import NodeUnreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HEAD: Final = 8
_MAX_ANSWER: Final = 64 * 1024
"""Longest answer to the request for the stream: a refusal with its text."""


class DaemonError(NodeUnreachable):
    """The daemon did not answer, or answered no. `status` is its HTTP status, 0 without an answer."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Stream(asyncio.Protocol):
    """One container's stdin, stdout and stderr over one upgraded connection.

    `receive(channel, data)` gets every chunk as it comes: channel 1 is stdout, 2 is stderr, and 0
    without data is the end. `ended` is set before, whoever ended the connection.
    """

    def __init__(self, receive: Callable[[int, bytes], None]) -> None:
        self._receive = receive
        self._buffer = bytearray()
        self._upgraded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport | None = None
        self.ended = asyncio.Event()

    async def open(self, request: bytes) -> None:
        """Ask for the upgrade and wait for the answer."""
        self.send(request)
        await self._upgraded

    def send(self, data: bytes) -> None:
        """Queue `data` for stdin; drops it after the end."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait while much is queued because the container does not read."""
        await self._writable.wait()

    def close(self) -> None:
        """End the connection; with `StdinOnce`, the container's stdin ends with it."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio calls this)."""
        self._transport = cast("asyncio.Transport", transport)

    def pause_writing(self) -> None:
        """The container reads slower than we write (asyncio calls this)."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The container has caught up (asyncio calls this)."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over (asyncio calls this)."""
        if not self._upgraded.done():
            self._upgraded.set_exception(
                DaemonError(f"the Docker daemon ended the attach request: {exc or 'no answer'}")
            )
        self._writable.set()
        self.ended.set()
        self._receive(0, b"")

    def data_received(self, data: bytes) -> None:
        """Hand on every whole chunk: 8 bytes of channel and size, then the data (asyncio calls this)."""
        self._buffer += data
        if not self._upgraded.done() and not self._read_head():
            return
        start = 0
        while len(self._buffer) - start >= _HEAD:
            size = int.from_bytes(self._buffer[start + 4 : start + _HEAD], "big")
            if len(self._buffer) - start - _HEAD < size:
                break
            self._receive(self._buffer[start], bytes(self._buffer[start + _HEAD : start + _HEAD + size]))
            start += _HEAD + size
        del self._buffer[:start]

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_ANSWER:
                self.close()
            return False
        status = self._buffer.split(b" ", 2)[1:2]
        if status in ([b"101"], [b"200"]):
            del self._buffer[: end + 4]
            self._upgraded.set_result(None)
            return True
        text = self._buffer[end + 4 :].decode(errors="replace").strip()
        self._upgraded.set_exception(DaemonError(f"the Docker daemon refused to attach: {text}"))
        self.close()
        return False


def reason(error: BaseException) -> str:
    """The system's own word for it, inside of what libraries wrap around: "Connection refused"."""
    *_, inner = _chain(error)
    return getattr(inner, "strerror", None) or str(error) or type(error).__name__


def let_go(error: BaseException) -> None:
    """Close the socket whose connect failed: the `docker` package leaves it open, in the hands of its error."""
    for each in _chain(error):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            left = frame.f_locals.get("sock") if frame.f_code.co_name == "connect" else None
            if isinstance(left, socket.socket):
                left.close()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and all that it came from, the first cause last."""
    while error is not None:
        yield error
        error = error.__context__
