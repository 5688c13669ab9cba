"""`GET /piece/{CID}`: what was published for Filecoin's storage providers, whole or in ranges.

Providers have no key: who published a result meant it to be pulled, and nothing else lies in this folder.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from aiohttp import web

from bacalhau_node.api.answers import Refused, Stream
from bacalhau_node.errors import ContentError

PART: Final = 1024 * 1024

_CID = re.compile(r"b[a-z2-7]{50,120}")
_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")


class Pieces:
    """The handler over a folder of pieces."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def routes(self) -> list[web.RouteDef]:
        """What is answered here; `HEAD` as well."""
        return [web.get("/piece/{cid}", self.piece)]

    async def piece(self, request: web.Request) -> web.StreamResponse:
        """The payload of a piece, without the zeros that follow it. By its CID of version 2."""
        cid = request.match_info["cid"]
        path = self._folder / f"{cid}.car"
        if not _CID.fullmatch(cid) or not await asyncio.to_thread(path.is_file):
            raise Refused(404, ContentError("no such piece was published here: name it by its CID of version 2"))
        size = await asyncio.to_thread(_used, path)
        start, stop = _span(request, f'"{cid}"', size) or (0, size)
        headers = {
            "Content-Type": "application/vnd.ipld.car; version=1",
            "Content-Length": str(stop - start),
            "Accept-Ranges": "bytes",
            "Etag": f'"{cid}"',
            "Cache-Control": "public, max-age=29030400, immutable",
            "X-Content-Type-Options": "nosniff",
        }
        if partial := (start, stop) != (0, size):
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        async with Stream(request, status=206 if partial else 200, headers=headers) as stream:
            parts = _parts(path, start, stop)
            while request.method != "HEAD" and (part := await asyncio.to_thread(next, parts, b"")):
                await stream.send(part)
        return stream.response


def _used(path: Path) -> int:
    """The size of a piece, which stays for as long as it is asked for."""
    with suppress(OSError):  # a disk that takes no notes is no reason not to read it
        os.utime(path)
    return path.stat().st_size


def _span(request: web.Request, etag: str, size: int) -> tuple[int, int] | None:
    """(first, behind the last) of the one range that is asked for; None: all of it."""
    match = _RANGE.fullmatch(request.headers.get("Range", ""))
    if match is None or request.headers.get("If-Range", etag) != etag:
        return None
    if match[3] is not None:
        first, stop = max(0, size - int(match[3])), size
    else:
        first, stop = int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)
    if first >= stop:
        raise Refused(416, ContentError(f"the piece has {size} bytes"), **{"Content-Range": f"bytes */{size}"})
    return first, stop


def _parts(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (part := file.read(min(PART, stop - start))):
            start += len(part)
            yield part
