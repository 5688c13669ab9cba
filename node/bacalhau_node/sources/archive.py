"""Archives as folders: an input with `unpack` is listed as what is in it.

An input that is itself an archive, whatever it is called, is the folder in it; one in a folder, known by its suffix, is
a folder with its name. What it unpacks to (see `unpacking`) goes into the content store, and shards get its files by
CID; which folder that was is remembered by the archive's own version, so it is unpacked once.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.fetched import Fetched
from bacalhau_node.ports import Access, ContentStore, Source
from bacalhau_node.sharding import ContentRef, Doubtful, Entry, shown
from bacalhau_node.sources.limits import Limits
from bacalhau_node.spec import InputSource

SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")


class Unpacker:
    """Lists inputs with `unpack`; made on the loop. `folder`: for members on their way, on the store's file system."""

    def __init__(self, content: ContentStore, *, fetched: Fetched, folder: Path, limits: Limits | None = None) -> None:
        self._content, self._fetched, self._folder, self._limits = content, fetched, folder, limits or Limits()
        self._loop = asyncio.get_running_loop()

    def list(self, listed_by: Source, source: InputSource, *, index: int, access: Access) -> list[Entry]:
        """The files of `source`, with what is in archives in their place; raises `ContentError`, `SpecError`.

        From a thread: the archives are fetched by their own source.
        """
        entries = listed_by.list(source, index=index)
        alone = len(entries) == 1 and "/" not in entries[0].path
        packed = entries if alone else [entry for entry in entries if entry.path.lower().endswith(SUFFIXES)]
        if not packed:
            raise SpecError(f"--input {shown(source.source)}: unpack, but no file in it ends in {', '.join(SUFFIXES)}")
        if doubts := [entry.problem for entry in packed if isinstance(entry, Doubtful)]:
            raise ContentError("; ".join(doubts))
        missing = [entry for entry in packed if self._known(entry) is None]
        fetching = listed_by.fetch(missing, access=access, told=_nobody)
        asyncio.run_coroutine_threadsafe(fetching, self._loop).result()
        found = [entry for entry in entries if entry not in packed]
        for entry in packed:
            found += self._members(listed_by, entry, "" if alone else f"{entry.path}/")
        return sorted(found, key=lambda entry: os.fsencode(entry.path))

    def _members(self, source: Source, entry: Entry, below: str) -> Iterator[Entry]:
        cid = self._known(entry) or self._unpack(source, entry)
        for path, file, size in self._content.list(cid):
            yield Entry(below + path, ContentRef(file), size, entry.source)

    def _known(self, entry: Entry) -> str | None:
        """The folder that this very archive was unpacked to."""
        cid = self._fetched.recall(*_key(entry))
        return cid if cid is not None and self._content.has(cid) else None

    def _unpack(self, source: Source, entry: Entry) -> str:
        scratch = self._folder / f"unpack-{uuid.uuid4().hex}"
        scratch.mkdir(parents=True)
        try:
            root = scratch / "unpacked"
            packed = source.open(entry.reference, scratch=scratch)
            unpacking = importlib.import_module("bacalhau_node.sources.unpacking")  # when there is something to unpack
            unpacking.unpack(packed, root, name=entry.path, limits=self._limits)
            source.check(entry.reference)
            cid = self._content.add_path(root, move=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._fetched.remember(*_key(entry), cid)
        return cid


def _key(entry: Entry) -> tuple[str, str]:
    """What `Fetched` calls the folder in an archive."""
    return f"unpack:{entry.reference!a}", ""


def _nobody(_name: str, _done: int, _total: int | None, _cid: str) -> None:
    """Nobody watches a listing."""
