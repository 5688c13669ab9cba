"""Who uses a store right now: temporary files with an owner, and how far back unfinished work reaches.

Theory of operation. Every open store has a folder of its own in `tmp/`, and in it a file `lock` that it holds locked
for as long as it lives; the system takes the lock back when the process dies, however it dies. What lies beside the
lock is half-made and belongs to that process: whoever finds a folder whose lock is free removes it.

The lock file also says since when (seconds since 1970, 0: nothing) its process has unfinished work, the
oldest of its **holds**. The collector removes nothing that was used after the oldest hold of any living process
began. So a long import costs two writes of sixteen bytes, not a row for each of its blocks, and a process
that dies lets go of everything at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_STRAY_SECONDS: Final = 86_400
"""Age of a file without an owner that is removed: stores of format 1 had such, and may still be in use."""

_WIDTH = 16


class Session:
    """One open store, in a new folder below `tmp`. Raises `OSError`."""

    def __init__(self, tmp: Path) -> None:
        self.folder = tmp / uuid.uuid4().hex
        self._lock = threading.Lock()
        self._starts: dict[object, int] = {}
        self._told = 0
        self._numbers = itertools.count()
        tmp.mkdir(parents=True, exist_ok=True)
        with _locked(tmp):  # nobody sees the folder without its lock
            self.folder.mkdir()
            self._handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
        self._tell(0)

    def temporary(self) -> str:
        """A new path for something half-made."""
        return f"{self.folder}/{next(self._numbers)}"

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing that is used from now on is collected, by whichever process, until this ends."""
        token = object()
        with self._lock:
            self._starts[token] = int(time.time())
            self._tell(min(self._starts.values()))
        try:
            yield
        finally:
            with self._lock:
                del self._starts[token]
                self._tell(min(self._starts.values(), default=0))

    def close(self) -> None:
        """Remove the folder and give the lock back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._handle)

    def _tell(self, since: int) -> None:
        if since != self._told or not since:
            os.pwrite(self._handle, b"%0*d" % (_WIDTH, since), 0)
            self._told = since


def sweep(tmp: Path) -> int | None:
    """Remove what the dead have left in `tmp`; returns when the oldest hold of the living began, if there is one."""
    starts = []
    with _locked(tmp):
        for path in list(tmp.iterdir()):
            if path.is_dir():
                if (since := _since(path)) is None:
                    shutil.rmtree(path, ignore_errors=True)
                elif since:
                    starts.append(since)
            elif time.time() - path.stat(follow_symlinks=False).st_ctime > _STRAY_SECONDS:
                path.unlink(missing_ok=True)
    return min(starts, default=None)


def _since(folder: Path) -> int | None:
    """What the living owner of `folder` says; None when there is none."""
    try:
        handle = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(handle, _WIDTH, 0) or 0)
    else:
        return None
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
