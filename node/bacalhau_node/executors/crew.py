"""Which container runs which shard: one job per container, kept while its job lives, spares ahead of it.

Theory of operation (DESIGN section 6). A run takes its shares of the machine, then a container:
one of its job that is idle, else a spare, else a new one (and then an idle container of another
job goes, so that there are never more than slots). When the last run in it ends, the container
is idle again. A job's containers go when the job is released; spares take their place.

Runs without files may ride along: where every share is taken and nobody else waits, they are
queued in a container of their job that is at work, so that its agent never waits for this
process. Files have to be put in place between two shards, so runs with files never ride. A
container that runs dry gets a run back that waits in another one.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bacalhau_node.executors.turns import Turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from bacalhau_node.executors.agents import AgentContainer
    from bacalhau_node.executors.layout import Shape
    from bacalhau_node.ids import JobId

AHEAD: Final = 64
"""Most runs that wait in one agent: the largest prefetch of DESIGN section 5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one run needs: a container of `shape` for `job`, `shares` of the machine.

    `rides`: it may be queued behind another run. `once`: its container serves no other run.
    """

    job: JobId
    shape: Shape
    imports: tuple[str, ...]
    shares: int = 1
    rides: bool = False
    once: bool = False


@dataclass(slots=True)
class _Post:
    """A container at work or idle: whose it is, how many runs are in it, what they took."""

    container: AgentContainer
    need: Need
    users: int = 0


class Crew:
    """All agent containers of one node that have a job. `start` makes one, or takes a spare."""

    def __init__(self, slots: int, start: Callable[[Need], Coroutine[None, None, AgentContainer]]) -> None:
        self.turns = Turns(slots)
        self._start = start
        self._idle: list[_Post] = []
        self._busy: list[_Post] = []
        self._jobs: set[JobId] = set()
        self._ending: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def container(self, need: Need) -> AsyncIterator[AgentContainer]:
        """A container for one run, until it leaves the context."""
        self._jobs.add(need.job)
        post = self._ride(need) or await self._wait(need)
        post.users += 1
        try:
            yield post.container
        finally:
            post.users -= 1
            if not post.users:
                self._leave(post)

    @contextlib.asynccontextmanager
    async def turn(self, shares: int) -> AsyncIterator[None]:
        """So many shares of the machine, without a container."""
        await self.turns.take(shares)
        try:
            yield
        finally:
            self.turns.give(shares)

    def _ride(self, need: Need) -> _Post | None:
        """A container at work that the run may queue in: the one with the shortest queue."""
        if not need.rides or need.once or not self.turns.full or self.turns.crowded:
            return None
        fitting = [post for post in self._busy if _fits(post, need) and not post.need.once]
        best = min(fitting, key=lambda post: post.users, default=None)
        return best if best is not None and best.users <= AHEAD else None

    async def _wait(self, need: Need) -> _Post:
        await self.turns.take(need.shares)
        try:
            post = await self._take(need)
        except BaseException:
            self.turns.give(need.shares)
            raise
        self._busy.append(post)
        return post

    async def _take(self, need: Need) -> _Post:
        for post in [post for post in self._idle if post.need.job == need.job]:
            self._idle.remove(post)
            if _fits(post, need):
                post.need = need
                return post
            self.end(post.container)
        while self._idle and len(self._idle) + len(self._busy) >= self.turns.total:
            self.end(self._idle.pop(0).container)
        return _Post(await self._start(need), need)

    def _leave(self, post: _Post) -> None:
        self._busy.remove(post)
        self.turns.give(post.need.shares)
        if post.need.once or not post.container.alive or post.need.job not in self._jobs:
            self.end(post.container)
        else:
            self._idle.append(post)
            self._recall(post)

    def _recall(self, idle: _Post) -> None:
        """`idle` has run dry: take a run back that was queued in the busiest other container of its job."""
        fitting = [post for post in self._busy if _fits(post, idle.need) and post.users > 1]
        if fitting and not self.turns.crowded:
            max(fitting, key=lambda post: post.users).container.recall()

    async def release(self, job: JobId) -> None:
        """Remove the containers of this job; those at work go when their last run ends."""
        self._jobs.discard(job)
        gone = [self.end(post.container) for post in self._idle if post.need.job == job]
        self._idle = [post for post in self._idle if post.need.job != job]
        if gone:
            await asyncio.wait(gone)

    def end(self, container: AgentContainer) -> asyncio.Task[None]:
        """Remove a container in the background; `close` waits for it."""
        ending = asyncio.create_task(container.remove())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return ending

    async def close(self) -> None:
        """Remove every container, those at work included: their runs see a lost agent."""
        for post in (*self._idle, *self._busy):
            self.end(post.container)
        self._idle.clear()
        while self._ending:
            await asyncio.wait(set(self._ending))


def _fits(post: _Post, need: Need) -> bool:
    return post.need.job == need.job and post.container.shape == need.shape and post.container.alive
