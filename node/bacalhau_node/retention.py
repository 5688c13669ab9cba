"""How long a node remembers jobs that have ended: their rows, their feeds, and what is kept in the store for them.

The newest `KEPT_JOBS` are remembered, none for longer than `KEPT_SECONDS`; of all but the newest `KEPT_TEXTS`
the text for late watchers goes earlier, as each may hold megabytes of memory and all of it is in the
records. Jobs that have not ended are never touched. The journal forgets first: what a crash leaves then is
pins that stand for nothing (see `keeping`), never a job whose results may go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, MutableMapping
from typing import Final

from bacalhau_node.feed import Feed
from bacalhau_node.ids import JobId
from bacalhau_node.keeping import Keeping
from bacalhau_node.ports import Journal

log = logging.getLogger(__name__)

KEPT_JOBS: Final = 1_000
KEPT_SECONDS: Final = 90 * 86_400.0
KEPT_TEXTS: Final = 32
"""What people hardly look back beyond (guesses); by `feed.TEXT_LIMIT` texts are at most 128 million characters."""


class Retention:
    """Forgets ended jobs of one node. `busy` says which have something left to do."""

    def __init__(
        self,
        feeds: MutableMapping[JobId, Feed],
        *,
        journal: Journal,
        keeping: Keeping,
        busy: Callable[[JobId], bool],
    ) -> None:
        self._feeds, self._journal, self._keeping, self._busy = feeds, journal, keeping, busy

    async def apply(self, now: float) -> list[JobId]:
        """Forget what is too old at `now` (seconds since 1970) or too much; returns the jobs that are gone."""
        ended = [feed for job, feed in self._feeds.items() if feed.ended and not self._busy(job)]
        ended.sort(key=_created, reverse=True)
        for feed in ended[KEPT_TEXTS:]:
            feed.drop_text()
        gone = [feed for at, feed in enumerate(ended) if at >= KEPT_JOBS or now - _created(feed) > KEPT_SECONDS]
        if not gone:
            return []
        jobs = [feed.job.job for feed in gone]
        self._journal.forget(jobs)
        for job in jobs:
            del self._feeds[job]
        await asyncio.to_thread(self._keeping.forgotten, jobs)
        log.info("jobs that ended long ago are forgotten", extra={"jobs": len(jobs)})
        return jobs


def _created(feed: Feed) -> float:
    assert feed.row is not None  # a feed is made by its first row
    return feed.row.created
