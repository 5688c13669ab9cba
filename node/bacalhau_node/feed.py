"""What clients may see of one job: its rows, its present state, then every change, in order.

A feed belongs to the loop of its node. A watcher that comes late gets the latest state of the
job and of each shard first, and the text that was printed so far (the newest `TEXT_LIMIT`
characters); from then on it gets what everybody gets. Updates wait in the watcher's own
queue, so a slow one delays nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Literal

import msgspec

from bacalhau_node.ids import JobId
from bacalhau_node.protocol.events import FINAL_JOB, JobChanged, JobRow, ShardChanged, ShardRow

TEXT_LIMIT = 4 * 1024 * 1024
"""Characters of a running job kept for watchers that come late; all of a shard's text is in its record."""


class ShardText(msgspec.Struct, frozen=True):
    """Text that a shard printed: as it comes, in order within shard, attempt and stream."""

    job: JobId
    shard: int
    attempt: int
    stream: Literal["stdout", "stderr"]
    text: str


Update = JobChanged | ShardChanged | ShardText


class Feed:
    """One job for its watchers. `row` and `shard_rows` are what the journal holds of it."""

    def __init__(self, job: JobId) -> None:
        self.row: JobRow | None = None
        self.shard_rows: dict[int, ShardRow] = {}
        self.job: JobChanged = JobChanged(job, "Pending")
        self.shards: dict[int, ShardChanged] = {}
        self.ended = False
        self._texts: deque[ShardText] = deque()
        self._length = 0
        self._watchers: list[asyncio.Queue[Update | None]] = []

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
            self.shards[index] = ShardChanged(self.row.job, index, shard.state, shard.node, shard.attempts, error)
        self.publish(JobChanged(self.row.job, self.row.state, self.row.reason, self.row.cid))

    def publish(self, update: JobChanged | ShardChanged) -> None:
        """Tell all watchers, and remember it for those to come."""
        if isinstance(update, ShardChanged):
            self.shards[update.shard] = update
        else:
            self.job = update
        self._push(update)
        if isinstance(update, JobChanged) and update.state in FINAL_JOB:
            self.end()

    def text(self, text: ShardText) -> None:
        """Pass on what a shard printed."""
        self._texts.append(text)
        self._length += len(text.text)
        while self._length > TEXT_LIMIT:
            self._length -= len(self._texts.popleft().text)
        self._push(text)

    def forget_text(self) -> None:
        """Drop the text: whoever comes now reads it in the shards' records."""
        self._texts.clear()
        self._length = 0

    def end(self) -> None:
        """No more updates will come."""
        self.ended = True
        for queue in self._watchers:
            queue.put_nowait(None)

    async def follow(self) -> AsyncIterator[Update]:
        """All updates for one watcher, to the end."""
        queue: asyncio.Queue[Update | None] = asyncio.Queue()
        for update in self._present():
            queue.put_nowait(update)
        if self.ended:
            queue.put_nowait(None)
        self._watchers.append(queue)
        try:
            while (change := await queue.get()) is not None:
                yield change
        finally:
            self._watchers.remove(queue)

    def _present(self) -> list[Update]:
        """What a new watcher needs; a final job state comes last, since it ends the reading."""
        shards = [shard for shard in self.shards.values() if shard.state != "waiting"]
        if self.job.state in FINAL_JOB:
            return [*shards, *self._texts, self.job]
        return [self.job, *shards, *self._texts]

    def _push(self, update: Update) -> None:
        for queue in self._watchers:
            queue.put_nowait(update)
