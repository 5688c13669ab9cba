"""What has happened to a node and waits for its next turn, and when that turn is.

Theory of operation. Whatever happens is posted, and the next turn takes all of it. What the machines of the node say to
each other in a turn is heard in the same turn, before all else: a node that has ended a shard is given the next one
before it is found idle.

While `ENOUGH` shards may wait in front of the slots (`patient`), turns begin at least `GROUP` apart: what ends
meanwhile shares a commit, and the slots have something to do. Of an execution whose end waits here nobody need hear
that it has started.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from bacalhau_node.protocol.events import Event, ExecutionEnded, ExecutionStarted

GROUP: Final = 0.01
"""Seconds between turns while shards end faster than they could be committed one by one: a commit takes about one
millisecond, and up to 64 shards wait (a guess: 5 to 20 ms do as well)."""

ENOUGH: Final = 8
"""So many may wait when the last shard took under 60 ms, see `Compute.prefetch`: the slots won't miss a turn that is
late by `GROUP` (a guess)."""


class Inbox:
    """The events of one node, on the running loop, which calls `turn` when there are any."""

    def __init__(self, turn: Callable[[], None], *, patient: Callable[[], bool]) -> None:
        self._turn, self._patient = turn, patient
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._within: deque[Event] = deque()
        self._next: asyncio.Handle | None = None
        self._began = 0.0
        self._closed = False

    def __len__(self) -> int:
        return len(self._within) + len(self._events)

    def post(self, event: Event) -> None:
        """Put an event in; there will be a turn for it soon."""
        self._events.append(event)
        if self._closed or (self._next is not None and not isinstance(self._next, asyncio.TimerHandle)):
            return
        if not self._patient():
            self._cancel()
            self._next = self._loop.call_soon(self._turn)
        elif self._next is None:
            self._next = self._loop.call_at(self._began + GROUP, self._turn)

    def add(self, event: Event) -> None:
        """Put an event in for a turn that the caller sees to."""
        self._events.append(event)

    def say(self, event: Event) -> None:
        """One machine of this node says this to another, in a turn."""
        self._within.append(event)

    def begin(self) -> float:
        """A turn begins; the time."""
        self._cancel()
        self._began = self._loop.time()
        over = {event.execution for event in self._events if isinstance(event, ExecutionEnded)}
        self._events = deque(
            event for event in self._events if not (isinstance(event, ExecutionStarted) and event.execution in over)
        )
        return self._began

    def take(self) -> Event:
        """The next event of this turn."""
        return (self._within or self._events).popleft()

    def close(self) -> None:
        """There will be no further turn."""
        self._closed = True
        self._cancel()

    def _cancel(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None
