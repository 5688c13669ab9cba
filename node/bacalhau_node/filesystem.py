"""What kind of file system a folder lies on, where that changes what may be done there."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path

_NETWORK = frozenset(("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "fuse"))
"""Types of mounts that may be shared with other machines; "fuse" stands for "fuse.sshfs" and its like too."""

_MANY = 1_000
"""Names of a folder that are looked at for one that was perhaps meant."""

MOUNTS = Path("/proc/self/mounts")


def on_network(folder: Path, *, table: Path = MOUNTS) -> bool:
    """Whether `folder` may lie on another machine's disk, as far as Linux's mount table tells; else False.

    SQLite's WAL needs memory that all users of a file share, which no two machines have.
    """
    try:
        lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    path = folder.resolve()
    mounts = [(Path(_plain(point)), kind) for _, point, kind, *_ in map(str.split, lines)]
    around = [(len(point.parts), at, kind) for at, (point, kind) in enumerate(mounts) if path.is_relative_to(point)]
    kind = max(around, default=(0, 0, ""))[2]  # the deepest; of several at one place the one mounted last
    return kind.split(".")[0] in _NETWORK


def names_in(folder: str) -> list[str]:
    """What `folder` holds, so far as it can be printed; nothing if it can't be listed."""
    try:
        with os.scandir(folder) as scan:
            return [entry.name for entry in islice(scan, _MANY) if entry.name.isprintable()]
    except OSError:
        return []


def _plain(point: str) -> str:
    r"""A mount point as it is: the table writes blanks, tabs, newlines and backslashes as `\040` and so on."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
