"""Piece commitments: the name that Filecoin gives to a run of bytes (CommP), as its CID of version 1 and 2.

Theory of operation. Every 127 bytes of payload become 128: four groups of 254 bits with two zero bits behind each
(fr32), so that each 32 bytes are an element of the field that proofs are made in. Over these 32-byte leaves stands
a binary tree of SHA-256 whose digests lose their two highest bits for the same reason. The payload counts as
followed by zeros up to a whole power of two of leaves; the roots of trees over nothing but zeros are known
beforehand. The piece's CID is the root: version 1 names it alone, version 2 (FRC-0069) the tree's height and how
many of the zeros were not payload as well.

Trees over aligned runs of 127·2^k bytes don't depend on each other, so a large file is cut into **segments** that a
few helper processes hash: so the interpreter's lock of a notebook's kernel stays free. A helper reads the numbers
of segments from its stdin, writes their roots to its stdout, and ends when its stdin does. Within a segment all
work but the hashing itself is done on whole levels of the tree at once, as arithmetic on one long number: 33 MB/s
on one core, where a loop over leaves made 11.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from base64 import b32decode, b32encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

import msgspec

import bacalhau_node
from bacalhau_node.content.dagpb import varint
from bacalhau_node.errors import ContentError

_QUAD = 127  # payload bytes of four leaves
_QUAD_HEIGHT = 2
_SEGMENT_HEIGHT = 18
SEGMENT: Final = _QUAD << (_SEGMENT_HEIGHT - _QUAD_HEIGHT)
"""Payload bytes that are hashed at once: 8.3 MB, a quarter of a second."""

MAX_HEIGHT: Final = 31
"""Of the largest piece that fits a sector of 64 GiB."""

HELPERS: Final = 4

_WORD = (1 << 254) - 1
_DIGEST_MASK = b"\xff" * 31 + b"\x3f"
_V1 = b"\x01" + varint(0xF101) + varint(0x1012) + b"\x20"
_V2 = b"\x01\x55" + varint(0x1011)


class Piece(msgspec.Struct, frozen=True):
    """A run of bytes as Filecoin names it. `payload`: its bytes; `height`: of the tree over them."""

    root: bytes
    height: int
    payload: int

    @property
    def padded(self) -> int:
        """Bytes that it takes in a sector: a power of two, from 128."""
        return 32 << self.height

    @property
    def padding(self) -> int:
        """Zeros that follow the payload."""
        return (self.padded >> 7) * _QUAD - self.payload

    @classmethod
    def known(cls, cid_v1: str, *, padded: int, payload: int) -> Piece:
        """The piece that a manifest describes; raises `ContentError` for numbers that can't be one's."""
        try:
            cid = b32decode(f"{cid_v1[1:].upper()}{'=' * (-(len(cid_v1) - 1) % 8)}")
        except ValueError:
            cid = b""
        piece = cls(cid[len(_V1) :], padded.bit_length() - 6, payload)
        if piece.cid_v1 != cid_v1 or len(piece.root) != 32 or not _QUAD_HEIGHT <= piece.height <= MAX_HEIGHT:
            raise ContentError(f"{cid_v1!r:.100} is not the CID (version 1) of a piece of {padded} bytes")
        if piece.padded != padded or piece.padding < 0:
            raise ContentError(f"no piece has {payload} bytes of payload in {padded}")
        return piece

    @property
    def cid_v1(self) -> str:
        """`baga6ea4seaq…`: the root alone."""
        return _text(_V1 + self.root)

    @property
    def cid_v2(self) -> str:
        """`bafkzcib…`: root, height and padding, and so the payload's size."""
        digest = varint(self.padding) + bytes((self.height,)) + self.root
        return _text(_V2 + varint(len(digest)) + digest)


def commit(path: Path, stop: threading.Event) -> Piece:
    """The piece that a file is; blocks for half a minute a gigabyte and core.

    Raises `ContentError` for a file that is over what a sector holds, and soon after `stop` is set.
    """
    size = path.stat().st_size
    height = _height(size)
    if height > MAX_HEIGHT:
        raise ContentError(f"{path.name} has {size} bytes, over what the largest sector of Filecoin holds (64 GiB)")
    if height <= _SEGMENT_HEIGHT:
        return Piece(segment_root(path, 0), height, size)
    roots = _by_helpers(path, -(-size // SEGMENT), stop)
    return Piece(_raised(roots, _SEGMENT_HEIGHT, height), height, size)


def _height(size: int) -> int:
    """Of the tree over so many bytes of payload."""
    quads = max(1, -(-size // _QUAD))
    return (quads - 1).bit_length() + _QUAD_HEIGHT


def segment_root(path: Path, index: int) -> bytes:
    """The root over a segment of a file; over less where it is the last one, alone, and not full."""
    with path.open("rb") as file:
        file.seek(index * SEGMENT)
        data = file.read(SEGMENT)
    quads = SEGMENT // _QUAD if index else 1 << (_height(len(data)) - _QUAD_HEIGHT)
    level = _fr32(data.ljust(quads * _QUAD, b"\0"))
    while len(level) > 32:
        level = above(level)
    return level


def _fr32(data: bytes) -> bytes:
    """Payload, whole quads of it, as leaves."""
    quads = len(data) // _QUAD
    spaced = b"\0".join([data[at : at + _QUAD] for at in range(0, len(data), _QUAD)])
    number, leaves = int.from_bytes(spaced, "little"), 0
    for word in range(4):
        mask = int.from_bytes((_WORD << 254 * word).to_bytes(128, "little") * quads, "little")
        leaves |= (number & mask) << 2 * word
    return leaves.to_bytes(128 * quads, "little")


def above(level: bytes) -> bytes:
    """The level of the tree above this one."""
    digests = b"".join([sha256(level[at : at + 64]).digest() for at in range(0, len(level), 64)])
    mask = int.from_bytes(_DIGEST_MASK * (len(digests) // 32), "little")
    return (int.from_bytes(digests, "little") & mask).to_bytes(len(digests), "little")


def _zeros() -> Iterator[bytes]:
    node = bytes(32)
    for _ in range(MAX_HEIGHT + 1):
        yield node
        node = above(node + node)


ZEROS: Final = tuple(_zeros())
"""The roots of trees over zeros, by height."""


def _raised(roots: list[bytes], low: int, high: int) -> bytes:
    """The root at height `high` over these at height `low`, with zeros behind them."""
    for height in range(low, high):
        if len(roots) % 2:
            roots = [*roots, ZEROS[height]]
        roots = [above(roots[at] + roots[at + 1]) for at in range(0, len(roots), 2)]
    return roots[0]


def _text(cid: bytes) -> str:
    return "b" + b32encode(cid).decode("ascii").rstrip("=").lower()


# --- helpers ---


def _by_helpers(path: Path, count: int, stop: threading.Event) -> list[bytes]:
    """The roots of all segments."""
    waiting: SimpleQueue[int] = SimpleQueue()
    for index in range(count):
        waiting.put(index)
    roots: dict[int, bytes] = {}
    helpers = min(HELPERS, count, os.cpu_count() or 1)
    with ThreadPoolExecutor(helpers) as threads:
        for done in [threads.submit(_drive, path, waiting, roots, stop) for _ in range(helpers)]:
            done.result()
    if stop.is_set():
        raise ContentError(f"{path.name} was not hashed to the end: the node stops")
    return [roots[index] for index in range(count)]


def _drive(path: Path, waiting: SimpleQueue[int], roots: dict[int, bytes], stop: threading.Event) -> None:
    """Give one helper the segments that wait, one after the other."""
    code = "from bacalhau_node.content.piece import help_with; help_with()"
    above = str(Path(bacalhau_node.__file__).parents[1])
    with subprocess.Popen(  # noqa: S603 - this very module
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (above, os.environ.get("PYTHONPATH"))))},
        start_new_session=True,  # Stop interrupts the kernel, not what it has promised
    ) as helper:
        assert helper.stdin is not None
        assert helper.stdout is not None
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except Empty:
                break
            helper.stdin.write(b"%d\n" % index)
            helper.stdin.flush()
            answer = helper.stdout.readline().strip()
            if len(answer) != 64:
                raise ContentError(f"a helper that hashes {path} ended without an answer: is the memory full?")
            roots[index] = bytes.fromhex(answer.decode("ascii"))


def help_with() -> None:
    """What a helper does."""
    path = Path(sys.argv[1])
    for line in sys.stdin:
        sys.stdout.write(f"{segment_root(path, int(line)).hex()}\n")
        sys.stdout.flush()
