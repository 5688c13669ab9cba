"""Requests to one node that survive broken connections.

Theory of operation. Every request of the API may be made twice (jobs have ids that the client made up, blocks
are named by what they hold), so whatever breaks before an answer is whole is simply asked again, after a pause
that grows, until `PATIENCE` is over without any progress. A node that was never reached is given up
earlier: then the address is wrong more likely than the node is being restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import time
from collections.abc import AsyncIterator, Mapping
from typing import Final, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec
from yarl import URL

from bacalhau_node.api import shapes
from bacalhau_node.errors import NodeUnreachable, ProtocolError
from bacalhau_node.literals import is_loopback

T = TypeVar("T")

PATIENCE: Final = 60.0
"""Seconds without progress after which a node that was reached before counts as gone: time for a restart."""
FIRST_PATIENCE: Final = 3.0
"""The same for a node that was never reached."""

LONG: Final = 600.0
"""Seconds for an answer that takes work: a plan over a million files."""

LARGEST_ANSWER: Final = 1024 * 1024 * 1024
LARGEST_ERROR: Final = 1024 * 1024
"""Bytes that are read of an answer: a job of a million shards has some hundred million."""

_USUAL = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0

BROKEN: Final = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError, TimeoutError)
"""What says that a connection broke, or couldn't be made, and that another may do better."""

_GATEWAY_STATUS = frozenset((502, 504))
_NOT_NOW = 503


class Retry:
    """How long to go on after something broke: reset by every bit of progress."""

    def __init__(self, url: str, patience: float) -> None:
        self._url, self._patience = url, patience
        self._pause, self._since = _FIRST_PAUSE, 0.0

    def progress(self) -> None:
        """Something got through."""
        self._pause, self._since = _FIRST_PAUSE, 0.0

    async def again(self, error: Exception) -> None:
        """Wait before the next try; raises `NodeUnreachable` when there is to be none."""
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since >= self._patience:
            raise NodeUnreachable(f"the node at {self._url} does not answer: {_reason(error)}") from error
        await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - so that clients don't come at once
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


class Connection:
    """One node's API. `url` as `literals.node_url` gives it."""

    def __init__(self, url: str, token: str, *, patience: float = PATIENCE) -> None:
        self.url = url
        self._token, self._patience = token, patience
        self._session: aiohttp.ClientSession | None = None
        self._met = False

    def retry(self) -> Retry:
        """The patience for one operation."""
        return Retry(self.url, self._patience if self._met else min(FIRST_PATIENCE, self._patience))

    async def ask(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        body: object = None,
        query: Mapping[str, str] | None = None,
        seconds: float = _USUAL,
    ) -> T:
        """The answer to a request, however often it has to be made; raises what the node raised."""
        data = None if body is None else shapes.encode(body)
        retry = self.retry()
        while True:
            try:
                return await self.once(method, path, kind, data=data, query=query, seconds=seconds)
            except BROKEN as error:
                await retry.again(error)

    async def once(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        data: bytes | None = None,
        query: Mapping[str, str] | None = None,
        seconds: float = _USUAL,
    ) -> T:
        """The same for one try; raises one of `BROKEN` when the connection breaks."""
        async with self.stream(method, path, data=data, query=query, silence=seconds) as response:
            answer = await self._read(response, LARGEST_ANSWER)
        try:
            return shapes.decode(answer, kind)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the node at {self.url} sent an answer that can't be read: {error}") from error

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        data: bytes | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        silence: float = _USUAL,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The good answer to one try, its body still to be read; `silence`: seconds without a byte that break it."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=silence)
        url = URL(f"{self.url}{path}", encoded=True)
        try:
            async with self.session().request(
                method,
                url,
                data=data and io.BytesIO(data),
                params=query,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                await self._checked(response)
                yield response
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError) as error:
            raise NodeUnreachable(
                f"the certificate of {self.url} is not trusted: {error}; SSL_CERT_FILE can name the one to trust"
            ) from error
        except aiohttp.ClientResponseError as error:
            raise NodeUnreachable(f"what answers at {self.url} is not a node: {error.message}") from error

    async def _checked(self, response: aiohttp.ClientResponse) -> None:
        """Raise what the node raised, or what its answer means."""
        if response.status in _GATEWAY_STATUS:
            raise ConnectionError(f"a proxy answers {response.status}")
        if response.status >= 300:
            answer = await self._read(response, LARGEST_ERROR)
            try:
                body = shapes.decode(answer, shapes.ErrorBody)
            except msgspec.DecodeError as error:
                raise NodeUnreachable(
                    f"what answers at {self.url} is not a node: HTTP {response.status} {response.reason}"
                ) from error
            self._met = True
            if response.status == _NOT_NOW and "Retry-After" in response.headers:
                raise ConnectionError(body.message)
            raise shapes.raised(body)
        self._met = True

    async def _read(self, response: aiohttp.ClientResponse, most: int) -> bytes:
        """All of an answer, which nobody else bounds; raises `ProtocolError`."""
        body = bytearray()
        async for part in response.content.iter_any():
            body += part
            if len(body) > most:
                raise ProtocolError(f"the node at {self.url} sent an answer of over {most} bytes")
        return bytes(body)

    def session(self) -> aiohttp.ClientSession:
        """The session, which belongs to the loop that is first asked on."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
                trust_env=not is_loopback(urlsplit(self.url).hostname or ""),
                connector=aiohttp.TCPConnector(keepalive_timeout=15, limit=32),
                read_bufsize=512 * 1024,
                auto_decompress=False,  # how large it gets would be up to its sender
            )
        return self._session

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


def part(text: str) -> str:
    """`text` as one level of a path."""
    return quote(text, safe="")


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.strerror or str(error.os_error)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
