"""The warm boxes of one node: their shapes, who gets which, how many may run, and the spares.

A box is a container or a sandbox with an agent in it. All that differs between the two is the
`Runtime` that makes them (`layout.py`), and that containers may come from an image (`plant.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from bacalhau_node.executors.agents import AgentContainer
from bacalhau_node.executors.crew import Crew, Need
from bacalhau_node.executors.environment import collapse
from bacalhau_node.executors.layout import Image, Shape, Site, roots_of, shape_of
from bacalhau_node.executors.program import copy_agent
from bacalhau_node.executors.slot import ahead
from bacalhau_node.executors.spares import Spares
from bacalhau_node.executors.staging import Reader, destroy

if TYPE_CHECKING:
    from pathlib import Path

    from bacalhau_node.ids import JobId
    from bacalhau_node.ports import ShardTask

SHORT: Final = 0.02
"""Seconds: while the shards of a job last less, more of them are queued in one agent (DESIGN section 5)."""
ANSWER_FIRST: Final = 0.01
"""Seconds from the end of a job to the start of the next spare, which holds the loop for some milliseconds: whoever
waits for the job has its result by then."""
_SHARD_USER: Final = 1000
_SPARE_MEMORY: Final = 100 * 1024 * 1024
"""What a spare with pandas preloaded holds; all of them together take a tenth of the memory."""


@dataclass(slots=True)
class JobFacts:
    """What the shards of one job have taught: its image, the roots of its large files, whether they are short."""

    image: Image | None = None
    roots: tuple[Path, ...] = ()
    short: bool = False


class Workshop:
    """All boxes of one node on one runtime."""

    def __init__(self, site: Site, *, slots: int, memory: int) -> None:
        self.site = site
        self.crew = Crew(slots, self._hire)
        self.usual = Shape(memory=memory, cpu=1.0)
        self.spares = Spares(
            max(1, min(slots, slots * memory // 10 // _SPARE_MEMORY)),
            start=lambda imports: self._start(self.usual, imports),
            end=self.crew.end,
            stamp=site.host.stamp,
        )
        self._memory = memory
        self._numbers = itertools.count()
        self._jobs: dict[JobId, JobFacts] = {}
        self._imports: tuple[str, ...] = ()

    def number(self) -> int:
        """A number that no other box of this node has."""
        return next(self._numbers)

    def facts(self, task: ShardTask) -> JobFacts:
        """What is known of the task's job."""
        return self._jobs.setdefault(task.execution.job, JobFacts())

    async def shape(self, task: ShardTask) -> Shape:
        """What the box of `task` must be; its image is here then. Raises `NoEnvironment`."""
        facts = self.facts(task)
        shape = shape_of(task, image=facts.image, memory=task.spec.resources.memory or self._memory)
        return replace(shape, roots=facts.roots)

    def with_roots(self, task: ShardTask, shape: Shape, file: Path) -> Shape:
        """From now on the boxes of this job show `file` through its folder."""
        facts = self.facts(task)
        facts.roots = collapse((*facts.roots, *roots_of(task, file)))
        return replace(shape, roots=facts.roots)

    def shares(self, shape: Shape) -> int:
        """How many slots' worth of the machine a box of this shape takes."""
        wanted = max(math.ceil(shape.memory / self._memory), math.ceil(shape.cpu))
        return min(wanted, self.crew.turns.total)

    def need(self, task: ShardTask, shape: Shape) -> Need:
        """What the run of a shard needs."""
        return Need(
            job=task.execution.job,
            shape=shape,
            imports=ahead(task.spec),
            shares=self.shares(shape),
            rides=not task.files and not shape.gpus and self._jobs.get(task.execution.job, JobFacts()).short,
            once=task.spec.container_per == "shard" or bool(shape.gpus),
        )

    def learn(self, job: JobId, seconds: float) -> None:
        """A shard of `job` took so long."""
        if job in self._jobs:
            self._jobs[job].short = seconds < SHORT

    async def _hire(self, need: Need) -> AgentContainer:
        if not need.shape.gpus:
            self._imports = need.imports
        spare = await self.spares.take() if need.shape == self.usual else None
        return spare or await self._start(need.shape, need.imports)

    async def _start(self, shape: Shape, imports: tuple[str, ...]) -> AgentContainer:
        return await self._start_with(str(self.site.host.executable), shape, imports)

    async def _start_with(self, python: str, shape: Shape, imports: tuple[str, ...]) -> AgentContainer:
        container = AgentContainer(self.site, shape, number=self.number())
        await container.start(python, imports)
        return container

    async def release(self, job: JobId) -> None:
        """Remove the job's boxes, and have spares ready for the next: they start before those are gone."""
        self._jobs.pop(job, None)
        await asyncio.gather(self.crew.release(job), self._warm_soon())

    async def _warm_soon(self) -> None:
        await asyncio.sleep(ANSWER_FIRST)
        self.warm()

    def warm(self, imports: tuple[str, ...] | None = None) -> None:
        """Have spares ready, with these modules (None: those that the last cell imported) preloaded."""
        self._imports = self._imports if imports is None else imports
        self.spares.warm(self._imports)

    async def close(self) -> None:
        """Remove everything, in parallel."""
        await self.spares.close()
        await self.crew.close()
        await self.site.daemon.close()
        await asyncio.to_thread(destroy, self.site.folder / "slots")


def shard_user() -> Reader:
    """Who runs in a box of this node, as this machine sees it.

    A node that runs as root must not give its shards that user; any other node gives them its own,
    so that it may read and remove what they leave.
    """
    own = Reader(os.getuid(), os.getgid())
    return Reader(_SHARD_USER, _SHARD_USER) if own.uid == 0 else own


def new_slots(folder: Path) -> Path:
    """An empty `slots` folder with a copy of the agent that any user may read."""
    slots = folder / "slots"
    destroy(slots)
    slots.mkdir(parents=True)
    return copy_agent(slots)
