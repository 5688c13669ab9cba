"""The host's side of one agent: frames over a byte pipe, several shards in flight, outcomes back.

Theory of operation. An agent (`agent/`) runs inside a slot: a plain process, a sandbox or a
container. Whoever starts one hands its two byte streams over as a `Pipe`; `AgentSlot` does the
rest. One slot serves one job (`bind`) and runs one shard at a time, but `run` may be called ahead:
the agent keeps a queue, so a busy host never lets a slot wait. Lines are handed on as they come and
kept whole up to the agent's cap; the value arrives in the last frame, or lies in the scratch folder.
When the streams end before `close`, every outstanding `run` raises `AgentLost`: the executor knows
whether a limit, a person or the node was to blame, and says so in the outcome.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from bacalhau_node.errors import BugError, ProtocolError
from bacalhau_node.executors.link import AgentLink, Pipe, Reply, ValueHead, frame
from bacalhau_node.ids import Execution
from bacalhau_node.ports import ExecutorEvent, RawOutcome, RawValue, ShardLines, ShardStarted, ShardTask
from bacalhau_node.spec import JobSpec, PythonCell

WARM_MODULES = ("numpy", "pandas", "polars", "pyarrow")
"""Modules that may be imported before a fork: their import alone starts no thread and opens no device."""

OOM_FILES = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
"""The counters of a container's own control group, as it sees them: version 2, version 1."""

RECALLED = "it was recalled"
"""The cause in an `AgentLost` whose agent is well: the run may start elsewhere."""
CANCEL_SECONDS = 1.0
"""How long an agent may take to kill a shard, before it is given up with everything in it."""

Emit = Callable[[ExecutorEvent], None]


class AgentLost(Exception):
    """The agent went away while `run` waited.

    `started`: the shard's own code ran already. `partial`: the text that had arrived. `cause`: a
    clause for a person, such as "its process was killed by SIGKILL".
    """

    def __init__(self, cause: str, *, started: bool, partial: RawOutcome) -> None:
        super().__init__(cause)
        self.cause = cause
        self.started = started
        self.partial = partial


class AgentSetup(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame: what an agent knows before it has a job. All paths as the agent sees them.

    `path` goes in front of `sys.path`, `env` over the agent's environment, `imports` are preloaded.
    `oom`: files with an `oom_kill N` line, the first that exists is read around each shard (the default
    is where a container sees its own). `watch`: no control group holds memory and processes, the agent
    looks by itself. `filters`: programs of system calls (base64, by machine) that it puts on.
    """

    path: tuple[str, ...] = ()
    env: Mapping[str, str] = {}
    imports: tuple[str, ...] = ()
    oom: tuple[str, ...] = OOM_FILES
    watch: bool = False
    filters: Mapping[str, str] = {}


class AgentJob(msgspec.Struct, frozen=True, kw_only=True):
    """The job that this agent serves, until it ends. `bundle`: the cell's folder as the agent sees it."""

    bundle: str = ""
    name: str = "cell"
    line_offset: int = 0
    imports: tuple[str, ...] = ()
    env: Mapping[str, str] = {}
    argv: tuple[str, ...] = ()
    """A program in place of a cell (`Command`), already with its shell."""


class ShardRun(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One execution as the agent is told to run it; see `shard_run`. All paths as the agent sees them.

    `outputs`, `work` (the working and temporary folder) and `scratch` (large values, only when there
    is one) are made by the agent where missing; `work` is removed by it. `hold`: after a shard that wrote into
    `outputs`, start no other until `collected`. Limits are bytes and seconds; 0 is none.
    """

    key: str
    shard: int
    count: int
    seed: int
    outputs: str
    work: str
    scratch: str
    inputs: tuple[str, ...] = ()
    logical: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    env: Mapping[str, str] = {}
    timeout: float = 0.0
    memory: int = 0
    disk: int = 0
    hold: bool = False


def agent_job(task: ShardTask, *, bundle: str) -> AgentJob:
    """The job of `task` for `AgentSlot.bind`; `bundle` is its folder as the agent sees it."""
    cell = task.spec.task
    if not isinstance(cell, PythonCell):
        argv = ("sh", "-c", cell.shell) if cell.shell is not None else cell.argv
        return AgentJob(argv=argv, env=task.spec.env)
    return AgentJob(
        bundle=bundle,
        name=cell.name,
        line_offset=cell.line_offset,
        imports=ahead(task.spec),
        env=task.spec.env,
    )


def shard_run(
    task: ShardTask,
    *,
    locate: Callable[[Path, str], str],
    outputs: str,
    work: str,
    scratch: str,
    memory: int = 0,
    disk: int = 0,
    hold: bool = False,
) -> ShardRun:
    """The run of `task`; `locate(path, mount)` says where the agent finds a staged file."""
    execution = task.execution
    own = [file for file in task.files if not file.shared]
    return ShardRun(
        key=f"{execution.shard}#{execution.attempt}",
        shard=execution.shard,
        count=task.count,
        seed=seed_of(execution),
        outputs=outputs,
        work=work,
        scratch=scratch,
        inputs=tuple(locate(file.path, file.mount) for file in own),
        logical=tuple(file.logical for file in own),
        shared=tuple(locate(file.path, file.mount) for file in task.files if file.shared),
        env={**task.secrets.values, **_identity(execution, task.count)},
        timeout=task.spec.timeout or 0.0,
        memory=memory,
        disk=disk,
        hold=hold,
    )


def warm_imports(imports: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a cell's imports that an agent may load before it forks, sorted."""
    return tuple(name for name in WARM_MODULES if name in imports)


def ahead(spec: JobSpec) -> tuple[str, ...]:
    """What the agents of a job load before its shards start: nothing where a shard has a GPU of its own.

    Nothing of a driver may be open in a process that forks.
    """
    if spec.resources.gpus or not isinstance(spec.task, PythonCell):
        return ()
    return warm_imports(spec.task.imports)


def seed_of(execution: Execution) -> int:
    """The seed of a shard's random generators: the same for every attempt, 32 bits (what NumPy takes)."""
    text = f"{execution.job}/{execution.shard}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def _identity(execution: Execution, count: int) -> dict[str, str]:
    return {
        "BACALHAU_JOB_ID": execution.job,
        "BACALHAU_EXECUTION_ID": f"{execution.job}-{execution.shard}-{execution.attempt}",
        "BACALHAU_PARTITION_INDEX": str(execution.shard),
        "BACALHAU_PARTITION_COUNT": str(count),
    }


# --- the slot ---


class _Pending:
    """One `run` in flight: its text so far, and the future of its end."""

    def __init__(self, run: ShardRun, *, host_scratch: Path, host_outputs: Path, emit: Emit) -> None:
        self.run = run
        self.scratch = host_scratch
        self.outputs = host_outputs
        self.emit = emit
        self.started = False
        self.recalled = False
        self.pid = 0
        self.text = {"stdout": bytearray(), "stderr": bytearray()}
        self.decoders: dict[str, codecs.IncrementalDecoder] = {}
        self.ended: asyncio.Future[RawOutcome] = asyncio.get_running_loop().create_future()

    def lines(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        self.text[stream] += data
        decoder = self.decoders.get(stream)
        if decoder is None:
            decoder = self.decoders[stream] = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data)
        if text:
            self.emit(ShardLines(stream, text))

    def flush(self) -> None:
        """Hand on what is left of a character that was never finished."""
        for stream, decoder in self.decoders.items():
            text = decoder.decode(b"", final=True)
            if text:
                self.emit(ShardLines("stdout" if stream == "stdout" else "stderr", text))

    def outcome(self, reply: Reply, body: bytes) -> RawOutcome:
        return RawOutcome(
            ok=reply.ok,
            exit_code=reply.exit_code,
            value=self._value(reply.value, body),
            outputs=self.outputs if reply.outputs else None,
            stdout=bytes(self.text["stdout"]),
            stderr=bytes(self.text["stderr"]),
            cut=reply.cut,
            error=reply.error,
            seconds=reply.seconds,
            max_rss=reply.max_rss,
        )

    def _value(self, head: ValueHead | None, body: bytes) -> RawValue:
        if head is None:
            return RawValue()
        if not head.file:
            return RawValue(head.kind, head.type, body)
        if head.file != Path(head.file).name or head.file == "..":
            raise ProtocolError(f"the agent named {head.file!r} as a file of its scratch folder")
        return RawValue(head.kind, head.type, self.scratch / head.file)

    def partial(self) -> RawOutcome:
        return RawOutcome(ok=False, exit_code=-1, stdout=bytes(self.text["stdout"]), stderr=bytes(self.text["stderr"]))


class AgentSlot:
    """One agent, from the moment its streams exist until it is gone. All calls on one asyncio loop.

    `setup` is sent at once. `ready` ends with the agent's Python version. `dead` ends with the cause
    (a clause for a person) when the streams end, by `close` or otherwise; `explain`, asked then, may
    know more than "its streams ended".
    """

    def __init__(
        self, pipe: Pipe, setup: AgentSetup, *, explain: Callable[[], str] = lambda: "its streams ended"
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[str] = loop.create_future()
        self.warm: asyncio.Future[tuple[str, ...]] = loop.create_future()
        self.dead: asyncio.Future[str] = loop.create_future()
        self.holding = ""
        """The key of the `hold` run whose outputs wait for `collected`, cancelled ones included."""
        self._pipe = pipe
        self._explain = explain
        self._pending: dict[str, _Pending] = {}
        self._job: AgentJob | None = None
        pipe.write(frame("hello", setup))
        self._reader = loop.create_task(self._read(AgentLink(pipe)))

    @property
    def outstanding(self) -> int:
        """How many runs have not ended."""
        return len(self._pending)

    @property
    def running(self) -> tuple[int, ...]:
        """The process ids of the shards that have started, as the agent sees them."""
        return tuple(pending.pid for pending in self._pending.values() if pending.started)

    def prepare(self, imports: tuple[str, ...]) -> None:
        """Have these modules imported ahead of the next job, in place of the former ones unless those have them all."""
        self._pipe.write(frame("prepare", {"imports": imports}))

    def bind(self, job: AgentJob) -> None:
        """Give the agent its job: once, before the first `run`."""
        if self._job is not None and self._job != job:
            raise BugError("an agent was to serve a second job")
        if self._job is None:
            self._job = job
            self._pipe.write(frame("job", job))

    async def run(self, run: ShardRun, *, host_scratch: Path, host_outputs: Path, emit: Emit) -> RawOutcome:
        """Run one execution and say how it ended; further calls queue behind it.

        `host_scratch` and `host_outputs` are the run's `scratch` and `outputs` on this machine.
        Raises `AgentLost` when the agent goes away. Cancelling kills the shard with everything that
        it started, waits until that is done, and re-raises; an agent that does not do it within
        `CANCEL_SECONDS` loses its streams, and is then for its owner to end.
        """
        if self.dead.done():
            raise AgentLost(self.dead.result(), started=False, partial=RawOutcome(ok=False, exit_code=-1))
        pending = _Pending(run, host_scratch=host_scratch, host_outputs=host_outputs, emit=emit)
        self._pending[run.key] = pending
        self._pipe.write(frame("run", run))
        try:
            await self._pipe.drain()
            return await asyncio.shield(pending.ended)
        except asyncio.CancelledError:
            await self._cancel(pending)
            raise
        finally:
            self._pending.pop(run.key, None)

    def recall(self) -> bool:
        """Ask for the run back that would start last; unless it starts, its `run` raises `AgentLost` (`RECALLED`)."""
        waiting = [pending for pending in self._pending.values() if not (pending.started or pending.recalled)]
        if not waiting:
            return False
        waiting[-1].recalled = True
        self._pipe.write(frame("recall", {"key": waiting[-1].run.key}))
        return True

    def collected(self, run: ShardRun) -> None:
        """The outputs of a `hold` run are taken: the next shard may start."""
        self.holding = ""
        self._pipe.write(frame("collected", {"key": run.key}))

    async def close(self) -> None:
        """Let the agent go, with whatever it still runs; returns when its streams have ended."""
        self._pipe.write(frame("bye"))
        self._pipe.close()
        await asyncio.wait({self._reader})
        await asyncio.sleep(0)  # a transport lets go of its socket in the loop's next turn

    async def _cancel(self, pending: _Pending) -> None:
        pending.emit = _silent
        self._pipe.write(frame("kill", {"key": pending.run.key}))
        await asyncio.wait({pending.ended}, timeout=CANCEL_SECONDS)
        if not pending.ended.done():
            self._pipe.close()
            await asyncio.wait({pending.ended})
        if not pending.ended.cancelled():
            pending.ended.exception()  # seen: nobody else will ask

    async def _read(self, link: AgentLink) -> None:
        cause = ""
        try:
            while frames := await link.receive():
                for reply, body in frames:
                    self._handle(reply, body)
        except ProtocolError as error:
            cause = str(error)
        self._pipe.close()
        self._end(cause or self._explain())

    def _handle(self, reply: Reply, body: bytes) -> None:
        pending = self._pending.get(reply.key)
        if reply.t == "ready" and not self.ready.done():
            self.ready.set_result(reply.python)
        elif reply.t == "warm":
            if not self.warm.done():
                self.warm.set_result(reply.imports)
        elif reply.t == "error":
            raise ProtocolError(f"the agent did not understand its host: {reply.message}")
        elif pending is not None:
            self._shard(pending, reply, body)
            if reply.t == "done" and reply.outputs and pending.run.hold:
                self.holding = reply.key

    def _shard(self, pending: _Pending, reply: Reply, body: bytes) -> None:
        if reply.t == "started":
            pending.started, pending.pid = True, reply.pid
            pending.emit(ShardStarted())
        elif reply.t == "lines":
            pending.lines(reply.stream, body)
        elif reply.t == "done":
            pending.flush()
            if pending.ended.done():
                raise ProtocolError("the agent ended one shard twice")
            pending.ended.set_result(pending.outcome(reply, body))
        elif reply.t == "recalled" and not pending.ended.done():
            pending.ended.set_exception(AgentLost(RECALLED, started=False, partial=pending.partial()))
        else:
            raise ProtocolError(f"the agent sent a frame of the unknown type {reply.t!r}")

    def _end(self, cause: str) -> None:
        self.dead.set_result(cause)
        self.ready.cancel()
        self.warm.cancel()
        for pending in self._pending.values():
            if not pending.ended.done():
                pending.ended.set_exception(AgentLost(cause, started=pending.started, partial=pending.partial()))


def _silent(_: ExecutorEvent) -> None:
    """What a cancelled run emits to."""
