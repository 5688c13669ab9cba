"""Images that a job names: on the daemon's machine or pulled, and the Python that is in them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.layout import Image, NoEnvironment

if TYPE_CHECKING:
    from bacalhau_node.executors.containers import Daemon


class Images:
    """The images of one daemon. Many shards may ask for one that is being pulled: it is pulled once."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._pulls: dict[str, asyncio.Task[None]] = {}

    async def find(self, name: str) -> Image:
        """The image `name`, pulled if it is not here. Raises `NoEnvironment`."""
        try:
            return await self._inspect(name)
        except DaemonError as error:
            if error.status != 404:
                raise
        await self._pull(name)
        return await self._inspect(name)

    async def _inspect(self, name: str) -> Image:
        found = await self._daemon.image(name)
        return Image(found["Id"], (found.get("Config") or {}).get("WorkingDir") or "")

    async def _pull(self, name: str) -> None:
        pull = self._pulls.get(name)
        if pull is None:
            pull = self._pulls[name] = asyncio.create_task(self._daemon.pull(name))
            pull.add_done_callback(lambda _: self._pulls.pop(name))
        try:
            await asyncio.shield(pull)
        except DaemonError as error:
            raise NoEnvironment(f"the image {name} is not here and could not be pulled ({error}): check its name, or pull it yourself") from error

    async def close(self) -> None:
        """End the pulls under way."""
        pulls = list(self._pulls.values())
        for pull in pulls:
            pull.cancel()
        if pulls:
            await asyncio.wait(pulls)
