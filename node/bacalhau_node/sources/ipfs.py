"""Inputs named by a CID: `ipfs://CID[/path]` or a bare CID, from the node's own content store or from elsewhere.

Listing what is not here brings the folders, and of each file at most its first block; a shard brings the files that are
its own, whole, and no others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from bacalhau_node.buckets import together
from bacalhau_node.cid import Cid
from bacalhau_node.errors import BugError, ContentError, NodeUnreachable, SpecError
from bacalhau_node.ports import Access, ContentStore, Provider, Told
from bacalhau_node.sharding import ContentRef, Entry, Reference, shown
from bacalhau_node.sources.stored import stored_file
from bacalhau_node.spec import InputSource

AT_ONCE: Final = 8
"""Files that one shard brings at a time."""

_SCHEME = "ipfs://"

Listing = list[tuple[str, str, int]]
"""(path, CID, size) of files, as `ports.ContentStore.list` has them."""


class Elsewhere(Protocol):
    """Where content comes from that is not in the store; see `content.elsewhere`."""

    def listing(self, cid: str, path: str) -> Listing:
        """The files of the folder or file at `path` below `cid`; blocks."""
        ...

    async def bring(self, cid: str, *, size: int, first: Sequence[Provider], told: Callable[[int], None]) -> None:
        """Have all of `cid` in the store, asking `first` before others."""
        ...


class ContentSource:
    """`ports.Source` of what `store` has or gets from `elsewhere`."""

    def __init__(self, store: ContentStore, elsewhere: Elsewhere) -> None:
        self._store, self._elsewhere = store, elsewhere

    def claims(self, source: str) -> bool:
        """Whether `source` is `ipfs://…` or spells a CID."""
        if source.startswith(_SCHEME):
            return True
        try:
            Cid.parse(source)
        except SpecError:
            return False
        return True

    def list(self, source: InputSource, *, index: int) -> list[Entry]:
        """Every file below the CID (or its path); a single file is named by its path, or by the CID itself."""
        cid, path = _split(source.source)
        listed = self._here(cid, path) if self._store.has(cid) else self._elsewhere.listing(cid, path)
        return [Entry(below or _last(path) or cid, ContentRef(file), size, index) for below, file, size in listed]

    def _here(self, cid: str, path: str) -> Listing:
        everything = self._store.list(cid)
        listed = [(below, file, size) for item, file, size in everything if (below := _below(item, path)) is not None]
        if path and not listed and f"{path}/" not in {item for item, _, _ in everything}:
            some = ", ".join(shown(item) for item, _, _ in everything[:5]) or "nothing"
            raise ContentError(f"there is no {shown(path)} in {cid}, which holds {some}")
        return listed

    async def fetch(self, entries: Sequence[Entry], *, access: Access, told: Told) -> None:
        """Bring what is not here, several files at once, asking those first that the job names.

        Where it names some, what nobody gives is the fault of this node (`NodeUnreachable`): another may reach them.
        """
        missing = await asyncio.to_thread(self._missing, entries)
        waiting = iter(missing)

        async def work() -> None:
            for entry, cid in waiting:
                await self._bring(entry, cid, access, told)

        try:
            await together(work, min(AT_ONCE, len(missing)))
        except ContentError as error:
            if access.providers:
                raise NodeUnreachable(str(error)) from error
            raise

    def _missing(self, entries: Sequence[Entry]) -> tuple[tuple[Entry, str], ...]:
        named = ((entry, _cid(entry.reference)) for entry in entries)
        return tuple((entry, cid) for entry, cid in named if not self._store.has(cid))

    async def _bring(self, entry: Entry, cid: str, access: Access, told: Told) -> None:
        def so_far(done: int) -> None:
            told(entry.path, min(done, entry.size), entry.size, "")

        try:
            await self._elsewhere.bring(cid, size=entry.size, first=access.providers, told=so_far)
        except ContentError as error:
            raise ContentError(f"{shown(entry.path)}: {error}") from error
        told(entry.path, entry.size, entry.size, cid)

    def open(self, reference: Reference, *, scratch: Path) -> Path:
        """The store's own file where it has one, else one written to `scratch` (once for each CID)."""
        cid = _cid(reference)
        return stored_file(self._store, cid, scratch)

    def check(self, reference: Reference) -> None:
        """Content by CID cannot change, but the store's file that was handed out can: it is looked at again."""
        if isinstance(reference, ContentRef):
            self._store.file(reference.cid)


def _split(source: str) -> tuple[str, str]:
    cid, _, path = source.removeprefix(_SCHEME).partition("/")
    try:
        return str(Cid.parse(cid)), path.strip("/")
    except SpecError as error:
        raise SpecError(f"--input {shown(source)}: {error}") from error


def _below(item: str, path: str) -> str | None:
    """`item` seen from the file or folder `path`: "" for a file itself, None for what is not in it."""
    if not path or item == path:
        return item.removeprefix(path)
    return (item.removeprefix(f"{path}/") or None) if item.startswith(f"{path}/") else None


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _cid(reference: Reference) -> str:
    if not isinstance(reference, ContentRef):
        raise BugError(f"a source of content was asked to open {reference!r}")
    return reference.cid
