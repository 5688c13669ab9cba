"""The folders of a shard that runs as a plain process: its inputs as a container would show them, what it left."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bacalhau_node.executors.staging import unfit
from bacalhau_node.messages import ShardError

if TYPE_CHECKING:
    from bacalhau_node.ports import RawOutcome, ShardTask


async def checked(outcome: RawOutcome) -> RawOutcome:
    """The outcome, failed if its outputs can't travel."""
    if outcome.outputs is None:
        return outcome
    problem = await asyncio.to_thread(unfit, outcome.outputs)
    if problem is None:
        return outcome
    error = outcome.error or ShardError("output", message=problem)
    return msgspec.structs.replace(outcome, ok=False, exit_code=outcome.exit_code or 1, outputs=None, error=error)


def linked_inputs(task: ShardTask) -> Path:
    """A folder with a link to each input where a container would have it: `/inputs/a.csv` is `a.csv` in it."""
    folder = task.scratch / "inputs"
    for file in task.files:
        link = folder / (file.mount.removeprefix("/inputs") or "/").lstrip("/")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
