"""An agent as a plain process of this machine: started, held to limits, and ended without a trace.

The process has its own session; a socket pair is its two streams. Where the node may write control
groups it gets one of its own (`limits.py`). Everything that it or its shards start carries a
random mark in its environment, by which it is found and ended where there is no group.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from bacalhau_node.executors.limits import ControlGroup
from bacalhau_node.executors.program import AGENT_FILE
from bacalhau_node.executors.slot import AgentSetup, AgentSlot

AGENT_MEMORY: Final = 160 * 1024**2
"""Bytes of an agent that has imported pandas and pyarrow; a job's limit is for its shards."""
END_SECONDS: Final = 2.0
"""How long an agent may take to exit once its streams have ended."""
GROUP_PREFIX: Final = "bacalhau-"
"""How the names of our control groups start."""
LAST_WORDS: Final = 0.1
"""How long the loop waits for the exit code of an agent whose streams have ended, which is a matter of microseconds."""
MARK: Final = "BACALHAU_AGENT"
"""Environment variable with a random name of the agent: all that its shards start can be found by it."""
_DROPPED: Final = re.compile(r"^(PYTHON|BACALHAU_|JPY_|MPLBACKEND$)")
"""Variables of the notebook that would change what a shard does, or that are about the notebook itself."""


class SocketPipe:
    """One end of a socket pair as the agent's two streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, ours: socket.socket) -> SocketPipe:
        """A pipe over our end, which it owns from now on."""
        return cls(*await asyncio.open_connection(sock=ours, limit=1 << 20))

    async def read(self) -> bytes:
        """The next bytes; empty when the agent is gone."""
        try:
            return await self._reader.read(1 << 20)
        except ConnectionError:
            return b""

    def write(self, data: bytes) -> None:
        """Queue `data`; drops it when the agent is gone."""
        if not self._writer.is_closing():
            self._writer.write(data)

    async def drain(self) -> None:
        """Wait while much is queued."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    def close(self) -> None:
        """Let go: the agent kills what it runs and exits."""
        self._writer.close()


class PlainAgent:
    """A process with an agent in it, from `start` to `end`."""

    def __init__(self, process: subprocess.Popen[bytes], group: ControlGroup | None, log: Path, mark: str) -> None:
        self.process = process
        self.group = group
        self.log = log
        self.mark = mark
        self.slot: AgentSlot
        self._ended = False

    @classmethod
    async def start(cls, folder: Path, imports: tuple[str, ...], *, layer: Path | None = None) -> PlainAgent:
        """Start one; it answers when it is ready, and queues what it is sent before.

        `layer`: a folder of packages that counts before all others.
        """
        mark = secrets.token_hex(8)
        log = folder / f"agent-{mark}.log"
        group = ControlGroup.make(GROUP_PREFIX + mark)
        ours, theirs = socket.socketpair()
        try:
            with theirs, log.open("wb") as errors:
                process = subprocess.Popen(  # noqa: ASYNC220, S603 - returns within milliseconds; a program of ours
                    [sys.executable, "-s", "-u", str(AGENT_FILE)],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=errors,
                    start_new_session=True,
                    cwd=folder,
                    env=environment(mark),
                )
        except BaseException:
            ours.close()
            raise
        if group is not None and not group.join(process.pid):
            group = None
        agent = cls(process, group, log, mark)
        agent.slot = AgentSlot(await SocketPipe.over(ours), _setup(group, imports, layer), explain=agent.cause)
        return agent

    @property
    def alive(self) -> bool:
        """Whether it can take runs."""
        return not self.slot.dead.done()

    def limit(self, memory: int) -> None:
        """Hold its shards to this much memory, besides what the agent itself holds."""
        if self.group is not None:
            self.group.limit(memory + AGENT_MEMORY)

    def cause(self) -> str:
        """How the process ended, as a clause."""
        try:
            code = self.process.wait(timeout=LAST_WORDS)
        except subprocess.TimeoutExpired:
            return "it closed its streams"
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        words = self.log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with exit code {code}" + (f": {words[-1]}" if words else "")

    async def end(self) -> None:
        """End it with all that it started; leaves no process, group or file. May be called twice."""
        if self._ended:
            return
        self._ended = True
        busy = self.slot.outstanding or not self.alive
        await self.slot.close()
        await asyncio.to_thread(self._clean, thorough=bool(busy))

    def _clean(self, *, thorough: bool) -> None:
        try:
            self.process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            thorough = True
        if self.group is not None:
            self.group.remove()
        elif thorough:
            kill_marked(self.mark)
        self.log.unlink(missing_ok=True)


def _setup(group: ControlGroup | None, imports: tuple[str, ...], layer: Path | None) -> AgentSetup:
    """The agent's first frame. The programs that a shard starts find the job's packages as it does."""
    first = (str(layer),) if layer is not None else ()
    return AgentSetup(
        path=(*first, *search_path()),
        env={"PYTHONPATH": str(layer)} if layer is not None else {},
        imports=imports,
        oom=(group.oom_file,) if group is not None else (),
        watch=group is None,
    )


def environment(mark: str) -> dict[str, str]:
    """The environment of an agent: this process's own, without what is about the notebook.

    Hashes of strings are not random: a set has the same order in every attempt of a shard.
    """
    own = {name: value for name, value in os.environ.items() if not _DROPPED.match(name)}
    return {**own, MARK: mark, "PYTHONHASHSEED": "0"}


def search_path() -> tuple[str, ...]:
    """Where this process finds modules, without its current folder."""
    here = os.path.realpath(os.curdir)
    return tuple(entry for entry in sys.path if entry and os.path.realpath(entry) != here)


def kill_marked(mark: str) -> None:
    """Kill every process that carries the mark, until there is none."""
    while pids := _marked(f"{MARK}={mark}".encode()):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _marked(word: bytes) -> list[int]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if word in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found
