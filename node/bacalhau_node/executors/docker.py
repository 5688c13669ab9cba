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

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bacalhau_node.errors import ContentError
from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.command import run_command
from bacalhau_node.executors.containers import DEFAULT_HOST
from bacalhau_node.executors.fit import installed, mismatch, python_version
from bacalhau_node.executors.layout import NoEnvironment, size_text
from bacalhau_node.executors.limits import memory_per_slot, usable_cores
from bacalhau_node.executors.plant import Plant, open_plant
from bacalhau_node.executors.slot import RECALLED, AgentLost, warm_imports
from bacalhau_node.executors.staging import NeedsRoot
from bacalhau_node.messages import ShardError
from bacalhau_node.ports import Capabilities, RawOutcome
from bacalhau_node.spec import Command, PythonCell

if TYPE_CHECKING:
    from collections.abc import Callable

    from bacalhau_node.executors.layout import Shape
    from bacalhau_node.ids import JobId, NodeId
    from bacalhau_node.messages import ErrorKind
    from bacalhau_node.ports import ExecutorEvent, ShardTask
    from bacalhau_node.spec import JobSpec, Resources

TRIES: Final = 3
"""How often a run is given to a container before it had started: another run may have ended the first two."""


class DockerExecutor:
    """Implements `ports.Executor` with isolation "container".

    `folder` is the node's own (its slots lie in it, on the store's file system). `is_alive` says
    whether a node of this data folder runs now. `slots`: shards at once; None: usable cores.
    """

    def __init__(
        self,
        folder: Path,
        *,
        node: NodeId,
        slots: int | None = None,
        is_alive: Callable[[NodeId], bool] = lambda _: True,
    ) -> None:
        self._folder, self._node, self._is_alive = folder, node, is_alive
        self._slots = slots or usable_cores()
        self._memory = memory_per_slot(self._slots)
        self._host = os.environ.get("DOCKER_HOST") or DEFAULT_HOST
        self._plant: Plant | None = None
        self._problem: str | None = "it has not been tried yet"
        self._versions: dict[str, str] = {}
        self._probing = asyncio.Lock()
        self._runs: set[asyncio.Task[object]] = set()

    # --- ports.Executor ---

    async def probe(self) -> Capabilities:
        """Find the daemon and start a container; later probes only ask whether it is still there."""
        async with self._probing:
            try:
                await self._try()
                self._problem = None
            except (DaemonError, NoEnvironment, OSError) as error:
                self._problem = str(error)
        plant = self._plant
        return Capabilities(
            executor="docker",
            isolation="container",
            slots=self._slots,
            memory_per_slot=self._memory,
            python=python_version(),
            versions=self._versions,
            limits_enforced=plant is None or plant.info.limits,
            problem=self._problem,
        )

    async def _try(self) -> None:
        plant = self._plant
        if plant is not None:
            await plant.site.daemon.ping()
            await plant.ensure_image()
        else:
            opening = open_plant(
                self._host,
                self._folder,
                node=self._node,
                slots=self._slots,
                memory=self._memory,
                is_alive=self._is_alive,
            )
            opened, self._versions = await asyncio.gather(opening, asyncio.to_thread(installed))
            self._plant = plant = opened
        plant.warm()

    def check(self, spec: JobSpec) -> str | None:
        """Why containers of this node can never run `spec`, or None."""
        if self._problem:
            return f"Docker can't be used on this node: {self._problem}"
        if spec.network == "full" and self._plant is not None and not self._plant.info.bridge:
            return "--network full: the Docker daemon of this node has no bridge network"
        if isinstance(spec.task, PythonCell) and spec.image is None and (lack := mismatch(spec.task, self._versions)):
            return lack
        return self._too_much(spec.resources)

    def _too_much(self, wanted: Resources) -> str | None:
        most = self._memory * self._slots
        if wanted.gpus:
            return f"--gpu: this node has no GPU ({_no_gpu()})"
        if wanted.memory is not None and wanted.memory > most:
            return f"--memory {size_text(wanted.memory)}: this node can give a shard at most {size_text(most)}"
        if wanted.cpu > self._slots:
            return f"--cpu {wanted.cpu:g}: this node can give a shard at most {self._slots} cores"
        return None

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """Run one execution; see `ports.Executor`."""
        plant = self._plant
        if plant is None:
            return _failed("node", DaemonError(f"Docker can't be used on this node: {self._problem}"))
        current = asyncio.current_task()
        assert current is not None
        self._runs.add(current)
        try:
            shape = await plant.shape(task)
            if isinstance(task.spec.task, Command):
                async with plant.crew.turn(plant.shares(shape)):
                    return await run_command(plant.site, task, shape, number=plant.number(), emit=emit)
            return await self._run_cell(plant, task, shape, emit)
        except NoEnvironment as error:
            return _failed("environment", error)
        except ContentError as error:
            return _failed("input", error)
        except (DaemonError, OSError) as error:
            return _failed("node", error)
        finally:
            self._runs.discard(current)

    async def _run_cell(
        self, plant: Plant, task: ShardTask, shape: Shape, emit: Callable[[ExecutorEvent], None]
    ) -> RawOutcome:
        """Run a cell in a container of the crew; again if the container went before the cell had started."""
        lost = 0
        while True:
            try:
                async with plant.crew.container(plant.need(task, shape)) as container:
                    try:
                        outcome = await container.run(task, emit)
                    except AgentLost as end:
                        lost += end.cause != RECALLED
                        if end.started or lost >= TRIES:
                            return await container.explain(end)
                        continue
                    plant.learn(task.execution.job, outcome.seconds)
                    return outcome
            except NeedsRoot as needed:
                shape = plant.with_roots(task, shape, needed.file)

    async def release(self, job: JobId) -> None:
        """Remove the job's containers; spares for the next job take their place."""
        if self._plant is not None:
            await self._plant.release(job)

    async def close(self) -> None:
        """End the runs under way; remove every container and folder, in parallel."""
        for run in self._runs:
            run.cancel()
        if self._runs:
            await asyncio.wait(set(self._runs))
        async with self._probing:
            plant, self._plant = self._plant, None
            self._problem = "it was closed"
            if plant is not None:
                await plant.close()

    # --- more than the port ---

    async def warm(self, imports: tuple[str, ...] = ()) -> None:
        """Have containers ready, with these modules preloaded."""
        if self._plant is not None:
            self._plant.warm(warm_imports(imports))


def _no_gpu() -> str:
    if Path("/proc/driver/nvidia/version").exists():
        return "there is an NVIDIA driver, but this version gives no GPU to containers"
    return "no NVIDIA driver found"


def _failed(kind: ErrorKind, error: Exception) -> RawOutcome:
    return RawOutcome(ok=False, exit_code=-1, error=ShardError(kind, message=str(error)))
