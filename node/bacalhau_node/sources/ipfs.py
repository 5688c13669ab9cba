"""Inputs named by a CID: `ipfs://CID[/path]` or a bare CID, from the node's own content store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bacalhau_node.cid import Cid
from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.ports import Access, ContentStore, Told
from bacalhau_node.sharding import ContentRef, Entry, Reference, shown
from bacalhau_node.spec import InputSource

_SCHEME = "ipfs://"


class ContentSource:
    """`ports.Source` over the content that `store` has; other nodes are not asked in this version."""

    def __init__(self, store: ContentStore) -> None:
        self._store = store

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
        if not self._store.has(cid):
            raise ContentError(
                f"{cid} is not in this node's content store, and this version does not fetch from other nodes:"
                " name the folder or file that holds the data",
            )
        listed = self._store.list(cid)
        entries = [
            Entry(below or _last(path) or cid, ContentRef(file), size, index)
            for item, file, size in listed
            if (below := _below(item, path)) is not None
        ]
        if path and not entries and f"{path}/" not in {item for item, _, _ in listed}:
            some = ", ".join(shown(item) for item, _, _ in listed[:5]) or "nothing"
            raise ContentError(f"there is no {shown(path)} in {cid}, which holds {some}")
        return entries

    async def fetch(self, entries: Sequence[Entry], *, access: Access, told: Told) -> None:
        """Nothing is brought from elsewhere in this version."""

    def open(self, reference: Reference, *, scratch: Path) -> Path:
        """The store's own file where it has one, else one written to `scratch` (once for each CID)."""
        cid = _cid(reference)
        path = self._store.file(cid)
        if path is None:
            path = scratch / cid
            if not path.exists():  # an export appears whole or not at all
                scratch.mkdir(parents=True, exist_ok=True)
                self._store.export(cid, path)
        return path

    def check(self, reference: Reference) -> None:
        """Content by CID cannot change, but the store's file that was handed out can: it is looked at again."""
        if isinstance(reference, ContentRef):
            self._store.file(reference.cid)


def _split(source: str) -> tuple[str, str]:
    cid, _, path = source.removeprefix(_SCHEME).partition("/")
    return str(Cid.parse(cid)), path.strip("/")


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
