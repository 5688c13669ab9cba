"""The shard that runs now, as the parent sees it: what it wrote, what is due, and how it ended."""

from __future__ import annotations

import functools
import os
import signal
import time

from .failures import blame, crash_frames
from .frames import unpack
from .text import HEAD, Text
from .watch import DISK_WATCH, out_of_disk, out_of_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

    from .frames import Header

LINGER = 10.0
"""Seconds that threads and exit handlers may go on after a cell's value is known."""
LEFT_BEHIND = b"[a thread or exit handler that the cell left was ended %g s after the cell]\n" % LINGER


class Running:
    """One execution from its fork until its last frame. `send(header, body)` queues a frame to the host."""

    def __init__(self, run: Header, send: Callable[[Header, bytes], None]) -> None:
        self.run = run
        self.key: str = run["key"]
        self.began = time.monotonic()
        self.room = HEAD
        self.streams = {
            name: Text(functools.partial(send, {"t": "lines", "key": self.key, "stream": name}))
            for name in ("stdout", "stderr")
        }
        self.result = bytearray()
        self.crash = bytearray()
        self.why: Header | None = None
        self.deadline = self.began + run["timeout"] if run.get("timeout") else 0.0
        self.linger = 0.0
        self.watch_at = 0.0
        self.disk_at = self.began + DISK_WATCH if run.get("disk") else 0.0

    def timers(self) -> list[float]:
        """When something has to be looked at; zeros are none."""
        texts = [text.due for text in self.streams.values()]
        return [self.deadline, self.linger, self.watch_at, self.disk_at, *texts]

    def take(self, name: str, data: bytes, now: float) -> None:
        """What came through one of its pipes. The first of its result starts the time for what it leaves behind."""
        if name == "result":
            self.result += data
            self.linger = self.linger or now + LINGER
        elif name == "crash":
            self.crash += data
        else:
            self.room -= self.streams[name].feed(data, self.room, now)

    def flush(self, now: float) -> None:
        """Send the text that is due."""
        for text in self.streams.values():
            if text.due and text.due <= now:
                text.flush(now)

    def finish_text(self, now: float) -> int:
        """Send the rest of its text; returns how many bytes were cut out."""
        return sum(text.finish(now) for text in self.streams.values())


def outcome(running: Running, status: int, ooms: int, *, name: str) -> tuple[Header, bytes]:
    """How the shard ended: the fields `ok`, `exit_code`, `error` and `value` of its `done`, and the body.

    `name` is the cell's file name.
    """
    result = unpack(running.result)
    header, body = result if result is not None else ({}, b"")
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = 128 + killed if killed else os.WEXITSTATUS(status)
    if running.why is not None:
        return {"ok": False, "exit_code": code, "error": running.why}, b""
    if header.get("error"):
        return {"ok": False, "exit_code": header.get("exit_code", 127), "error": header["error"]}, b""
    if killed and result is None:
        frames = crash_frames(running.crash.decode("utf-8", "replace"), name)
        error = {**killed_by(running.run, killed, ooms), "frames": frames}
        return {"ok": False, "exit_code": code, "error": error}, b""
    if result is None and code:
        text = "the process ended with exit code %d" % code
        return {"ok": False, "exit_code": code, "error": blame("exit", text)}, b""
    return {"ok": True, "exit_code": 0, "value": header.get("value")}, body


def killed_by(run: Header, number: int, ooms: int) -> Header:
    """What a signal means: the kernel's memory killer, the file size limit, or the signal itself."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "signal %d" % number
    if number == signal.SIGKILL and ooms:
        return out_of_memory(run)
    if number == signal.SIGXFSZ and run.get("disk"):
        return out_of_disk(run)
    return blame("signal", "the process was killed by %s" % name, name=name)
