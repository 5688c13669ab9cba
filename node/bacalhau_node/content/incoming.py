"""What comes from strangers into a store: only what is wanted, only what is right, nothing half. No I/O of its own.

Theory of operation. `walk` says which blocks follow from which. What is here already is not wanted: the store has
nothing without everything below it, so a root that is here asks for nothing at all. `missing` are the wants whose
blocks are known to be needed and are not here; each block that comes either fulfils one of them or is refused.
Blocks that will be whole go into the store by `car.CarImport`, children first. Those of which only a
part is wanted (folders on the way, the listing of a folder, a file's range) can't: the store must not
claim what is below them. They are used for the walk, and kept only in `loose` for who asked for that.

Two sorts of fault are told apart. `ProtocolError`: whoever sent this is not to be trusted, another may do better.
`ContentError`: the content itself is malformed, too large or not there, or the store can't take it: nobody could
do better.

Bounds. A block has at most 2 MiB; those that wait for others have `car.MAX_WAITING` together, which bounds
the links that are wanted too; blocks lie at most `walk.MAX_DEPTH` deep. `limit` is for the bytes of files, as they say
themselves and each as often as it is named, and for what comes, where the blocks around them may take a little more.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Final, Protocol

from bacalhau_node.cid import Cid
from bacalhau_node.content.car import CarImport
from bacalhau_node.content.reader import MAX_BLOCK
from bacalhau_node.content.walk import Expanded, Want, expand
from bacalhau_node.errors import ContentError, ProtocolError

MAX_USELESS: Final = 16 * 1024 * 1024
"""Bytes of blocks that were here already that a sender may send, over as many as were useful."""

MAX_LOOSE: Final = 256 * 1024 * 1024
"""Bytes of blocks that are held in memory for a listing: of folders with some two million files."""

_HELD_SHARE = 8
_AROUND = 16  # of a file's bytes so many stand in the blocks around them at most


class Shelf(Protocol):
    """Where blocks go: a `ports.ContentStore`, or memory."""

    def holds(self, cid: Cid) -> bool:
        """Whether the block is here, and so all below it."""
        ...

    def block(self, cid: Cid) -> bytes:
        """Its checked bytes."""
        ...

    def keep(self, cid: Cid, block: bytes) -> None:
        """Store a block that was checked, and all of whose links are here."""
        ...

    def flush(self) -> None:
        """Make what was kept durable."""
        ...

    def hold(self) -> AbstractContextManager[None]:
        """Until it ends nothing is collected that came or was asked for since it began."""
        ...


class Incoming:
    """One walk over content that comes. `take` may be called from several threads."""

    def __init__(
        self, shelf: Shelf, want: Want, *, limit: int | None = None, loose: dict[bytes, bytes] | None = None
    ) -> None:
        self.target: Cid | None = None
        """What the path leads to, once that is known."""
        self.missing: dict[bytes, list[Want]] = {}
        """By digest; the last ones are wanted first."""
        self.bytes = 0
        """Of the blocks that were wanted and came."""
        self._shelf, self._limit, self._loose = shelf, limit, {} if loose is None else loose
        self._keep_loose, self._loose_bytes = loose is not None, 0
        self._import = CarImport(shelf)
        self._lock = threading.Lock()
        self._came: set[bytes] = set()
        self._walked: set[object] = set()  # what was followed and is not kept whole, so that it is followed once
        self._useless = self._held = self._met = 0
        self._sizes: dict[bytes, tuple[int | None, list[bytes]]] = {}
        self._meet([want])

    @property
    def much_is_here(self) -> bool:
        """Whether an archive would bring much that was here before: the missing blocks are better asked for alone."""
        return self._held * _HELD_SHARE > self._met

    def take(self, cid: Cid, block: bytes) -> None:
        """Take a block that was checked against its CID; for what is raised see above."""
        with self._lock:
            wants = self.missing.get(cid.digest)
            if wants is None:
                self._count_useless(cid, block)
                return
            if len(block) > MAX_BLOCK:
                raise ContentError(f"the block {cid} has {len(block)} bytes, over the limit of {MAX_BLOCK}")
            self.bytes += len(block)
            self._check_limit(self.bytes, spare=MAX_BLOCK + (self._limit or 0) // _AROUND)
            del self.missing[cid.digest]
            self._came.add(cid.digest)
            for want in wants:
                self._use(want, block)

    def next(self, *, but: Collection[bytes], nor: Collection[bytes]) -> Cid | None:
        """The missing block that is wanted first, but none with these digests."""
        with self._lock:
            for digest, wants in reversed(self.missing.items()):
                if digest not in but and digest not in nor:
                    return wants[0].cid
        return None

    def end(self) -> None:
        """Nothing is missing any more: raises `ContentError` if what came can't be whole, or expands to too much."""
        self._import.end()
        if self._limit is not None and self.target is not None:
            self._check_limit(self._expanded(self.target.digest, {}))

    def _use(self, want: Want, block: bytes) -> None:
        """Follow a want whose block has come, and put the block where it belongs."""
        further = expand(want, block)
        if further.absent:
            raise ContentError(further.absent)
        self._note_size(want, further)
        self._meet(further.below)
        if further.whole:
            self._import.take(want.cid, block, [one.cid for one in further.below])
        elif self._keep_loose:
            self._walked.add(want.key)
            self._loose[want.cid.digest] = block
            self._loose_bytes += len(block)
            if self._loose_bytes > MAX_LOOSE:
                raise ContentError(f"its folders have over {MAX_LOOSE:,} bytes: name one that is in it")

    def _meet(self, wants: list[Want]) -> None:
        """Note what is missing of these, following what is here as far as it has to be read."""
        waiting = list(wants)  # taken from its end: the first one is noted last, and wanted first
        while waiting:
            want = waiting.pop()
            if not want.steps and self.target is None:
                self.target = want.cid
            if want.key in self._walked:
                continue
            block = self._known(want)
            if block is not None:
                self._walked.add(want.key)
                further = expand(want, block)
                if further.absent:
                    raise ContentError(further.absent)
                waiting += further.below
            elif not self._is_here(want.cid):
                self._met += 1
                same = self.missing.setdefault(want.cid.digest, [])
                if all(one.key != want.key for one in same):  # a block may name another any number of times
                    same.append(want)

    def _known(self, want: Want) -> bytes | None:
        """The bytes of a block that is here, where the walk has to go through it."""
        if want.steps and self._shelf.holds(want.cid):
            return self._shelf.block(want.cid)
        return self._loose.get(want.cid.digest)

    def _is_here(self, cid: Cid) -> bool:
        if self._import.waits(cid):
            return True
        if not self._shelf.holds(cid):
            return False
        if cid.digest not in self._came:
            self._met += 1
            self._held += 1
        return True

    def _count_useless(self, cid: Cid, block: bytes) -> None:
        if not (cid.digest in self._came or self._shelf.holds(cid)):
            raise ProtocolError(f"it sent the block {cid}, which nobody asked for")
        self._useless += len(block)
        if self._useless > self.bytes + MAX_USELESS:
            raise ProtocolError(f"it sent {self._useless:,} bytes of blocks that are here already")

    def _check_limit(self, size: int, *, spare: int = 0) -> None:
        if self._limit is not None and size > self._limit + spare:
            raise ContentError(f"it has over {self._limit:,} bytes, more than was announced or is allowed")

    def _note_size(self, want: Want, further: Expanded) -> None:
        """Remember what a block expands to, or to what."""
        if self._limit is not None and not want.steps:
            self._check_limit(further.size or 0)
            self._sizes[want.cid.digest] = further.size, [one.cid.digest for one in further.below]

    def _expanded(self, digest: bytes, known: dict[bytes, int]) -> int:
        """The bytes that this block stands for, each part as often as it is named, as far as they are known."""
        if (size := known.get(digest)) is None:
            size, below = self._sizes.get(digest, (0, []))
            if size is None:
                size = sum(self._expanded(one, known) for one in below)
            known[digest] = size
        return size
