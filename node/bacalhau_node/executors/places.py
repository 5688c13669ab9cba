"""The folders of a shard that runs as a plain process: its inputs as a container would show them, what it left."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bacalhau_node.messages import ShardError

if TYPE_CHECKING:
    from bacalhau_node.ports import RawOutcome, ShardTask


async def checked(outcome: RawOutcome) -> RawOutcome:
    """The outcome, failed if its outputs can't travel."""
    if outcome.outputs is None:
        return outcome
    problem = await asyncio.to_thread(_output_problem, outcome.outputs)
    if problem is None:
        return outcome
    error = outcome.error or ShardError("output", message=problem)
    return msgspec.structs.replace(outcome, ok=False, exit_code=outcome.exit_code or 1, outputs=None, error=error)


def _output_problem(outputs: Path) -> str | None:
    """What in the folder is neither a file, nor a folder, nor a link to one inside."""
    root = outputs.resolve()
    for base, folders, files in os.walk(outputs):
        for name in (*folders, *files):
            path = Path(base, name)
            inside = f"outputs/{path.relative_to(outputs)}"
            if path.is_symlink():
                if not path.resolve().is_relative_to(root):
                    return (
                        f"{inside} is a link to {path.readlink()}, which is outside of outputs: copy the file instead"
                    )
            elif not (path.is_file() or path.is_dir()):
                return f"{inside} is neither a file nor a folder: remove it before the cell ends"
    return None


def linked_inputs(task: ShardTask) -> Path:
    """A folder with a link to each input where a container would have it: `/inputs/a.csv` is `a.csv` in it."""
    folder = task.scratch / "inputs"
    for file in task.files:
        link = folder / (file.mount.removeprefix("/inputs") or "/").lstrip("/")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
