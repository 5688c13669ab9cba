"""Sandboxes as the executor sees them: made from recipes, started, ended without a trace.

Theory of operation. This stands where the Docker daemon stands for containers, with the same
methods, but it is a table in this process. Each sandbox is a `bwrap` process with three pipes. The
first process inside is the root of a process namespace: when it is killed the kernel kills
everything inside, and `bwrap` ends only when all of that is gone. When this process dies the
pipes end and the kernel kills the sandboxes: there is nothing to find by a later node.

A shell of one line puts itself into the control group before it becomes `bwrap`, so that nothing
is ever started outside. The options and the filter of system calls travel as files in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.bubblewrap import options
from bacalhau_node.executors.containers import State
from bacalhau_node.executors.limits import ControlGroup
from bacalhau_node.executors.plain import AGENT_MEMORY, GROUP_PREFIX
from bacalhau_node.executors.seccomp import deny_list

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from bacalhau_node.executors.bubblewrap import Bubblewrap, Root
    from bacalhau_node.executors.containers import Recipe

LINGER_SECONDS: Final = 1.0
"""How long a sandbox may live on after the agent in it has closed its stream."""
END_SECONDS: Final = 10.0
"""How long the kernel may take to end everything in a sandbox on a busy machine."""
_JOIN: Final = 'ulimit -c 0; while [ "$1" != -- ]; do echo $$ > "$1" || exit 125; shift; done; shift; exec "$@"'
"""Becomes a member of the groups whose files stand before the `--`, then the program behind it; leaves no core dump."""


class Streams(asyncio.SubprocessProtocol):
    """A sandbox's stdin, stdout and stderr, and its end; what `attach.Stream` is for a container.

    `receive(channel, data)` gets every chunk as it comes: channel 1 is stdout, 2 is stderr, and 0
    without data is the end. `ended` is set before: then nothing in the sandbox lives.
    """

    def __init__(self, receive: Callable[[int, bytes], None]) -> None:
        self.ended = asyncio.Event()
        self.code: int | None = None
        self._receive = receive
        self._transport: asyncio.SubprocessTransport | None = None
        self._status = -1
        self._first = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._closing: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._transport is not None and not self.ended.is_set()

    def watch(self, status: int) -> None:
        """About to start; the file `status` will tell the id of its first process, and is closed at the end."""
        self._status = status

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the process (asyncio calls this)."""
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def send(self, data: bytes) -> None:
        """Queue `data` for stdin; drops it after the end."""
        stdin = self._transport.get_pipe_transport(0) if self._transport is not None else None
        if stdin is not None and not stdin.is_closing():
            cast("asyncio.WriteTransport", stdin).write(data)

    async def drain(self) -> None:
        """Wait while much is queued because the agent does not read."""
        await self._writable.wait()

    def close(self) -> None:
        """End the sandbox with everything in it."""
        if self._transport is None or self._transport.get_returncode() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._first_process() or self._transport.get_pid(), signal.SIGKILL)

    def process_exited(self) -> None:
        """`bwrap` has ended (asyncio calls this). What it had just begun to make would wait for it for ever."""
        assert self._transport is not None
        if not self._first:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._transport.get_pid(), signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                if first := self._first_process():  # it has left that group
                    os.kill(first, signal.SIGKILL)

    def _first_process(self) -> int:
        """The id of the first process inside; 0 before there is one."""
        if not self._first:
            with contextlib.suppress(BlockingIOError, ValueError):
                self._first = int(json.loads(os.read(self._status, 4096))["child-pid"])
        return self._first

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Hand on what was written (asyncio calls this)."""
        self._receive(fd, data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The agent closed a stream (asyncio calls this); without its stdout it is of no use."""
        if fd == 1 and self._closing is None:
            self._closing = asyncio.get_running_loop().call_later(LINGER_SECONDS, self.close)

    def pause_writing(self) -> None:
        """The agent reads slower than we write (asyncio calls this)."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The agent has caught up (asyncio calls this)."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The process and all pipes have ended (asyncio calls this)."""
        assert self._transport is not None
        self.code = self._transport.get_returncode()
        self._transport.close()
        os.close(self._status)
        if self._closing is not None:
            self._closing.cancel()
        self._writable.set()
        self.ended.set()
        self._receive(0, b"")


@dataclass(slots=True)
class _Sandbox:
    recipe: Recipe
    streams: Streams | None = None
    group: ControlGroup | None = None
    killed: bool = False


class Sandboxes:
    """All sandboxes of one node. `grouped`: control groups hold them to their limits. Errors are `DaemonError`."""

    def __init__(self, bubblewrap: Bubblewrap, root: Root, *, grouped: bool) -> None:
        self._bubblewrap, self._root, self._grouped = bubblewrap, root, grouped
        self._filter = deny_list() or b""
        self._known: dict[str, _Sandbox] = {}

    async def create(self, recipe: Recipe) -> str:
        """Note what a sandbox is to be; its id."""
        name = secrets.token_hex(8)
        self._known[name] = _Sandbox(recipe)
        return name

    async def attach(self, sandbox: str, receive: Callable[[int, bytes], None]) -> Streams:
        """The streams of a sandbox that has not started."""
        streams = self._known[sandbox].streams = Streams(receive)
        return streams

    async def start(self, sandbox: str) -> None:
        """Start it."""
        box = self._known[sandbox]
        assert box.streams is not None
        if self._grouped:
            box.group = ControlGroup.make(GROUP_PREFIX + sandbox, cores=box.recipe.cpu)
            if box.group is None:
                raise DaemonError("this node may make no more control groups, which hold sandboxes to their limits")
            box.group.limit(box.recipe.memory + AGENT_MEMORY)
        try:
            await self._spawn(box, box.streams)
        except OSError as error:
            raise DaemonError(f"a sandbox could not be started: {error}") from error

    async def _spawn(self, box: _Sandbox, streams: Streams) -> None:
        told, tells = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        given = [tells]
        streams.watch(told)
        try:
            given.append(_in_memory(self._filter))
            inside = options(self._bubblewrap, self._root, box.recipe, box.group)
            words = ["--info-fd", str(tells), "--seccomp", str(given[1]), *inside]
            given.append(_in_memory(b"".join(os.fsencode(word) + b"\0" for word in words)))
            joined = [str(folder / "cgroup.procs") for folder in box.group.folders] if box.group else []
            starting = asyncio.get_running_loop().subprocess_exec(
                lambda: streams,
                *("/bin/sh", "-c", _JOIN, "sh", *joined, "--"),
                *(self._bubblewrap.program, "--args", str(given[2]), "--"),
                *(*self._bubblewrap.become_user(), *box.recipe.command),
                pass_fds=given,
                env={},
                cwd="/",
                start_new_session=True,
            )
            await _undisturbed(starting)
        except OSError:
            os.close(told)  # no process, no end that would do it
            raise
        finally:
            for each in given:
                os.close(each)

    async def state(self, sandbox: str) -> State | None:
        """How it is; None when it is unknown (any more)."""
        box = self._known.get(sandbox)
        if box is None or box.streams is None:
            return None
        code = box.streams.code
        out_of_memory = box.group is not None and box.group.oom_kills() > 0
        return State(running=code is None, exit_code=code or 0, out_of_memory=out_of_memory, pid=0)

    async def killed(self, sandbox: str) -> bool:
        """Whether it was ended from outside: by us, or by a signal to `bwrap`, which nobody inside can reach."""
        box = self._known.get(sandbox)
        return box is None or box.killed or (box.streams is not None and (box.streams.code or 0) < 0)

    async def kill(self, sandbox: str) -> None:
        """End everything in it now."""
        box = self._known.get(sandbox)
        if box is not None and box.streams is not None:
            box.killed = True
            box.streams.close()

    async def remove(self, sandbox: str) -> None:
        """End it; returns when nothing of it is left. One that is gone is no error."""
        box = self._known.pop(sandbox, None)
        if box is None:
            return
        streams = box.streams
        if streams is not None and streams.running:
            streams.close()
            await asyncio.wait({asyncio.ensure_future(streams.ended.wait())}, timeout=END_SECONDS)
        if box.group is not None:
            await asyncio.to_thread(box.group.remove)

    async def close(self) -> None:
        """End all that are left."""
        await asyncio.gather(*map(self.remove, list(self._known)))


async def _undisturbed(work: Coroutine[object, object, object]) -> None:
    """Do `work` to its end, also when cancelled meanwhile.

    When a start is cancelled asyncio kills the outermost process only, and waits for ever if others hold its pipes.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _in_memory(data: bytes) -> int:
    """A file that only its holders can read, from its start."""
    descriptor = os.memfd_create("sandbox")
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
