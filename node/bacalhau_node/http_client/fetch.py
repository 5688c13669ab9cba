"""Content from the node that a client talks to: by `content.fetch`, from its gateway, over the client's connection.

Here is only what is special about a client: a node that doesn't answer is asked again, since it may be restarting, and
what is read at once goes into memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

from bacalhau_node.cid import Cid
from bacalhau_node.content.elsewhere import PATIENCE, named
from bacalhau_node.content.fetch import fetch as fetch_from
from bacalhau_node.content.incoming import Shelf
from bacalhau_node.content.providers import HttpProvider
from bacalhau_node.errors import ContentError, NodeUnreachable
from bacalhau_node.http_client.connection import Connection
from bacalhau_node.ports import Scope

IN_MEMORY: Final = 1024 * 1024 * 1024
"""Bytes that a value read into memory may have."""

SILENCE: Final = 120.0
"""Seconds without a byte after which a node that is connected counts as gone."""


class Memory:
    """A shelf in memory, for what is read at once."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, bytes] = {}
        self._bytes = 0

    def holds(self, cid: Cid) -> bool:
        """See `incoming.Shelf`."""
        return cid.digest in self._blocks

    def keep(self, cid: Cid, block: bytes) -> None:
        """See `incoming.Shelf`; raises `ContentError` for more than `IN_MEMORY`."""
        self._bytes += len(block)
        if self._bytes > IN_MEMORY:
            raise ContentError(f"over {IN_MEMORY} bytes are too many for the memory: download it to a folder")
        self._blocks[cid.digest] = block

    def block(self, cid: Cid) -> bytes:
        """See `incoming.Shelf`."""
        if (block := self._blocks.get(cid.digest)) is None:
            raise ContentError(f"the block {cid} was not sent")
        return block

    def flush(self) -> None:
        """See `incoming.Shelf`."""

    def hold(self) -> contextlib.nullcontext[None]:
        """See `incoming.Shelf`."""
        return contextlib.nullcontext()

    def file_size(self, _cid: Cid) -> int | None:
        """See `reader.Blocks`."""
        return None


class _Patient:
    """The node's gateway as a `ports.Provider` that is asked again until the connection's patience is over."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._gateway = HttpProvider(connection.url, session=connection.session())
        self.name = f"the node at {connection.url}"

    async def car(self, root: Cid, *, path: str = "", scope: Scope = "all") -> AsyncIterator[bytes]:
        """See `ports.Provider`. When it breaks in the middle, its blocks are asked for one by one."""
        retry, begun = self._connection.retry(), False
        while True:
            try:
                async for part in self._gateway.car(root, path=path, scope=scope):
                    begun = True
                    yield part
                return  # noqa: TRY300 - of a generator, there is nothing to put behind `else`
            except NodeUnreachable as error:
                if begun:
                    raise
                await retry.again(error)

    async def block(self, cid: Cid, *, root: Cid) -> bytes:
        """See `ports.Provider`."""
        retry = self._connection.retry()
        while True:
            try:
                return await self._gateway.block(cid, root=root)
            except NodeUnreachable as error:
                await retry.again(error)


async def fetch(
    connection: Connection, cid: Cid, shelf: Shelf, *, path: str = "", told: Callable[[int], None] | None = None
) -> str:
    """Put what `path` below `cid` leads to, and all below that, on the shelf; returns the CID of what it leads to.

    `told` hears how many bytes came. Raises `ContentError` for what does not come, or not right.
    """
    return (await fetch_from(shelf, cid, [_Patient(connection)], path=path, told=told, patience=SILENCE)).cid


async def fetch_anywhere(
    connection: Connection, cid: Cid, shelf: Shelf, *, path: str = "", told: Callable[[int], None] | None = None
) -> str:
    """`fetch`, and what the node does not give comes from whom the environment here names."""
    try:
        return await fetch(connection, cid, shelf, path=path, told=told)
    except ContentError as error:
        if not (others := named()):
            raise
        try:
            return (await fetch_from(shelf, cid, others, path=path, told=told, patience=PATIENCE)).cid
        except ContentError as further:
            raise ContentError(f"{error}. And {further}") from further
