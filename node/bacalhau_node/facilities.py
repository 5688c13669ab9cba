"""What runs jobs on this machine: its executors, the best first, and which of them a job gets.

The executors are tried in the order container, sandbox, plain process; each job gets the first that works and can
run it. To try one is to start something real, so a node that runs only its user's jobs tries the next one when there
is a job that needs it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bacalhau_node.errors import BugError
from bacalhau_node.executors.gpus import at_once
from bacalhau_node.layers.store import Layers
from bacalhau_node.ports import Capabilities, Executor
from bacalhau_node.spec import JobSpec, PythonCell

PROBE_AGAIN = 5.0
"""Seconds after which a submission asks again which executors work (a daemon may have gone or come)."""


@dataclass
class _Option:
    """An executor and what its last probe said."""

    executor: Executor
    capabilities: Capabilities


class Facilities:
    """The executors of a node. `at_fault`: an execution has failed by this node's own fault since the last probe."""

    def __init__(self, executors: Sequence[Executor], layers: Layers) -> None:
        self._all, self._untried, self.layers = executors, list(executors), layers
        self._options: list[_Option] = []
        self._trying = asyncio.Lock()
        self._probed = asyncio.get_running_loop().time()
        self.at_fault = False

    @classmethod
    async def open(cls, executors: Sequence[Executor], layers: Layers) -> Facilities:
        """Those of `executors` that work, tried up to the first; the best isolation comes first."""
        facilities = cls(executors, layers)
        await facilities._try_until(lambda _: True)
        return facilities

    async def try_for(self, spec: JobSpec) -> None:
        """Know whether `spec` can run here: try executors up to the first that can."""
        await self._try_until(lambda executor: executor.check(spec) is None)

    async def try_all(self) -> None:
        """Know what each executor can do."""
        await self._try_until(lambda _: False)

    async def _try_until(self, enough: Callable[[Executor], bool]) -> None:
        async with self._trying:
            while self._untried and not any(enough(option.executor) for option in self._working()):
                self._options.append(_Option(self._untried[0], await self._untried[0].probe()))
                del self._untried[0]

    @property
    def slots(self) -> int:
        """How many shards run here at once."""
        return max(option.capabilities.slots for option in self._options)

    async def close(self) -> None:
        """End all that runs."""
        await asyncio.gather(*(executor.close() for executor in self._all))

    @property
    def capabilities(self) -> Capabilities:
        """What the best executor that works can do."""
        return self._working()[0].capabilities

    def working(self) -> list[Capabilities]:
        """What those can do that were tried and work."""
        return [option.capabilities for option in self._working()]

    async def probe_again(self) -> None:
        """Ask the executors again if the last answer is old, or one of them has failed since."""
        now = asyncio.get_running_loop().time()
        if now - self._probed < PROBE_AGAIN and not self.at_fault:
            return
        self._probed, self.at_fault = now, False
        for option in self._options:
            option.capabilities = await option.executor.probe()
        await self._try_until(lambda _: True)

    def executors(self) -> list[Capabilities]:
        """What each executor that was tried said at its last probe, best isolation first."""
        return [option.capabilities for option in self._options]

    def _working(self) -> list[_Option]:
        return [option for option in self._options if option.capabilities.problem is None]

    def problems(self) -> list[str]:
        """Why the better executors don't work here, one sentence each."""
        return [option.capabilities.problem for option in self._options if option.capabilities.problem]

    def refuse(self, spec: JobSpec) -> str | None:
        """Why no executor of this node can ever run `spec`; None if one can."""
        reasons = [option.executor.check(spec) for option in self._working()]
        if None in reasons:
            return None
        best = [reason for reason in reasons[:1] if reason]  # those that isolate less can't do more
        better = self.problems() if _asks_for_a_container(spec) or not best else ()
        return "; ".join([*best, *better]) or "no executor works on this node"

    def choose(self, spec: JobSpec) -> tuple[Executor, str]:
        """The executor that runs the job, and its name."""
        option = self._option(spec)
        return option.executor, option.capabilities.executor

    def _option(self, spec: JobSpec) -> _Option:
        for option in self._working():
            if option.executor.check(spec) is None:
                return option
        raise BugError(f"a job was taken that no executor can run: {self.refuse(spec)}")

    # --- environments ---

    async def environment(self, spec: JobSpec) -> tuple[str, ...]:
        """Where `spec` would run and what would be installed for it, in sentences for `--dry-run`."""
        if (refusal := self.refuse(spec)) is not None:
            return (f"environment: none on this node: {refusal}",)
        executor, name = self.choose(spec)
        requires = spec.task.requires if isinstance(spec.task, PythonCell) else ()
        if spec.image is not None:
            where = (f"environment: {name}, the image {spec.image}",)
            return (*where, f"packages: {', '.join(requires)}, for the Python of the image") if requires else where
        target = await executor.target(spec)
        whose = "this machine's" if target.executable else "the base image's"
        where = (f"environment: {name}, {whose} Python {target.python}",)
        return (*where, self.layers.describe(requires, target)) if requires else where

    def gpu_notes(self, spec: JobSpec, count: int) -> tuple[str, ...]:
        """What keeps most of the `count` shards of `spec` waiting if GPUs do, in a sentence for its user."""
        if not spec.resources.gpus or self.refuse(spec) is not None:
            return ()
        cards = self._option(spec).capabilities.gpus
        most = at_once(cards, spec.resources)
        if most >= min(count, self.slots):
            return ()
        return (f"{len(cards)} GPU{'s' * (len(cards) != 1)}: {most} of {count} shards at once, the others queue",)

    async def preparations(self, spec: JobSpec) -> tuple[str, ...]:
        """What has to be done before the first shard of `spec` can start, in sentences for its user."""
        requires = spec.task.requires if isinstance(spec.task, PythonCell) else ()
        if not requires or spec.image is not None or self.refuse(spec) is not None:
            return ()
        executor, _ = self.choose(spec)
        if not self.layers.missing(requires, await executor.target(spec)):
            return ()
        return (f"installing {', '.join(requires)} before the first shard; later jobs find it installed",)


def _asks_for_a_container(spec: JobSpec) -> bool:
    """Whether what refuses `spec` may be that a better executor does not work here."""
    return bool(spec.image or spec.isolation or spec.container_per == "shard")
