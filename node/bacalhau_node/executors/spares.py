"""Containers that are ready before their job is known."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from bacalhau_node.errors import BacalhauError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from bacalhau_node.executors.agents import AgentContainer

IDLE_SECONDS: Final = 300.0
"""A spare that nobody needed for this long goes; the next probe, at the next job, starts new ones."""


class Spares:
    """Up to `count` containers of the usual shape, preloaded with the modules that the last cell imported.

    `start` makes one with these modules, `end` removes one in the background. `stamp` changes when
    what a container shows has changed: what was preloaded before is then of no use.
    """

    def __init__(
        self,
        count: int,
        *,
        start: Callable[[tuple[str, ...]], Coroutine[None, None, AgentContainer]],
        end: Callable[[AgentContainer], object],
        stamp: Callable[[], object],
    ) -> None:
        self._count, self._start, self._end, self._stamp = count, start, end, stamp
        self._starting: list[asyncio.Task[AgentContainer]] = []
        self._made: object = None
        self._retirement: asyncio.TimerHandle | None = None

    def warm(self, imports: tuple[str, ...] = (), *, most: int | None = None) -> None:
        """See to it that all spares (or `most` of them) are there or on their way.

        With `imports`, those there load these too.
        """
        self._drop_outdated()
        self._drop_broken()
        for spare in self._starting:
            if imports and spare.done():
                spare.result().prepare(imports)
        for _ in range((most or self._count) - len(self._starting)):
            spare = asyncio.create_task(self._start(imports))
            spare.add_done_callback(_made)  # one that failed is told by the run that needs it
            self._starting.append(spare)
        self._wait_idle()

    async def ready(self) -> None:
        """Wait for the first spare; raises what kept it from starting."""
        await asyncio.shield(self._starting[0])

    async def take(self) -> AgentContainer | None:
        """A spare, waited for while it starts; None when there is none that works."""
        self._drop_outdated()
        self._wait_idle()
        while self._starting:
            spare = self._starting.pop(0)
            try:
                container = await asyncio.shield(spare)
            except BacalhauError:
                continue
            except asyncio.CancelledError:
                self._starting.insert(0, spare)
                raise
            if container.alive:
                return container
            self._end(container)
        return None

    def retire(self) -> None:
        """Remove all spares, in the background."""
        if self._retirement is not None:
            self._retirement.cancel()
        for spare in self._starting:
            spare.add_done_callback(self._end_one)
        self._starting.clear()

    async def close(self) -> None:
        """Remove all spares; those that are starting are ended on the way."""
        starting = list(self._starting)
        for spare in starting:
            spare.cancel()
        self.retire()
        if starting:
            await asyncio.wait(starting)

    def _end_one(self, spare: asyncio.Task[AgentContainer]) -> None:
        if _made(spare):
            self._end(spare.result())

    def _drop_outdated(self) -> None:
        stamp = self._stamp()
        if stamp != self._made:
            self.retire()
            self._made = stamp

    def _drop_broken(self) -> None:
        ended = [spare for spare in self._starting if spare.done() and not (_made(spare) and spare.result().alive)]
        for spare in ended:
            self._starting.remove(spare)
            self._end_one(spare)

    def _wait_idle(self) -> None:
        if self._retirement is not None:
            self._retirement.cancel()
        self._retirement = asyncio.get_running_loop().call_later(IDLE_SECONDS, self.retire)


def _made(spare: asyncio.Task[AgentContainer]) -> bool:
    """Whether this start came to a good end (its exception counts as seen)."""
    return not spare.cancelled() and spare.exception() is None
