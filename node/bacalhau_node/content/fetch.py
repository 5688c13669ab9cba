"""The reader: content from others into a store, every block checked, whoever sent it.

Theory of operation. Providers are asked in their order for one archive (CAR) of what is wanted; the first that
has it sends all of it in one answer. If the answer breaks off, or if it turns out that much of it is here
already, what is still missing is asked for block by block, `AT_ONCE` at a time, of all providers that are left, each
block of another when one doesn't have it. So a broken connection costs what was on its way and nothing more, a
fetch that was cancelled goes on where it was, and several providers help each other. What may go into the store, and
when, is up to `incoming`.

A provider is dropped when it sends what is wrong or unasked, when nothing comes from it for `patience` seconds, when
it fails `TRIES` times in a row, or when it lacks `MAX_LACKING` blocks in a row. Each is named with its reason and
its seconds if in the end something is missing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, Self, cast

import msgspec

from bacalhau_node.cid import RAW, Cid
from bacalhau_node.content.car import CarReader
from bacalhau_node.content.dagpb import decode_node
from bacalhau_node.content.heap import keep_memory
from bacalhau_node.content.incoming import Incoming, Shelf
from bacalhau_node.content.reader import MAX_BLOCK, Reader
from bacalhau_node.content.walk import Want, steps_of
from bacalhau_node.errors import ContentError, NodeUnreachable, ProtocolError
from bacalhau_node.ports import Provider, Scope
from bacalhau_node.sharding import shown

AT_ONCE: Final = 8
"""Single blocks that are asked for at the same time, of all providers together."""

TRIES: Final = 3
"""Answers in a row that fail before a provider is dropped."""

MAX_LACKING: Final = 64
"""Blocks in a row that a provider doesn't have before it is asked no more."""

SLOWEST: Final = 4
"""Patiences within which a whole block must come: a byte now and then is not enough."""

AHEAD: Final = 4 * 1024 * 1024
"""Bytes of an archive that are read while those before them are checked and stored."""

_MANY = 1024  # parts of an archive that are read ahead: each takes memory, however small it is
_PAUSE = 0.1


class Fetched(msgspec.Struct, frozen=True):
    """What came. `cid`: what the path leads to; `bytes` of the blocks that were needed; `sources`: by provider."""

    cid: str
    bytes: int
    sources: dict[str, int]


async def fetch(
    store: Shelf,
    root: Cid,
    providers: Sequence[Provider],
    *,
    path: str = "",
    scope: Scope = "all",
    limit: int | None = None,
    told: Callable[[int], None] | None = None,
    patience: float = 30.0,
) -> Fetched:
    """Bring what `path` below `root` leads to into the store, from whoever has it.

    Scope `all`, and `entity` of a file, are in the store when this returns, whole. Other scopes, and the folders on
    the way, are only looked at: a store has no folder without all that is in it (see `listing`). `limit`: bytes that
    it may have. `told` is called on the loop with the bytes that came so far. Raises `ContentError` that says who
    was asked, what each answered and how long it took; what came until then stays and is not fetched again.
    """
    want = Want(root, steps_of(path), scope)
    with store.hold():
        incoming = await asyncio.to_thread(Incoming, store, want, limit=limit)
        return await _Fetch(store, incoming, want, providers, told=told, patience=patience).run(path, scope)


async def listing(
    store: Shelf, root: Cid, providers: Sequence[Provider], *, path: str = "", patience: float = 30.0
) -> list[tuple[str, str, int]]:
    """What `ports.ContentStore.list` says of the folder or file at `path` below `root`, which need not be here.

    Only what that takes is fetched: the folders, and of each file that isn't one raw block its first block. Sizes of
    raw blocks are those that their folder gives. Raises `ContentError` like `fetch`.
    """
    loose: dict[bytes, bytes] = {}
    want = Want(root, steps_of(path), "names")
    with store.hold():
        incoming = await asyncio.to_thread(Incoming, store, want, loose=loose)
        fetched = await _Fetch(store, incoming, want, providers, told=None, patience=patience).run(path, "entity")
        return await asyncio.to_thread(lambda: Reader(_Seen(store, loose), Cid.parse(fetched.cid)).listing())


class _Seen:
    """`reader.Blocks` over a store and blocks that were only looked at."""

    def __init__(self, store: Shelf, loose: dict[bytes, bytes]) -> None:
        self._store, self._loose = store, loose
        links = chain.from_iterable(decode_node(block).links for block in loose.values())
        self._sizes = {link.cid: link.tsize for link in links}

    def block(self, cid: Cid) -> bytes:
        """The checked bytes of a block."""
        found = self._loose.get(cid.digest)
        return self._store.block(cid) if found is None else found

    def file_size(self, cid: Cid) -> int | None:
        """The size of a file that is one raw block, as it is linked."""
        return self._sizes.get(cid.binary) if cid.codec == RAW else None


@dataclass(eq=False)
class _Asked:
    """A provider, and how it does."""

    provider: Provider
    received: int = 0
    answer: str = ""
    """Its last failure."""
    out: bool = False
    lacking: int = 0
    lacks: set[bytes] = field(default_factory=set)
    since: float | None = None
    seconds: float = 0.0

    def drop(self, why: object) -> None:
        self.out, self.answer = True, str(why)
        self.seconds = time.monotonic() - (self.since or time.monotonic())

    def __str__(self) -> str:
        if self.since is None:
            return f"{self.provider.name} was not asked"
        return f"{self.provider.name} ({self.seconds:.1f} s): {self.answer}"


class _Fetch:
    """One call of `fetch`."""

    def __init__(
        self,
        store: Shelf,
        incoming: Incoming,
        want: Want,
        providers: Sequence[Provider],
        *,
        told: Callable[[int], None] | None,
        patience: float,
    ) -> None:
        self._store, self._incoming, self._want = store, incoming, want
        self._asked = [_Asked(provider) for provider in providers]
        self._told, self._patience = told, patience
        self._under_way: set[bytes] = set()
        self._changed = asyncio.Condition()

    async def run(self, path: str, scope: Scope) -> Fetched:
        """Ask until nothing is missing, or nobody is left."""
        try:
            if self._incoming.missing:
                await self._stream(path, scope)
            if self._incoming.missing:
                await self._block_by_block()
        finally:
            await asyncio.to_thread(self._store.flush)
        if self._incoming.missing:
            raise self._failure(path)
        await asyncio.to_thread(self._incoming.end)
        sources: dict[str, int] = {}
        for one in self._asked:
            if one.received:
                sources[one.provider.name] = sources.get(one.provider.name, 0) + one.received
        return Fetched(str(self._incoming.target), self._incoming.bytes, sources)

    def _failure(self, path: str) -> ContentError:
        what = f"{self._want.cid}/{shown(path.strip('/'))}" if path.strip("/") else f"{self._want.cid}"
        if not self._asked:
            return ContentError(f"{what} is not here, and nobody is known who could be asked for it")
        missing = len(self._incoming.missing)
        some = f"{self._incoming.bytes:,} bytes came, and at least {missing} block{'s' * (missing != 1)} did not"
        asked = "; ".join(map(str, self._asked))
        return ContentError(
            f"{what} could not be fetched ({some if self._incoming.bytes else 'nothing came'}). Asked: {asked}."
            " Make sure that a node that has it is running and can be reached"
        )

    # --- one archive ---

    async def _stream(self, path: str, scope: Scope) -> None:
        """Ask one provider after another for all of it, until one has sent something."""
        for asked in self._asked:
            asked.since = time.monotonic()
            before = self._incoming.bytes
            asked.answer = "its answer ended too early"
            try:
                await self._take_archive(asked, asked.provider.car(self._want.cid, path=path, scope=scope))
            except ProtocolError as error:
                asked.drop(_untrusted(error))
            except TimeoutError:
                asked.drop(self._silence())
            except NodeUnreachable as error:
                asked.answer = str(error)
            if self._incoming.bytes > before:
                return
            if not asked.out:
                asked.drop(asked.answer)

    async def _take_archive(self, asked: _Asked, parts: AsyncIterator[bytes]) -> None:
        reader = CarReader()
        keep_memory()
        async with _Ahead(parts) as ahead:
            last = time.monotonic()
            while self._incoming.missing and not self._incoming.much_is_here:
                try:
                    async with asyncio.timeout(self._patience):
                        data = await ahead.some()
                except ContentError as error:
                    asked.drop(error)
                    return
                if not data:
                    return
                asked.received += sum(map(len, data))
                if await asyncio.to_thread(self._read_archive, reader, data):
                    last = time.monotonic()
                elif time.monotonic() - last > SLOWEST * self._patience:
                    raise TimeoutError
                self._tell()
            if not self._incoming.missing:
                await ahead.finish()

    def _read_archive(self, reader: CarReader, parts: list[bytes]) -> int:
        """Take the blocks that are whole with these parts, as far as an archive is of use; how many they are."""
        count = 0
        for part in parts:
            if self._incoming.much_is_here:
                break
            try:
                found = reader.feed(part)
            except ContentError as error:
                raise ProtocolError(str(error)) from error
            for cid, block in found:
                if self._incoming.missing:  # what comes behind the last block that was wanted is not looked at
                    self._incoming.take(cid, block)
            count += len(found)
        return count

    # --- single blocks ---

    async def _block_by_block(self) -> None:
        """Ask everybody who is left for the missing blocks, several at once."""
        left = [asked for asked in self._asked if not asked.out]
        if not left:
            return
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(max(AT_ONCE, len(left))):
                    group.create_task(self._worker(left[number % len(left)]))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        for asked in left:
            if not asked.out:
                asked.drop(asked.answer or "it has no more of it")

    async def _worker(self, asked: _Asked) -> None:
        """Ask one provider for one block after another."""
        asked.since = asked.since or time.monotonic()
        failures = 0
        while failures < TRIES and (cid := await self._next(asked)) is not None:
            try:
                good = await self._ask(asked, cid)
            finally:
                async with self._changed:
                    self._under_way.discard(cid.digest)
                    self._changed.notify_all()
            failures = 0 if good else failures + 1
            if 0 < failures < TRIES:
                await asyncio.sleep(_PAUSE * 2**failures)
        if failures == TRIES and not asked.out:
            asked.drop(asked.answer)

    async def _next(self, asked: _Asked) -> Cid | None:
        """A block that this provider may have and nobody else is asked for; None when there will be none."""
        async with self._changed:
            while not asked.out and asked.lacking < MAX_LACKING:
                if (cid := self._incoming.next(but=self._under_way, nor=asked.lacks)) is not None:
                    self._under_way.add(cid.digest)
                    return cid
                if not self._under_way:
                    break
                await self._changed.wait()
        return None

    async def _ask(self, asked: _Asked, cid: Cid) -> bool:
        """Ask for one block and take it; False if it may be asked for again."""
        try:
            async with asyncio.timeout(self._patience):
                block = await asked.provider.block(cid, root=self._want.cid)
        except ContentError as error:
            asked.answer = str(error)
            asked.lacks.add(cid.digest)
            asked.lacking += 1
            return True
        except NodeUnreachable as error:
            asked.answer = str(error)
            return False
        except TimeoutError:
            asked.drop(self._silence())
            return True
        asked.received += len(block)
        try:
            await asyncio.to_thread(self._take_block, cid, block)
        except ProtocolError as error:
            asked.drop(_untrusted(error))
            return True
        asked.lacking = 0
        self._tell()
        return True

    def _take_block(self, cid: Cid, block: bytes) -> None:
        if len(block) > MAX_BLOCK or not cid.matches(block):
            raise ProtocolError(f"it sent something else as the block {cid}")
        self._incoming.take(cid, block)

    # --- what is told ---

    def _tell(self) -> None:
        if self._told is not None:
            self._told(self._incoming.bytes)

    def _silence(self) -> str:
        return f"nothing came for {self._patience:g} s"


class _Ahead:
    """Reads a stream while what came before is worked at; one that is too fast has to wait."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = cast("AsyncGenerator[bytes, None]", stream)
        self._parts: list[bytes] = []
        self._size, self._ended = 0, False
        self._came, self._taken = asyncio.Event(), asyncio.Event()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()  # whoever wanted to know it has asked

    async def some(self) -> list[bytes]:
        """All that came, as soon as there is something; [] at the end. Raises what reading raises."""
        await self._came.wait()
        parts, self._parts, self._size = self._parts, [], 0
        self._taken.set()
        if not parts:
            await self._task
        elif not self._ended:
            self._came.clear()
        return parts

    async def finish(self) -> None:
        """Read the end of an answer that has brought everything, so that its connection is left in order."""
        await asyncio.wait([self._task], timeout=1)

    async def _read(self) -> None:
        try:
            async with aclosing(self._stream) as stream:
                async for part in stream:
                    self._parts.append(part)
                    self._size += len(part)
                    self._came.set()
                    while self._size >= AHEAD or len(self._parts) >= _MANY:
                        self._taken.clear()
                        await self._taken.wait()
        finally:
            self._ended = True
            self._came.set()


def _untrusted(error: ProtocolError) -> str:
    return f"{error}: it is not to be trusted"
