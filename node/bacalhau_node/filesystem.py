"""What kind of file system a folder lies on, where that changes what may be done there."""

from __future__ import annotations

import re
from pathlib import Path

_NETWORK = frozenset(("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "fuse"))
"""Types of mounts that may be shared with other machines; "fuse" stands for "fuse.sshfs" and its like too."""

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


def _plain(point: str) -> str:
    r"""A mount point as it is: the table writes blanks, tabs, newlines and backslashes as `\040` and so on."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
