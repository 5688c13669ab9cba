"""Shards as plain processes of this machine: no isolation, for one's own jobs.

Theory of operation. A slot holds at most one agent at a time, a plain process of the notebook's
own interpreter in its own session; a socket pair is its two streams, and thus its dead-man's
switch. An agent serves the shards of one job and is replaced when another job needs its slot, or
when the job is released. Inputs are used where they lie.

A run waits for a slot (first come, first served) and then goes to the agent. While the shards of
a job last under 20 ms a slot takes several runs ahead, so that a busy node does not keep it
waiting; when another slot runs dry it gets one of them back. An agent that dies under a shard fails
that shard; the runs queued behind it start again elsewhere.

Spares: after the first job, or when `warm` asks, one unused agent per slot is kept with the last
job's modules imported. They end after five minutes without a job.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bacalhau_node.executors.fit import installed, misfit, own_target, python_version
from bacalhau_node.executors.gpus import Gpus, NoGpu, variables
from bacalhau_node.executors.limits import DEFAULT_DISK, ControlGroup, memory_per_slot, usable_cores, usable_memory
from bacalhau_node.executors.places import checked, linked_inputs
from bacalhau_node.executors.plain import GROUP_PREFIX, PlainAgent
from bacalhau_node.executors.slot import RECALLED, AgentLost, ShardRun, agent_job, shard_run, warm_imports
from bacalhau_node.messages import ShardError
from bacalhau_node.ports import Capabilities, ExecutorEvent, RawOutcome, ShardTask, Target
from bacalhau_node.spec import Command, JobSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from bacalhau_node.ids import JobId

SHORT: Final = 0.02
"""Seconds: shards that last less let a slot take more runs ahead (DESIGN section 5)."""
MAX_AHEAD: Final = 32
"""Runs that one slot takes at most, the running one included."""
SPARE_SECONDS: Final = 300.0
"""How long a spare waits for a job (DESIGN section 6)."""
SPARE_MEMORY: Final = 150 * 1024**2
"""Bytes of a spare that has imported pandas; all spares together take a tenth of the memory at most."""
RESTARTS: Final = 3
"""How often a run that had not started is given to another agent."""


class _Seat:
    """One slot: its job, how many runs of it it holds, and the agent, which may still be another job's."""

    def __init__(self) -> None:
        self.agent: PlainAgent | None = None
        self.agent_job: JobId | None = None
        self.job: JobId | None = None
        self.runs = 0
        self.ahead = 1
        self.lock = asyncio.Lock()

    def take(self, job: JobId) -> None:
        """One more run, of this job; another job's only when the slot is idle."""
        if self.job != job:
            self.job, self.ahead = job, 1
        self.runs += 1

    def learned(self, seconds: float) -> None:
        """Take more ahead while shards are short, nothing ahead when one was not."""
        self.ahead = min(2 * self.ahead, MAX_AHEAD) if seconds < SHORT else 1


class ProcessExecutor:
    """Runs shards as plain processes. `folder` is for its own small files; `slots` shards run at once.

    `gpus`: the cards of the node.

    Implements `ports.Executor` with isolation "none".
    """

    def __init__(self, folder: Path, *, slots: int | None = None, gpus: Gpus | None = None) -> None:
        self._folder = folder
        self._gpus = gpus or Gpus(folder / "gpus")
        self._slots = slots or usable_cores()
        self._memory = memory_per_slot(self._slots)
        self._most_spares = min(self._slots, max(1, usable_memory() // 10 // SPARE_MEMORY))
        self._seats = [_Seat() for _ in range(self._slots)]
        self._waiting: deque[tuple[JobId, asyncio.Future[_Seat]]] = deque()
        self._spares: list[PlainAgent] = []
        self._imports: tuple[str, ...] = ()
        self._versions: dict[str, str] = {}
        self._problem: str | None = "it has not been tried yet"
        self._grouped = False
        """Whether control groups hold its agents."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._retire: asyncio.TimerHandle | None = None
        self._filling = asyncio.Lock()
        self._closed = False

    # --- ports.Executor ---

    async def probe(self) -> Capabilities:
        """Start one agent for real, once: it stays as a spare."""
        await self._gpus.look()
        if self._problem is not None:
            try:
                self._problem = await self._try()
            except OSError as error:
                self._problem = f"no process could be started: {error}"
        self._versions = await asyncio.to_thread(installed)
        return Capabilities(
            executor="process",
            isolation="none",
            slots=self._slots,
            memory_per_slot=self._memory,
            python=python_version(),
            versions=self._versions,
            gpus=self._gpus.cards,
            limits_enforced=self._grouped,
            problem=self._problem,
        )

    async def _try(self) -> str | None:
        """What keeps this machine from running an agent; None: there is one."""
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        await asyncio.to_thread(ControlGroup.tidy, GROUP_PREFIX)
        spare = await PlainAgent.start(self._folder, ())
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({spare.slot.ready, spare.slot.dead}, return_when=asyncio.FIRST_COMPLETED)
        if not spare.alive:
            await spare.end()
            return f"no process could be started: {spare.slot.dead.result()}"
        self._grouped = spare.group is not None
        self._spares.append(spare)
        return None

    def check(self, spec: JobSpec) -> str | None:
        """Why plain processes can never run `spec`, or None."""
        return misfit(spec, self._versions) or self._gpus.lack(spec.resources)

    async def target(self, spec: JobSpec) -> Target:
        """The interpreter of this process, whatever the job."""
        del spec  # the same for all
        return await asyncio.to_thread(own_target, self._versions)

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """Run one execution; see `ports.Executor`."""
        try:
            async with self._gpus.hold(task.execution, task.spec.resources) as cards:
                return await self._run(task, tuple(card.uuid for card in cards), emit)
        except NoGpu as error:
            return RawOutcome(ok=False, exit_code=-1, error=ShardError("environment", message=str(error)))

    async def _run(self, task: ShardTask, cards: tuple[str, ...], emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        cause, left = "", RESTARTS
        while left:
            try:
                return await self._run_once(task, cards, emit)
            except AgentLost as lost:
                if lost.started:
                    return _lost_outcome(lost)
                cause = lost.cause
                left -= cause != RECALLED
        error = ShardError("node", message=f"no process could be kept to run the shard: {cause}")
        return RawOutcome(ok=False, exit_code=-1, error=error)

    async def release(self, job: JobId) -> None:
        """End the job's agents, and have spares ready for the next."""
        seats = [seat for seat in self._seats if seat.agent_job == job and not seat.runs]
        for seat in seats:
            async with seat.lock:
                await self._vacate(seat)
        self._spawn(self._fill())

    async def close(self) -> None:
        """End all agents."""
        self._closed = True
        if self._retire is not None:
            self._retire.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        agents = [seat.agent for seat in self._seats if seat.agent is not None]
        await asyncio.gather(*(agent.end() for agent in (*agents, *self._spares)))
        self._spares.clear()

    # --- spares ---

    async def warm(self, imports: tuple[str, ...] = ()) -> None:
        """Have an unused agent ready for every slot, with these modules imported."""
        self._imports = warm_imports(imports)
        await self._fill()
        await asyncio.gather(*(_warmed(spare) for spare in self._spares))

    async def _fill(self) -> None:
        async with self._filling:
            await self._fill_now()

    async def _fill_now(self) -> None:
        dead = [spare for spare in self._spares if not spare.alive]
        self._spares = [spare for spare in self._spares if spare.alive]
        await asyncio.gather(*(spare.end() for spare in dead))
        for spare in self._spares:
            spare.slot.prepare(self._imports)
        while len(self._spares) < self._most_spares and not self._closed:
            self._spares.append(await self._start(self._imports))
        if self._retire is not None:
            self._retire.cancel()
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        self._retire = loop.call_later(SPARE_SECONDS, lambda: self._spawn(self._retire_spares()))

    async def _retire_spares(self) -> None:
        spares, self._spares = self._spares, []
        await asyncio.gather(*(spare.end() for spare in spares))

    async def _start(self, imports: tuple[str, ...], layer: Path | None = None) -> PlainAgent:
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        return await PlainAgent.start(self._folder, imports, layer=layer)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Go on with `work` whatever happens to the caller; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever started it may be gone

    # --- slots ---

    async def _run_once(
        self, task: ShardTask, cards: tuple[str, ...], emit: Callable[[ExecutorEvent], None]
    ) -> RawOutcome:
        seat = await self._acquire(task.execution.job)
        try:
            agent = await self._agent_for(seat, task)
            run, places = self._shard_run(task, cards), (task.scratch / "value", task.scratch / "outputs")
            try:
                outcome = await agent.slot.run(run, host_scratch=places[0], host_outputs=places[1], emit=emit)
            except AgentLost as lost:
                if lost.cause != RECALLED:
                    await asyncio.shield(self._spawn(agent.end()))
                raise
            if not cards:
                seat.learned(outcome.seconds)
            return await checked(outcome)
        finally:
            if cards:  # its interpreter is nobody else's, and gone before its cards are
                await asyncio.shield(self._spawn(self._empty(seat)))
            seat.runs -= 1
            self._serve_waiting()

    async def _empty(self, seat: _Seat) -> None:
        async with seat.lock:
            await self._vacate(seat)

    async def _agent_for(self, seat: _Seat, task: ShardTask) -> PlainAgent:
        """An agent of the task's job in the slot. Raises `AgentLost` when there can be none."""
        cause = "the node is closing"
        try:
            await asyncio.shield(self._spawn(self._settle(seat, task)))
        except OSError as error:
            cause = str(error)
        if seat.agent is None:
            raise AgentLost(cause, started=False, partial=RawOutcome(ok=False))
        return seat.agent

    async def _acquire(self, job: JobId) -> _Seat:
        seat = None if self._waiting else self._pick(job)
        if seat is not None:
            seat.take(job)
            return seat
        future: asyncio.Future[_Seat] = asyncio.get_running_loop().create_future()
        ticket = job, future
        self._waiting.append(ticket)
        try:
            return await future
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            elif not future.cancelled():
                future.result().runs -= 1
                self._serve_waiting()
            raise

    def _serve_waiting(self) -> None:
        """Give slots to those who wait, in their order."""
        while self._waiting:
            job, future = self._waiting[0]
            seat = self._pick(job)
            if seat is None:
                return
            self._waiting.popleft()
            if not future.cancelled():
                seat.take(job)
                future.set_result(seat)
        if not all(seat.runs for seat in self._seats):
            self._recall()

    def _recall(self) -> None:
        """A slot is idle and nobody waits for one: take a run back that was given ahead to the busiest other."""
        seat = max(self._seats, key=lambda seat: seat.runs)
        if seat.runs > 1 and seat.agent is not None:
            seat.agent.slot.recall()

    def _pick(self, job: JobId) -> _Seat | None:
        """An idle slot, the job's own first, then one without a job; else one of the job that takes runs ahead."""
        idle = [seat for seat in self._seats if not seat.runs]
        if idle:
            return min(idle, key=lambda seat: (seat.job != job, seat.job is not None))
        ahead = [seat for seat in self._seats if seat.job == job and seat.runs < seat.ahead]
        return min(ahead, key=lambda seat: seat.runs, default=None)

    async def _settle(self, seat: _Seat, task: ShardTask) -> None:
        """Have an agent of the task's job in the slot."""
        async with seat.lock:
            job = task.execution.job
            if seat.agent is not None and seat.agent.alive and seat.agent_job == job:
                return
            await self._vacate(seat)
            seat.agent_job = job
            if self._closed:
                return
            work = agent_job(task, bundle=str(task.bundle))
            if not task.spec.resources.gpus:
                self._imports = work.imports
            fresh = task.layer is not None or task.spec.resources.gpus > 0
            seat.agent = await (self._start(work.imports, task.layer) if fresh else self._take_agent(work.imports))
            seat.agent.limit(task.spec.resources.memory or self._memory)
            seat.agent.slot.bind(work)

    async def _take_agent(self, imports: tuple[str, ...]) -> PlainAgent:
        """A spare if there is one. Not for a job with a layer, of which a spare may have loaded another version."""
        while self._spares:
            spare = self._spares.pop()
            if spare.alive:
                return spare
            await spare.end()
        return await self._start(imports)

    @staticmethod
    async def _vacate(seat: _Seat) -> None:
        agent, seat.agent, seat.agent_job = seat.agent, None, None
        if agent is not None:
            await agent.end()

    def _shard_run(self, task: ShardTask, cards: tuple[str, ...]) -> ShardRun:
        run = shard_run(
            task,
            locate=lambda path, _: str(path),
            outputs=str(task.scratch / "outputs"),
            work=str(task.scratch / "work"),
            scratch=str(task.scratch / "value"),
            memory=task.spec.resources.memory or self._memory,
            disk=task.spec.resources.disk or DEFAULT_DISK,
        )
        if cards or self._gpus.cards:  # without --gpu it sees none, as in a container
            run = msgspec.structs.replace(run, env={**run.env, **variables(cards)})
        if not isinstance(task.spec.task, Command):
            return run
        places = {"BACALHAU_INPUTS": str(linked_inputs(task)), "BACALHAU_OUTPUTS": run.outputs}
        return msgspec.structs.replace(run, env={**run.env, **places})


# --- small things ---


def _lost_outcome(lost: AgentLost) -> RawOutcome:
    """What to say of a shard whose agent went away under it: the shard killed it, or someone else did."""
    error = ShardError("signal", message=f"the agent that ran the shard ended: {lost.cause}")
    return msgspec.structs.replace(lost.partial, error=error)


async def _warmed(spare: PlainAgent) -> None:
    """Wait until a spare has started and has its modules."""
    ends: set[asyncio.Future[Any]] = {spare.slot.warm, spare.slot.dead}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
