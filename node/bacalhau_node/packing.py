"""What a shard needs, made fetchable for another node: references to this machine become CIDs.

A plan names local files by stamps, which mean nothing elsewhere. When such a shard is first offered to another node,
its files are imported into the store without being copied, and its block is written anew with their CIDs; objects in
buckets become URLs that were signed here. Everything else can be fetched by anybody, and stays as it is. The sources
in the spec, which name paths and buckets of this machine's owner, become ones that say only how to open what the
entries name.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from msgspec import structs

from bacalhau_node.plan import read_shard, store_entries, store_shard
from bacalhau_node.ports import ContentStore
from bacalhau_node.sharding import ContentRef, Entry, LocalStamp, Reference, UrlRef
from bacalhau_node.spec import InputSource, JobSpec, PythonCell

NOTHING: Final = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
"""The CID of no bytes at all: stands for a root that nobody needs to know."""

SIGNED_FOR: Final = 24 * 3600
"""Seconds for which a URL into a bucket is good."""

AGAIN: Final = SIGNED_FOR / 2
"""Seconds after which a block is packed anew."""

MOST_KNOWN: Final = 200_000
"""Files whose CIDs are remembered for the next job: some 100 MB, and beyond that they are hashed once more."""

Presign = Callable[[UrlRef], Awaitable[UrlRef]]


class Checks(Protocol):
    """The part of a local source that is needed here."""

    def check(self, reference: Reference) -> None:
        """Raise `ContentError` if the file is no longer the one that was listed."""
        ...


class Packed:
    """A packed shard: its block, all CIDs that a node must be allowed to fetch, and the local files behind them."""

    def __init__(self, block: str, roots: tuple[str, ...], stamps: tuple[LocalStamp, ...], made: float) -> None:
        self.block, self.roots, self.stamps, self.made = block, roots, stamps, made


class Packing:
    """Packs the shards of one node's jobs. `presign` signs the URL of an object in a bucket; `local` checks stamps."""

    def __init__(self, content: ContentStore, *, local: Checks, presign: Presign) -> None:
        self._content, self._local, self._presign = content, local, presign
        self._cids: dict[LocalStamp, str] = {}

    async def pack(self, block: str) -> Packed:
        """The shard with this block; raises `ContentError` for a file that is not what it was."""
        entries, shared = await asyncio.to_thread(read_shard, self._content, block)
        moved = tuple([await self._moved(entry) for entry in entries])
        moved_shared = tuple([await self._moved(entry) for entry in shared])
        if (moved, moved_shared) != (entries, shared):
            block = await asyncio.to_thread(self._store, moved, moved_shared)
        every = (*moved, *moved_shared)
        roots = (block, *(entry.reference.cid for entry in every if isinstance(entry.reference, ContentRef)))
        stamps = tuple(entry.reference for entry in (*entries, *shared) if isinstance(entry.reference, LocalStamp))
        return Packed(block, roots, stamps, asyncio.get_running_loop().time())

    async def is_good(self, packed: Packed) -> bool:
        """Whether it can be offered once more; raises `ContentError` for a file that has changed."""
        if packed.stamps:
            await asyncio.to_thread(self._check, packed.stamps)
        return asyncio.get_running_loop().time() - packed.made < AGAIN

    def _check(self, stamps: Sequence[LocalStamp]) -> None:
        for stamp in stamps:
            self._local.check(stamp)

    def _store(self, entries: tuple[Entry, ...], shared: tuple[Entry, ...]) -> str:
        return store_shard(entries, store_entries(shared, self._content), self._content)

    async def _moved(self, entry: Entry) -> Entry:
        """The entry by a reference that is good everywhere."""
        reference = entry.reference
        if isinstance(reference, LocalStamp):
            cid = await asyncio.to_thread(self._imported, reference)
            return Entry(entry.path, ContentRef(cid), entry.size, entry.source)
        if isinstance(reference, UrlRef) and "://" in reference.url and not reference.url.startswith("http"):
            return structs.replace(entry, reference=await self._presign(reference))
        return entry

    def _imported(self, stamp: LocalStamp) -> str:
        self._local.check(stamp)
        if (cid := self._cids.get(stamp)) is None or not self._content.has(cid):
            cid = self._content.add_path(Path(os.path.realpath(stamp.path)), link=True)
            self._local.check(stamp)
            if len(self._cids) >= MOST_KNOWN:
                self._cids.clear()
            self._cids[stamp] = cid
        return cid


def packed_spec(spec: JobSpec) -> JobSpec:
    """The spec for another node: without the places of this machine, and what only concerns the requester."""
    return structs.replace(
        spec,
        inputs=tuple(map(_placeless, spec.inputs)),
        shared=tuple(map(_placeless, spec.shared)),
        pin=False,
        reuse=False,
        publish="store",
    )


def _placeless(source: InputSource) -> InputSource:
    scheme, colon, _ = source.source.partition("://")
    if source.source.startswith("/"):
        named = f"/{Path(source.source).name}" if not Path(source.source).is_dir() else "/"
        return structs.replace(source, source=f"ipfs://{NOTHING}{named}")
    if colon and scheme not in ("http", "https", "ipfs"):
        return structs.replace(source, source="https://signed/")
    return source


def bundle_of(spec: JobSpec) -> str | None:
    """The CID of the cell's folder, if there is one."""
    return spec.task.bundle if isinstance(spec.task, PythonCell) else None
