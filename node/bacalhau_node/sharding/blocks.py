"""Entries as the data of a plan's blocks, and back.

A block is `{"entries": [row, ...]}` of plain lists, strings and integers, for DAG-JSON. A row is
`[path, source, size, cid]`, `[path, source, size, url, version, sha256]` or
`[path, source, size, absolute path, mtime_ns, inode, device]`. A path that
is not valid UTF-8 (surrogates stand for such bytes) is a byte string, since no text format
carries it. What is read is checked like any message: rows may come from another node, and
their paths decide where files are put.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from bacalhau_node.errors import ProtocolError
from bacalhau_node.sharding.entries import ContentRef, Entry, LocalStamp, Reference, UrlRef
from bacalhau_node.sharding.selecting import refuse_unusable

BLOCK_BUDGET = 900 * 1024
"""Bytes of entries in one block, so that it stays under the store's limit of 1 MiB."""

_ROW_BYTES = 128
"""Bound on what a row takes besides its texts: five integers of up to 20 digits and the brackets."""

Row = list[str | bytes | int]


def chunks(entries: Iterable[Entry]) -> Iterator[tuple[Entry, ...]]:
    """Cut `entries` so that each part's `plan_block` fits into one block of the store."""
    part: list[Entry] = []
    filled = 0
    for entry in entries:
        size = _bound(entry)
        if part and filled + size > BLOCK_BUDGET:
            yield tuple(part)
            part, filled = [], 0
        part.append(entry)
        filled += size
    if part:
        yield tuple(part)


def _bound(entry: Entry) -> int:
    """At least what the row takes: JSON writes no character with more than six bytes."""
    return 6 * (len(entry.path) + _length(entry.reference)) + _ROW_BYTES


def _length(reference: Reference) -> int:
    match reference:
        case LocalStamp(path):
            return len(path)
        case ContentRef(cid):
            return len(cid)
        case UrlRef(url, version, sha256):
            return len(url) + len(version) + len(sha256)


def plan_block(entries: Sequence[Entry]) -> dict[str, object]:
    """The data of a block that holds `entries`; raises `ContentError` for one that can't be read."""
    refuse_unusable(entries)
    return {"entries": [_row(entry) for entry in entries]}


def _row(entry: Entry) -> Row:
    start: Row = [_packed(entry.path), entry.source, entry.size]
    match entry.reference:
        case ContentRef(cid):
            return [*start, cid]
        case UrlRef(url, version, sha256):
            return [*start, url, version, sha256]
        case LocalStamp(path, _, mtime_ns, inode, device):
            return [*start, _packed(path), mtime_ns, inode, device]


def _packed(path: str) -> str | bytes:
    return path if path.isascii() or _is_text(path) else path.encode("utf-8", "surrogateescape")


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_block(data: object) -> tuple[Entry, ...]:
    """The entries of a block; raises `ProtocolError` for anything but what `plan_block` makes."""
    rows = data.get("entries") if isinstance(data, Mapping) else None
    if not isinstance(rows, list):
        raise ProtocolError("a block of a plan has no list of entries")
    return tuple(_entry(row) for row in rows)


def _entry(row: object) -> Entry:
    match row:
        case [path, int(source), int(size), str(cid)] if source >= 0 and size >= 0:
            return Entry(_logical(path), ContentRef(cid), size, source)
        case [path, int(source), int(size), str(url), str(version), str(sha256)] if source >= 0 and size >= 0:
            return Entry(_logical(path), UrlRef(url, version, sha256), size, source)
        case [path, int(source), int(size), place, int(mtime_ns), int(inode), int(device)] if source >= 0 and size >= 0:
            return Entry(_logical(path), LocalStamp(_unpacked(place), size, mtime_ns, inode, device), size, source)
    raise ProtocolError(f"not an entry of a plan: {row!r:.200}")


def _logical(data: object) -> str:
    """A path that stays below the mount: staging writes there."""
    path = _unpacked(data)
    levels = path.removesuffix("/").split("/")
    if "\0" in path or not {"", ".", ".."}.isdisjoint(levels):
        raise ProtocolError(f"not a path of an entry: {path!r:.200}")
    return path


def _unpacked(data: object) -> str:
    if isinstance(data, bytes):
        return data.decode("utf-8", "surrogateescape")
    if isinstance(data, str):
        return data
    raise ProtocolError(f"not a path of an entry: {data!r:.200}")
