"""A node in this process, as soon as it can be had: for notebooks, and for commands where no server runs."""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import TYPE_CHECKING

from bacalhau_node.opening import begin

if TYPE_CHECKING:
    from collections.abc import Callable

    from bacalhau_node.client import Client

HEAD_START = 0.05
"""Seconds for which executors have the interpreter to themselves: a box has to be asked for before one can wait for it.
(A guess; only speed depends on it.)"""


async def open_local(*, received: Callable[[int], None] | None = None) -> Client:
    """A client of a new node in this process, on the running loop; `close` ends both. `received`: see `LocalClient`.

    Most of the node is loaded while its first container or sandbox starts.
    """
    opening = await begin()
    try:
        await asyncio.wait({opening.facilities}, timeout=HEAD_START)
        await asyncio.to_thread(import_module, "bacalhau_node.client")
    except BaseException:
        await opening.undo()
        raise
    from bacalhau_node.client import LocalClient  # noqa: PLC0415 - is loaded by now
    from bacalhau_node.node import finish  # noqa: PLC0415 - as above

    return LocalClient(await finish(opening), received=received)
