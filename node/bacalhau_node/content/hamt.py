"""Large folders as a hash trie (HAMT), byte for byte as kubo builds them. Pure.

A name's 64-bit murmur3 hash is read eight bits at a time, from the top; each byte is a slot of
one of the trie's nodes. A slot with one entry holds it, with two or more it holds a node of the next level.
Link names are the slot as two upper-case hex digits, followed by the entry's name (nothing for
a node).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import mmh3

from bacalhau_node.content.dagpb import PbLink, encode_node, hamt_node
from bacalhau_node.errors import ContentError

PREFIX: Final = 2
"""Characters of a link's name that spell its slot."""

LEVELS: Final = 8
"""Levels of the deepest trie: a 64-bit hash, eight bits a level."""


def build_hamt(links: Sequence[PbLink], store: Callable[[bytes, int], PbLink]) -> PbLink:
    """Store a folder's `links` as a trie and return the link of its root.

    `store(block, size below)` stores one node and returns its (nameless) link. Raises
    `ContentError` for names whose hashes are equal to the last bit, as kubo does.
    """
    return _build([(hashed(link.name), link) for link in links], 0, store)


def hashed(name: bytes) -> bytes:
    """The slots of a name, that of the top level first."""
    return mmh3.hash64(name, signed=False)[0].to_bytes(LEVELS, "big")


def _build(entries: list[tuple[bytes, PbLink]], level: int, store: Callable[[bytes, int], PbLink]) -> PbLink:
    if level == LEVELS:
        names = ", ".join(repr(link.name) for _, link in entries)
        raise ContentError(f"a folder cannot hold both of {names}: their hashes are equal; rename one")
    slots: dict[int, list[tuple[bytes, PbLink]]] = {}
    for item in entries:
        slots.setdefault(item[0][level], []).append(item)
    out, bitfield = [], 0
    for slot in sorted(slots):
        items = slots[slot]
        link = items[0][1] if len(items) == 1 else _build(items, level + 1, store)
        out.append(PbLink(link.cid, b"%02X" % slot + link.name, link.tsize))
        bitfield |= 1 << slot
    return store(encode_node(out, hamt_node(bitfield)), sum(link.tsize for link in out))
