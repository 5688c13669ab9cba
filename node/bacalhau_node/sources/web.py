"""Questions over HTTP to servers that nobody trusts: redirects, statuses, headers, and what may be tried again.

Redirects are followed by hand: each hop is checked (`guard`), and none leads from https to http. Bodies are taken as
they are: one that the server packed on the way could unpack to anything, so it is refused. Imported
late, by whoever has a URL to ask: it needs aiohttp.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import aiohttp
from yarl import URL

from bacalhau_node import __version__
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.sources.guard import Guard, Refused
from bacalhau_node.sources.limits import Limits
from bacalhau_node.sources.listing import file_name, is_html, is_page, shown_url

T = TypeVar("T")

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_AGAIN: Final = frozenset({408, 425, 429})
_PACKED: Final = {"gzip": (".gz", ".tgz"), "x-gzip": (".gz", ".tgz")}
_HINTS: Final = {
    401: ": it wants to know who asks",
    403: ": it does not let this node have it",
    404: ": there is no such file, or no longer",
    410: ": the file is gone for good",
}


class Broken(Exception):
    """An attempt that failed in a way that the next one may not."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a server says about a file. `size`: None where it doesn't say; `version`: "" likewise; `kind`: MIME type."""

    name: str
    version: str
    size: int | None
    kind: str


class Web:
    """Asks servers within the rules of `guard` and `limits`; made by `open_web`."""

    def __init__(self, session: aiohttp.ClientSession, guard: Guard, limits: Limits) -> None:
        self._session, self._guard, self.limits = session, guard, limits

    async def look(self, url: str) -> Found:
        """What `url` is, without its bytes; raises `ContentError`."""

        async def attempt() -> Found:
            async with self.answer("HEAD", url) as response:
                if response.status == 200 and response.content_length and not is_html(response.content_type):
                    return found(response, url)
            async with self.answer("GET", url) as response:  # many answer HEAD wrongly, or not at all
                check_status(response, url)
                return found(response, url)

        return await self._several(attempt, url)

    async def page(self, url: str) -> tuple[str, bytes | None]:
        """(the URL that answered, its body), of a web page; None in place of the body of anything else."""

        async def attempt() -> tuple[str, bytes | None]:
            async with self.answer("GET", url) as response:
                check_status(response, url)
                return str(response.url), await self._small(response, url) if is_html(response.content_type) else None

        return await self._several(attempt, url)

    async def text(self, url: str) -> str:
        """A small text."""

        async def attempt() -> bytes:
            async with self.answer("GET", url) as response:
                check_status(response, url)
                check_kind(response, url)
                return await self._small(response, url)

        return (await self._several(attempt, url)).decode("utf-8-sig", "replace")

    @asynccontextmanager
    async def answer(
        self, method: str, url: str, headers: dict[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer after redirects, whatever its status; raises `ContentError` or `Broken`."""
        at = URL(url)
        with _translated(url):
            for _ in range(self.limits.redirects + 1):
                self._guard.check_host(at.host or "")
                async with asyncio.timeout(2 * self.limits.silence):  # headers that drip are given up, too
                    response = await self._session.request(method, at, allow_redirects=False, headers=headers)
                async with response:
                    if response.status not in _REDIRECTS or "Location" not in response.headers:
                        yield response
                        response.close()  # what is left of a body is not waited for
                        return
                    at = _next(at, response.headers["Location"])
        last = shown_url(str(at))
        raise ContentError(f"{shown_url(url)} leads to {self.limits.redirects + 1} redirects, the last to {last}")

    async def _small(self, response: aiohttp.ClientResponse, url: str) -> bytes:
        check_encoding(response, url)
        body = bytearray()
        async for part in response.content.iter_any():
            body += part
            if len(body) > self.limits.page:
                raise ContentError(
                    f"{shown_url(url)} is longer than an index or a list may be ({self.limits.page} bytes)"
                )
        return bytes(body)

    async def _several(self, attempt: Callable[[], Awaitable[T]], url: str) -> T:
        """Try again what broke, within bounds."""
        for number in range(1, self.limits.attempts + 1):
            try:
                async with asyncio.timeout(2 * self.limits.silence):
                    return await attempt()
            except Broken as error:
                problem = str(error)
            except TimeoutError:
                problem = f"{shown_url(url)} took over {2 * self.limits.silence:g} s to say what it is"
            if number < self.limits.attempts:
                await asyncio.sleep(self.limits.pause * 2 ** (number - 1))
        raise ContentError(f"{problem} ({self.limits.attempts} attempts)")


@asynccontextmanager
async def open_web(guard: Guard, limits: Limits) -> AsyncIterator[Web]:
    """A `Web` with connections of its own. The owner's own questions go through the proxies of the environment."""
    if not hasattr(aiohttp, "SocketFactoryType"):
        raise SpecError("inputs from URLs need aiohttp 3.12 or newer: pip install -U aiohttp")
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(socket_factory=guard.socket, limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.connect, sock_read=limits.silence),
        headers={"Accept-Encoding": "identity", "User-Agent": f"bacalhau-jupyter/{__version__}"},
        auto_decompress=False,
        trust_env=guard.own,
        read_bufsize=1 << 20,
    )
    async with session:
        yield Web(session, guard, limits)


# --- what an answer says ---


def check_status(response: aiohttp.ClientResponse, url: str) -> None:
    """Raise for anything but success: `Broken` for what may be better in a moment."""
    status = response.status
    if status in (200, 203):
        return
    reason = f" {response.reason}" if response.reason and response.reason.isprintable() else ""
    text = f"{_shown(response, url)} answers {status}{reason[:100]}"
    if status >= 500 or status in _AGAIN:
        raise Broken(text)
    raise ContentError(f"{text}{_HINTS.get(status, '')}")


def check_kind(response: aiohttp.ClientResponse, url: str) -> None:
    """Raise `ContentError` for a web page in place of a file that is none."""
    if any(is_page(response.content_type, name) for name in (URL(url).name, response.url.name)):
        raise ContentError(
            f"{_shown(response, url)} answers a web page (text/html), not data: look at it in a browser;"
            " it may want a log-in, or say where the file lies now"
        )


def check_encoding(response: aiohttp.ClientResponse, url: str) -> None:
    """Raise `ContentError` for a body that was packed on the way, but for a file that is called like a packed one."""
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity") and not URL(url).name.endswith(_PACKED.get(coding, ("\0",))):
        raise ContentError(
            f"{_shown(response, url)} is sent packed (Content-Encoding: {coding[:40]}) though it was asked for as it"
            " is: nobody can say how large it is"
        )


def found(response: aiohttp.ClientResponse, url: str) -> Found:
    """What the headers of a whole answer say; raises `ContentError` for what is no file of data."""
    check_kind(response, url)
    check_encoding(response, url)
    headers = response.headers
    name = file_name(headers.get("Content-Disposition", ""), str(response.url), url)
    return Found(name=name, version=version(response), size=response.content_length, kind=response.content_type)


def version(response: aiohttp.ClientResponse) -> str:
    """The strong ETag, else the date of the last change, else ""."""
    tag = response.headers.get("ETag", "")
    if tag.startswith('"') and tag.endswith('"') and len(tag) > 2:
        return tag
    return response.headers.get("Last-Modified", "")


def _shown(response: aiohttp.ClientResponse, url: str) -> str:
    """The URL for a message, with where it led to."""
    final = shown_url(str(response.url))
    return shown_url(url) if response.url == URL(url) else f"{shown_url(url)} (redirected to {final})"


# --- what goes wrong ---


def _next(at: URL, location: str) -> URL:
    """Where a redirect leads; raises `ContentError` for a place where it must not."""
    try:
        target = at.join(URL(location))
    except ValueError as error:
        raise ContentError(f"{shown_url(str(at))} redirects to {location[:200]!r}, which is no URL") from error
    if target.scheme not in ("http", "https") or not target.host:
        raise ContentError(f"{shown_url(str(at))} redirects to {shown_url(str(target))}, which is not http or https")
    if at.scheme == "https" and target.scheme == "http":
        raise ContentError(
            f"{shown_url(str(at))} redirects to {shown_url(str(target))}: from https to http, where anybody on the way"
            " could change the data"
        )
    if target.origin() == at.origin() and at.user is not None and target.user is None:
        target = target.with_user(at.user).with_password(at.password)
    return target


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what aiohttp raises into `ContentError` (it will be the same again) or `Broken` (it may not)."""
    name = shown_url(url)
    try:
        yield
    except aiohttp.ClientConnectorCertificateError as error:
        raise ContentError(f"{name}: its certificate is not valid for this name: {error.certificate_error}") from error
    except aiohttp.ClientConnectorError as error:
        refused = isinstance(error.os_error, Refused) or "a node asks no such address" in str(error.os_error)
        text = f"{name}: {_cause(error)}"
        raise (ContentError(text) if refused else Broken(text)) from error
    except aiohttp.InvalidURL as error:
        raise ContentError(f"{name} is no URL that can be asked, or leads to one: {error}") from error
    except aiohttp.ClientResponseError as error:
        raise ContentError(f"{name} gives an answer that is not HTTP: {error.message[:200]!r}") from error
    except TimeoutError as error:
        raise Broken(f"{name} sends nothing ({error or 'timed out'})") from error
    except (aiohttp.ClientError, OSError) as error:
        raise Broken(f"{name}: the connection broke off ({str(error)[:200] or type(error).__name__})") from error


def _cause(error: aiohttp.ClientConnectorError) -> str:
    return str(error.os_error.strerror or error.os_error) if error.os_error else str(error)
