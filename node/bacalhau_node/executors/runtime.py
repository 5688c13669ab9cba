"""What makes boxes: a Docker daemon makes containers, this node itself makes sandboxes.

A box is created from a recipe, its streams are opened, then it is started; so no word of it is
lost. It is removed explicitly, whatever became of it. All methods are called from one asyncio
loop, and raise `DaemonError`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from bacalhau_node.executors.containers import Recipe, State


class Channels(Protocol):
    """A box's stdin, stdout and stderr. `ended` is set when they have ended, whoever did it."""

    ended: asyncio.Event

    def send(self, data: bytes, /) -> None:
        """Queue `data` for stdin; drops it after the end."""
        ...

    async def drain(self) -> None:
        """Wait while much is queued because nobody in the box reads."""
        ...

    def close(self) -> None:
        """Let go of them; an agent in the box then ends."""
        ...


class Runtime(Protocol):
    """Makes, starts and ends boxes."""

    async def create(self, recipe: Recipe, /) -> str:
        """A new box that does not run yet; its id."""
        ...

    async def attach(self, box: str, receive: Callable[[int, bytes], None], /) -> Channels:
        """The streams of a box that has not started: `receive` gets (1: stdout, 2: stderr, 0: the end; data)."""
        ...

    async def start(self, box: str, /) -> None:
        """Start it."""
        ...

    async def state(self, box: str, /) -> State | None:
        """How it is, or how it ended; None when it is unknown (any more)."""
        ...

    async def killed(self, box: str, /) -> bool:
        """Whether it was ended from outside."""
        ...

    async def kill(self, box: str, /) -> None:
        """End everything in it now."""
        ...

    async def remove(self, box: str, /) -> None:
        """End and remove it. One that is gone is no error."""
        ...

    async def close(self) -> None:
        """Wait for calls under way."""
        ...
