"""What this node answers to those who ask for content: the trustless gateway, without any HTTP in it.

Theory of operation. A question names a root, a path and a scope, or one block; the answer is a CAR or the block's
bytes, which the other side checks. It is the same over HTTP (`api.gateway`) and over a stream of the network, where
a question is a msgpack map and an answer begins with one byte: 0, and what was asked for follows; else why it
doesn't, as text.

**Rights.** A root is given to whoever holds a token that opens it, or to everybody if it is public. A single block
is given only if it lies below such a root, which the question names: otherwise a token for one job would open
all that this node has. Which blocks lie below a root is found by reading it once, as far as need be, and is
remembered for the last ones that were asked for, `MAX_KNOWN` blocks in all. Who may not have a block gets
the same answer as who asks for one that isn't here.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import chain
from typing import Final, Literal

import msgspec

from bacalhau_node.cid import RAW, Cid
from bacalhau_node.content import car
from bacalhau_node.content.grants import Grants
from bacalhau_node.content.heap import keep_memory
from bacalhau_node.content.walk import Want, selected, steps_of
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.ids import NodeId
from bacalhau_node.ports import Answering, ContentStore, Scope

PART: Final = 1024 * 1024
"""Bytes that are read at once, and that a part of an answer over a stream has at most."""

JOINED: Final = 128 * 1024
"""Small parts are joined up to so many bytes."""

MAX_KNOWN: Final = 1_000_000
"""Blocks that are remembered to lie below a root: some 100 MB, and 250 GB of content."""

GOOD, NOT_HERE, BAD_QUESTION = 0, 1, 2
"""The first byte of an answer over a stream."""


class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is asked over a stream. `root`: below which a block lies; "": it is a root itself."""

    cid: str
    path: str = ""
    form: Literal["car", "raw"] = "car"
    scope: Scope = "all"
    root: str = ""
    token: str | None = None


class Gateway:
    """Answers over a store. All but `answering` blocks on disk."""

    def __init__(self, store: ContentStore, grants: Grants) -> None:
        self._store, self._grants = store, grants
        self._below: OrderedDict[Cid, _Below] = OrderedDict()
        self._lock = threading.Lock()

    def allows(self, token: str | None, cid: Cid, *, root: Cid | None = None) -> bool:
        """Whether somebody with this token may have `cid`: as a root, or as a block below `root` or a public one."""
        if self._grants.allows(token, cid):
            return True
        if root is not None:
            return self._grants.allows(token, root) and self._lies_below(root, cid)
        return any(self._lies_below(public, cid) for public in self._grants.public())

    def archive(self, want: Want) -> Iterator[bytes]:
        """A CAR; raises `ContentError` where a block is missing. Its blocks are not hashed more often than need be."""
        keep_memory()
        blocks = selected(self._store.to_send, want)
        return gathered(chain((car.header([want.cid]),), (car.section(cid, block) for cid, block in blocks)))

    def answering(self) -> Answering:
        """The handler for `ports.Transport.serve`."""
        return self._answer

    async def _answer(self, _asker: NodeId, data: bytes) -> AsyncIterator[bytes]:
        try:
            parts = await asyncio.to_thread(self._opened, data)
        except SpecError as error:
            yield bytes((BAD_QUESTION,)) + str(error).encode()
            return
        except ContentError as error:
            yield bytes((NOT_HERE,)) + str(error).encode()
            return
        yield bytes((GOOD,))
        async for part in in_threads(parts):
            for at in range(0, len(part), PART):
                yield part[at : at + PART]

    def _opened(self, data: bytes) -> Iterator[bytes]:
        """What answers a question; raises `SpecError` for a bad one, `ContentError` for what is not here."""
        try:
            asked = msgspec.msgpack.decode(data, type=Question)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SpecError(f"the question can't be read: {error}") from error
        cid, steps = Cid.parse(asked.cid), steps_of(asked.path)
        root = Cid.parse(asked.root) if asked.root else None
        if not self.allows(asked.token, cid, root=root) or not self._store.holds(cid):
            raise ContentError(f"{cid} is not here, or not for you")
        if asked.form == "raw":
            return iter((self._store.block(cid),))
        return self.archive(Want(cid, steps, asked.scope))

    def _lies_below(self, root: Cid, cid: Cid) -> bool:
        with self._lock:
            below = self._below.setdefault(root, _Below(self._store, root))
            self._below.move_to_end(root)
        found = below.finds(cid)
        with self._lock:
            while len(self._below) > 1 and sum(map(len, self._below.values())) > MAX_KNOWN:
                self._below.popitem(last=False)
        return found


class _Below:
    """The blocks below a root, read level by level and as far as need be: links tell of blocks before they are read."""

    def __init__(self, store: ContentStore, root: Cid) -> None:
        self._store = store
        self._known = {_named(root)}
        self._unread = deque((root,))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def finds(self, cid: Cid) -> bool:
        """Whether this block is one of them; not beyond the first `MAX_KNOWN`."""
        with self._lock:
            while _named(cid) not in self._known and self._unread and len(self._known) < MAX_KNOWN:
                self._read(self._unread.popleft())
            return _named(cid) in self._known

    def _read(self, cid: Cid) -> None:
        try:
            links = car.links(cid, self._store.block(cid))
        except ContentError:
            return  # missing or damaged: nothing is known of what lies below it
        new = [link for link in links if _named(link) not in self._known]
        self._known.update(map(_named, new))
        self._unread.extend(link for link in new if link.codec != RAW)


def _named(cid: Cid) -> bytes:
    """The block and its codec: what a job has written as a file may look like a folder of whatever there is."""
    return cid.v1().binary


def gathered(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in larger parts: small ones are joined up to `JOINED`, larger ones stay as they are."""
    found: list[bytes] = []
    size = 0
    for part in parts:
        if size and size + len(part) > JOINED:
            yield b"".join(found)
            found, size = [], 0
        found.append(part)
        size += len(part)
    if size:
        yield b"".join(found)


async def in_threads(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    """The same bytes, `gathered`, read in threads and about `PART` of them at once."""
    waiting = gathered(parts)
    while batch := await asyncio.to_thread(_some, waiting):
        for part in batch:
            yield part


def _some(parts: Iterator[bytes]) -> list[bytes]:
    found, size = [], 0
    for part in parts:
        found.append(part)
        size += len(part)
        if size >= PART:
            break
    return found
