"""An HTTP server that does what good ones never do. Raw bytes on asyncio, so that nothing mends the answers.

`Hostile.answers` maps a path to what answers there; `asked` is every request so far, in order. The makers below are
for answers that several tests want; a test may write its own.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from html import escape
from http import HTTPStatus
from pathlib import Path
from threading import Thread
from urllib.parse import quote, unquote


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    headers: Mapping[str, str]


Answer = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Hostile:
    """A running server. What raises `ConnectionResetError` in an answer resets the connection."""

    url: str
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    default: Answer | None = None
    open: set[asyncio.Task[None] | None] = field(default_factory=set)
    """Connections that are being served."""

    def gets(self, path: str) -> list[Asked]:
        """The GET requests for one path."""
        return [asked for asked in self.asked if (asked.method, asked.path) == ("GET", path)]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request after the other on a connection, until an answer ends it."""
        self.open.add(asyncio.current_task())
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = request.decode("latin-1").strip().split("\r\n")
                method, path, _ = first.split(" ")
                pairs = (line.split(": ", 1) for line in lines)
                asked = Asked(method, path, {name.lower(): value for name, value in pairs})
                self.asked.append(asked)
                answer = self.answers.get(path) or self.default or status(404)
                await answer(asked, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.transport.abort()
        finally:
            self.open.discard(asyncio.current_task())
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def hostile(*, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> AsyncIterator[Hostile]:
    """A server on a free port of the running loop."""
    made = Hostile("")
    server = await asyncio.start_server(made.serve, host, 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    made.url = f"{'https' if tls else 'http'}://{'localhost' if tls else host}:{port}"
    try:
        yield made
    finally:
        server.close()
        for task in filter(None, tuple(made.open)):  # answers that go on for ever end here
            task.cancel()
            await asyncio.wait([task])


@contextmanager
def in_thread() -> Iterator[tuple[Hostile, asyncio.AbstractEventLoop]]:
    """A server on a loop of its own, for tests that block."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine: object) -> object:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)  # type: ignore[arg-type]

    context = hostile()
    try:
        yield call(context.__aenter__()), loop  # type: ignore[misc]
    finally:
        call(context.__aexit__(None, None, None))
        call(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# --- answers ---


def head(code: int, headers: Mapping[str, object]) -> bytes:
    """The first lines of an answer."""
    lines = [
        f"HTTP/1.1 {code} {HTTPStatus(code).phrase}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def status(code: int, **headers: str) -> Answer:
    """An empty answer."""

    async def answer(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(code, {"Content-Length": 0, **headers}))

    return answer


def redirect(location: str, code: int = 302) -> Answer:
    """Go elsewhere."""
    return status(code, Location=location)


def data(body: bytes, **headers: str) -> Answer:
    """A good answer, without ranges; `Content_Length="?"`: in one chunk, its length unsaid."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        named: dict[str, object] = {"Content-Type": "application/octet-stream", "Content-Length": len(body)}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        chunked = named["Content-Length"] == "?"
        if chunked:
            del named["Content-Length"]
            named["Transfer-Encoding"] = "chunked"
        writer.write(head(200, named))
        if asked.method == "HEAD":
            return
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked and body else body)

    return answer


def ranged(body: bytes, *, etag: str, stops: list[int], **headers: str) -> Answer:
    """A good answer with ranges, whose GETs break off: the next after `stops.pop(0)` more bytes, until none is left."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        named = {"ETag": etag, **headers}
        start = 0
        if "range" in asked.headers and asked.headers.get("if-range") == etag:
            start = int(asked.headers["range"].removeprefix("bytes=").removesuffix("-"))
            named["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        writer.write(head(206 if start else 200, {"Content-Length": len(body) - start, **named}))
        if asked.method == "HEAD":
            return
        if stops:
            writer.write(body[start : start + stops.pop(0)])
            await writer.drain()
            raise ConnectionResetError
        writer.write(body[start:])

    return answer


def short(body: bytes, *, claimed: int) -> Answer:
    """Fewer bytes than announced, then a proper end of the connection."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, {"Content-Length": claimed}))
        if asked.method == "GET":
            writer.write(body)
            await writer.drain()
            writer.close()
            raise ConnectionError

    return answer


def endless(**headers: str) -> Answer:
    """A body without an end and without a length."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, {"Transfer-Encoding": "chunked", **headers}))
        while asked.method == "GET":
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()

    return answer


def drip(length: int, *, every: float) -> Answer:
    """A byte now and then."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, {"Content-Length": length}))
        while asked.method == "GET":
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(every)

    return answer


async def silent(asked: Asked, _: asyncio.StreamWriter) -> None:
    """No answer at all."""
    assert asked
    await asyncio.Event().wait()


def folder(root: Path, *, title: str = "Index of") -> Answer:
    """A folder of this machine with indexes, as Apache shows it: every file with its ETag."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        path = root / unquote(asked.path.partition("?")[0]).strip("/")
        if asked.path.endswith("/") and path.is_dir():
            await data(_index(path, asked.path, title), Content_Type="text/html;charset=UTF-8")(asked, writer)
        elif path.is_file():
            seen = path.stat()
            await data(path.read_bytes(), ETag=f'"{seen.st_ino}-{seen.st_mtime_ns}"')(asked, writer)
        else:
            await status(404)(asked, writer)

    return answer


def _index(path: Path, at: str, title: str) -> bytes:
    rows = ['<a href="?C=N;O=D">Name</a>', '<a href="?C=M;O=A">Last modified</a>', '<a href="../">Parent Directory</a>']
    for child in path.iterdir():
        name = quote(child.name) + ("/" if child.is_dir() else "")
        rows.append(f'<a href="{escape(name)}">{escape(child.name)}</a>')
    rows += [
        '<a href="https://httpd.apache.org/">Apache</a>',
        f'<a href="{at}">here</a>',
        '<a href="/robots.txt">r</a>',
    ]
    head = f"<html><head><title>{title} {escape(at)}</title></head><body><h1>{title} {escape(at)}</h1><pre>"
    return (head + "\n".join(rows) + "</pre></body></html>").encode()
