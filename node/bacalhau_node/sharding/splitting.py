"""How the selected files become shards: `--shards`, `--batch-size`, `--shard-size`."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain

from bacalhau_node.errors import SpecError
from bacalhau_node.sharding.entries import Entry, Unit
from bacalhau_node.spec import MAX_SHARDS, Sharding


def split(
    units: Sequence[Unit], sharding: Sharding, *, slots: int, with_inputs: bool
) -> tuple[list[tuple[Entry, ...]], list[str]]:
    """(the entries of each shard, sentences for the user). Every unit in exactly one shard, in order, none empty.

    By count, the largest shard has as few bytes as contiguous shards allow. Without inputs there
    are `sharding.n` shards without entries. Raises `SpecError` where there is nothing to split.
    """
    if not with_inputs:
        return _without_inputs(sharding), []
    if not units:
        raise SpecError("the inputs hold no files: there is nothing to run on")
    sizes = [sum(entry.size for entry in unit) for unit in units]
    cuts, notes = _cuts(sizes, sharding, slots=slots, noun=_noun(units))
    if len(cuts) > MAX_SHARDS:
        raise SpecError(f"{_noun(units)} make {len(cuts)} shards: at most {MAX_SHARDS} are possible")
    starts = [0, *cuts[:-1]]
    return [tuple(chain.from_iterable(units[start:end])) for start, end in zip(starts, cuts, strict=True)], notes


def _without_inputs(sharding: Sharding) -> list[tuple[Entry, ...]]:
    if sharding.by == "count":
        return [()] * sharding.n
    option = {"auto": "--shards auto", "batch": "--batch-size", "size": "--shard-size"}[sharding.by]
    raise SpecError(f"{option} divides files, and there is no --input: add one, or say --shards N")


def _noun(units: Sequence[Unit]) -> str:
    """What the units are, for people: "365 files", "2 folders", or "7 files and folders"."""
    kinds = {len(unit) == 1 and not unit[0].path.endswith("/") for unit in units}
    word = "file" if kinds == {True} else "folder" if kinds == {False} else "files and folder"
    return f"{len(units)} {word}" + ("" if len(units) == 1 else "s")


def _cuts(sizes: Sequence[int], sharding: Sharding, *, slots: int, noun: str) -> tuple[list[int], list[str]]:
    """Where each shard ends (index after its last unit), and what to tell about it."""
    many = len(sizes)
    automatic = min(many, 4 * slots)
    if sharding.by == "batch":
        return [*range(sharding.n, many, sharding.n), many], []
    if sharding.by == "size":
        return _cuts_by_size(sizes, sharding.n), []
    if sharding.by == "auto":
        return balanced_cuts(sizes, automatic), []
    if sharding.n > many:
        return list(range(1, many + 1)), [f"--shards {sharding.n}: only {noun}, so {many} shard" + "s" * (many > 1)]
    if sharding.n == 1 and many > 1:
        return [many], [f"{noun} in one shard: --shards auto makes {automatic} of them"]
    return balanced_cuts(sizes, sharding.n), []


def _cuts_by_size(sizes: Sequence[int], limit: int) -> list[int]:
    """Consecutive units up to `limit` bytes a shard; one that is larger is a shard of its own."""
    cuts, filled = [], 0
    for index, size in enumerate(sizes):
        if index and filled + size > limit:
            cuts.append(index)
            filled = 0
        filled += size
    return [*cuts, len(sizes)]


def balanced_cuts(sizes: Sequence[int], count: int) -> list[int]:
    """Ends of `count` contiguous non-empty parts (at most one per size) whose largest sum is the smallest possible.

    How it works: the smallest largest sum (`cap`) is found by bisection, each probe a greedy walk
    over the prefix sums. That leaves freedom in where to cut, which is used to keep the other
    parts even: each cut goes as near to its fair place as the cap and the parts to come allow.
    Fair places are measured with sizes clipped to a fair share (one huge file must not drag its
    neighbours together), and by number where there are no bytes to go by.
    """
    many = len(sizes)
    prefix = [0, *accumulate(sizes)]
    cap = _smallest_cap(prefix, max(sizes), count)
    earliest = _earliest_cuts(prefix, cap, count)
    fair, share = _fair_places(sizes, count)
    cuts = [0]
    for part in range(1, count):
        latest = min(bisect_right(prefix, prefix[cuts[-1]] + cap) - 1, many - (count - part))
        place = bisect_left(fair, part * share)
        if place and part * share - fair[place - 1] < fair[place] - part * share:
            place -= 1
        cuts.append(min(max(place, earliest[part], cuts[-1] + 1), latest))
    return [*cuts[1:], many]


def _smallest_cap(prefix: Sequence[int], largest: int, count: int) -> int:
    """The smallest sum such that `count` contiguous parts of at most that much hold everything."""
    low = max(largest, -(-prefix[-1] // count))
    high = low + largest  # a greedy walk wastes less than the largest size in each part
    while low < high:
        middle = (low + high) // 2
        if _fits(prefix, middle, count):
            high = middle
        else:
            low = middle + 1
    return low


def _fits(prefix: Sequence[int], cap: int, count: int) -> bool:
    end, many = 0, len(prefix) - 1
    for _ in range(count):
        end = bisect_right(prefix, prefix[end] + cap, end) - 1
        if end == many:
            return True
    return False


def _earliest_cuts(prefix: Sequence[int], cap: int, count: int) -> list[int]:
    """For each cut, the earliest place from where the parts to come still fit under the cap."""
    cuts = [0] * count
    end = len(prefix) - 1
    for part in range(count - 1, 0, -1):
        end = bisect_left(prefix, prefix[end] - cap, 0, end)
        cuts[part] = end
    return cuts


def _fair_places(sizes: Sequence[int], count: int) -> tuple[list[int], int]:
    """(prefix sums of the clipped weights, the weight of one part).

    A size weighs its bytes first and its number second: times (n + 1), plus 1. Whatever is over
    a fair share gets a part of its own and is taken as one share; the rest is shared anew.
    All of it is scaled by `count`, which keeps the fair places of equal sizes whole.
    """
    factor = (len(sizes) + 1) * count
    weights = [size * factor + count for size in sizes]
    rest, parts = sum(weights), count
    for weight in sorted(weights, reverse=True):
        if parts == 1 or weight * parts <= rest:
            break
        rest -= weight
        parts -= 1
    share = -(-rest // parts)
    return [0, *accumulate(min(weight, share) for weight in weights)], share
