"""The folder of one execution: what is put there beside its files, and how it goes."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from bacalhau_node.sharding import Entry, LocalStamp


def named(path: Path, entry: Entry, folder: Path, mount: str) -> Path:
    """`path` itself, or where content lies under its CID: a second name for it below `folder`, that of its mount.

    A shard without a container sees this very path, and what it is called matters: `.csv`, `.gz`.
    """
    if isinstance(entry.reference, LocalStamp) or mount.endswith("/"):
        return path
    named = folder / mount.lstrip("/")
    named.parent.mkdir(parents=True, exist_ok=True)
    try:
        named.hardlink_to(path)
    except OSError:  # another disk, or one without hard links
        named.symlink_to(path)
    return named


async def remove(scratch: Path) -> None:
    """Remove an execution's folder, which mostly was never made: removing one can take milliseconds on ext4."""
    if os.path.lexists(scratch):  # noqa: ASYNC240 - microseconds, a third of those of `Path.exists`
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
