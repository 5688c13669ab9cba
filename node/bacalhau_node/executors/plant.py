"""A Docker daemon that works for this node: what was found out about it, its images, its containers.

Theory of operation. Opening a plant asks the daemon what it is, describes the host environment
and imports its empty image, removes what dead nodes left, and starts the spares. The first time
on a daemon it waits for a spare, because only a container that runs proves that the daemon sees
this machine's files and that its user may read them; later nodes trust the note in the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import math
import os
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bacalhau_node.executors.agents import AgentContainer
from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.containers import Daemon, DaemonInfo, Label
from bacalhau_node.executors.crew import Crew, Need
from bacalhau_node.executors.environment import Interpreter, collapse, describe
from bacalhau_node.executors.images import Images
from bacalhau_node.executors.layout import Image, NoEnvironment, NoProgram, Shape, Site, roots_of, shape_of
from bacalhau_node.executors.program import copy_agent
from bacalhau_node.executors.slot import warm_imports
from bacalhau_node.executors.spares import Spares
from bacalhau_node.executors.staging import Reader, destroy
from bacalhau_node.spec import PythonCell

if TYPE_CHECKING:
    from collections.abc import Callable

    from bacalhau_node.ids import JobId, NodeId
    from bacalhau_node.ports import ShardTask

SHORT: Final = 0.02
"""Seconds: while the shards of a job last less, more of them are queued in one agent (DESIGN section 5)."""
_SHARD_USER: Final = 1000
_PYTHONS: Final = ("python3", "python")
_SPARE_MEMORY: Final = 100 * 1024 * 1024
"""What a spare with pandas preloaded holds; all of them together take a tenth of the memory."""
_NOT_SEEN: Final = "bind source path does not exist"


@dataclass(slots=True)
class _Job:
    """What the shards of one job have taught: its image, the roots of its large files, whether they are short."""

    image: Image | None = None
    roots: tuple[Path, ...] = ()
    short: bool = False


class Plant:
    """All that one node does with one daemon. Made by `open_plant`."""

    def __init__(self, site: Site, info: DaemonInfo, *, slots: int, memory: int) -> None:
        self.site, self.info = site, info
        self.images = Images(site.daemon)
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
        self._pythons: dict[str, str] = {}
        self._jobs: dict[JobId, _Job] = {}
        self._imports: tuple[str, ...] = ()
        self._reaping: asyncio.Task[None] | None = None

    async def ensure_image(self) -> None:
        """Import the empty image of the host environment if the daemon does not have it (any more)."""
        if not await self.site.daemon.has_image(self.site.host.tag):
            await self.site.daemon.import_image(self.site.host.image, self.site.host.tag)

    def number(self) -> int:
        """A number that no other container of this node has."""
        return next(self._numbers)

    async def shape(self, task: ShardTask) -> Shape:
        """What the container of `task` must be; its image is here then. Raises `NoEnvironment`."""
        job = self._jobs.setdefault(task.execution.job, _Job())
        if task.spec.image is not None and job.image is None:
            job.image = await self.images.find(task.spec.image)
        shape = shape_of(task, image=job.image, memory=task.spec.resources.memory or self._memory)
        return replace(shape, roots=job.roots)

    def with_roots(self, task: ShardTask, shape: Shape, file: Path) -> Shape:
        """From now on the containers of this job show `file` through its folder."""
        job = self._jobs.setdefault(task.execution.job, _Job())
        job.roots = collapse((*job.roots, *roots_of(task, file)))
        return replace(shape, roots=job.roots)

    def shares(self, shape: Shape) -> int:
        """How many slots' worth of the machine a container of this shape takes."""
        wanted = max(math.ceil(shape.memory / self._memory), math.ceil(shape.cpu))
        return min(wanted, self.crew.turns.total)

    def need(self, task: ShardTask, shape: Shape) -> Need:
        """What the run of a cell needs."""
        cell = task.spec.task
        return Need(
            job=task.execution.job,
            shape=shape,
            imports=warm_imports(cell.imports) if isinstance(cell, PythonCell) else (),
            shares=self.shares(shape),
            rides=not task.files and self._jobs.get(task.execution.job, _Job()).short,
            once=task.spec.container_per == "shard",
        )

    def learn(self, job: JobId, seconds: float) -> None:
        """A shard of `job` took so long."""
        if job in self._jobs:
            self._jobs[job].short = seconds < SHORT

    async def _hire(self, need: Need) -> AgentContainer:
        self._imports = need.imports
        spare = await self.spares.take() if need.shape == self.usual else None
        return spare or await self._start(need.shape, need.imports)

    async def _start(self, shape: Shape, imports: tuple[str, ...]) -> AgentContainer:
        if shape.image is None:
            return await self._start_with(str(self.site.host.executable), shape, imports)
        problem = ""
        for python in (self._pythons[shape.image],) if shape.image in self._pythons else _PYTHONS:
            try:
                container = await self._start_with(python, shape, imports)
            except NoProgram as error:
                problem = str(error)
                continue
            self._pythons[shape.image] = python
            return container
        raise NoEnvironment(f"there is no Python in the image {shape.called}: cells need one, --raw does not ({problem})")

    async def _start_with(self, python: str, shape: Shape, imports: tuple[str, ...]) -> AgentContainer:
        container = AgentContainer(self.site, shape, number=self.number())
        await container.start(python, imports)
        return container

    async def release(self, job: JobId) -> None:
        """Remove the job's containers, and have spares ready for the next."""
        self._jobs.pop(job, None)
        await self.crew.release(job)
        self.warm()

    def warm(self, imports: tuple[str, ...] | None = None) -> None:
        """Have spares ready, with these modules (None: those that the last cell imported) preloaded."""
        self._imports = self._imports if imports is None else imports
        self.spares.warm(self._imports)

    async def close(self) -> None:
        """Remove everything, in parallel."""
        if self._reaping is not None:
            self._reaping.cancel()
            await asyncio.wait({self._reaping})
        await asyncio.gather(self.spares.close(), self.images.close())
        await self.crew.close()
        await self.site.daemon.close()
        await asyncio.to_thread(destroy, self.site.folder / "slots")

    # --- what dead nodes left ---

    def reap_later(self, is_alive: Callable[[NodeId], bool]) -> None:
        """Remove what dead nodes left, in the background."""
        self._reaping = asyncio.create_task(self.reap(is_alive))

    async def reap(self, is_alive: Callable[[NodeId], bool]) -> None:
        """Remove containers of an earlier life of this node, of dead nodes beside it, and those past their deadline."""
        with contextlib.suppress(DaemonError):  # then the daemon is gone: the next probe says so
            found = await self.site.daemon.ours()
            gone = [container for container, labels in found if self._abandoned(labels, is_alive)]
            await asyncio.gather(*map(self.site.daemon.remove, gone))

    def _abandoned(self, labels: dict[str, str], is_alive: Callable[[NodeId], bool]) -> bool:
        deadline = labels.get(Label.DEADLINE, "")
        if deadline.isdigit() and int(deadline) < time.time():
            return True
        own = labels.get(Label.FOLDER) == str(self.site.folder) and labels.get(Label.NODE) == self.site.node
        if own:
            return labels.get(Label.LIFE) != self.site.life
        beside = Path(labels.get(Label.FOLDER, "")).parent == self.site.folder.parent
        return beside and not is_alive(labels.get(Label.NODE, ""))


async def open_plant(
    host: str, folder: Path, *, node: NodeId, slots: int, memory: int, is_alive: Callable[[NodeId], bool]
) -> Plant:
    """Make the daemon at `host` work for this node. Raises `DaemonError` or `NoEnvironment`, which say why it can't."""
    if importlib.util.find_spec("docker") is None:
        raise NoEnvironment("the docker package is not installed: pip install 'bacalhau-jupyter[docker]'")
    daemon = Daemon(host)
    plant: Plant | None = None
    try:
        await daemon.ping()
        plant = await _found(daemon, folder, node=node, slots=slots, memory=memory)
        plant.reap_later(is_alive)
        plant.warm()
        await _prove(plant)
    except BaseException:
        await (plant.close() if plant is not None else daemon.close())
        raise
    return plant


async def _found(daemon: Daemon, folder: Path, *, node: NodeId, slots: int, memory: int) -> Plant:
    info = await daemon.info()
    user, inside = _users(rootless=info.rootless)
    host = await asyncio.to_thread(describe, Interpreter.current(), uid=inside.uid, gid=inside.gid)
    if host.problem:
        raise NoEnvironment(host.problem)
    site = Site(
        daemon=daemon,
        folder=folder,
        node=node,
        host=host,
        user=user,
        inside=f"{inside.uid}:{inside.gid}",
        life=secrets.token_hex(8),
        agent=await asyncio.to_thread(_new_slots, folder),
    )
    plant = Plant(site, info, slots=slots, memory=memory)
    await plant.ensure_image()
    return plant


def _users(*, rootless: bool) -> tuple[Reader, Reader]:
    """Who runs in the containers, as this machine and as they themselves see it.

    A node that runs as root must not give its shards that user; any other node gives them its own,
    so that it may read and remove what they leave. Under a rootless daemon its user is root inside.
    """
    own = Reader(os.getuid(), os.getgid())
    if rootless:
        return own, Reader(0, 0)
    user = Reader(_SHARD_USER, _SHARD_USER) if own.uid == 0 else own
    return user, user


def _new_slots(folder: Path) -> Path:
    """An empty `slots` folder with a copy of the agent that any user may read."""
    slots = folder / "slots"
    destroy(slots)
    slots.mkdir(parents=True)
    return copy_agent(slots)


async def _prove(plant: Plant) -> None:
    """Wait for one real container, unless this folder's note says that it worked with this daemon before."""
    site = plant.site
    note = site.folder / "docker-works"
    facts = "\n".join((plant.info.id, site.host.tag, str(site.host.executable), site.inside))
    if note.is_file() and note.read_text() == facts:
        return
    try:
        await plant.spares.ready()
    except DaemonError as error:
        if _NOT_SEEN not in str(error):
            raise
        raise NoEnvironment(
            f"the Docker daemon at {site.daemon.host} does not see this machine's files "
            f"(does it run elsewhere?): {error}"
        ) from error
    except NoEnvironment as error:
        raise NoEnvironment(_unusable(site, error)) from error
    note.write_text(facts)


def _unusable(site: Site, error: NoEnvironment) -> str:
    """Why this machine's Python does not run in a container, and what to do."""
    executable = site.host.executable
    if "Permission denied" in str(error):
        return (
            f"user {site.user.uid}, as whom shards run, may not read the notebook's Python: "
            f"`chmod -R a+rX {executable.parent.parent}` ({error})"
        )
    return f"the notebook's Python {executable} does not run in a container: {error}"
