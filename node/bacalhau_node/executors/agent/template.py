"""The template: the process that imports what the cell imports and forks the shards; and the parent's end of it."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import marshal
import os
import signal
import socket
import struct
import sys
import time

from .cell import Cell
from .frames import pack, unpack
from .shard import shard_process
from .tree import Children, die_with_parent, send_signal
from .values import travelling

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterator, NoReturn

    from .frames import Header
    from .text import Pipes

REPORT = struct.Struct(">cqqq")
"""What the template says of a shard: "p" and its process id; "x", its process id, status and peak memory in kB;
"f" and the error number of a fork that failed."""


SIZE = struct.Struct(">I")
"""What precedes a message to the template."""


def template_process(channel: socket.socket, imports: list[str], pipes: Pipes, private: list[int]) -> NoReturn:
    """The whole life of the template: import, freeze, then fork a shard for each request; never returns."""
    try:
        for fd in (*private, *pipes.read_ends.values()):
            os.close(fd)
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        be_killed_first()
        done = [name for name in imports if preload(name)]
        if "pandas" in done:
            rehearse_pandas()
        safe = not imports or len(os.listdir("/proc/self/task")) == 1  # a fork copies one thread: others would hang
        channel.sendall(pack({"imports": done, "safe": safe}))
        open_streams(pipes)
        rehearse_values()
        gc.collect()
        gc.freeze()
        cell = Cell(read_message(channel))
        while safe:
            serve_request(channel, cell, pipes.write_ends["result"])
    finally:
        os._exit(0)


def be_killed_first() -> None:
    """When memory runs out, the kernel should choose a shard, not the agent and not the notebook."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # it helps, but is not needed
        file.write("900")


def open_streams(pipes: Pipes) -> None:
    """Point stdout and stderr at the shards' pipes, unbuffered as with `python -u`."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        end = pipes.write_ends[name]
        os.dup2(end, fd)
        os.close(end)
        raw: Any = io.FileIO(fd, "w", closefd=False)
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
        setattr(sys, name, stream)
        setattr(sys, "__%s__" % name, stream)
    faulthandler.enable(file=pipes.write_ends["crash"], all_threads=False)


def preload(name: str) -> bool:
    """Import one module; the cell will say itself what is wrong with one that fails."""
    try:
        __import__(name)
    except BaseException:  # anybody's module
        return False
    return True


def rehearse_pandas() -> None:
    """One tiny read and group: what pandas sets up at its first use is then shared by all shards."""
    import pandas as pd

    frame = pd.read_csv(io.StringIO("key,value\na,1\nb,2\n"))
    frame.groupby("key")["value"].sum()
    preload("pyarrow")


def rehearse_values() -> None:
    """Run once what every shard runs: what Python adapts in its code at first use is then shared, not copied."""
    samples: list[Any] = [0, "", [], {}]
    for value in samples * 8:
        pack(*travelling(value, ""))


def serve_request(channel: socket.socket, cell: Cell, result: int) -> None:
    """Wait for one request, fork its shard, report its process id and later its end."""
    run = read_message(channel)
    cell.prepare(run)
    try:
        pid = os.fork()
    except OSError as error:
        channel.sendall(REPORT.pack(b"f", error.errno or 0, 0, 0))
        return
    if pid == 0:
        os.close(channel.fileno())
        shard_process(cell, run, result)
    channel.sendall(REPORT.pack(b"p", pid, 0, 0))
    _, status, usage = os.wait4(pid, 0)
    channel.sendall(REPORT.pack(b"x", pid, status, usage.ru_maxrss))


def read_message(channel: socket.socket) -> Header:
    """One message of the parent: its size, then the message as `marshal` writes it: a fork pays for what reads JSON."""
    size = SIZE.unpack(read_exactly(channel, SIZE.size))[0]
    message: Header = marshal.loads(read_exactly(channel, size))
    return message


def read_exactly(channel: socket.socket, size: int) -> bytes:
    """`size` bytes; the end of the channel is the end of this process."""
    data = b""
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            os._exit(0)
        data += part
    return data


class Template:
    """The parent's view of the template: what it was to import, and whether it can fork by now."""

    def __init__(self, pid: int, channel: socket.socket, wanted: list[str]) -> None:
        self.pid = pid
        self.channel = channel
        self.children = Children(pid)
        self.wanted = wanted
        self.ready = False
        self.since = time.monotonic()
        self.buffer = bytearray()

    def tell(self, message: Header) -> None:
        """Send a message; the template is idle, so it reads at once."""
        data = marshal.dumps(message)
        with contextlib.suppress(OSError):  # its end is seen on the channel
            self.channel.sendall(SIZE.pack(len(data)) + data)

    def receive(self) -> bool:
        """Take what it sent; False when it is gone."""
        data = self.channel.recv(65536)
        self.buffer += data
        return bool(data)

    def greeting(self) -> Header | None:
        """Its first message, when it is there."""
        frame = unpack(self.buffer)
        return frame[0] if frame else None

    def reports(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Its reports so far."""
        while len(self.buffer) >= REPORT.size:
            report = REPORT.unpack_from(self.buffer)
            del self.buffer[: REPORT.size]
            yield report

    def kill(self) -> None:
        """Let it go; its end is reaped as that of any child."""
        self.channel.close()
        self.children.close()
        send_signal(self.pid, signal.SIGKILL)
