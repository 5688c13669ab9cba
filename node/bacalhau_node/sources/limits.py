"""How much is taken from elsewhere: bounds on what a stranger may make a node download or unpack."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bacalhau_node.errors import ContentError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes and seconds. The values are guesses from what public data looks like, far above what is usual.

    `file`: the largest file. `reserve`: what stays free on the disk. `page`: an index or a list. `silence`: no byte for
    so long, or fewer than `slowest` a second on average, is a broken connection. `pause`: before the second
    of `attempts`, twice as much before each further one. Attempts that bring fewer than
    `step` new bytes are counted.
    """

    file: int = 100 * 10**9
    reserve: int = 1 << 30
    page: int = 16 << 20
    connect: float = 15.0
    silence: float = 30.0
    slowest: int = 1_000
    redirects: int = 5
    attempts: int = 3
    pause: float = 0.5
    step: int = 1 << 20

    def check_room(self, folder: Path, size: int) -> None:
        """Raise `ContentError` if `size` more bytes below `folder` would leave less than the reserve. Quick."""
        disk = os.statvfs(folder)
        free = disk.f_bavail * disk.f_frsize - self.reserve
        if size > free:
            raise ContentError(
                f"no room for {size} bytes in {folder}: {max(0, free)} are free beyond the {self.reserve} kept in"
                " reserve; make room, or set BACALHAU_DIR to a folder on another disk"
            )
