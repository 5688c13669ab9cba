"""One file over HTTP into the content store, whole or not at all.

Theory of operation. A body is written to a draft of the store as it comes, which hashes it, and is counted on the way
(and hashed once more, where a checksum is wanted); it is nothing but a half-written file until its last byte was
checked. Whatever breaks on the
way is tried again: from where it broke off where the server can show that the file is still the same one (`If-Range`
with a strong validator, answered by 206 and the right range), else from the start. Attempts that bring nothing new
are counted.

The body is written and hashed in threads, a few MiB at a time, while more of it is read: none waits for the others.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from hashlib import sha256
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp

from bacalhau_node.errors import ContentError
from bacalhau_node.ports import ContentStore
from bacalhau_node.sources.limits import Limits
from bacalhau_node.sources.listing import shown_url
from bacalhau_node.sources.web import Broken, Web, check_encoding, check_kind, check_status, version

BLOCK: Final = 4 << 20
"""Bytes that a thread writes and hashes: with fewer, threads wait for each other and for the interpreter's lock."""

AT_ONCE: Final = 2
"""Blocks of one file that are written at the same time, while one more is read."""

FEW: Final = 64
"""Up to so many pieces of a block are written one by one; more are cheaper copied together."""

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

T = TypeVar("T")

Tell = Callable[[int, int | None], None]
"""Called with (bytes so far, bytes in all or None)."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file as it was listed; `version` "" and `size` None where nobody knows. `sha256` alone settles which it is."""

    url: str
    version: str = ""
    size: int | None = None
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Got:
    """What a download brought. `sha256` is "" where a version says which file it is, and nobody named a checksum."""

    cid: str
    size: int
    sha256: str


async def download(web: Web, wanted: Wanted, content: ContentStore, tell: Tell) -> Got:
    """Bring `wanted` into the store; raises `ContentError`, and then nothing of it is there."""
    name = shown_url(wanted.url)
    hashed = bool(wanted.sha256) or not wanted.version  # the store hashes it again: not twice for nothing
    async with _Part(content, name, limits=web.limits, hashed=hashed) as part:
        await _Download(web, wanted, part, tell).run()
        sha256 = part.digest.hexdigest() if hashed else ""
        if wanted.sha256 and sha256 != wanted.sha256:
            raise ContentError(
                f"{name} has the sha256 {sha256}, not {wanted.sha256}: it is another file than the one that"
                " was meant, or it changed since the job was planned"
            )
        return Got(cid=await part.finish(), size=part.size, sha256=sha256)


class _Part:
    """A draft that is being written: removed at the end unless it was finished. `size`: bytes put so far."""

    def __init__(self, content: ContentStore, name: str, *, limits: Limits, hashed: bool) -> None:
        self._draft, self._name, self._limits, self._hashed = content.draft(), name, limits, hashed
        self._at_once = 1 if hashed else AT_ONCE  # the digest of the whole takes one after the other
        self._writing: deque[asyncio.Future[Any]] = deque()
        self._pieces: list[bytes | memoryview] = []
        self._held = 0  # bytes in these pieces, less than a block
        self.size, self.digest = 0, sha256()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing:
            for written in (await asyncio.wait(self._writing))[0]:
                written.exception()  # the first one was told
        self._draft.close()

    async def put(self, data: bytes) -> None:
        """Take what comes next: written while the caller goes on. Raises `ContentError`, also for a full disk."""
        self.size += len(data)
        if self.size > self._limits.file:
            raise ContentError(f"{self._name} is larger than {self._limits.file} bytes, the most that is downloaded")
        self._pieces.append(data)
        self._held += len(data)
        while self._held >= BLOCK:
            self._held -= BLOCK
            last = memoryview(self._pieces.pop())
            cut = len(last) - self._held
            block, self._pieces = [*self._pieces, last[:cut]], [last[cut:]]
            await self._write_block(self.size - self._held - BLOCK, block)

    async def end(self) -> None:
        """No more comes: wait until all that was put is on disk, and hashed."""
        if self._held:
            await self._write_block(self.size - self._held, self._pieces)
            self._pieces, self._held = [], 0
        await self.settle()

    async def settle(self) -> None:
        """Wait until every whole block that was put is on disk."""
        while self._writing:
            await self._done(self._writing[0])
            self._writing.popleft()

    async def _write_block(self, at: int, pieces: Sequence[bytes | memoryview]) -> None:
        if len(self._writing) >= self._at_once:
            await self._done(self._writing[0])
            self._writing.popleft()
        self._writing.append(asyncio.get_running_loop().run_in_executor(None, self._write, at, pieces))

    def _write(self, at: int, pieces: Sequence[bytes | memoryview]) -> None:
        self._limits.check_room(self._draft.folder, sum(map(len, pieces)))
        if len(pieces) > FEW:
            pieces = [b"".join(pieces)]
        if self._hashed:
            for piece in pieces:
                self.digest.update(piece)
        self._draft.write(at, pieces)

    async def _done(self, work: asyncio.Future[T]) -> T:
        """Wait for work in a thread, which goes on when the waiting is cancelled."""
        try:
            return await asyncio.shield(work)
        except OSError as error:
            raise ContentError(
                f"{self._name} can't be written to {self._draft.folder}: {error.strerror or error}; make room"
            ) from error

    async def finish(self) -> str:
        """Make it a file of the store; returns its CID."""
        finishing = asyncio.get_running_loop().run_in_executor(None, self._draft.finish)
        self._writing.append(finishing)
        return await self._done(finishing)

    async def start_again(self) -> None:
        """Forget what was written."""
        await self.settle()
        self._draft.start_again()
        self._pieces, self._held = [], 0
        self.size, self.digest = 0, sha256()

    def check_total(self, total: int) -> None:
        """Raise `ContentError` for a file that can't be taken whole."""
        if total > self._limits.file:
            raise ContentError(f"{self._name} has {total} bytes; at most {self._limits.file} are downloaded")
        self._limits.check_room(self._draft.folder, total - self.size)


class _Download:
    """The attempts at one file. `validator`: what `If-Range` may hold, "" if there is no such thing."""

    def __init__(self, web: Web, wanted: Wanted, part: _Part, tell: Tell) -> None:
        self._web, self._wanted, self._part, self._tell = web, wanted, part, tell
        self._name, self._limits = shown_url(wanted.url), web.limits
        self._validator = ""
        self._total: int | None = None

    async def run(self) -> None:
        """Until all is there; raises `ContentError`."""
        failures, before = 0, 0
        while True:
            try:
                await self._attempt()
                return await self._part.end()
            except Broken as error:
                await self._part.settle()
                had, before = before, self._part.size
                failures = 1 if before - had >= self._limits.step else failures + 1
                if failures >= self._limits.attempts:
                    came = f", {before} bytes came" if before else ""
                    raise ContentError(f"{error} ({failures} attempts{came})") from error
            await asyncio.sleep(self._limits.pause * 2 ** (failures - 1))
            if not self._validator:
                await self._part.start_again()

    async def _attempt(self) -> None:
        headers = {}
        if self._part.size:
            headers = {"Range": f"bytes={self._part.size}-", "If-Range": self._validator}
        async with self._web.answer("GET", self._wanted.url, headers) as response:
            if headers and response.status == 206:
                self._check_range(response)
            elif headers and response.status == 416:
                self._validator = ""
                raise Broken(f"{self._name} has no such part: it was shorter, or changed on the way")
            else:
                await self._begin(response)
            await self._body(response)
        if self._total is not None and self._part.size != self._total:
            raise Broken(f"{self._name} ended after {self._part.size} of {self._total} bytes")

    async def _begin(self, response: aiohttp.ClientResponse) -> None:
        """Check that this is the file that was listed, from its start."""
        if self._part.size:
            await self._part.start_again()
        check_status(response, self._wanted.url)
        check_kind(response, self._wanted.url)
        check_encoding(response, self._wanted.url)
        self._total = response.content_length
        now, wanted = version(response), self._wanted
        if not wanted.sha256 and wanted.version and now != wanted.version:
            raise ContentError(
                f"{self._name} changed since the job was planned (it was {wanted.version}, it is"
                f" {now or 'without a version'}): run the job again"
            )
        if not wanted.sha256 and wanted.size is not None and self._total not in (None, wanted.size):
            raise ContentError(
                f"{self._name} changed since the job was planned (it had {wanted.size} bytes, it has {self._total}):"
                " run the job again"
            )
        self._part.check_total(self._total or 0)
        self._validator = now if now.startswith('"') or _is_strong(response) else ""

    def _check_range(self, response: aiohttp.ClientResponse) -> None:
        """Raise for an answer that does not go on where the part ends, in the very same file."""
        match = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        same = version(response) in ("", self._validator)
        first, total = (int(match[1]), match[3]) if match else (-1, "*")
        right = first == self._part.size and (total == "*" or self._total in (None, int(total)))
        check_encoding(response, self._wanted.url)
        if not (same and right):
            self._validator = ""
            raise Broken(f"{self._name} goes on with another part of the file than it was asked for")

    async def _body(self, response: aiohttp.ClientResponse) -> None:
        """Take the body; raises `Broken` if it comes too slowly."""
        clock = asyncio.get_running_loop().time
        since, taken = clock(), 0
        async for data, _ in response.content.iter_chunks():  # as they came: nothing is copied together
            await self._part.put(data)
            self._tell(self._part.size, self._total)
            taken += len(data)
            if (spent := clock() - since) > self._limits.silence:
                if taken < self._limits.slowest * spent:
                    raise Broken(f"{self._name} sends too slowly: {taken} bytes in {spent:.0f} s")
                since, taken = clock(), 0


def _is_strong(response: aiohttp.ClientResponse) -> bool:
    """Whether the date of the last change names one state of the file: it lies a second before the answer, or more."""
    try:
        changed = parsedate_to_datetime(response.headers["Last-Modified"])
        return (parsedate_to_datetime(response.headers["Date"]) - changed).total_seconds() >= 1
    except (KeyError, ValueError, TypeError):
        return False
