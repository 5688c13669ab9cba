"""What executors do that run shards in boxes: a box for each run, tries, refusals, the end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from bacalhau_node.errors import ContentError
from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.gpus import NO_RUNTIME, Gpus, NoGpu, devices, no_runtime
from bacalhau_node.executors.layout import NoEnvironment, size_text
from bacalhau_node.executors.limits import memory_per_slot, usable_cores
from bacalhau_node.executors.slot import RECALLED, AgentLost, warm_imports
from bacalhau_node.executors.staging import NeedsRoot
from bacalhau_node.executors.workshop import Workshop
from bacalhau_node.messages import ShardError
from bacalhau_node.ports import RawOutcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from bacalhau_node.executors.layout import Shape
    from bacalhau_node.ids import JobId
    from bacalhau_node.messages import ErrorKind
    from bacalhau_node.ports import ExecutorEvent, ShardTask
    from bacalhau_node.spec import Resources

TRIES: Final = 3
"""How often a run is given to a box before it had started: another run may have ended the first two."""

W = TypeVar("W", bound=Workshop)


class BoxedExecutor(Generic[W]):
    """Most of an executor. `called`: what it is, in a sentence that says that it can't be used.

    `slots`: shards at once; None: usable cores. `gpus`: the cards of the node, for all of its executors.
    """

    called: str

    def __init__(self, *, gpus: Gpus, slots: int | None = None) -> None:
        self._gpus = gpus
        self._slots = slots or usable_cores()
        self._memory = memory_per_slot(self._slots)
        self._workshop: W | None = None
        self._problem: str | None = "it has not been tried yet"
        self._versions: dict[str, str] = {}
        self._probing = asyncio.Lock()
        self._runs: set[asyncio.Task[object]] = set()

    def _unusable(self) -> str:
        return f"{self.called} can't be used on this node: {self._problem}"

    def _too_much(self, wanted: Resources, *, whole: bool = True) -> str | None:
        """What this machine has not, or can't give to one shard. `whole`: a shard can't get a slice of a card."""
        most = self._memory * self._slots
        if (lack := self._gpus.lack(wanted, whole=whole)) is not None:
            return lack
        if wanted.memory is not None and wanted.memory > most:
            return f"--memory {size_text(wanted.memory)}: this node can give a shard at most {size_text(most)}"
        if wanted.cpu > self._slots:
            return f"--cpu {wanted.cpu:g}: this node can give a shard at most {self._slots} cores"
        return None

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """Run one execution; see `ports.Executor`."""
        workshop = self._workshop
        if workshop is None:
            return _failed("node", DaemonError(self._unusable()))
        current = asyncio.current_task()
        assert current is not None
        self._runs.add(current)
        try:
            shape = await workshop.shape(task)
            holding = self._gpus.hold(task.execution, task.spec.resources, whole=shape.image is None)
            async with holding as cards:
                if cards:
                    shape = replace(shape, gpus=tuple(card.uuid for card in cards), devices=devices(cards))
                return await self._run(workshop, task, shape, emit)
        except (NoEnvironment, NoGpu) as error:
            return _failed("environment", error)
        except ContentError as error:
            return _failed("input", error)
        except (DaemonError, OSError) as error:
            return _failed("environment", NoGpu(NO_RUNTIME)) if no_runtime(error) else _failed("node", error)
        finally:
            self._runs.discard(current)

    async def _run(
        self, workshop: W, task: ShardTask, shape: Shape, emit: Callable[[ExecutorEvent], None]
    ) -> RawOutcome:
        """Run a shard in a box of the crew; again if the box went before it had started."""
        lost = 0
        while True:
            try:
                async with workshop.crew.container(workshop.need(task, shape)) as container:
                    try:
                        outcome = await container.run(task, emit)
                    except AgentLost as end:
                        lost += end.cause != RECALLED
                        if end.started or lost >= TRIES:
                            return await container.explain(end)
                        continue
                    finally:
                        if shape.gpus:
                            await container.remove()  # before its cards are another shard's
                    workshop.learn(task.execution.job, outcome.seconds)
                    return outcome
            except NeedsRoot as needed:
                shape = workshop.with_roots(task, shape, needed.file)

    async def release(self, job: JobId) -> None:
        """Remove the job's boxes; spares for the next job take their place."""
        if self._workshop is not None:
            await self._workshop.release(job)

    async def close(self) -> None:
        """End the runs under way; remove every box and folder, in parallel."""
        for run in self._runs:
            run.cancel()
        if self._runs:
            await asyncio.wait(set(self._runs))
        async with self._probing:
            workshop, self._workshop = self._workshop, None
            self._problem = "it was closed"
            if workshop is not None:
                await workshop.close()

    async def warm(self, imports: tuple[str, ...] = ()) -> None:
        """Have boxes ready, with these modules preloaded."""
        if self._workshop is not None:
            self._workshop.warm(warm_imports(imports))


def _failed(kind: ErrorKind, error: Exception) -> RawOutcome:
    return RawOutcome(ok=False, exit_code=-1, error=ShardError(kind, message=str(error)))
