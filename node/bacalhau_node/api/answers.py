"""Between handlers and HTTP: bodies with limits, streams that can't be held up, errors with their class."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Self, TypeVar

import msgspec
from aiohttp import web

from bacalhau_node.api import shapes
from bacalhau_node.api.metrics import Traffic
from bacalhau_node.errors import (
    BacalhauError,
    BugError,
    ContentError,
    NoCapacity,
    NodeUnreachable,
    ProtocolError,
    SpecError,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

IDLE_SECONDS = 30.0
"""How long a client may send or take nothing in the middle of a request."""

SLOWEST, STEP = 120.0, 128 * 1024
"""Seconds in which so many bytes of a body have to come, or the rest: one that drips would hold a turn for ever."""

TRAFFIC = web.AppKey("traffic", Traffic)

_STATUS: tuple[tuple[type[BacalhauError], int], ...] = (
    (SpecError, 400),
    (ProtocolError, 400),
    (ContentError, 422),
    (NoCapacity, 503),
    (NodeUnreachable, 503),
)


class Refused(Exception):
    """An answer other than the usual one for its error: `status`, and the error to tell."""

    def __init__(self, status: int, error: BacalhauError, **headers: str) -> None:
        super().__init__(str(error))
        self.status, self.error, self.headers = status, error, headers


def answer(value: object, *, status: int = 200) -> web.Response:
    """`value` as JSON."""
    return web.Response(body=shapes.encode(value), status=status, content_type="application/json")


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as JSON with its class; what nobody foresaw is logged, and told without its insides."""
    try:
        return await handler(request)
    except Refused as refused:
        return _told(refused.status, refused.error, refused.headers)
    except BugError as error:
        return _bug(request, error)
    except BacalhauError as error:
        return _told(next(status for kind, status in _STATUS if isinstance(error, kind)), error)
    except web.HTTPException as error:
        return _told(error.status, SpecError(f"{request.method} {request.path}: {error.reason}"))
    except ConnectionError:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary to a stranger's connection, as a task's is in the engine
        return _bug(request, error)


def _bug(request: web.Request, error: Exception) -> web.Response:
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    body = shapes.ErrorBody("BugError", f"the node failed at {request.method} {request.path}; its log says why")
    return answer(body, status=500)


def _told(status: int, error: BacalhauError, headers: Mapping[str, str] | None = None) -> web.Response:
    response = answer(shapes.ErrorBody(type(error).__name__, str(error)), status=status)
    response.headers.update(headers or {})
    if response.headers.get("Connection") == "close":
        response.force_close()
    return response


# --- bodies ---


async def body(request: web.Request, *, limit: int) -> AsyncIterator[bytes]:
    """The request's bytes as they come; raises for too many of them, and for a sender that stops, or only drips."""
    clock, total = asyncio.get_running_loop().time, 0
    mark, latest = STEP, clock() + SLOWEST
    if request.content_length is not None and request.content_length > limit:
        raise Refused(413, SpecError(f"a body of {request.content_length} bytes: at most {limit} are taken"))
    while True:
        try:
            async with asyncio.timeout_at(min(clock() + IDLE_SECONDS, latest)):
                data = await request.content.readany()
        except TimeoutError as error:
            why = f"nothing came for {IDLE_SECONDS:.0f} s, or under {STEP} bytes in {SLOWEST:.0f} s"
            raise Refused(408, ProtocolError(why)) from error
        if not data:
            return
        total += len(data)
        if total >= mark:
            mark, latest = total + STEP, clock() + SLOWEST
        request.app[TRAFFIC].received += len(data)
        if total > limit:
            raise Refused(413, SpecError(f"a body of over {limit} bytes"))
        yield data


async def read(request: web.Request, kind: type[T]) -> tuple[T, bytes]:
    """The `kind` in the request's JSON, and that JSON; raises `SpecError` saying which part is wrong."""
    data = b"".join([part async for part in body(request, limit=shapes.MAX_JSON)])
    try:
        return shapes.decode(data, kind), data
    except msgspec.ValidationError as error:
        raise SpecError(f"the request's body is not what is wanted here: {error}") from error
    except msgspec.DecodeError as error:
        raise SpecError(f"the request's body is not JSON: {error}") from error


# --- streams ---


class Stream:
    """An answer of unknown length. Whoever takes nothing for `IDLE_SECONDS`, or an error, cuts the connection.

    A cut is how the receiver learns that it hasn't got all: a whole answer ends properly.
    """

    def __init__(self, request: web.Request, *, status: int = 200, headers: Mapping[str, str]) -> None:
        self._request = request
        self.response = web.StreamResponse(status=status, headers=headers)

    async def __aenter__(self) -> Self:
        await self.response.prepare(self._request)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            with contextlib.suppress(ConnectionError):  # whoever has all of it may go before it is told so
                await self.response.write_eof()
            return False
        if self._request.transport is not None:
            self._request.transport.abort()
        if isinstance(error, ConnectionError):
            return True  # the receiver is gone: it resumes or it doesn't, and nobody here is at fault
        if not isinstance(error, asyncio.CancelledError):
            log.warning("%s %s was cut off: %s", self._request.method, self._request.path, error)
        return False

    async def send(self, data: bytes) -> None:
        """Send a part, as soon as the receiver has taken most of what came before."""
        self._request.app[TRAFFIC].sent += len(data)
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                await self.response.write(data)
        except TimeoutError as error:
            raise ConnectionResetError(f"nothing was taken for {IDLE_SECONDS:.0f} s") from error
