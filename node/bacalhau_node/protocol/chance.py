"""Chance that can be had again: a machine's own random choices, drawn from a seed.

The generator is splitmix64: a counter that grows by an odd constant, and a mixer over it. It is nothing for secrets;
a node's seed comes from real chance, so that nobody foresees whom it will ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

T = TypeVar("T")

_MASK: Final = 2**64 - 1


class Chance:
    """An endless row of draws; equal seeds give equal rows."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def draw(self) -> int:
        """64 bits."""
        self._state = self._state + 0x9E3779B97F4A7C15 & _MASK
        mixed = (self._state ^ self._state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
        return mixed ^ mixed >> 31

    def below(self, count: int) -> int:
        """A whole number from 0 to `count` - 1."""
        return self.draw() * count >> 64

    def between(self, low: float, high: float) -> float:
        """A number between the two."""
        return low + (high - low) * (self.draw() >> 11) / 2**53

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different ones of the items, or all of them, in any order."""
        left = list(items)
        for place in range(min(count, len(left))):
            other = place + self.below(len(left) - place)
            left[place], left[other] = left[other], left[place]
        return left[:count]
