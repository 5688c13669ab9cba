"""A program that is not a cell: one container for one shard, its lines as they are printed.

Theory of operation (DESIGN section 6). The stream is attached before the container starts, so no
line is lost; its end, and then one question to the daemon, say how the program ended. A container
whose program could not be started remains until it is removed, so it always is. The daemon keeps
the last 10 MB of text, for whoever looks at a container that this process left behind. That text, and the
environment with its secrets, lie as they are in the daemon's own folder, for root, until the container is removed.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import signal
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Literal

from bacalhau_node.executors import staging
from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.containers import Recipe
from bacalhau_node.executors.layout import NoProgram, Shape, Site, SlotFolder, gpu_label, memory_text, size_text
from bacalhau_node.executors.limits import DEFAULT_DISK
from bacalhau_node.executors.slot import shard_run
from bacalhau_node.messages import ShardError
from bacalhau_node.ports import RawOutcome, ShardLines, ShardStarted, ShardTask
from bacalhau_node.spec import Command

if TYPE_CHECKING:
    from collections.abc import Callable

    from bacalhau_node.executors.runtime import Channels
    from bacalhau_node.ports import ExecutorEvent

TOO_LONG: Final = "the shard ran longer than its --timeout of {:g} s: give it more, or use smaller shards"
HEAD: Final = 8 * 1024 * 1024
"""Text that is sent as it comes, both streams together; with the tails 10 MB in all (DESIGN section 6)."""
TAIL: Final = 1024 * 1024
"""Text of a stream that is kept beyond that: its end."""
UNFINISHED_SECONDS: Final = 0.05
"""An unfinished line waits so long for its end."""
DISK_SECONDS: Final = 0.25
"""Between two looks at what the shard has written."""
ENDED_SECONDS: Final = 0.02
"""Between two questions whether a container has ended whose stream has."""
GRACE_SECONDS: Final = 60
"""So long after its time-out may any node remove a container."""
_INIT_FAILED: Final = b"[FATAL tini"


async def run_command(
    site: Site, task: ShardTask, shape: Shape, *, number: int, emit: Callable[[ExecutorEvent], None]
) -> RawOutcome:
    """Run one execution of a `Command`. Raises `ContentError`, `NoEnvironment` and `DaemonError`."""
    folder = SlotFolder(site.folder / "slots" / str(number), shape)
    container = ""
    try:
        await asyncio.to_thread(_fill, folder, task, site)
        container = await site.daemon.create(_recipe(site, task, shape, folder, number))
        return await _Program(site, task, folder=folder, container=container, emit=emit).run()
    finally:
        await asyncio.shield(asyncio.create_task(_remove(site, container, folder)))


def _fill(folder: SlotFolder, task: ShardTask, site: Site) -> None:
    folder.create(site.user)
    folder.stage(task.files, site.user)


async def _remove(site: Site, container: str, folder: SlotFolder) -> None:
    if container:
        with contextlib.suppress(DaemonError):  # then the daemon is gone; `reap` finds what it left
            await site.daemon.remove(container)
    await asyncio.to_thread(staging.destroy, folder.path)


def _recipe(site: Site, task: ShardTask, shape: Shape, folder: SlotFolder, number: int) -> Recipe:
    command = task.spec.task
    assert isinstance(command, Command)
    named = {"job": task.execution.job, "slot": str(number), **gpu_label(shape)}
    if task.spec.timeout is not None:
        named["deadline"] = str(int(time.time() + task.spec.timeout) + GRACE_SECONDS)
    identity = shard_run(task, locate=lambda _, mount: mount, outputs="/outputs", work="/slot/work", scratch="").env
    devices, gpus = site.cards(shape)
    return Recipe(
        image=site.image(shape),
        command=command.argv if command.shell is None else (),
        entrypoint=None if command.shell is None else ("sh", "-c", command.shell),
        environment={**site.variables(shape), **task.spec.env, **identity},
        mounts=folder.mounts(site),
        labels=site.labels(**named),
        user=site.inside,
        folder=None if shape.folder and command.shell is None else "/slot/work",
        memory=shape.memory,
        cpu=shape.cpu,
        network=shape.network,
        log="local",
        stdin=False,
        devices=devices,
        gpus=gpus,
    )


class _Program:
    """One container from its start to its outcome."""

    def __init__(
        self,
        site: Site,
        task: ShardTask,
        *,
        folder: SlotFolder,
        container: str,
        emit: Callable[[ExecutorEvent], None],
    ) -> None:
        self._site, self._task, self._folder, self._container, self._emit = site, task, folder, container, emit
        self._started = False
        self._room = _Room(HEAD)
        self._texts = {1: _Text("stdout", self._room, emit), 2: _Text("stderr", self._room, emit)}
        self._disk = task.spec.resources.disk or DEFAULT_DISK
        self._memory = folder.shape.memory

    async def run(self) -> RawOutcome:
        daemon = self._site.daemon
        stream = await daemon.attach(self._container, self._receive)
        try:
            await daemon.start(self._container)
            began = time.monotonic()
            self._tell_started()
            stopped = await self._watch(stream, began)
            seconds = time.monotonic() - began
        finally:
            stream.close()
            for text in self._texts.values():
                text.finish()
        return await self._outcome(stopped, seconds)

    def _receive(self, channel: int, data: bytes) -> None:
        if channel in self._texts:
            self._tell_started()  # its first line may be here before the daemon's answer is
            self._texts[channel].feed(data)

    def _tell_started(self) -> None:
        if not self._started:
            self._started = True
            self._emit(ShardStarted())

    async def _watch(self, stream: Channels, began: float) -> ShardError | None:
        """Wait for the program's end; why it was ended, if it was."""
        timeout = self._task.spec.timeout
        while True:
            left = DISK_SECONDS if timeout is None else min(DISK_SECONDS, began + timeout - time.monotonic())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stream.ended.wait(), max(0.0, left))
                return None
            why = await self._over(began)
            if why is not None:
                await self._site.daemon.kill(self._container)
                return why

    async def _over(self, began: float) -> ShardError | None:
        timeout = self._task.spec.timeout
        if timeout is not None and time.monotonic() - began >= timeout:
            return ShardError("timeout", message=TOO_LONG.format(timeout))
        written = await asyncio.to_thread(lambda: sum(map(staging.used, (self._folder.outputs, self._folder.work))))
        if written > self._disk:
            limit = size_text(self._disk)
            return ShardError(
                "disk", message=f"the shard wrote more than its disk limit of {limit}: raise it with --disk"
            )
        return None

    async def _outcome(self, stopped: ShardError | None, seconds: float) -> RawOutcome:
        code, error = await self._ended()
        outputs = await asyncio.to_thread(staging.take_out, self._folder.outputs, self._task.scratch / "outputs")
        if outputs is not None and (problem := await asyncio.to_thread(staging.unfit, outputs)) is not None:
            outputs, error = None, error or ShardError("output", message=problem)
        error = stopped or error
        return RawOutcome(
            ok=error is None,
            exit_code=code,
            outputs=outputs,
            stdout=self._texts[1].kept(),
            stderr=self._texts[2].kept(),
            cut=sum(text.cut for text in self._texts.values()),
            error=error,
            seconds=seconds,
        )

    async def _ended(self) -> tuple[int, ShardError | None]:
        """The exit code, and what it means."""
        while True:
            state = await self._site.daemon.state(self._container)
            if state is None:
                return -1, ShardError("node", message="its container was removed from outside")
            if not state.running:
                break
            await asyncio.sleep(ENDED_SECONDS)
        if state.exit_code == 0:
            return 0, None
        return state.exit_code, await self._meaning(state.exit_code, out_of_memory=state.out_of_memory)

    async def _meaning(self, code: int, *, out_of_memory: bool) -> ShardError:
        last = self._texts[2].kept()
        if code in (126, 127) and last.startswith(_INIT_FAILED):
            raise NoProgram(f"the program could not be started: {last.decode(errors='replace').strip()}")
        if out_of_memory:
            return ShardError("memory", message=memory_text(self._memory))
        if code > 128 and code - 128 in set(signal.Signals):
            if await self._site.daemon.killed(self._container):
                return ShardError("node", message="its container was ended from outside")
            name = signal.Signals(code - 128).name
            return ShardError("signal", name=name, message=f"the process was killed by {name}")
        return ShardError("exit", message=f"the process ended with exit code {code}")


class _Room:
    """How much text may still be sent as it comes."""

    def __init__(self, size: int) -> None:
        self.left = size


class _Text:
    """One stream: whole lines go out as they come, an unfinished one after a moment; the cap keeps both ends."""

    def __init__(self, name: Literal["stdout", "stderr"], room: _Room, emit: Callable[[ExecutorEvent], None]) -> None:
        self.cut = 0
        self._name, self._room, self._emit = name, room, emit
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._waiting = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._timer: asyncio.TimerHandle | None = None

    def feed(self, data: bytes) -> None:
        """Take what was printed."""
        now, later = data[: self._room.left], data[self._room.left :]
        self._room.left -= len(now)
        self._head += now
        self._waiting += now
        if later:
            self._tail.append(later)
            self._tail_size += len(later)
            while self._tail_size - len(self._tail[0]) >= TAIL:
                self.cut += len(self._tail[0])
                self._tail_size -= len(self._tail.popleft())
        self._send(self._waiting.rfind(b"\n") + 1)
        if self._waiting and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(UNFINISHED_SECONDS, self._send_all)

    def finish(self) -> None:
        """The stream has ended: send the rest."""
        if self._timer is not None:
            self._timer.cancel()
        rest = self.kept()[len(self._head) :]
        self._waiting += rest
        self._send(len(self._waiting))
        if text := self._decoder.decode(b"", final=True):
            self._emit(ShardLines(self._name, text))

    def kept(self) -> bytes:
        """All that was printed, up to the cap."""
        gap = b"\n[... %d bytes left out ...]\n" % self.cut if self.cut else b""
        return bytes(self._head) + gap + b"".join(self._tail)

    def _send_all(self) -> None:
        self._timer = None
        self._send(len(self._waiting))

    def _send(self, size: int) -> None:
        text = self._decoder.decode(bytes(self._waiting[:size]))
        del self._waiting[:size]
        if text:
            self._emit(ShardLines(self._name, text))
