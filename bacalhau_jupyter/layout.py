"""Where the nodes of a network are drawn: a force layout with numpy. Pure.

Nodes push each other away, links pull their ends together, everything is pulled a little to the middle (after
Fruchterman and Reingold). It starts from places that hang only on the nodes' ids, or from an earlier layout, so the
same network looks the same again, and one that has changed a little moves a little.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Places = Mapping[str, tuple[float, float]]

ROUNDS = 120
"""Steps of a layout from nothing; one that goes on from an earlier layout takes a quarter."""

GRAVITY = 0.02
STILL = 1e-9


def arrange(
    ids: Sequence[str], links: Sequence[tuple[int, int]], before: Places | None = None
) -> dict[str, tuple[float, float]]:
    """A place for each node, from -1 to 1 both ways; `links` are pairs of indexes into `ids`."""
    if not ids:
        return {}
    before = before or {}
    known = sum(node in before for node in ids)
    places = np.array([before.get(node) or _start(node) for node in ids], dtype=np.float32)
    rounds = ROUNDS // 4 if 2 * known > len(ids) else ROUNDS
    _settle(places, np.array(links, dtype=np.intp).reshape(-1, 2), rounds)
    places -= (places.max(axis=0) + places.min(axis=0)) / 2
    places /= max(float(np.abs(places).max()), STILL)
    return {node: (float(x), float(y)) for node, (x, y) in zip(ids, places, strict=True)}


def _settle(places: np.ndarray, links: np.ndarray, rounds: int) -> None:
    """Move the places, in smaller and smaller steps."""
    count = len(places)
    ideal = 1.0 / math.sqrt(count)
    for number in range(rounds):
        push = _pushed(places, ideal)
        if len(links):
            gap = places[links[:, 0]] - places[links[:, 1]]
            pull = gap * (np.linalg.norm(gap, axis=1, keepdims=True) / ideal)
            np.subtract.at(push, links[:, 0], pull)
            np.add.at(push, links[:, 1], pull)
        push -= GRAVITY * places / ideal
        length = np.linalg.norm(push, axis=1, keepdims=True)
        step = 0.15 * (1 - number / rounds) ** 2 + 0.1 * ideal
        places += push / np.maximum(length, STILL) * np.minimum(length, step)


def _pushed(places: np.ndarray, ideal: float) -> np.ndarray:
    """How each node is pushed by all others: squared ideal distance over distance."""
    x, y = places[:, 0], places[:, 1]
    dx, dy = x[:, None] - x[None, :], y[:, None] - y[None, :]
    weight = dx * dx + dy * dy
    np.maximum(weight, STILL, out=weight)
    np.divide(ideal * ideal, weight, out=weight)
    return np.stack(((dx * weight).sum(axis=1), (dy * weight).sum(axis=1)), axis=1)


def _start(node: str) -> tuple[float, float]:
    digest = hashlib.sha256(node.encode()).digest()
    radius = math.sqrt(int.from_bytes(digest[:4], "big") / 2**32)
    angle = 2 * math.pi * int.from_bytes(digest[4:8], "big") / 2**32
    return radius * math.cos(angle), radius * math.sin(angle)
