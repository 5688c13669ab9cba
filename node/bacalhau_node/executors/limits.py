"""What this machine can give a shard, and control groups that hold a shard to it.

Theory of operation. Where the node may write control groups (as root; or below a delegated one),
each agent gets one of its own: the kernel then counts memory and processes of the agent with all
that its shards start, and kills what is over the limit. Version 1 keeps memory and processes in
two trees, version 2 in one, where a group that holds processes can't have children with limits:
there the new group lies beside our own, not below it. Where none of this works `ControlGroup.make`
says None, and the agent watches its shards itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

SYSTEM_RESERVE: Final = 2 * 1024**3
"""Bytes of RAM that are left to the system and the notebook (DESIGN section 6)."""
MIN_MEMORY: Final = 512 * 1024**2
"""A slot never gets less: Python with pandas and a small frame fits."""
DEFAULT_DISK: Final = 10 * 1024**3
"""Bytes that a shard may write (DESIGN section 6)."""
MAX_PROCESSES: Final = 512
"""Processes of one agent and its shard (DESIGN section 6)."""
CPU_PERIOD: Final = 100_000
"""Microseconds over which the kernel counts a group's CPU time: its own default."""
NEW_SECONDS: Final = 60.0
"""So long may a group of a node beside us be without a process: it is about to start one."""
REMOVE_SECONDS: Final = 2.0
"""How long the processes of a group may take to be gone after they were killed."""

_ROOT: Final = Path("/sys/fs/cgroup")


@cache
def usable_cores() -> int:
    """Cores that this process may use: its affinity, cut by the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return max(1, min(cores, int(quota))) if quota else cores


@cache
def usable_memory() -> int:
    """Bytes of RAM, cut by the limit of our control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for base in _own_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                total = min(total, int((base / name).read_text()))
    return total


def memory_per_slot(slots: int) -> int:
    """Bytes that a shard may use when its job does not say."""
    return max(MIN_MEMORY, (usable_memory() - SYSTEM_RESERVE) // slots)


def _quota() -> float | None:
    """CPU seconds a second that our control group allows; None without a limit."""
    for base in _own_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (base / "cpu.max").read_text().split()
            return int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError):
            limit = int((base / "cpu.cfs_quota_us").read_text())
            return limit / int((base / "cpu.cfs_period_us").read_text()) if limit > 0 else None
    return None


def _own_groups(controller: str) -> list[Path]:
    """The folders of our control group, for a controller of version 1 or for version 2."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, names, path = line.split(":", 2)
            if controller in names.split(","):
                found.append(_ROOT / controller / path.lstrip("/"))
            elif number == "0" and (_ROOT / "cgroup.controllers").exists():
                found.append(_ROOT / path.lstrip("/"))
    return found


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """A control group of one agent: one folder of version 2, or one of each controller of version 1."""

    folders: tuple[Path, ...]
    unified: bool

    @classmethod
    def make(cls, name: str, *, cores: float = 0.0) -> ControlGroup | None:
        """A new group called `name` that limits the number of processes; None where we may not.

        `cores`: CPU seconds a second, where the kernel lets us say that too; 0: no limit.
        """
        unified = (_ROOT / "cgroup.controllers").exists()
        controllers = (
            ("memory",) if unified else ("memory", "pids", *(("cpu",) if cores and _own_groups("cpu") else ()))
        )
        made: list[Path] = []
        try:
            for controller in controllers:
                base = _own_groups(controller)[0]
                folder = (base.parent if unified else base) / name
                folder.mkdir()
                made.append(folder)
            group = cls(tuple(made), unified)
            (made[0 if unified else 1] / "pids.max").write_text(str(MAX_PROCESSES))
            group.limit(usable_memory())
            if cores:
                group._share(cores)
        except (OSError, IndexError):
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            return None
        return group

    @property
    def oom_file(self) -> str:
        """The file that counts what the kernel killed for memory."""
        return str(self.folders[0] / ("memory.events" if self.unified else "memory.oom_control"))

    @staticmethod
    def tidy(prefix: str) -> None:
        """Remove empty groups of nodes that were killed; the kernel keeps those in use, we those that are new."""
        for base in {*_own_groups("memory"), *_own_groups("pids"), *_own_groups("cpu")}:
            for parent in (base, base.parent):
                for folder in parent.glob(f"{prefix}*"):
                    with contextlib.suppress(OSError):
                        if time.time() - folder.stat().st_mtime > NEW_SECONDS:
                            folder.rmdir()

    def join(self, pid: int) -> bool:
        """Put a process in; what it starts from now on is born inside. False when the group is gone."""
        try:
            for folder in self.folders:
                (folder / "cgroup.procs").write_text(str(pid))
        except OSError:
            self.remove()
            return False
        return True

    def limit(self, memory: int) -> None:
        """At most `memory` bytes, swap included where the kernel counts it."""
        base = self.folders[0]
        if self.unified:
            (base / "memory.max").write_text(str(memory))
            _try_write(base / "memory.swap.max", "0")
            return
        _try_write(base / "memory.memsw.limit_in_bytes", "-1")
        (base / "memory.limit_in_bytes").write_text(str(memory))
        _try_write(base / "memory.memsw.limit_in_bytes", str(memory))

    def _share(self, cores: float) -> None:
        """At most so many CPU seconds a second, where the kernel counts them in a group."""
        quota = int(cores * CPU_PERIOD)
        if self.unified:
            _try_write(self.folders[0] / "cpu.max", f"{quota} {CPU_PERIOD}")
        else:
            _try_write(self.folders[-1] / "cpu.cfs_quota_us", str(quota))

    def oom_kills(self) -> int:
        """How many processes the kernel has killed here for memory."""
        with contextlib.suppress(OSError):
            for line in Path(self.oom_file).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0

    def remove(self) -> None:
        """Kill what is left inside and remove the group. Blocks for at most `REMOVE_SECONDS`."""
        end = time.monotonic() + REMOVE_SECONDS
        for folder in self.folders:
            while not _removed(folder) and time.monotonic() < end:
                _kill_all(folder)
                time.sleep(0.002)


def _removed(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        try:
            folder.rmdir()
        except OSError:
            return False
    return True


def _kill_all(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _try_write(path: Path, text: str) -> None:
    """Not every kernel counts swap."""
    with contextlib.suppress(OSError):
        path.write_text(text)
