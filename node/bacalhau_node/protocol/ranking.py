"""Which nodes a shard should go to: the same ones again for the same data.

Theory of operation. Weighted rendezvous hashing: each pair (shard, node) has a score that depends
on nothing but the two and the node's weight, and the shard goes to the nodes with the highest ones.
When a node comes or goes only its own shards move. Scoring all nodes for all shards would cost
their product, so the nodes stand on a ring by their keys, and a shard scores only the `WINDOW` nodes
that follow its own key; with no more nodes than that this is rendezvous hashing proper.

Keys come from a cryptographic hash, never from `hash()`, so they are equal in every process.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Final

from bacalhau_node.ids import NodeId

WINDOW: Final = 8
"""Nodes that are scored for one shard (a guess: a few more than the replicas that people ask for)."""

_MASK: Final = 2**64 - 1


def key(text: str) -> int:
    """64 bits that stand for `text`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def score(shard: int, node: int, weight: float) -> float:
    """How well two keys fit: a node's chance to have the highest score of all is in proportion to its weight."""
    mixed = (shard ^ node) * 0x9E3779B97F4A7C15 & _MASK
    mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & _MASK
    mixed ^= mixed >> 32
    return -weight / math.log(((mixed >> 12) + 0.5) / 2**52)


class Ring:
    """The known nodes in the order of their keys."""

    def __init__(self) -> None:
        self._ring: list[tuple[int, NodeId]] = []

    def __len__(self) -> int:
        """How many nodes stand on it."""
        return len(self._ring)

    def add(self, node: NodeId) -> None:
        """Put a node in its place, if it isn't there."""
        place = (key(node), node)
        at = bisect_left(self._ring, place)
        if at == len(self._ring) or self._ring[at] != place:
            insort(self._ring, place)

    def remove(self, node: NodeId) -> None:
        """Take a node away, if it is there."""
        place = (key(node), node)
        at = bisect_left(self._ring, place)
        if at < len(self._ring) and self._ring[at] == place:
            del self._ring[at]

    def best(self, shard: int, *, count: int, weight: Callable[[NodeId], float]) -> list[NodeId]:
        """The `count` nodes that fit the shard's key best, the best one first; those without weight never."""
        size = len(self._ring)
        start = bisect_left(self._ring, (shard, ""))
        window = [self._ring[(start + step) % size] for step in range(min(size, max(WINDOW, count)))]
        scored = [(score(shard, place, heavy), node) for place, node in window if (heavy := weight(node)) > 0]
        return [node for _, node in sorted(scored, reverse=True)[:count]]
