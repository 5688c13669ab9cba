"""What clients may see of one job: its rows, its present state, then changes, in order.

Theory of operation. A feed belongs to the loop of its node. Every update gets the next **number**, and the
feed remembers the latest update of the job and of each shard, and the newest `TEXT_LIMIT` characters of text,
in the order of their numbers. A watcher is nothing but a number: it asks for what came after it, and
waits when there is nothing. So one that comes late, one that was cut off and one that never was read the
same way, nobody has a queue that could grow, and a slow one delays nobody: it gets the latest
state of each shard in place of every step on the way there, and all text but what is over the limit.

Numbers mean something only together with the feed's `epoch`: after a restart of the node they begin anew.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, deque
from collections.abc import AsyncIterator
from typing import Literal

import msgspec

from bacalhau_node.ids import JobId
from bacalhau_node.protocol.events import FINAL_JOB, JobChanged, JobRow, ShardChanged, ShardRow

FETCHED_LIMIT = 1_000
"""Transfers that are over and kept for watchers that come late."""

TEXT_LIMIT = 4 * 1024 * 1024
"""Characters of a job kept for watchers that come late; all of a shard's text is in its record."""

TEXTS_LIMIT = 100_000
"""Pieces of it: however short, each takes some hundred bytes."""

NAME_LIMIT = 1_000
"""Characters of the name of a transfer, which another node tells."""


class ShardText(msgspec.Struct, frozen=True):
    """Text that a shard printed: as it comes, in order within shard, attempt and stream."""

    job: JobId
    shard: int
    attempt: int
    stream: Literal["stdout", "stderr"]
    text: str


class ShardBytes(msgspec.Struct, frozen=True):
    """Bytes of `name` on their way to a shard: `done` of `total` (None: unknown); `cid` once it is all here."""

    job: JobId
    shard: int
    attempt: int
    name: str
    done: int
    total: int | None
    cid: str


Update = JobChanged | ShardChanged | ShardText | ShardBytes

Key = tuple[str, int]
"""What an update is about: ("job", 0), ("shard", index), ("bytes", index), ("text" or "fetched", its number).

A later one takes its place."""


class Feed:
    """One job for its watchers. `row` and `shard_rows` are what the journal holds of it."""

    def __init__(self, job: JobId) -> None:
        self.row: JobRow | None = None
        self.shard_rows: dict[int, ShardRow] = {}
        self.job: JobChanged = JobChanged(job, "Pending")
        self.shards: dict[int, ShardChanged] = {}
        self.counts: Counter[str] = Counter()
        """How many shards are in each state; those that never left "waiting" are not counted."""
        self.ended = False
        self.epoch = secrets.token_hex(4)
        self._number = 0
        self._latest: dict[Key, tuple[int, Update]] = {}  # in the order of the numbers
        self._texts: deque[tuple[Key, int]] = deque()
        self._fetched: deque[Key] = deque()
        self._length = 0
        self._changed = asyncio.Event()
        self._remember(("job", 0), self.job)

    def record(self, row: JobRow | ShardRow) -> None:
        """Remember a row that was committed."""
        if isinstance(row, JobRow):
            self.row = row
        else:
            self.shard_rows[row.shard] = row

    def restore(self) -> None:
        """Take the present state from the rows (of a job that was read from the journal)."""
        assert self.row is not None
        for index, shard in self.shard_rows.items():
            error = shard.outcome.error if shard.outcome else None
            self.publish(ShardChanged(self.row.job, index, shard.state, shard.node, shard.attempts, error))
        row = self.row
        self.publish(JobChanged(row.job, row.state, row.reason, row.cid, row.published))

    def publish(self, update: JobChanged | ShardChanged) -> None:
        """Tell all watchers, and remember it for those to come."""
        if isinstance(update, JobChanged):
            self.job = update
            self._remember(("job", 0), update)
            if update.state in FINAL_JOB:
                self.end()
            return
        if before := self.shards.get(update.shard):
            self.counts[before.state] -= 1
        self.counts[update.state] += 1
        self.shards[update.shard] = update
        self._remember(("shard", update.shard), update)

    def text(self, text: ShardText) -> None:
        """Pass on what a shard printed."""
        if not text.text:
            return
        key = ("text", self._number + 1)
        self._texts.append((key, len(text.text)))
        self._length += len(text.text)
        self._remember(key, text)
        while self._length > TEXT_LIMIT or len(self._texts) > TEXTS_LIMIT:
            self._forget_text()

    def transfer(self, news: ShardBytes) -> None:
        """Pass on how far the bytes of a shard are. What is all here is remembered for itself."""
        news = msgspec.structs.replace(news, name=news.name[:NAME_LIMIT], cid=news.cid[:NAME_LIMIT])
        self._latest.pop(("bytes", news.shard), None)
        if not news.cid:
            self._remember(("bytes", news.shard), news)
            return
        key = ("fetched", self._number + 1)
        self._fetched.append(key)
        self._remember(key, news)
        if len(self._fetched) > FETCHED_LIMIT:
            del self._latest[self._fetched.popleft()]

    def end(self) -> None:
        """No more updates will come."""
        self.ended = True
        self._changed.set()

    def after(self, number: int) -> list[tuple[int, Update]]:
        """What came after `number` (0: the present state) with its numbers, the oldest first."""
        found = []
        for entry in reversed(self._latest.values()):
            if entry[0] <= number:
                break
            found.append(entry)
        found.reverse()
        return found

    async def wait(self, number: int) -> bool:
        """Wait until there is something after `number`; False when nothing will come any more."""
        while self._number <= number:
            if self.ended:
                return False
            self._changed.clear()  # who waits already is woken by what has set it
            await self._changed.wait()
        return True

    async def follow(self) -> AsyncIterator[Update]:
        """All updates for one watcher, to the end."""
        number = 0
        while await self.wait(number):
            for reached, update in self.after(number):
                yield update
                number = reached

    def _remember(self, key: Key, update: Update) -> None:
        self._number += 1
        self._latest.pop(key, None)
        self._latest[key] = (self._number, update)
        self._changed.set()

    def drop_text(self) -> None:
        """Keep no text for watchers to come."""
        while self._texts:
            self._forget_text()

    def _forget_text(self) -> None:
        key, length = self._texts.popleft()
        self._length -= length
        del self._latest[key]
