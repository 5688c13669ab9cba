"""A job's inputs on their way, for people: which files come now and how far they are, and what has come.

Pure: fed with `ShardBytes`, asked with a clock. What is quicker than half a second is nothing to look at, and is
only counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bacalhau_node.feed import ShardBytes
from bacalhau_node.literals import size_text
from bacalhau_node.sharding import shown

QUIET: Final = 0.5
"""Seconds that a transfer has lasted when it is first shown."""

MOST: Final = 10_000
"""Transfers that are followed at once; a node may name as many as it likes."""

NAMED: Final = 3
"""So many CIDs of what was fetched are told."""


@dataclass(slots=True)
class _Going:
    since: float
    attempt: int
    done: int = 0
    total: int | None = None


class Transfers:
    """The transfers of one job."""

    def __init__(self) -> None:
        self._going: dict[tuple[int, str], _Going] = {}
        self._files = self._bytes = 0
        self._cids: dict[str, None] = {}

    def take(self, news: ShardBytes, now: float) -> None:
        """Note how far one is; one with a CID is all here."""
        key = news.shard, news.name
        if news.cid:
            self._going.pop(key, None)
            self._files += 1
            self._bytes += news.done
            if len(self._cids) < NAMED:
                self._cids[news.cid] = None
            return
        going = self._going.get(key)
        if going is None or going.attempt < news.attempt:
            going = self._going[key] = _Going(now, news.attempt)
            if len(self._going) > MOST:
                del self._going[next(iter(self._going))]
        going.done, going.total = news.done, news.total

    def over(self, shard: int) -> None:
        """Nothing is fetched for this shard any more: it runs, or has ended, or is to be tried again."""
        for key in [key for key in self._going if key[0] == shard]:
            del self._going[key]

    def now(self, now: float) -> str:
        """`fetching x.csv 120 MB of 1.2 GB`, `fetching 3 files, 120 MB`; "" while nothing has lasted half a second."""
        going = {name: each for (_, name), each in self._going.items() if now - each.since >= QUIET}
        if not going:
            return ""
        what = f"{len(going):,} files," if len(going) > 1 else shown(next(iter(going)))
        done, totals = sum(each.done for each in going.values()), [each.total for each in going.values()]
        known = [total for total in totals if total is not None]
        of = f" of {size_text(sum(known))}" if len(known) == len(totals) else ""
        return f"fetching {what} {size_text(done)}{of}"

    def fetched(self) -> str:
        """`fetched 3 files, 1.2 GB: CID, CID, CID`; "" where nothing was."""
        if not self._files:
            return ""
        more = self._files - len(self._cids)
        names = ", ".join(map(shown, self._cids)) + (f" and {more:,} more" if more > 0 else "")
        return f"fetched {self._files:,} file{'s' * (self._files != 1)}, {size_text(self._bytes)}: {names}"
