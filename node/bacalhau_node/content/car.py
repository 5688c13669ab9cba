"""CAR archives (version 1): a header with roots, then blocks, each behind its length and its CID.

Theory of operation. An archive is a stream, and what comes in may be hostile: so `CarReader` is fed with
whatever arrives, holds at most one unfinished section, checks every length before it waits for so many
bytes, and every block against its CID before anybody sees it. `CarImport` puts such blocks into a store in an
order that keeps the store's promise: *whoever has a block has all that is below it*. A block without links goes in
at once; one whose links are not all there waits, in memory and bounded, for those. So the
order of the archive doesn't matter, one that is cut off leaves no root without its leaves, and a
root in the store means that nothing below it has to be asked for again. Which blocks may come at all is up to who
feeds it (`incoming`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from bacalhau_node import dagjson
from bacalhau_node.cid import DAG_JSON, RAW, Cid
from bacalhau_node.content.dagpb import decode_node, varint
from bacalhau_node.content.reader import MAX_BLOCK
from bacalhau_node.errors import ContentError, SpecError

MAX_HEADER: Final = 32 * 1024
MAX_ROOTS: Final = 256
MAX_WAITING: Final = 16 * 1024 * 1024
"""Bytes of blocks that wait for what they link to: the inner nodes of some 75 GB of files."""

_LONGEST_CID: Final = 37
_LONGEST_VARINT: Final = 5
_SMALL: Final = 16 * 1024
_TAG_CID = 42


# --- writing ---


def header(roots: Sequence[Cid]) -> bytes:
    """What an archive of these roots begins with: their list in DAG-CBOR."""
    links = b"".join(b"\xd8\x2a" + _cbor_head(2, len(root.binary) + 1) + b"\0" + root.binary for root in roots)
    body = b"\xa2\x65roots" + _cbor_head(4, len(roots)) + links + b"\x67version\x01"
    return varint(len(body)) + body


def section(cid: Cid, block: bytes) -> bytes:
    """One block as it stands in an archive."""
    return b"".join((varint(len(cid.binary) + len(block)), cid.binary, block))


def links(cid: Cid, block: bytes) -> list[Cid]:
    """What a block links to, in order; raises `ContentError` for one that is malformed."""
    if cid.codec == RAW:
        return []
    try:
        if cid.codec == DAG_JSON:
            return [Cid.parse(link.cid) for link in _json_links(dagjson.decode(block))]
        return [Cid.decode(link.cid) for link in decode_node(block).links]
    except SpecError as error:
        raise ContentError(f"the block {cid} has a link that can't be followed: {error}") from error


def _json_links(value: object) -> Iterator[dagjson.Link]:
    if isinstance(value, dagjson.Link):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _json_links(item)


# --- reading ---


class CarReader:
    """An archive that comes in parts. `roots` is None until the header is there."""

    def __init__(self) -> None:
        self.roots: tuple[Cid, ...] | None = None
        self._parts: deque[bytes | bytearray] = deque()
        self._at = 0  # so much of the first part is used up
        self._size = 0
        self._length: int | None = None  # of the next section, once that is known

    def feed(self, data: bytes) -> list[tuple[Cid, bytes]]:
        """The blocks that are whole with `data`, each checked; raises `ContentError` for what is no archive."""
        self._append(data)
        found = []
        while self._is_next_whole():
            if self.roots is None:
                self.roots = _read_header(self._take(self._length or 0))
            else:
                found.append(self._block(self._length or 0))
            self._length = None
        return found

    def end(self) -> None:
        """No more will come: raises `ContentError` when something is unfinished."""
        if self.roots is None or self._size or self._length is not None:
            raise ContentError("the archive is cut off: send it again")

    def _append(self, data: bytes) -> None:
        """Large parts are kept as they came; small ones are joined, or each would take many times its size."""
        self._size += len(data)
        last = self._parts[-1] if self._parts else b""
        if len(data) >= _SMALL:
            self._parts.append(data)
        elif isinstance(last, bytearray) and len(last) < _SMALL:
            last += data
        elif data:
            self._parts.append(bytearray(data))

    def _is_next_whole(self) -> bool:
        if self._length is None and not self._read_length():
            return False
        return self._size >= (self._length or 0)

    def _read_length(self) -> bool:
        """Read how long the next section is; False while that is not all there."""
        limit = MAX_HEADER if self.roots is None else MAX_BLOCK + _LONGEST_CID
        length = shift = 0
        for count, byte in enumerate(self._peek(_LONGEST_VARINT), 1):
            length |= (byte & 0x7F) << shift
            shift += 7
            if length > limit or (count == _LONGEST_VARINT and byte >= 0x80):
                raise ContentError(f"not a CAR archive, or one with a part of over {limit} bytes")
            if byte < 0x80:
                self._take(count)
                self._length = length
                return True
        return False

    def _block(self, length: int) -> tuple[Cid, bytes]:
        head = self._peek(min(length, _LONGEST_CID))
        own = 34 if head[:2] == b"\x12\x20" else 37 if head[:3] == b"\x01\xa9\x02" else 36
        try:
            cid = Cid.decode(head[:own])
        except SpecError as error:
            raise ContentError(f"a block of the archive has no usable name: {error}") from error
        self._take(own)
        block = self._take(length - own)
        if not cid.matches(block):
            raise ContentError(f"the block that was sent as {cid} is another one: it is damaged, or its sender lies")
        return cid, block

    def _peek(self, count: int) -> bytes:
        """The next bytes, at most so many."""
        found = b""
        for number, part in enumerate(self._parts):
            at = 0 if number else self._at
            found += part[at : at + count - len(found)]
            if len(found) == count:
                break
        return found

    def _take(self, count: int) -> bytes:
        """The next bytes, exactly so many, copied once."""
        found = []
        self._size -= count
        while count:
            part = memoryview(self._parts[0])[self._at : self._at + count]
            found.append(part)
            count -= len(part)
            self._at += len(part)
            if self._at == len(self._parts[0]):
                self._parts.popleft()
                self._at = 0
        return b"".join(found)


# --- the header's DAG-CBOR: a map of two keys, nothing else is read ---


def _cbor_head(major: int, value: int) -> bytes:
    if value < 24:
        return bytes((major << 5 | value,))
    size = 1 if value < 1 << 8 else 2
    return bytes((major << 5 | 23 + size,)) + value.to_bytes(size, "big")


def _read_header(body: bytes) -> tuple[Cid, ...]:
    cursor = _Cursor(body)
    cursor.expect(5, 2)
    roots: tuple[Cid, ...] | None = None
    version = None
    for _ in range(2):
        key = cursor.take(cursor.value(3))
        if key == b"roots" and roots is None:
            roots = _read_roots(cursor)
        elif key == b"version" and version is None:
            version = cursor.value(0)
        else:
            raise _no_header()
    if roots is None or version != 1 or not cursor.done:
        raise _no_header()
    return roots


def _read_roots(cursor: _Cursor) -> tuple[Cid, ...]:
    count = cursor.value(4)
    if count > MAX_ROOTS:
        raise ContentError(f"an archive with {count} roots: at most {MAX_ROOTS} are read")
    found = []
    for _ in range(count):
        cursor.expect(6, _TAG_CID)
        link = cursor.take(cursor.value(2))
        if link[:1] != b"\0":
            raise _no_header()
        try:
            found.append(Cid.decode(link[1:]))
        except SpecError as error:
            raise ContentError(f"a root of the archive has no usable name: {error}") from error
    return tuple(found)


class _Cursor:
    """Reads the few sorts of CBOR that a header is made of."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def done(self) -> bool:
        return self._at == len(self._data)

    def take(self, length: int) -> bytes:
        part = self._data[self._at : self._at + length]
        if len(part) != length:
            raise _no_header()
        self._at += length
        return part

    def value(self, major: int) -> int:
        """The number in the next head, which must be of this major type."""
        first = self.take(1)[0]
        low = first & 0x1F
        if first >> 5 != major or low > 26:
            raise _no_header()
        return low if low < 24 else int.from_bytes(self.take(1 << (low - 24)), "big")

    def expect(self, major: int, value: int) -> None:
        if self.value(major) != value:
            raise _no_header()


def _no_header() -> ContentError:
    return ContentError("not a CAR archive of version 1: its header is another one")


# --- taking in ---


class Shelf(Protocol):
    """Where an import puts blocks."""

    def holds(self, cid: Cid) -> bool:
        """Whether the block is here, and so all below it."""
        ...

    def keep(self, cid: Cid, block: bytes) -> None:
        """Store a block that was checked."""
        ...


@dataclass(eq=False)
class _Waiting:
    cid: Cid
    block: bytes
    missing: int


class CarImport:
    """Puts the blocks of an archive on a shelf, see above."""

    def __init__(self, shelf: Shelf) -> None:
        self.bytes = 0
        """What was stored so far."""
        self._shelf = shelf
        self._waiting: dict[bytes, _Waiting] = {}
        self._waiters: dict[bytes, list[_Waiting]] = {}
        self._waiting_bytes = 0

    def waits(self, cid: Cid) -> bool:
        """Whether this block came, and waits for what it links to."""
        return cid.digest in self._waiting

    def take(self, cid: Cid, block: bytes, children: Sequence[Cid] | None = None) -> None:
        """Take one checked block; `children`: what it links to, where that is known already.

        Raises `ContentError` when too many wait.
        """
        children = links(cid, block) if children is None else children
        if cid.digest in self._waiting:
            return
        missing = {child.digest for child in children if not self._shelf.holds(child)}
        if missing:
            self._hold(_Waiting(cid, block, len(missing)), missing)
        else:
            self._keep(cid, block)

    def end(self) -> None:
        """No more will come: raises `ContentError` when something that was sent links to what is nowhere."""
        if self._waiting:
            parent = next(iter(self._waiting.values()))
            lacking = next(child for child in links(parent.cid, parent.block) if not self._shelf.holds(child))
            raise ContentError(f"the archive has {parent.cid} but not {lacking}, which belongs to it: send both")

    def _hold(self, waiting: _Waiting, missing: set[bytes]) -> None:
        self._waiting_bytes += len(waiting.block)
        if self._waiting_bytes > MAX_WAITING:
            raise ContentError(f"over {MAX_WAITING} bytes wait for blocks they link to: send those first")
        self._waiting[waiting.cid.digest] = waiting
        for digest in missing:
            self._waiters.setdefault(digest, []).append(waiting)

    def _keep(self, cid: Cid, block: bytes) -> None:
        """Store a block, and all that waited for nothing else."""
        ready = [(cid, block)]
        while ready:
            cid, block = ready.pop()
            self._shelf.keep(cid, block)
            self.bytes += len(block)
            for waiting in self._waiters.pop(cid.digest, ()):
                waiting.missing -= 1
                if not waiting.missing:
                    del self._waiting[waiting.cid.digest]
                    self._waiting_bytes -= len(waiting.block)
                    ready.append((waiting.cid, waiting.block))
