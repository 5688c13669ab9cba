"""Content from a node: one archive, every block checked against the CID that was asked for.

A connection that breaks is followed by one that goes on at the byte where it broke: an archive of a CID is always
the same. Nothing that is fetched is believed before its hash was compared.
"""

from __future__ import annotations

import asyncio
from typing import Final

from bacalhau_node.cid import Cid
from bacalhau_node.content import car
from bacalhau_node.errors import ContentError
from bacalhau_node.http_client.connection import BROKEN, Connection

IN_MEMORY: Final = 1024 * 1024 * 1024
"""Bytes that a value read into memory may have."""

_PART = 1024 * 1024


class Memory:
    """A shelf in memory, for what is read at once."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, bytes] = {}
        self._bytes = 0

    def holds(self, cid: Cid) -> bool:
        """See `car.Shelf`."""
        return cid.digest in self._blocks

    def keep(self, cid: Cid, block: bytes) -> None:
        """See `car.Shelf`; raises `ContentError` for more than `IN_MEMORY`."""
        self._bytes += len(block)
        if self._bytes > IN_MEMORY:
            raise ContentError(f"over {IN_MEMORY} bytes are too many for the memory: download it to a folder")
        self._blocks[cid.digest] = block

    def block(self, cid: Cid) -> bytes:
        """See `reader.Blocks`."""
        if (block := self._blocks.get(cid.digest)) is None:
            raise ContentError(f"the block {cid} was not sent")
        return block

    def file_size(self, _cid: Cid) -> int | None:
        """See `reader.Blocks`."""
        return None


async def fetch(connection: Connection, cid: Cid, shelf: car.Shelf) -> None:
    """Put `cid` and all below it on the shelf; raises `ContentError` for what is not there or not what it should be."""
    reader, taken = car.CarReader(), car.CarImport(shelf, wanted=cid)

    def step(data: bytes) -> None:
        for name, block in reader.feed(data):
            taken.take(name, block)

    got, retry = 0, connection.retry()
    while True:
        try:
            async with connection.stream("GET", f"/v0/car/{cid}", query={"from": str(got)}) as response:
                async for data in response.content.iter_chunked(_PART):
                    got += len(data)
                    await asyncio.to_thread(step, data)
                    retry.progress()
            break
        except BROKEN as error:
            await retry.again(error)
    reader.end()
    taken.end()
    if not shelf.holds(cid):
        raise ContentError(f"the node sent an archive without {cid}")
