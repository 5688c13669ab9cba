"""How much a store may take, and the thread that collects when it takes more.

What a store takes is measured now and then, not at every write: after a twentieth of the limit was written here, or
a minute after the last time, as other processes write too. A collection makes room for a fifth of the limit. When
what is pinned or in use leaves no such room, the next one waits until the store has grown by a twentieth again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from bacalhau_node.errors import ContentError

log = logging.getLogger(__name__)

_SECONDS: Final = 60.0


class Room:
    """Watches over `limit` bytes. `measure` says how many are taken, `collect(keep)` removes until `keep` are left."""

    def __init__(self, limit: int, *, measure: Callable[[], int], collect: Callable[[int], int]) -> None:
        self._limit, self._measure, self._collect = limit, measure, collect
        self._step = max(1, limit // 20)
        self._lock = threading.Lock()
        self._grown = 0
        self._next = time.monotonic() + _SECONDS
        self._tolerated = limit
        self._thread: threading.Thread | None = None
        self.closing = threading.Event()
        """Set when the store is being closed: a collection ends soon."""

    def grew(self, size: int) -> None:
        """`size` bytes were written. Starts to look, and to collect, if it is time for that. Quick."""
        with self._lock:
            self._grown += size
            if self._grown < self._step and time.monotonic() < self._next:
                return
            if self.closing.is_set() or (self._thread is not None and self._thread.is_alive()):
                return
            self._grown, self._next = 0, time.monotonic() + _SECONDS
            self._thread = threading.Thread(target=self._run, name="bacalhau-collect", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End a collection that is under way."""
        self.closing.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            if self._measure() <= self._tolerated:
                return
            freed = self._collect(self._limit - 4 * self._step)
            left = self._measure()
        except ContentError as error:
            log.warning("the content store can't be collected now: %s", error)
            return
        self._tolerated = max(self._limit, left + self._step)
        log.info("the content store was collected", extra={"freed": freed, "left": left})
