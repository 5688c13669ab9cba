"""Taking files and folders into the store: copied, taken over, or read where they lie.

Theory of operation. A regular file over `INLINE` bytes stays one file: it gets a second name (a hard link) in
the session's folder, is hashed, and gets its place in the very transaction that writes its rows; only when the whole
import is in the index are the names outside removed. A process that dies in between leaves the source as it was
and a store whose index is true; the same import, repeated, finds what is there. What
is to stay outside, or has more names there, is copied: what is hashed is what was written. A **linked**
file is hashed where it lies, and its stamp is kept to tell when it has changed.

Files that are not small are read, hashed and copied in several threads; one thread notes what they gave, in the order
of the folder.

Blocks are indexed before whatever links to them: a root in the index has everything below it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

from bacalhau_node.cid import DAG_PB, RAW, Cid, binary_prefix
from bacalhau_node.content.dagpb import has_links, leaf_overhead
from bacalhau_node.content.files import Files, Places, clone, discard, place
from bacalhau_node.content.index import Block, Index, Slice, Stamp, WholeFile
from bacalhau_node.content.unixfs import (
    Finish,
    Imported,
    Leaf,
    Profile,
    changed,
    import_file,
    import_folder,
    import_leaves,
    unreadable,
)

INLINE: Final = 4096
"""Blocks and whole files up to this size live in the index: a page of it is cheaper than a file."""

How = Literal["copy", "move", "link"]

_BATCH = 2000  # rows a transaction: some milliseconds for whoever waits
_PLACES = 200  # files that get their place in one transaction
_RAW = binary_prefix(RAW, version=1)


class Intake:
    """One import: collects rows and files and writes them in order, some thousand a transaction."""

    def __init__(self, index: Index, files: Files, *, profile: Profile, how: How) -> None:
        self._index, self._files, self._profile, self._how = index, files, profile, how
        self._blocks: list[Block] = []
        self._whole: list[WholeFile] = []
        self._places: Places = []
        self._half_made: set[str] = set()
        self._clones = how == "copy"  # until one fails: mostly all lie on one file system
        self.size = 0
        """Bytes that were stored so far, without those of linked files."""

    def add(self, path: Path) -> Imported:
        """Import the file or folder at `path`; a moved one is gone afterwards."""
        try:
            status = path.lstat()
            folder = stat.S_ISDIR(status.st_mode)
            if folder:
                root = import_folder(path, self.sink, profile=self._profile, hidden=True, add_file=self._add_file)
            else:
                root = self._add_file(str(path), status)()
            self._write()
            if self._how == "move":
                shutil.rmtree(path) if folder else path.unlink()
        except OSError as error:
            raise unreadable(path, error) from error
        finally:
            discard(self._half_made)
        return root

    def adopt(self, held: str, hashed: Hashed) -> Imported:
        """Import a file of the session's folder that was hashed as it was written; it is gone from there afterwards."""
        self._half_made.add(held)
        try:
            file = WholeFile(b"", self._files.stamp_of(os.lstat(held), linked=False))
            root = self._note(hashed, file, held)
            self._write()
        finally:
            discard(self._half_made)
        return root

    def sink(self, cid: bytes, block: bytes) -> None:
        """Take a block that has no file to lie in."""
        digest = cid[-32:]
        inline = len(block) <= INLINE
        if not inline:
            self._files.write_block(digest, block, self._places)
            self._half_made.add(self._places[-1][0])
        self.size += len(block)
        codec = DAG_PB if cid[:-32] != _RAW and has_links(block) else RAW
        self._append(Block(digest, len(block), block if inline else None, codec=codec))

    def _add_file(self, path: str, status: os.stat_result) -> Finish:
        """Take a file, in any thread; its rows are noted by what is returned."""
        if status.st_size <= INLINE or not stat.S_ISREG(status.st_mode):  # what is no file is refused there
            return lambda: import_file(path, self.sink, profile=self._profile)
        hashed = Hashed(self._profile)
        if self._how == "link":
            hashed.take(path)
            stamp = self._unchanged(path, path, status)
            return lambda: self._note(hashed, WholeFile(b"", stamp, Path(path).absolute()), "")
        held = self._files.session.temporary()
        self._half_made.add(held)
        if self._how == "move" and status.st_nlink == 1 and _second_name(path, held):
            hashed.take(held)
            stamp = self._unchanged(path, held, status)
        else:
            self._copy(path, held, hashed)
            stamp = self._files.stamp_of(os.lstat(held), linked=False)
        return lambda: self._note(hashed, WholeFile(b"", stamp), held)

    def _copy(self, path: str, held: str, hashed: Hashed) -> None:
        """Hash a copy of the file at `path`; where the file system can, one that shares the bytes on disk."""
        target = os.open(held, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._clones = cloned = self._clones and clone(path, target)
            hashed.take(held if cloned else path, copy=None if cloned else target)
        finally:
            os.close(target)

    def _unchanged(self, path: str, held: str, before: os.stat_result) -> Stamp:
        """The stamp of a file that is what it was before it was hashed; raises `ContentError` for another one."""
        linked = self._how == "link"
        stamp = self._files.stamp_of(before, linked=linked)
        if self._files.stamp_of(os.lstat(held), linked=linked) != stamp:
            raise changed(path)
        return stamp

    def _note(self, hashed: Hashed, file: WholeFile, held: str) -> Imported:
        """Note the blocks of a file as slices of it; `held` is the store's own file, if it has one."""
        got, linked = hashed.root, file.path is not None
        root = Cid(got.cid).v1().binary
        self._whole.append(WholeFile(root, file.stamp, file.path))
        if not linked:
            self._places.append((held, self._files.file_path(root)))
            self.size += got.size
        for cid, at, length in hashed.leaves:
            around = 0 if self._profile.raw_leaves else leaf_overhead(length)
            self._append(Block(cid[-32:], length + around, None, Slice(root, at, length, linked)))
        for cid, block in hashed.nodes:
            self.sink(cid, block)
        return got

    def _append(self, block: Block) -> None:
        self._blocks.append(block)
        if len(self._blocks) >= _BATCH or len(self._places) >= _PLACES:
            self._write()

    def _write(self) -> None:
        self._index.write(self._blocks, files=self._whole, place=lambda: place(self._places))
        self._half_made.difference_update(made for made, _ in self._places)
        self._blocks, self._whole, self._places = [], [], []


class Hashed:
    """What hashing a file gave."""

    root: Imported

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.leaves: list[tuple[bytes, int, int]] = []
        self.nodes: list[tuple[bytes, bytes]] = []

    def take(self, path: str, *, copy: int | None = None) -> None:
        """Hash the file at `path`, and write its bytes to the open file `copy`."""
        self.root = import_file(path, self._node, profile=self._profile, leaf=self._leaf, copy=copy)

    def join(self, leaves: Iterable[Leaf]) -> None:
        """Take a file whose leaves were hashed as they were written."""
        self.root = import_leaves(leaves, self._node, profile=self._profile, leaf=self._leaf)

    def _node(self, cid: bytes, block: bytes) -> None:
        self.nodes.append((cid, block))

    def _leaf(self, cid: bytes, at: int, length: int) -> None:
        self.leaves.append((cid, at, length))


def _second_name(path: str, held: str) -> bool:
    """Give the file at `path` the name `held` too; False on another disk, or one without hard links."""
    with contextlib.suppress(OSError):
        os.link(path, held, follow_symlinks=False)
        return True
    return False
