"""A container with an agent in it: how it is made, what it sees, how its end is explained.

Theory of operation (DESIGN section 6). The attach stream is opened before the container starts
and carries the agent's frames; files come and go through the slot's folder (`layout.py`). A
container serves one job. Where its folder can't be brought back to how a shard must find it, the
container is killed: an agent that nobody trusts gets no further run.

The shard's user is also the agent's: a hostile cell can kill the agent, and so only itself. What
a shard left is taken out of its reach before anyone looks at it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from bacalhau_node.executors import staging
from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.containers import Recipe
from bacalhau_node.executors.layout import (
    LAYER,
    NoEnvironment,
    NoProgram,
    Shape,
    Site,
    SlotFolder,
    gpu_label,
    memory_text,
)
from bacalhau_node.executors.limits import DEFAULT_DISK
from bacalhau_node.executors.seccomp import deny_lists
from bacalhau_node.executors.slot import AgentLost, AgentSetup, AgentSlot, agent_job, shard_run
from bacalhau_node.messages import ShardError
from bacalhau_node.ports import RawOutcome, RawValue, ShardTask

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from bacalhau_node.executors.runtime import Channels
    from bacalhau_node.ports import ExecutorEvent

READY_SECONDS: Final = 30.0
"""How long an interpreter may take to start on a machine that is busy."""
CANCEL_SECONDS: Final = 0.5
"""How long an agent may take to kill its shard before the whole container is killed."""
OVERTIME: Final = 5.0
"""Seconds after `--timeout` at which an agent that should have ended its shard is taken for stopped."""
T = TypeVar("T")

_ERRORS_KEPT: Final = 4096
_SIGKILLED: Final = (-signal.SIGKILL, 128 + signal.SIGKILL)
"""How a box ends that was killed: it, or its first process."""
_OVERTIME_CAUSE: Final = "it ran over its time and its worker did not end it: its container was killed"


@dataclass(slots=True)
class AgentPipe:
    """The agent's two byte streams over a container's stream; what it writes to stderr is kept for its epitaph."""

    stream: Channels | None = None
    errors: bytearray = field(default_factory=bytearray)
    _arrived: bytearray = field(default_factory=bytearray)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def receive(self, channel: int, data: bytes) -> None:
        """What the container's stream delivers; channel 0: its end."""
        if channel == 1:
            self._arrived += data
        elif channel == 2:
            self.errors += data
            del self.errors[:-_ERRORS_KEPT]
        self._news.set()

    async def read(self) -> bytes:
        """The next bytes; empty when the agent is gone."""
        while not self._arrived and self.stream is not None and not self.stream.ended.is_set():
            self._news.clear()
            await self._news.wait()
        data = bytes(self._arrived)
        self._arrived.clear()
        return data

    def write(self, data: bytes) -> None:
        """Queue `data`; drops it when the agent is gone."""
        if self.stream is not None:
            self.stream.send(data)

    async def drain(self) -> None:
        """Wait while much is queued."""
        if self.stream is not None:
            await self.stream.drain()

    def close(self) -> None:
        """Let go: the agent's stdin ends, it kills what it runs and exits, and the container with it."""
        if self.stream is not None:
            self.stream.close()


class AgentContainer:
    """One container, its agent and its folder, from `start` to `remove`."""

    def __init__(self, site: Site, shape: Shape, *, number: int) -> None:
        self.shape = shape
        self.folder = SlotFolder(site.folder / "slots" / str(number), shape)
        self._site = site
        self._number = number
        self._pipe = AgentPipe()
        self._id = ""
        self._agent: AgentSlot | None = None
        self._imports: tuple[str, ...] = ()
        self._showing: asyncio.Future[None] | None = None
        self._removal: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether its agent is at work."""
        return self._agent is not None and not self._agent.dead.done()

    async def start(self, python: str, imports: tuple[str, ...]) -> None:
        """Make and start it with the interpreter `python`. Raises `NoEnvironment` or `DaemonError`, leaving nothing."""
        try:
            await asyncio.to_thread(self.folder.create, self._site.user)
            self._id = await self._site.daemon.create(self._recipe(python))
            self._pipe.stream = await self._site.daemon.attach(self._id, self._pipe.receive)
            await self._site.daemon.start(self._id)
            await self._greet(imports)
        except BaseException:
            await self.remove()
            raise

    def _recipe(self, python: str) -> Recipe:
        devices, gpus = self._site.cards(self.shape)
        return Recipe(
            image=self._site.image(self.shape),
            command=(python, "-s", "-u", "/slot/agent/__main__.py"),
            entrypoint=(),
            environment=self._site.variables(self.shape),
            mounts=self.folder.mounts(self._site),
            labels=self._site.labels(slot=str(self._number), **gpu_label(self.shape)),
            user=self._site.inside,
            folder="/slot/work",
            memory=self.shape.memory,
            cpu=self.shape.cpu,
            network=self.shape.network,
            devices=devices,
            gpus=gpus,
        )

    async def _greet(self, imports: tuple[str, ...]) -> None:
        self._imports = imports
        agent = AgentSlot(self._pipe, self._setup(imports), explain=self._last_words)
        self._agent = agent
        await asyncio.wait({agent.ready, agent.dead}, timeout=READY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if agent.dead.done():
            state = await self._site.daemon.state(self._id)
            if state is not None and state.exit_code in (126, 127):
                raise NoProgram(agent.dead.result())
            if state is None or (state.exit_code in _SIGKILLED and not state.out_of_memory):
                raise DaemonError("what it was to run in was ended from outside while it started")
            raise NoEnvironment(
                f"the Python of {self._called} can't run cells, which needs Python 3.8 or later: {agent.dead.result()}"
            )
        if not agent.ready.done():
            raise DaemonError(f"a container of {self._called} did not answer within {READY_SECONDS:.0f} s")

    def _setup(self, imports: tuple[str, ...]) -> AgentSetup:
        """The agent's first frame. The programs that a shard starts find the job's packages as it does."""
        setup = AgentSetup(imports=imports, watch=self._site.watched, filters=deny_lists())
        if self.shape.layer is None:
            return setup
        search = (LAYER, self._site.variables(self.shape).get("PYTHONPATH"))
        return msgspec.structs.replace(setup, path=(LAYER,), env={"PYTHONPATH": ":".join(filter(None, search))})

    @property
    def _called(self) -> str:
        return f"the image {self.shape.called}" if self.shape.image else "this machine"

    def _last_words(self) -> str:
        lines = self._pipe.errors.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "its container ended"

    def prepare(self, imports: tuple[str, ...]) -> None:
        """Preload these modules if others were; only before the first job."""
        if self._agent is not None and imports != self._imports:
            self._imports = imports
            self._agent.prepare(imports)

    def recall(self) -> None:
        """Ask for the run back that would start last: its `run` then raises `AgentLost` (`RECALLED`)."""
        if self._agent is not None:
            self._agent.recall()

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """Run one execution. Raises `AgentLost`, `staging.NeedsRoot` and `ContentError`."""
        agent = self._agent
        assert agent is not None
        await self._show_cell(task)
        agent.bind(agent_job(task, bundle="/slot/bundle/cell"))
        if task.files:
            await _to_the_end(self.folder.stage, task.files, self._site.user)
        name = f"{task.execution.shard}.{task.execution.attempt}"
        run = shard_run(
            task,
            locate=lambda _, mount: mount,
            outputs="/outputs",
            work=f"/slot/work/{name}",
            scratch=f"/slot/work/{name}.value",
            memory=self.shape.memory,
            disk=task.spec.resources.disk or DEFAULT_DISK,
            hold=True,
        )
        values = self.folder.work / f"{name}.value"
        watch = _Overtime(task.spec.timeout, queued=agent.outstanding, kill=self.kill)
        try:
            outcome = await self._await(
                agent.run(run, host_scratch=values, host_outputs=self.folder.outputs, emit=emit)
            )
            if outcome.outputs is not None or isinstance(outcome.value.data, Path):
                outcome = await self._taken_out(outcome, task.scratch)
        except asyncio.CancelledError:
            if agent.holding == run.key:  # what it left would be the next shard's
                await self._forget_outputs()
                agent.collected(run)
            raise
        except AgentLost as lost:
            if watch.fired:
                raise AgentLost(_OVERTIME_CAUSE, started=True, partial=lost.partial) from lost
            raise
        finally:
            watch.stop()
        if agent.holding == run.key:
            agent.collected(run)
        return outcome

    async def _show_cell(self, task: ShardTask) -> None:
        """Put the job's cell where the agent finds it, once: the first run that asks does it for all."""
        if task.bundle is not None and self._showing is None:
            target = self.folder.bundle / "cell"
            self._showing = asyncio.ensure_future(
                asyncio.to_thread(staging.mirror, task.bundle, target, self._site.user)
            )
        if self._showing is not None:
            await asyncio.shield(self._showing)

    async def _await(self, run: Coroutine[object, object, RawOutcome]) -> RawOutcome:
        """The outcome; when cancelled, the shard's end, by its agent or with its container."""
        running = asyncio.ensure_future(run)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.wait({running}, timeout=CANCEL_SECONDS)
            if not running.done():
                await self.kill()
                await asyncio.wait({running})
            if not running.cancelled():
                running.exception()  # seen: nobody else will ask
            raise

    async def _forget_outputs(self) -> None:
        try:
            await asyncio.to_thread(staging.clear, self.folder.outputs)
        except OSError:
            await self.kill()

    async def _taken_out(self, outcome: RawOutcome, scratch: Path) -> RawOutcome:
        try:
            return await _to_the_end(self._take_out, outcome, scratch)
        except OSError as error:
            await self.kill()
            problem = ShardError("output", message=f"what the shard left can't be taken: {error}")
            return msgspec.structs.replace(outcome, ok=False, outputs=None, value=RawValue(), error=problem)

    def _take_out(self, outcome: RawOutcome, scratch: Path) -> RawOutcome:
        """Move what the shard left out of reach of anything that may still run in its container."""
        outputs = None if outcome.outputs is None else staging.take_out(self.folder.outputs, scratch / "outputs")
        if outputs is not None and (problem := staging.unfit(outputs)) is not None:
            error = outcome.error or ShardError("output", message=problem)
            outcome = msgspec.structs.replace(outcome, ok=False, exit_code=outcome.exit_code or 1, error=error)
            outputs = None
        value = outcome.value
        if isinstance(value.data, Path):
            scratch.mkdir(parents=True, exist_ok=True)
            moved = value.data.rename(scratch / "value")
            if not stat.S_ISREG(moved.lstat().st_mode):
                raise OSError("its value is no file")
            with contextlib.suppress(OSError):  # whatever else the shard put there goes with the container
                value.data.parent.rmdir()
            value = RawValue(value.kind, value.type, moved)
        return msgspec.structs.replace(outcome, outputs=outputs, value=value)

    async def kill(self) -> None:
        """End everything in it now."""
        with contextlib.suppress(DaemonError):
            await self._site.daemon.kill(self._id)

    async def explain(self, lost: AgentLost) -> RawOutcome:
        """What to say about an execution whose agent went away."""
        error = await self._blame(lost)
        return msgspec.structs.replace(lost.partial, ok=False, exit_code=-1, error=error)

    async def _blame(self, lost: AgentLost) -> ShardError:
        if lost.cause == _OVERTIME_CAUSE:
            return ShardError("timeout", message=lost.cause)
        daemon = self._site.daemon
        try:
            state = await daemon.state(self._id)
            if state is not None and state.out_of_memory:
                return ShardError("memory", message=memory_text(self.shape.memory))
            if state is None or not lost.started or await daemon.killed(self._id):
                return ShardError("node", message="what it ran in was ended from outside")
        except DaemonError as problem:
            return ShardError("node", message=str(problem))
        return ShardError("signal", name="SIGKILL", message=f"it ended its own worker ({lost.cause})")

    async def remove(self) -> None:
        """Remove container and folder; may be called again."""
        if self._removal is None:
            self._removal = asyncio.create_task(self._remove())
        await asyncio.shield(self._removal)

    async def _remove(self) -> None:
        if self._agent is not None:
            await self._agent.close()
        self._pipe.close()
        if self._id:
            with contextlib.suppress(DaemonError):  # then the daemon is gone; `reap` finds what it left
                await self._site.daemon.remove(self._id)
        await asyncio.to_thread(staging.destroy, self.folder.path)


async def _to_the_end(work: Callable[..., T], *arguments: object) -> T:
    """Run `work` in a thread; when cancelled, only go once it is done: nobody else may touch the folder before."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        running.exception()  # seen: nobody else will ask
        raise


class _Overtime:
    """Kills a container whose agent should have ended a shard long ago: the cell may have stopped it.

    From the moment that a run is queued behind `queued` others; an agent that is stopped may not
    even have said that the shard has started.
    """

    def __init__(
        self, timeout: float | None, *, queued: int, kill: Callable[[], Coroutine[object, object, None]]
    ) -> None:
        self.fired = False
        self._kill = kill
        self._killing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            longest = (timeout + OVERTIME) * (queued + 1)
            self._timer = asyncio.get_running_loop().call_later(longest, self._fire)

    def _fire(self) -> None:
        self.fired = True
        self._killing = asyncio.ensure_future(self._kill())

    def stop(self) -> None:
        """The run has ended."""
        if self._timer is not None:
            self._timer.cancel()
