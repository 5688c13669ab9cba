"""A simulated executor: runs no process and isolates nothing. For tests and for measuring the engine alone."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import TYPE_CHECKING, Any, Final

from bacalhau_node.messages import ShardError
from bacalhau_node.ports import Capabilities, ExecutorEvent, RawOutcome, RawValue, ShardStarted, ShardTask, Target
from bacalhau_node.spec import ISOLATION_RANK

if TYPE_CHECKING:
    from collections.abc import Callable

    from bacalhau_node.ids import JobId
    from bacalhau_node.spec import Isolation, JobSpec

_MEMORY: Final = 1024**3


class FakeExecutor:
    """Simulates `ports.Executor`: `behave(task, emit)` stands for the shard's code.

    What it returns is the shard's value (as JSON), or a `RawOutcome` as it is; an awaitable of
    either takes its time; an exception that it raises is the shard's. Without `behave` every
    shard's value is None. At most `slots` shards run at once; `most` is how many ever did, `done`
    what ended, in order. `refusal` is the answer of `check`, `isolation` what it says of itself.
    """

    def __init__(
        self,
        behave: Callable[[ShardTask, Callable[[ExecutorEvent], None]], Any] | None = None,
        *,
        slots: int = 2,
        refusal: str | None = None,
        isolation: Isolation = "none",
    ) -> None:
        self._behave = behave
        self._slots = slots
        self._refusal, self._isolation = refusal, isolation
        self._free = asyncio.Semaphore(slots)
        self._running: dict[asyncio.Task[Any], JobId] = {}
        self.most = 0
        self.done: list[str] = []
        self.released: list[JobId] = []
        self.closed = False

    async def probe(self) -> Capabilities:
        """Always works."""
        return Capabilities(
            executor="fake", isolation=self._isolation, slots=self._slots, memory_per_slot=_MEMORY, python="3.11"
        )

    def check(self, spec: JobSpec) -> str | None:
        """The refusal that it was made with, or that it isolates too little."""
        if spec.isolation is not None and ISOLATION_RANK[spec.isolation] > ISOLATION_RANK[self._isolation]:
            return f"--isolation {spec.isolation}: this executor only simulates"
        return self._refusal

    async def target(self, spec: JobSpec) -> Target:
        """A Python with nothing installed."""
        del spec  # the same for all
        return Target(python="3.11.0", system="linux", machine="x86_64", libc="glibc 2.36")

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """Call `behave` when a slot is free."""
        async with self._free:
            self._running[_this_task()] = task.execution.job
            self.most = max(self.most, len(self._running))
            emit(ShardStarted())
            try:
                outcome = await self._outcome(task, emit)
            finally:
                del self._running[_this_task()]
            self.done.append(str(task.execution))
            return outcome

    async def _outcome(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        try:
            value = self._behave(task, emit) if self._behave is not None else None
            if inspect.isawaitable(value):
                value = await value
        except Exception as error:  # noqa: BLE001 - `behave` stands for a shard, whose errors are its own
            return RawOutcome(ok=False, exit_code=1, error=ShardError("exception", type(error).__name__, str(error)))
        if isinstance(value, RawOutcome):
            return value
        if value is None:
            return RawOutcome(ok=True)
        return RawOutcome(ok=True, value=RawValue("json", type(value).__name__, json.dumps(value).encode()))

    async def release(self, job: JobId) -> None:
        """Remembered in `released`."""
        self.released.append(job)

    async def close(self) -> None:
        """End what runs."""
        self.closed = True
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
