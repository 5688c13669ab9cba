"""Content over HTTP: what is missing, archives in and out, files with ranges."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping

from aiohttp import web

from bacalhau_node.api import policy, shapes
from bacalhau_node.api.answers import Refused, Stream, answer, body, read
from bacalhau_node.api.jobs import CALLER
from bacalhau_node.cid import Cid
from bacalhau_node.client import PUT, LocalClient
from bacalhau_node.content import car
from bacalhau_node.content.gateway import in_threads
from bacalhau_node.content.reader import Reader
from bacalhau_node.errors import ContentError
from bacalhau_node.sources.limits import Limits

IMPORTS = 4
"""Archives of one key that are taken in at once: each may hold some tens of megabytes in memory."""

PART = 1024 * 1024
"""Bytes that are received and then checked at once."""

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")


class Content:
    """The handlers over the node's store."""

    def __init__(self, client: LocalClient) -> None:
        self._client = client
        self._store, self._folder = client.node.content, client.node.folder.store
        self._imports: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(IMPORTS))

    def routes(self) -> list[web.RouteDef]:
        """What is answered here."""
        return [
            web.post("/v0/bundle", self.bundle),
            web.post("/v0/blocks/missing", self.missing),
            web.post("/v0/car", self.take),
            web.post("/v0/pins/{cid}", self.pin),
            web.get("/v0/content/{cid}", self.file, allow_head=False),
        ]

    # --- in ---

    async def bundle(self, request: web.Request) -> web.Response:
        """Store a cell's folder."""
        asked, _ = await read(request, shapes.BundleRequest)
        policy.check_files(asked.files)
        return answer(shapes.BundleAnswer(await self._client.put_bundle(asked.files)))

    async def missing(self, request: web.Request) -> web.Response:
        """Which blocks are not here; of those that are, everything below is here too."""
        asked, _ = await read(request, shapes.MissingRequest)
        cids = [_cid(text) for text in asked.cids]

        def look() -> list[str]:
            return [text for text, cid in zip(asked.cids, cids, strict=True) if not self._store.holds(cid)]

        return answer(shapes.MissingAnswer(await asyncio.to_thread(look)))

    async def take(self, request: web.Request) -> web.Response:
        """Take an archive in. What was stored when its connection breaks stays: the rest is enough then."""
        reader, taken = car.CarReader(), car.CarImport(self._store)

        def step(data: bytes) -> None:
            for cid, block in reader.feed(data):
                taken.take(cid, block)

        async with self._imports[request[CALLER].name]:
            Limits().check_room(self._folder, request.content_length or shapes.MAX_CAR)
            try:
                async for data in _gathered(request):
                    await asyncio.to_thread(step, data)
                reader.end()
                taken.end()
            finally:
                await asyncio.to_thread(self._store.flush)
        return answer(shapes.CarAnswer(taken.bytes))

    async def pin(self, request: web.Request) -> web.Response:
        """Keep what was sent, for the node's owner; what others send is kept by their jobs."""
        cid, own = self._here(request), request[CALLER].role == "admin"
        if own:
            self._store.pin(str(cid), owner=PUT)
            await asyncio.to_thread(self._store.flush)
        return answer(shapes.PinAnswer(own))

    # --- out ---

    async def file(self, request: web.Request) -> web.StreamResponse:
        """A file's bytes, or a range of them."""
        cid = self._here(request)
        size = await asyncio.to_thread(_file_size, Reader(self._store, cid))
        start, stop = 0, size
        status, headers = 200, {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if (asked := _range(request)) is not None:
            start, last = asked
            stop = min(size, size if last is None else last + 1)
            if start >= stop:
                error = ContentError(f"bytes {start} to {stop} of a file of {size} bytes")
                raise Refused(416, error, **{"Content-Range": f"bytes */{size}"})
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
        headers |= {"Content-Length": str(stop - start), "Content-Disposition": "attachment", **_forever(cid)}
        parts = _limited(_skipped(Reader(self._store, cid).chunks(cid), start), stop - start)
        async with Stream(request, status=status, headers=headers) as stream:
            await _send(parts, stream)
        return stream.response

    def _here(self, request: web.Request) -> Cid:
        """The CID of the path, whose block is here."""
        cid = _cid(request.match_info["cid"])
        if not self._store.holds(cid):
            raise Refused(404, ContentError(f"{cid} is not on this node"))
        return cid


def _cid(text: str) -> Cid:
    return Cid.parse(text)


def _file_size(reader: Reader) -> int:
    item = next(reader.walk())
    if item.kind != "file":
        raise ContentError(f"it is a {item.kind}: name a file in it, or take all of it from /ipfs/CID?format=car")
    return item.size


def _forever(cid: Cid) -> Mapping[str, str]:
    """What may be said of bytes that can never change."""
    return {
        "Etag": f'"{cid}.file"',
        "Cache-Control": "private, max-age=29030400, immutable",
        "X-Content-Type-Options": "nosniff",
    }


def _range(request: web.Request) -> tuple[int, int | None] | None:
    """(first, last or None) of one range; anything else is as if there were none, as HTTP allows."""
    match = _RANGE.fullmatch(request.headers.get("Range", ""))
    return (int(match[1]), int(match[2]) if match[2] else None) if match else None


async def _gathered(request: web.Request) -> AsyncIterator[bytes]:
    """The body in larger parts, so that each is worth a thread's work."""
    parts: list[bytes] = []
    size = 0
    async for part in body(request, limit=shapes.MAX_CAR):
        parts.append(part)
        size += len(part)
        if size >= PART:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join(parts)


async def _send(parts: Iterator[bytes], stream: Stream) -> None:
    """Read in threads; send what is there."""
    async for data in in_threads(parts):
        await stream.send(data)


def _skipped(parts: Iterator[bytes], count: int) -> Iterator[bytes]:
    """What comes after the first `count` bytes."""
    for part in parts:
        if count < len(part):
            yield part[count:] if count else part
        count = max(0, count - len(part))


def _limited(parts: Iterator[bytes], count: int) -> Iterator[bytes]:
    """The first `count` bytes."""
    for part in parts:
        yield part[:count]
        count -= len(part)
        if count <= 0:
            return
