"""`--publish ipfs`: the result of a job as a folder on IPFS, pinned by the daemon that the node's owner names.

    outputs/PATH                                what the shards wrote, under names that clash with no other
    values/INDEX.SUFFIX                         what they returned
    shards/INDEX/{stdout,stderr,exit_code}

It is an ordinary folder (`ipfs get`, any gateway), and as an input it is read like the job itself (`--input {job}`).

Theory of operation. The folder is made in the store, where its files are already, and goes to the daemon as one
archive: so its CID is known before and depends on no setting of the daemon. What is there already stays, so publishing
again changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

from bacalhau_node.cid import Cid
from bacalhau_node.errors import ContentError, NodeUnreachable, SpecError
from bacalhau_node.ids import JobId
from bacalhau_node.ports import ContentStore


class Daemon(Protocol):
    """What is needed of `content.kubo.Kubo`."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    async def version(self) -> str:
        """Its version; raises `NodeUnreachable` when it does not answer."""
        ...

    async def take(self, root: Cid, archive: AsyncIterator[bytes]) -> None:
        """Put an archive into it; raises `ContentError` and `NodeUnreachable`."""
        ...

    async def pin(self, root: Cid, *, name: str) -> None:
        """Keep it there."""
        ...


class IpfsPublisher:
    """`ports.Publisher` to the daemon that `daemon` gives (None: there is none).

    `folder` makes a folder of a sealed result and gives its CID, `archive` the bytes of its CAR; both block.
    """

    def __init__(
        self,
        content: ContentStore,
        *,
        folder: Callable[[str], str],
        archive: Callable[[str], Iterator[bytes]],
        daemon: Callable[[], Daemon | None],
    ) -> None:
        self._content, self._folder, self._archive, self._daemon = content, folder, archive, daemon

    def claims(self, target: str) -> bool:
        """Whether `target` is IPFS."""
        return target == "ipfs"

    async def check(self, target: str) -> None:
        """Ask the daemon for its version."""
        daemon = self._named(target)
        try:
            await daemon.version()
        except (ContentError, NodeUnreachable) as error:
            raise SpecError(
                f"--publish {target}: {daemon.name} can't be used ({error}): start it, or correct BACALHAU_IPFS_CONNECT"
            ) from error

    async def publish(self, job: JobId, root: str, target: str) -> tuple[str, ...]:
        """Put the folder there and pin it under the name of the job."""
        daemon = self._named(target)
        with self._content.hold():
            cid = await asyncio.to_thread(self._folder, root)
            await daemon.take(Cid.parse(cid), self._parts(cid))
        await daemon.pin(Cid.parse(cid), name=f"bacalhau {job}")
        return (f"ipfs://{cid}",)

    def _named(self, target: str) -> Daemon:
        daemon = self._daemon()
        if daemon is None:
            raise SpecError(
                f"--publish {target}: no IPFS daemon is named: set BACALHAU_IPFS_CONNECT to the address of its RPC,"
                " such as /ip4/127.0.0.1/tcp/5001, where this node runs"
            )
        return daemon

    async def _parts(self, cid: str) -> AsyncIterator[bytes]:
        parts = await asyncio.to_thread(self._archive, cid)
        while part := await asyncio.to_thread(next, parts, b""):
            yield part
