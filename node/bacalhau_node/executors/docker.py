"""The Docker executor: cells in warm containers, commands in one container each.

Theory of operation (DESIGN section 6). `probe` finds a daemon, imports the empty image of the
host environment, and starts a real container; that one is the first spare. A cell gets a
container from the crew (`crew.py`) and runs in its agent (`agents.py`); a command gets a container
of its own (`command.py`). The limits are the daemon's: memory, processors and processes by control
groups, no network, a read-only root, no capabilities.

What is left behind by a node that died is found by labels: at the first probe, containers of
this node's id, or of a node beside it whose lock is free, are removed, and nobody else's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.base_image import Environments
from bacalhau_node.executors.boxed import BoxedExecutor
from bacalhau_node.executors.command import run_command
from bacalhau_node.executors.containers import DEFAULT_HOST
from bacalhau_node.executors.gpus import Gpus
from bacalhau_node.executors.layout import NoEnvironment
from bacalhau_node.executors.plant import Plant, open_plant
from bacalhau_node.ports import Capabilities, Target
from bacalhau_node.spec import Command, PythonCell

if TYPE_CHECKING:
    from collections.abc import Callable

    from bacalhau_node.executors.layout import Shape
    from bacalhau_node.ids import NodeId
    from bacalhau_node.ports import ExecutorEvent, RawOutcome, ShardTask
    from bacalhau_node.spec import JobSpec


class DockerExecutor(BoxedExecutor[Plant]):
    """Implements `ports.Executor` with isolation "container".

    `folder` is the node's own (its slots lie in it, on the store's file system). `is_alive` says
    whether a node of this data folder runs now. `slots`: shards at once; None: usable cores. `gpus`: the cards
    of the node.
    """

    called = "Docker"

    def __init__(
        self,
        folder: Path,
        *,
        node: NodeId,
        slots: int | None = None,
        is_alive: Callable[[NodeId], bool] = lambda _: True,
        gpus: Gpus | None = None,
    ) -> None:
        super().__init__(slots=slots, gpus=gpus or Gpus(folder / "gpus"))
        self._images: tuple[str, ...] = ()
        self._folder, self._node, self._is_alive = folder, node, is_alive
        self._host = os.environ.get("DOCKER_HOST") or DEFAULT_HOST

    # --- ports.Executor ---

    async def probe(self) -> Capabilities:
        """Find the daemon and start a container; later probes only ask whether it is still there."""
        async with self._probing:
            await self._gpus.look()
            try:
                await self._try()
                self._problem = None
            except (DaemonError, NoEnvironment, OSError) as error:
                self._problem = str(error)
        plant = self._workshop
        usual = (plant.environments if plant else Environments({})).usual()
        return Capabilities(
            executor="docker",
            isolation="container",
            slots=self._slots,
            memory_per_slot=self._memory,
            python=".".join(usual.python.split(".")[:2]),
            versions=usual.versions,
            gpus=self._gpus.cards,
            images=self._images,
            limits_enforced=plant is None or plant.info.limits,
            problem=self._problem,
        )

    async def _try(self) -> None:
        plant = self._workshop
        if plant is not None:
            await plant.daemon.ping()
            await plant.ensure_image()
        else:
            opening = open_plant(
                self._host,
                self._folder,
                node=self._node,
                slots=self._slots,
                memory=self._memory,
                is_alive=self._is_alive,
                cards=self._gpus.cards,
            )
            self._workshop = plant = await opening
        plant.warm()
        self._images = await plant.images.names()
        await plant.try_cards(self._gpus.cards)

    def check(self, spec: JobSpec) -> str | None:
        """Why containers of this node can never run `spec`, or None."""
        if self._problem:
            return self._unusable()
        if spec.network == "full" and self._workshop is not None and not self._workshop.info.bridge:
            return "--network full: the Docker daemon of this node has no bridge network"
        cell, plant = spec.task, self._workshop
        if isinstance(cell, PythonCell) and spec.image is None and plant and (lack := plant.environments.lack(cell)):
            return lack
        lack = self._too_much(spec.resources, whole=spec.image is None)
        if lack is None and spec.resources.gpus and plant:
            return plant.no_cards_for_image if spec.image else plant.no_cards
        return lack

    async def target(self, spec: JobSpec) -> Target:
        """The Python that containers for `spec` have; see `ports.Executor`."""
        plant = self._workshop
        if plant is None:
            raise NoEnvironment(self._unusable())
        return await plant.target(spec)

    async def _run(
        self, workshop: Plant, task: ShardTask, shape: Shape, emit: Callable[[ExecutorEvent], None]
    ) -> RawOutcome:
        """A cell in a container of the crew; a command in one of its own."""
        if shape.gpus:  # a command's container outlives a node that is killed, and may have this very card
            await workshop.reap(self._is_alive)
        if isinstance(task.spec.task, Command):
            async with workshop.crew.turn(workshop.shares(shape)):
                return await run_command(workshop.site, task, shape, number=workshop.number(), emit=emit)
        return await super()._run(workshop, task, shape, emit)
