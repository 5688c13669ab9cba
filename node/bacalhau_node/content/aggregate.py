"""Several pieces in one, by Filecoin's rules for verifiable aggregation (FRC-0058). Pure; for whoever makes a deal.

Theory of operation. Providers want large pieces, and results are often small. An **aggregate** is a piece whose tree
has the trees of others as branches: each lies at the next multiple of its own padded size, so its root is a node of
the larger tree. At the very end is the **index**, an entry of 64 bytes (two leaves) for each piece: its root, its
offset and size in bytes of the sector, and a checksum, so that a provider finds the pieces and gives each of them out
by its own CID. The index has room for a number of entries that the size of the aggregate decides; the rest is zeros.

A **proof** shows to whoever has the root and size of a piece alone that an aggregate holds it: the siblings on the way
from the piece's root to that of the aggregate, and those on the way from its entry in the index. Both ways must end at
the same root. That this root is in a sector, and paid for, is on Filecoin's chain, which nobody here asks.

    pieces = [Piece.known(one["cid_v1"], padded=one["padded"], payload=one["payload"]) for one in ...]  # of manifests
    made = Aggregate(pieces)                # its file: each CAR at in_file(offset), made.index at in_file(index_offset)
    holder(pieces[0], made.proof(0)) == made.piece
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256

import msgspec

from bacalhau_node.content.piece import MAX_HEIGHT, ZEROS, Piece, above
from bacalhau_node.errors import ContentError

_LEAF = 32
_ENTRY = 64
_ENTRY_HEIGHT = 1
_LEAST_ENTRIES = 4
_SIZE_PER_ENTRY = 2_048 * _ENTRY  # one part in 2,048 is index
_LEAST_HEIGHT = 4  # of an index, and as much again


class Way(msgspec.Struct, frozen=True):
    """From a node of a tree up to its root: the node's number on its level, and the siblings, the lowest first."""

    index: int
    path: tuple[bytes, ...]

    def root(self, node: bytes) -> bytes:
        """Where this way leads from `node`; raises `ContentError` for one that no tree has."""
        if not 0 <= self.index < 1 << len(self.path) or any(len(sibling) != _LEAF for sibling in self.path):
            raise ContentError(f"no tree has a node {self.index} with these {len(self.path)} siblings")
        for level, sibling in enumerate(self.path):
            node = above(sibling + node if self.index >> level & 1 else node + sibling)
        return node


class Proof(msgspec.Struct, frozen=True):
    """That an aggregate holds a piece: `subtree` from the piece's root, `entry` from the node over its entry."""

    subtree: Way
    entry: Way


class Aggregate:
    """A piece made of `pieces`, which lie in it in this order; the largest first leave no gaps.

    Its tree is as high as that needs, and at least `height`. Raises `ContentError` for more than a sector takes.
    """

    def __init__(self, pieces: Sequence[Piece], *, height: int = 0) -> None:
        self.pieces = tuple(pieces)
        self.offsets = tuple(_offsets(pieces))
        """Where each begins, in bytes of the sector; `in_file` says where that is in the file."""
        height = _height(pieces, self.offsets, least=height)
        entries = b"".join(map(_entry, pieces, self.offsets))
        self._first_entry = _index_start(height) // _ENTRY
        self._levels = _grown(height, self._branches(), entries, first=2 * self._first_entry)
        self.piece = _whole(_node(self._levels, height, 0), height)
        self.index_offset = _index_start(height)
        self.index = _as_payload(entries).ljust(in_file(_index_size(height)), b"\0")
        """The bytes of the file from there to its end."""

    def proof(self, at: int) -> Proof:
        """That the piece with this number is in it."""
        piece, offset = self.pieces[at], self.offsets[at]
        subtree = self._way(piece.height, offset // piece.padded)
        return Proof(subtree, self._way(_ENTRY_HEIGHT, self._first_entry + at))

    def _branches(self) -> Iterator[tuple[int, int, bytes]]:
        for piece, offset in zip(self.pieces, self.offsets, strict=True):
            yield piece.height, offset // piece.padded, piece.root

    def _way(self, height: int, index: int) -> Way:
        levels = range(height, self.piece.height)
        return Way(index, tuple(_node(self._levels, level, index >> level - height ^ 1) for level in levels))


def holder(piece: Piece, proof: Proof) -> Piece:
    """The aggregate that holds `piece` if there is a sector with it; raises `ContentError` for what proves nothing."""
    height = piece.height + len(proof.subtree.path)
    if height != _ENTRY_HEIGHT + len(proof.entry.path) or height > MAX_HEIGHT:
        raise ContentError("the two ways of the proof end at different heights, or above the largest sector")
    root = proof.subtree.root(piece.root)
    entry = _entry(piece, proof.subtree.index * piece.padded)
    if proof.entry.root(above(entry)) != root:
        raise ContentError("the piece and its entry in the index are not in the same aggregate")
    if proof.entry.index * _ENTRY < _index_start(height):
        raise ContentError("what should be the piece's entry lies outside of the index")
    return _whole(root, height)


def in_file(offset: int) -> int:
    """Where the byte of a sector that a piece or the index begins with is in the aggregate's file."""
    return offset // 128 * 127


# --- where everything lies ---


def _offsets(pieces: Sequence[Piece]) -> Iterator[int]:
    end = 0
    for piece in pieces:
        offset = -(-end // piece.padded) * piece.padded
        yield offset
        end = offset + piece.padded


def _height(pieces: Sequence[Piece], offsets: Sequence[int], *, least: int) -> int:
    """Of the lowest tree that has room for them."""
    end = offsets[-1] + pieces[-1].padded if pieces else 0
    for height in range(max(_LEAST_HEIGHT, least), MAX_HEIGHT + 1):
        if end <= _index_start(height) and len(pieces) * _ENTRY <= _index_size(height):
            return height
    raise ContentError(f"{len(pieces):,} pieces that reach to {end:,} bytes are more than the largest sector takes")


def _index_size(height: int) -> int:
    return _ENTRY * max(_LEAST_ENTRIES, (_LEAF << height) // _SIZE_PER_ENTRY)


def _index_start(height: int) -> int:
    return (_LEAF << height) - _index_size(height)


def _entry(piece: Piece, offset: int) -> bytes:
    """Two leaves; the checksum is cut to what fits the second one."""
    said = piece.root + offset.to_bytes(8, "little") + piece.padded.to_bytes(8, "little")
    checksum = sha256(said.ljust(_ENTRY, b"\0")).digest()[:16]
    return said + checksum[:15] + bytes((checksum[15] & 0x3F,))


def _as_payload(entries: bytes) -> bytes:
    """What leaves are made of, in whole quads of four."""
    parts = []
    for at in range(0, len(entries), 128):
        words = [int.from_bytes(entries[start : start + _LEAF], "little") for start in range(at, at + 128, _LEAF)]
        parts.append(sum(word << 254 * number for number, word in enumerate(words)).to_bytes(127, "little"))
    return b"".join(parts)


def _whole(root: bytes, height: int) -> Piece:
    return Piece(root, height, in_file(_LEAF << height))


# --- the tree ---


def _grown(
    height: int, branches: Iterable[tuple[int, int, bytes]], leaves: bytes, *, first: int
) -> list[dict[int, bytes]]:
    """The nodes of each level that are not over zeros alone, by their number. `first`: the number of the first leaf."""
    levels: list[dict[int, bytes]] = [{} for _ in range(height + 1)]
    for level, index, root in branches:
        levels[level][index] = root
    for at in range(0, len(leaves), _LEAF):
        levels[0][first + at // _LEAF] = leaves[at : at + _LEAF]
    for level in range(height):
        for index in {index >> 1 for index in levels[level]}:
            both = _node(levels, level, 2 * index) + _node(levels, level, 2 * index + 1)
            levels[level + 1][index] = above(both)
    return levels


def _node(levels: Sequence[dict[int, bytes]], level: int, index: int) -> bytes:
    return levels[level].get(index, ZEROS[level])
