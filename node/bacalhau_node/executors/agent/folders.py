"""Folders: made, measured, removed, whoever else changes them meanwhile."""

from __future__ import annotations

import contextlib
import os
import stat


def make_folder(folder: str) -> None:
    """A folder, mostly below one that exists."""
    try:
        os.mkdir(folder)
    except FileExistsError:
        pass
    except FileNotFoundError:
        os.makedirs(folder, exist_ok=True)


def remove_tree(folder: str) -> None:
    """Remove a folder with all below it; what can't be removed is left to the host."""
    with contextlib.suppress(OSError):  # not empty
        os.rmdir(folder)
        return
    for base, folders, files in os.walk(folder, topdown=False):
        for name in files + folders:
            path = os.path.join(base, name)
            with contextlib.suppress(OSError):  # the host looks again
                if stat.S_ISDIR(os.lstat(path).st_mode):
                    os.rmdir(path)
                else:
                    os.unlink(path)
    with contextlib.suppress(OSError):  # the host looks again
        os.rmdir(folder)


def has_entries(folder: str) -> bool:
    """Whether there is anything in the folder."""
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def disk_use(folder: str) -> int:
    """Bytes that the files below a folder occupy; links are not followed."""
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(base, name)).st_blocks * 512
    return total
