"""Blocks come and go by the thousand; their memory should stay with the process meanwhile."""

from __future__ import annotations

from functools import cache
from typing import Final

_SIZE: Final = 16 * 1024 * 1024


@cache
def keep_memory() -> None:
    """Have glibc keep up to 32 MiB that were freed; before whoever moves many blocks.

    It takes what is larger than the largest block that was ever freed from the system, and gives it back at once: the
    pages of every block would be made anew, which takes more time than all copies of its bytes (a half of what serving
    a file took). One large block that is freed, and never touched, tells it better; elsewhere it does nothing. Once for
    a process: a second one would not come from the system any more, be cleared, and stay with the thread that made it.
    """
    bytes(_SIZE)
