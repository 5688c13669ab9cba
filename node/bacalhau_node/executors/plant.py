"""A Docker daemon that works for this node: what was found out about it, its images, its containers.

Theory of operation. Opening a plant asks the daemon what it is, describes the host environment
and imports its empty image, starts a spare, and removes what dead nodes left. The first time
on a daemon it waits for the spare, because only a container that runs proves that the daemon sees
this machine's files and that its user may read them; later nodes trust the note in the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bacalhau_node.executors.agents import AgentContainer
from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.base_image import Environments, advice, find
from bacalhau_node.executors.containers import Daemon, DaemonInfo, Label, Recipe
from bacalhau_node.executors.environment import Interpreter, describe
from bacalhau_node.executors.fit import installed, own_target
from bacalhau_node.executors.gpus import NO_RUNTIME, devices, no_runtime
from bacalhau_node.executors.images import Images
from bacalhau_node.executors.layout import NoEnvironment, NoProgram, Shape, Site
from bacalhau_node.executors.staging import Reader
from bacalhau_node.executors.workshop import Workshop, new_slots, shard_user

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bacalhau_node.ids import NodeId
    from bacalhau_node.ports import Gpu, ShardTask, Target
    from bacalhau_node.spec import JobSpec

_PYTHONS: Final = ("python3", "python")
_NOT_SEEN: Final = "bind source path does not exist"


class Plant(Workshop):
    """All that one node does with one daemon. Made by `open_plant`."""

    def __init__(self, site: Site, daemon: Daemon, info: DaemonInfo, *, slots: int, memory: int) -> None:
        super().__init__(site, slots=slots, memory=memory)
        self.daemon, self.info = daemon, info
        self.images = Images(daemon)
        self.environments = Environments({})
        self.no_cards: str | None = None
        """Why a usual container can't get a GPU, where there are some."""
        self.no_cards_for_image: str | None = None
        """Why a container of a job's own image can't."""
        self._tried_cards = False
        self._pythons: dict[str, str] = {}
        self._reaping: asyncio.Task[None] | None = None

    async def ensure_image(self) -> None:
        """Import the empty image of the host environment if the daemon does not have it (any more)."""
        if await self.images.here(self.site.host.tag) is None:
            await self.daemon.import_image(self.site.host.image, self.site.host.tag)

    async def shape(self, task: ShardTask) -> Shape:
        """What the container of `task` must be; its image is here then. Raises `NoEnvironment`."""
        facts = self.facts(task)
        if facts.image is None:
            base = self.environments.base_for(task.spec)
            if task.spec.image is not None:
                facts.image = await self.images.find(task.spec.image)
            elif base is not None:
                facts.image = base.image
        return await super().shape(task)

    async def target(self, spec: JobSpec) -> Target:
        """The Python that containers for `spec` have. Raises `NoEnvironment` and `DaemonError`."""
        if spec.image is not None:
            return await self.images.target(await self.images.find(spec.image), self.site)
        base = self.environments.base_for(spec)
        return base.target if base else own_target(self.environments.versions)

    async def rely_on_base(self, problem: str) -> None:
        """Run everything in the base image, because this machine's Python is of no use: `problem` says why."""
        self.environments.problem = problem
        base = self.environments.base
        if base is None:
            raise NoEnvironment(f"{problem}; {advice()}")
        await self.spares.close()
        self.usual = replace(self.usual, image=base.image.id, called=base.name, folder=base.image.folder)
        self.warm()
        await self.spares.ready()

    async def _start(self, shape: Shape, imports: tuple[str, ...]) -> AgentContainer:
        if shape.image is None:
            return await super()._start(shape, imports)
        problem = ""
        for python in (self._pythons[shape.image],) if shape.image in self._pythons else _PYTHONS:
            try:
                container = await self._start_with(python, shape, imports)
            except NoProgram as error:
                problem = str(error)
                continue
            self._pythons[shape.image] = python
            return container
        raise NoEnvironment(
            f"there is no Python in the image {shape.called}: cells need one, --raw does not ({problem})"
        )

    async def close(self) -> None:
        """Remove everything, in parallel."""
        if self._reaping is not None:
            self._reaping.cancel()
            await asyncio.wait({self._reaping})
        await self.images.close()
        await super().close()

    # --- GPUs ---

    async def try_cards(self, cards: Sequence[Gpu]) -> None:
        """Start containers with the first card, once; again while that fails: a runtime may have been installed."""
        if not cards or (self._tried_cards and not self.no_cards and not self.no_cards_for_image):
            return
        self.no_cards, self.no_cards_for_image = await asyncio.gather(
            self._card_problem(cards[0]), self._runtime_problem(cards[0])
        )
        self._tried_cards = True

    async def _card_problem(self, card: Gpu) -> str | None:
        shape = replace(self.usual, gpus=(card.uuid,), devices=devices([card]))
        try:
            container = await self._start(shape, ())
        except (DaemonError, NoEnvironment) as error:
            return f"--gpu: containers of this node can't be given a GPU: {error}"
        await container.remove()
        return None

    async def _runtime_problem(self, card: Gpu) -> str | None:
        """A daemon without the NVIDIA runtime says so only when a container starts; nothing needs to run in it."""
        container = await self.daemon.create(_card_question(self.site, card.uuid))
        try:
            await self.daemon.start(container)
        except DaemonError as error:
            return NO_RUNTIME if no_runtime(error) else None
        finally:
            await self.daemon.remove(container)
        return None

    # --- what dead nodes left ---

    def reap_later(self, is_alive: Callable[[NodeId], bool]) -> None:
        """Remove what dead nodes left, in the background."""
        self._reaping = asyncio.create_task(self.reap(is_alive))

    async def reap(self, is_alive: Callable[[NodeId], bool]) -> None:
        """Remove containers of an earlier life of this node, of dead nodes beside it, and those past their deadline."""
        with contextlib.suppress(DaemonError):  # then the daemon is gone: the next probe says so
            found = await self.daemon.ours()
            gone = [container for container, labels in found if self._abandoned(labels, is_alive)]
            await asyncio.gather(*map(self.daemon.remove, gone))

    def _abandoned(self, labels: dict[str, str], is_alive: Callable[[NodeId], bool]) -> bool:
        deadline = labels.get(Label.DEADLINE, "")
        if deadline.isdigit() and int(deadline) < time.time():
            return True
        own = labels.get(Label.FOLDER) == str(self.site.folder) and labels.get(Label.NODE) == self.site.node
        if own:
            return labels.get(Label.LIFE) != self.site.life
        beside = Path(labels.get(Label.FOLDER, "")).parent == self.site.folder.parent
        return beside and not is_alive(labels.get(Label.NODE, ""))


def _card_question(site: Site, card: str) -> Recipe:
    """A container with a card, of the image that is always here; there is no program in it."""
    return Recipe(
        image=site.host.tag,
        command=("/none",),
        entrypoint=(),
        environment={},
        mounts=(),
        labels=site.labels(slot="question"),
        user=site.inside,
        folder="/",
        memory=256 * 1024**2,
        cpu=1.0,
        stdin=False,
        gpus=(card,),
    )


async def open_plant(
    host: str,
    folder: Path,
    *,
    node: NodeId,
    slots: int,
    memory: int,
    is_alive: Callable[[NodeId], bool],
    cards: Sequence[Gpu] = (),
) -> Plant:
    """Make the daemon at `host` work for this node. Raises `DaemonError` or `NoEnvironment`, which say why it can't.

    `cards`: the GPUs of this machine. What a dead node left may have one: then it is removed before this returns.
    """
    if importlib.util.find_spec("docker") is None:
        raise NoEnvironment("the docker package is not installed: pip install 'bacalhau-jupyter[docker]'")
    daemon = Daemon(host)
    plant: Plant | None = None
    try:
        await daemon.ping()
        plant = await _found(daemon, folder, node=node, slots=slots, memory=memory)
        if cards:
            await plant.reap(is_alive)
        if plant.site.host.problem is None:
            plant.spares.warm(most=1)  # two at once would each take longer, and one is enough to go on
        plant.environments.versions, plant.environments.base = await asyncio.gather(
            asyncio.to_thread(installed), find(plant.images, plant.site)
        )
        await _settle(plant)
        if not cards:
            plant.reap_later(is_alive)
    except BaseException:
        await (plant.close() if plant is not None else daemon.close())
        raise
    return plant


async def _found(daemon: Daemon, folder: Path, *, node: NodeId, slots: int, memory: int) -> Plant:
    info = await daemon.info()
    user, inside = _users(rootless=info.rootless)
    host = await asyncio.to_thread(describe, Interpreter.current(), uid=inside.uid, gid=inside.gid)
    site = Site(
        daemon=daemon,
        folder=folder,
        node=node,
        host=host,
        user=user,
        inside=f"{inside.uid}:{inside.gid}",
        life=secrets.token_hex(8),
        agent=await asyncio.to_thread(new_slots, folder),
    )
    plant = Plant(site, daemon, info, slots=slots, memory=memory)
    await plant.ensure_image()
    return plant


def _users(*, rootless: bool) -> tuple[Reader, Reader]:
    """Who runs in the containers, as this machine and as they themselves see it.

    Under a rootless daemon its user is root inside.
    """
    if rootless:
        return Reader(os.getuid(), os.getgid()), Reader(0, 0)
    return shard_user(), shard_user()


async def _settle(plant: Plant) -> None:
    """Know what works: containers with this machine's Python or, where it can't be shown to them, the base image's."""
    problem = plant.site.host.problem
    if problem is None:
        try:
            await _prove(plant)
        except NoEnvironment as error:
            problem = str(error)
    if problem is not None:
        await plant.rely_on_base(problem)


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
        raise DaemonError(
            f"the Docker daemon at {plant.daemon.host} does not see this machine's files "
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
