"""The sandbox executor: cells and commands in bubblewrap sandboxes, where no Docker daemon answers.

Theory of operation (DESIGN section 6). The same agents, slot folders, staging, crew and spares as
for containers; only the boxes are made differently, by this process itself (`sandboxes.py`). What a
shard can see and do is the same as well: the host environment read-only, its inputs and outputs, no
network, no capabilities, no further namespaces. There are no images. Commands run in the agent
too, so a sandbox serves them as warm as cells.

Memory, processes and cores are held by control groups where this node may make them; where not,
the agents watch memory and processes, and `limits_enforced` is false.

With `--network full` a sandbox has this machine's own network, its loopback included: to give it
another one takes rights that the node of a notebook does not have.
"""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from bacalhau_node.errors import BacalhauError
from bacalhau_node.executors.boxed import BoxedExecutor
from bacalhau_node.executors.bubblewrap import Root, find
from bacalhau_node.executors.environment import Interpreter, describe
from bacalhau_node.executors.fit import installed, mismatch, own_target, python_version
from bacalhau_node.executors.gpus import Gpus
from bacalhau_node.executors.layout import NoEnvironment, Site
from bacalhau_node.executors.limits import ControlGroup
from bacalhau_node.executors.plain import GROUP_PREFIX
from bacalhau_node.executors.sandboxes import Sandboxes
from bacalhau_node.executors.workshop import Workshop, new_slots, shard_user
from bacalhau_node.ports import Capabilities, Target
from bacalhau_node.spec import ISOLATION_RANK, PythonCell

if TYPE_CHECKING:
    from bacalhau_node.spec import JobSpec


class SandboxExecutor(BoxedExecutor[Workshop]):
    """Implements `ports.Executor` with isolation "sandbox".

    `folder` is its own, on the store's file system. `slots`: shards at once; None: usable cores. `gpus`: the
    cards of the node.
    """

    called = "sandboxes"

    def __init__(self, folder: Path, *, slots: int | None = None, gpus: Gpus | None = None) -> None:
        super().__init__(slots=slots, gpus=gpus or Gpus(folder / "gpus"))
        self._folder = folder

    async def probe(self) -> Capabilities:
        """Run one sandbox for real; it stays as a spare."""
        async with self._probing:
            await self._gpus.look()
            try:
                if self._workshop is None:
                    opening = _open(self._folder, slots=self._slots, memory=self._memory)
                    self._workshop, self._versions = await asyncio.gather(opening, asyncio.to_thread(installed))
                self._problem = None
            except (BacalhauError, OSError) as error:
                self._problem = str(error)
        workshop = self._workshop
        return Capabilities(
            executor="sandbox",
            isolation="sandbox",
            slots=self._slots,
            memory_per_slot=self._memory,
            python=python_version(),
            versions=self._versions,
            gpus=self._gpus.cards,
            limits_enforced=workshop is None or not workshop.site.watched,
            problem=self._problem,
        )

    def check(self, spec: JobSpec) -> str | None:
        """Why sandboxes of this node can never run `spec`, or None."""
        if self._problem:
            return self._unusable()
        here = "this node runs shards in sandboxes"
        if spec.image is not None:
            return f"--image {spec.image}: {here}, which have no images"
        if spec.isolation is not None and ISOLATION_RANK[spec.isolation] > ISOLATION_RANK["sandbox"]:
            return f"--isolation {spec.isolation}: {here}"
        if isinstance(spec.task, PythonCell) and (lack := mismatch(spec.task, self._versions)):
            return lack
        return self._too_much(spec.resources)

    async def target(self, spec: JobSpec) -> Target:
        """The interpreter of this process, whatever the job."""
        del spec  # the same for all
        return await asyncio.to_thread(own_target, self._versions)


async def _open(folder: Path, *, slots: int, memory: int) -> Workshop:
    """Make sandboxes work for this node. Raises what keeps them from it; leaves nothing then."""
    user = shard_user()
    inside = f"{user.uid}:{user.gid}"
    bubblewrap, host = await asyncio.gather(
        asyncio.to_thread(find, inside),
        asyncio.to_thread(describe, Interpreter.current(), uid=user.uid, gid=user.gid),
    )
    if host.problem:
        raise NoEnvironment(host.problem)
    agent, root, grouped = await asyncio.to_thread(_prepare, folder, host.image)
    site = Site(
        daemon=Sandboxes(bubblewrap, root, grouped=grouped),
        folder=folder,
        host=host,
        user=user,
        inside=inside,
        agent=agent,
        watched=not grouped,
    )
    workshop = Workshop(site, slots=slots, memory=memory)
    try:
        workshop.spares.warm(most=1)
        await workshop.spares.ready()
    except BaseException:
        await workshop.close()
        raise
    return workshop


def _prepare(folder: Path, image: bytes) -> tuple[Path, Root, bool]:
    """The agent's file, the files of the root, and whether this node may make control groups."""
    agent = new_slots(folder)
    root = Root.unpack(image, folder / "slots" / "root")
    ControlGroup.tidy(GROUP_PREFIX)
    trial = ControlGroup.make(GROUP_PREFIX + secrets.token_hex(8))
    if trial is not None:
        trial.remove()
    return agent, root, trial is not None
