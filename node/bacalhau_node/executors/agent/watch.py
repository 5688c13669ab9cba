"""The limits of a shard: measured here where the kernel doesn't, and what to say of one that passed them."""

from __future__ import annotations

import resource

from .failures import blame
from .folders import disk_use
from .words import size_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .frames import Header

WATCH = 0.05
"""Seconds between two looks at memory and processes where no control group holds them."""
DISK_WATCH = 0.25
"""Seconds between two looks at the disk that a shard uses; a look never takes more than a twentieth of the time."""
MAX_PROCESSES = 512
"""Processes of one shard where no control group counts them (pids limit of DESIGN section 6)."""


def too_much(run: Header, pids: set[int]) -> Header | None:
    """The error of a shard with too many processes or too much memory; `pids` are all of its processes."""
    if len(pids) > MAX_PROCESSES:
        text = "the shard had %d processes; at most %d are allowed" % (len(pids), MAX_PROCESSES)
        return blame("signal", text, name="SIGKILL")
    limit = run.get("memory", 0)
    if limit and sum(map(resident, pids)) > limit and sum(map(proportional, pids)) > limit:
        return out_of_memory(run)
    return None


def too_much_disk(run: Header) -> Header | None:
    """The error of a shard whose folders hold too much."""
    if sum(map(disk_use, {run["work"], run["outputs"], run["scratch"]})) > run["disk"]:
        return out_of_disk(run)
    return None


def out_of_memory(run: Header) -> Header:
    """What to say of a shard that ran out of memory."""
    limit = " of %s" % size_text(run["memory"]) if run.get("memory") else ""
    text = "the shard used more than its memory limit%s: give it more with --memory, or use smaller shards"
    return blame("memory", text % limit)


def out_of_disk(run: Header) -> Header:
    """What to say of a shard that wrote too much."""
    text = "the shard wrote more than its disk limit of %s: raise it with --disk"
    return blame("disk", text % size_text(run["disk"]))


def resident(pid: int) -> int:
    """Bytes of memory that only this process holds, or its share of what is shared."""
    try:
        with open("/proc/%d/statm" % pid) as file:
            fields = file.read().split()
        return (int(fields[1]) - int(fields[2])) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def proportional(pid: int) -> int:
    """Like `resident`, with pages that a fork shares divided fairly; slower, and on Linux 4.14 or later."""
    try:
        with open("/proc/%d/smaps_rollup" % pid) as file:
            return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except (OSError, ValueError, IndexError):
        return resident(pid)


def oom_kills(files: list[str]) -> int:
    """How often the kernel's memory killer struck in our control group."""
    for path in files:
        try:
            with open(path) as file:
                lines = [line.split() for line in file]
        except OSError:
            continue  # the other version of control groups
        for words in lines:
            if len(words) == 2 and words[0] == "oom_kill":
                return int(words[1])
    return 0
