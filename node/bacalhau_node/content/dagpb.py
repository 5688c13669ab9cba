"""dag-pb blocks with UnixFS data in them: bytes <-> nodes. Pure.

Theory of operation. A UnixFS node is two protobuf messages, one inside the other: the dag-pb
node (links, then data: this order decides the hash) and in its data field the UnixFS message
(type, data, filesize, blocksizes, hashType, fanout, in this order). Both are tiny, so they are
written and read by hand: every byte counts for the CID, and a general protobuf library would
neither promise the order nor refuse what is not canonical enough to trust.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeVar

import msgspec

from bacalhau_node.errors import ContentError

FOLDER: Final = 1
FILE: Final = 2
SYMLINK: Final = 4
HAMT: Final = 5
RAW_FILE: Final = 0
"""The type of leaves that ancient importers wrote; read like `FILE`, never written."""

MURMUR3: Final = 0x22
FANOUT: Final = 256

_Buffer = TypeVar("_Buffer", bytes, memoryview)

_MAX_SHIFT = 63
_MAX_NUMBER = 1 << 63  # sizes beyond it fit no file, no SQLite column and no message


class PbLink(msgspec.Struct, frozen=True, gc=False):
    """A link of a node: binary CID, name (bytes; empty inside files), bytes below it blocks included."""

    cid: bytes
    name: bytes
    tsize: int


class Node(msgspec.Struct, frozen=True, gc=False):
    """A decoded UnixFS node. `filesize`: the file's bytes below it; `blocksizes`: of each link's part.

    `data` may be a part of the block that it was decoded from.
    """

    type: int
    data: bytes | memoryview
    links: tuple[PbLink, ...] = ()
    filesize: int = 0
    blocksizes: tuple[int, ...] = ()
    hash_type: int = 0
    fanout: int = 0


def varint(number: int) -> bytes:
    """`number` as a protobuf varint."""
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def encode_link(link: PbLink) -> bytes:
    """One link as it stands in a node, tag and length included."""
    body = b"".join(
        (
            b"\x0a",
            varint(len(link.cid)),
            link.cid,
            b"\x12",
            varint(len(link.name)),
            link.name,
            b"\x18",
            varint(link.tsize),
        ),
    )
    return b"\x12" + varint(len(body)) + body


def encode_node(links: Iterable[PbLink], unixfs: bytes) -> bytes:
    """A dag-pb block: links in the order given, then the UnixFS message."""
    return b"".join((*map(encode_link, links), b"\x0a", varint(len(unixfs)), unixfs))


def file_node(sizes: Sequence[int]) -> bytes:
    """The UnixFS message of an inner file node over parts of these sizes."""
    return b"".join((b"\x08\x02\x18", varint(sum(sizes)), *(b"\x20" + varint(size) for size in sizes)))


def leaf_frame(length: int) -> tuple[bytes, bytes]:
    """What stands before and after `length` bytes of data in a dag-pb leaf of a file."""
    size = varint(length)
    head = b"\x08\x02" + (b"\x12" + size if length else b"")
    tail = b"\x18" + size
    return b"\x0a" + varint(len(head) + length + len(tail)) + head, tail


def leaf_block(data: bytes | memoryview, *, raw: bool) -> bytes:
    """The block of a leaf with this data."""
    if raw:
        return bytes(data)
    head, tail = leaf_frame(len(data))
    return b"".join((head, data, tail))


def leaf_overhead(length: int) -> int:
    """How much larger than its `length` bytes of data a dag-pb leaf is."""
    return sum(map(len, leaf_frame(length)))


def folder_node() -> bytes:
    """The UnixFS message of a plain folder."""
    return b"\x08\x01"


def symlink_node(target: bytes) -> bytes:
    """The UnixFS message of a symbolic link."""
    return b"\x08\x04\x12" + varint(len(target)) + target


def hamt_node(bitfield: int) -> bytes:
    """The UnixFS message of one level of a sharded folder; bit i of `bitfield`: slot i is taken."""
    field = bitfield.to_bytes((bitfield.bit_length() + 7) // 8, "big")
    return b"\x08\x05\x12" + varint(len(field)) + field + b"\x28\x22\x30" + varint(FANOUT)


def has_links(block: bytes, size: int | None = None) -> bool:
    """Whether a dag-pb block may have links: False only when its data field is all there is. Quick.

    The first 16 bytes of a block of `size` are enough.
    """
    if block[:1] != b"\x0a":
        return True
    try:
        length, at = _read_varint(block, 1)
    except ContentError:
        return True
    return at + length != (len(block) if size is None else size)


def decode_node(block: bytes) -> Node:
    """The UnixFS node in a dag-pb block; raises `ContentError` for anything malformed."""
    data, links = None, []
    for field, value in _fields(memoryview(block)):  # a leaf's data is not copied
        if field == 1 and isinstance(value, memoryview) and data is None:
            data = value
        elif field == 2 and isinstance(value, memoryview):
            links.append(_decode_link(bytes(value)))
        else:
            raise ContentError(f"not a dag-pb block: unexpected field {field}")
    if data is None:
        raise ContentError("not a UnixFS block: it has no data field")
    return _decode_unixfs(data, tuple(links))


def _decode_link(data: bytes) -> PbLink:
    cid, name, tsize = b"", b"", 0
    for field, value in _fields(data):
        match field, value:
            case 1, bytes():
                cid = value
            case 2, bytes():
                name = value
            case 3, int():
                tsize = value
            case _:
                raise ContentError(f"not a dag-pb block: unexpected field {field} in a link")
    if not cid:
        raise ContentError("not a dag-pb block: a link without a CID")
    return PbLink(cid, name, tsize)


def _decode_unixfs(data: memoryview, links: tuple[PbLink, ...]) -> Node:
    numbers = {1: -1, 3: 0, 5: 0, 6: 0}  # type, filesize, hashType, fanout
    sizes: list[int] = []
    body = data[:0]
    for field, value in _fields(data):
        match field, value:
            case ((1 | 3 | 5 | 6), int()):
                numbers[field] = value
            case 2, memoryview():
                body = value
            case 4, int():
                sizes.append(value)
            case (7, int()) | (8, memoryview()):
                pass  # mode and mtime: kept by some importers, no part of a file's bytes
            case _:
                raise ContentError(f"not a UnixFS block: unexpected field {field}")
    return Node(numbers[1], body, links, numbers[3], tuple(sizes), numbers[5], numbers[6])


def _fields(data: _Buffer) -> Iterator[tuple[int, int | _Buffer]]:
    at, end = 0, len(data)
    while at < end:
        tag, at = _read_varint(data, at)
        value, at = _read_varint(data, at)
        if tag & 7 == 0:
            yield tag >> 3, value
        elif tag & 7 == 2:
            if value > end - at:
                raise ContentError("not a dag-pb block: a field is longer than the block")
            yield tag >> 3, data[at : at + value]
            at += value
        else:
            raise ContentError(f"not a dag-pb block: wire type {tag & 7}")


def _read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(data) and shift <= _MAX_SHIFT:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80 and number < _MAX_NUMBER:
            return number, at
        shift += 7
    raise ContentError("not a dag-pb block: a number is cut off or too long")
