"""The processes below the parent: found in /proc, and ended, however fast they start others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on a process below us whose parent ends becomes our child."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """This process is killed when the one that forked it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def children_of(pid: int) -> list[int]:
    """The child processes of one process, all of its threads'."""
    found: list[int] = []
    if not os.path.exists("/proc/self/task/%d/children" % os.getpid()):
        return [child for child in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(child) == pid]
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in os.listdir("/proc/%d/task" % pid):
            with open("/proc/%d/task/%s/children" % (pid, task)) as file:
                found += map(int, file.read().split())
    return found


def parent_of(pid: int) -> int:
    """The parent of a process; 0 when it has ended."""
    try:
        with open("/proc/%d/stat" % pid) as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Children:
    """The child processes of a process with one thread, asked often: the file stays open."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self.fd = os.open("/proc/%d/task/%d/children" % (pid, pid), os.O_RDONLY)
        except OSError:
            self.fd = -1  # a kernel that was built without it

    def now(self) -> list[int]:
        """Its children at this moment."""
        if self.fd < 0:
            return children_of(self.pid)
        try:
            return [int(pid) for pid in os.pread(self.fd, 1 << 20, 0).split()]
        except OSError:
            return []  # it has ended

    def close(self) -> None:
        """Let go of the file."""
        if self.fd >= 0:
            os.close(self.fd)


def descendants(roots: list[int]) -> set[int]:
    """All processes below these, the roots themselves included."""
    found: set[int] = set()
    todo = list(roots)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children_of(pid)
    return found


def group_of(pid: int) -> int:
    """The process group of a process; 0 when it has ended."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def send_signal(pid: int, number: int) -> None:
    """Signal a process that may have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or changed its user
        os.kill(pid, number)


def kill_all(below: Callable[[], set[int]]) -> None:
    """Kill all of the processes that `below` finds, asked until it finds no new ones.

    A process group dies as a whole: the kernel lets no member fork while it is being killed. What
    left its group is stopped first, so that none can start another, and killed when no new ones appear.
    """
    stopped: set[int] = set()
    own = os.getpgrp()
    while True:
        new = below() - stopped
        if not new:
            break
        for group in set(map(group_of, new)) - {own, 0}:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # ended, or it changed its user
                os.killpg(group, signal.SIGKILL)
        for pid in new:
            send_signal(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        send_signal(pid, signal.SIGKILL)


def sweep(below: Callable[[], set[int]]) -> None:
    """Kill and reap what `below` finds, until there is nothing."""
    while below():
        kill_all(below)
        reap()
        time.sleep(0.001)


def reap() -> None:
    """Collect all children that have ended."""
    with contextlib.suppress(ChildProcessError):  # none is left
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
