"""A real kernel as a page sees it: cells in, outputs out, each output under the cell it belongs to."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from jupyter_client.manager import KernelManager

ROOT = Path(__file__).parents[2]
NO_DOCKER = "unix:///nonexistent/docker.sock"
COLOUR = re.compile(r"\x1b\[[\d;]*m")
SECONDS = 90
"""How long anything may take before a test gives up: generous, since the machine may be busy."""


def environment(data: Path, **more: str) -> dict[str, str]:
    """The environment of a kernel that keeps everything in `data` and finds no Docker daemon.

    Shards may run in sandboxes, which hide all files but those that Python is imported from; so what a
    test tells a running shard lies in a folder on the path.
    """
    signals(data).mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join((str(ROOT), str(ROOT / "node"), str(signals(data))))
    return {**os.environ, "PYTHONPATH": path, "BACALHAU_DIR": str(data), "DOCKER_HOST": NO_DOCKER, **more}


def signals(data: Path) -> Path:
    """A folder that tests write and shards see."""
    return data.parent / "signals"


@dataclass
class Shown:
    """What stands under one cell."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    idle: bool = False

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """The contents of the messages of these kinds, in order."""
        return [message["content"] for message in self.messages if message["msg_type"] in kinds]

    def text(self, stream: str = "stdout") -> str:
        """What was printed."""
        return "".join(content["text"] for content in self.of("stream") if content["name"] == stream)

    @property
    def value(self) -> str:
        """The plain form of the cell's value; "" if it has none."""
        return "".join(content["data"]["text/plain"] for content in self.of("execute_result"))

    @property
    def record(self) -> str:
        """The plain form of what was displayed last; "" if nothing was."""
        shown = self.of("display_data", "update_display_data")
        return shown[-1]["data"].get("text/plain", "") if shown else ""

    @property
    def error(self) -> str:
        """The error's traceback without colours; "" if there is none."""
        return COLOUR.sub("", "\n".join(line for content in self.of("error") for line in content["traceback"]))


class Kernel:
    """One kernel and one client of it. `wrap`: a command that starts commands."""

    def __init__(self, cwd: Path, *, wrap: Sequence[str] = (), **env: str) -> None:
        self.signals = signals(cwd / "data")
        self.manager = KernelManager()
        self.manager.kernel_spec.argv[:1] = (*wrap, sys.executable)
        self.manager.start_kernel(env=environment(cwd / "data", **env), cwd=str(cwd))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=SECONDS)
        self.cells: defaultdict[str, Shown] = defaultdict(Shown)

    def send(self, code: str, **options: Any) -> Shown:
        """Run a cell without waiting for it."""
        return self.cells[self.client.execute(code, allow_stdin=True, **options)]

    def run(self, code: str, **options: Any) -> Shown:
        """Run a cell to its end."""
        shown = self.send(code, **options)
        self.until(lambda: shown.idle)
        return shown

    def until(self, condition: Any, *, seconds: float = SECONDS) -> None:
        """Take in what the kernel sends until `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the kernel did not get there"
            self._take_in()

    def _take_in(self) -> None:
        try:
            message = self.client.get_iopub_msg(timeout=0.1)
        except Empty:
            return
        shown = self.cells[message["parent_header"].get("msg_id", "")]
        if message["msg_type"] == "status":
            shown.idle = message["content"]["execution_state"] == "idle"
        else:
            shown.messages.append(message)

    def complete(self, code: str) -> list[str]:
        """What the kernel offers at the end of `code`."""
        reply = self.client.complete(code, len(code), reply=True, timeout=SECONDS)
        return reply["content"]["matches"]

    def interrupt(self) -> None:
        """What the Stop button does."""
        self.manager.interrupt_kernel()

    def kill(self) -> None:
        """End it without a chance to put anything away; a shutdown would press Stop first."""
        self.manager.signal_kernel(signal.SIGKILL)
        self.close(now=True)

    def close(self, *, now: bool = False) -> None:
        """Shut down in good order, as JupyterLab does; with `now`, wait for nothing."""
        if self.manager.has_kernel:
            self.client.stop_channels()
            self.manager.shutdown_kernel(now=now)
            self.manager.cleanup_resources()


def below(pid: int) -> dict[int, str]:
    """Every process that `pid` started, directly or not: id -> command."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it ended meanwhile
            continue
        children[int(parent)].append(int(process.name))
    found: dict[int, str] = {}
    rest = [pid]
    while rest:
        for child in children[rest.pop()]:
            found[child] = command_of(child)
            rest.append(child)
    return found


def command_of(pid: int) -> str:
    """The command line of a process; "" once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
