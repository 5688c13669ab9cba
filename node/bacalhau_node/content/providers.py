"""Those who may have content: trustless gateways over HTTP, and nodes over the network's streams.

Nothing is checked here but that an answer is one: what is in it is believed by nobody (see `fetch`). An
`HttpProvider` keeps a connection open only while something is asked, so it need not be closed; whoever has a
session of their own (with a guard, a proxy, connections that stay open) passes it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import quote, urlsplit

import msgspec

from bacalhau_node.cid import Cid
from bacalhau_node.content.gateway import GOOD, NOT_HERE, Question
from bacalhau_node.content.reader import MAX_BLOCK
from bacalhau_node.errors import ContentError, NodeUnreachable, SpecError
from bacalhau_node.ids import NodeId
from bacalhau_node.ports import Scope, Transport

if TYPE_CHECKING:
    import aiohttp

_CAR, _RAW = "application/vnd.ipld.car", "application/vnd.ipld.raw"
_ACCEPT = {_CAR: f"{_CAR}; version=1; order=dfs; dups=n", _RAW: _RAW}
_PART: Final = 1024 * 1024
_MAX_TEXT: Final = 1000
"""Characters of an error that are shown."""

_REFUSED = frozenset((400, 401, 403, 404, 406, 410, 412, 451))
"""Answers that say that asking again is of no use."""


class HttpProvider:
    """A trustless gateway at `url` (`http://host:port`), with a capability if need be.

    `session`: used in place of an own one, and not closed. `sockets`: makes the socket for each address that an own
    one dials, or refuses (`sources.guard.Guard.socket`): for addresses that strangers name.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        session: aiohttp.ClientSession | None = None,
        sockets: Callable[[tuple[Any, ...]], socket.socket] | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise SpecError(f"{url!r:.300} is not the address of a gateway: write http://host or https://host")
        self._url, self._token, self._session, self._sockets = url.rstrip("/"), token, session, sockets
        self.name = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")
        self._own: aiohttp.ClientSession | None = None
        self._users = 0

    async def car(self, root: Cid, *, path: str = "", scope: Scope = "all") -> AsyncIterator[bytes]:
        """See `ports.Provider`."""
        below = f"/{quote(path.strip('/'), errors='surrogateescape')}" if path.strip("/") else ""
        async with self._asked(f"/ipfs/{root}{below}?format=car&dag-scope={scope}", _CAR) as response:
            async for part, _ in response.content.iter_chunks():  # as they came: nothing is copied together
                yield part

    async def block(self, cid: Cid, *, root: Cid) -> bytes:
        """See `ports.Provider`."""
        below = f"&root={root}" if root != cid else ""
        async with self._asked(f"/ipfs/{cid}?format=raw{below}", _RAW) as response:
            found = bytearray()
            async for part in response.content.iter_chunked(_PART):
                found += part
                if len(found) > MAX_BLOCK:
                    break
            return bytes(found)

    @contextlib.asynccontextmanager
    async def _asked(self, where: str, kind: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """The good answer to a request; raises `ContentError` for another one, `NodeUnreachable` when it breaks."""
        import aiohttp  # noqa: PLC0415 - an extra, and slow to import: only for who asks over HTTP
        from yarl import URL  # noqa: PLC0415

        headers = {"Accept": _ACCEPT[kind], "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            async with (
                self._opened() as session,
                session.get(
                    URL(f"{self._url}{where}", encoded=True),
                    headers=headers,
                    allow_redirects=self._token is None and self._session is None,  # a session may send a key
                    max_redirects=3,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                ) as response,
            ):
                self._check(response, kind)
                yield response
        except (aiohttp.ClientError, OSError) as error:
            raise NodeUnreachable(f"it does not answer, or breaks off: {_reason(error)}") from error

    def _check(self, response: aiohttp.ClientResponse, kind: str) -> None:
        said = f"it answers {response.status} {response.reason or ''}".rstrip()
        if response.status in _REFUSED:
            raise ContentError(said)
        if response.status != 200:
            raise NodeUnreachable(said)
        if response.content_type not in {kind, "application/octet-stream"}:
            raise ContentError(f"it answers with {response.content_type:.100}, so it is no trustless gateway")

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[aiohttp.ClientSession]:
        """The session that was given, or one that lasts as long as it has users."""
        import aiohttp  # noqa: PLC0415 - see above

        if self._session is not None:
            yield self._session
            return
        if self._own is None:
            guard: dict[str, Any] = {} if self._sockets is None else {"socket_factory": self._sockets}
            self._own = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=32, **guard), read_bufsize=512 * 1024, auto_decompress=False
            )
        session = self._own
        self._users += 1
        try:
            yield session
        finally:
            self._users -= 1
            if not self._users:
                self._own = None
                await session.close()


def _reason(error: Exception) -> str:
    """What went wrong with a connection, without the address, which is told anyway."""
    cause = getattr(error, "os_error", error)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


class StreamProvider:
    """A node of the network, asked over `transport`, with a capability if need be."""

    def __init__(self, transport: Transport, node: NodeId, *, token: str | None = None) -> None:
        self._transport, self._node, self._token = transport, node, token
        self.name = f"node {node}"

    async def car(self, root: Cid, *, path: str = "", scope: Scope = "all") -> AsyncIterator[bytes]:
        """See `ports.Provider`."""
        async with self._asked(Question(str(root), path, "car", scope, token=self._token)) as parts:
            async for part in parts:
                yield part

    async def block(self, cid: Cid, *, root: Cid) -> bytes:
        """See `ports.Provider`."""
        below = str(root) if root != cid else ""
        async with self._asked(Question(str(cid), form="raw", root=below, token=self._token)) as parts:
            found = bytearray()
            async for part in parts:
                found += part
                if len(found) > MAX_BLOCK:
                    break
            return bytes(found)

    @contextlib.asynccontextmanager
    async def _asked(self, question: Question) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """What follows the first byte of a good answer; raises `ContentError` for another one."""
        answer = self._transport.request(self._node, msgspec.msgpack.encode(question))
        async with contextlib.aclosing(cast("AsyncGenerator[bytes, None]", answer)) as parts:
            first = await _some(parts)
            if first[:1] != bytes((GOOD,)):
                raise await _refusal(first, parts)
            yield _after(first[1:], parts)


async def _some(parts: AsyncGenerator[bytes, None]) -> bytes:
    async for part in parts:
        if part:
            return part
    raise NodeUnreachable("it broke its answer off before it began")


async def _after(first: bytes, parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    if first:
        yield first
    async for part in parts:
        yield part


async def _refusal(first: bytes, parts: AsyncGenerator[bytes, None]) -> ContentError:
    text = bytearray(first[1:])
    async for part in parts:
        text += part
        if len(text) > _MAX_TEXT:
            break
    said = text[:_MAX_TEXT].decode(errors="replace")
    if first[:1] == bytes((NOT_HERE,)):
        return ContentError(f"it answers: {said}")
    return ContentError(f"it refuses the question: {said}")
