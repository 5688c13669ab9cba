"""The start of a node: what takes longest is begun first.

Theory of operation. Between `%load_ext` and a first result most of the time is not this program's: a daemon or the
kernel makes a box, and an interpreter starts in it. So a node takes its folder and tries its executors at once, and
whatever else it is made of is loaded and opened meanwhile. For that, this module imports only what executors need.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bacalhau_node.executors.docker import DockerExecutor
from bacalhau_node.executors.gpus import Gpus
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.executors.sandbox import SandboxExecutor
from bacalhau_node.facilities import Facilities
from bacalhau_node.folders import NodeFolder, data_folder, take_folder
from bacalhau_node.layers.store import Layers
from bacalhau_node.ports import Executor


@dataclass(frozen=True, slots=True)
class Opening:
    """A node to be: its folder, and what runs its jobs, once that is known. To be finished (`node`) or undone."""

    folder: NodeFolder
    executors: Sequence[Executor]
    facilities: asyncio.Task[Facilities]

    async def undo(self) -> None:
        """Leave nothing."""
        self.facilities.cancel()
        await asyncio.gather(self.facilities, return_exceptions=True)
        for executor in self.executors:
            await executor.close()
        self.folder.close()


async def begin(root: Path | None = None, *, executors: Sequence[Executor] | None = None, serving: str = "") -> Opening:
    """Take a folder below `root` (default: the user's data folder) and try these executors or those of this machine.

    `serving`: the address (`HOST:PORT`) of a server.
    """
    folder = await asyncio.to_thread(_emptied, root, serving)
    chosen = list(executors) if executors is not None else machine_executors(folder)
    layers = Layers(folder.root / "layers")
    return Opening(folder, chosen, asyncio.create_task(Facilities.open(chosen, layers)))


def machine_executors(folder: NodeFolder) -> list[Executor]:
    """The executors of this machine, best isolation first."""
    gpus = Gpus(folder.root / "gpus")
    return [
        DockerExecutor(folder.path, node=folder.node, is_alive=folder.is_alive, gpus=gpus),
        SandboxExecutor(folder.path / "sandbox", gpus=gpus),
        ProcessExecutor(folder.path / "process", gpus=gpus),
    ]


def _emptied(root: Path | None, serving: str) -> NodeFolder:
    """A node's folder without what a node that was killed has left of its work."""
    folder = take_folder(root or data_folder(), serving=serving)
    for left in ("work", "process"):
        shutil.rmtree(folder.path / left, ignore_errors=True)
    return folder
