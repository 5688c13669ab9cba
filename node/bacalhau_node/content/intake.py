"""Taking files and folders into the store: copied, or taken over where they lie.

Theory of operation. A regular file over `INLINE` bytes stays one file: it is hashed where it lies, then gets a
second name (a hard link) in the store, then the index learns of it, and only when the whole import is
in the index are the names outside removed. A process that dies in between leaves the source as it was
and a store whose index is true; the same import, repeated, finds what is there. A
copy differs only in what is hashed: the store's own new copy, so a source that changes meanwhile does no harm.

Blocks are indexed before whatever links to them: a root in the index has everything below it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Final

from bacalhau_node.cid import Cid
from bacalhau_node.content.dagpb import leaf_overhead
from bacalhau_node.content.index import Block, Index, OwnedFile, Slice, Stamp
from bacalhau_node.content.unixfs import Imported, Profile, import_file, import_folder
from bacalhau_node.errors import ContentError

INLINE: Final = 4096
"""Blocks and whole files up to this size live in the index: a page of it is cheaper than a file."""

_BATCH = 2000  # rows a transaction: some milliseconds for whoever waits


class Files:
    """The store's folders: `blocks/` (one file a block), `files/` (whole files), `tmp/` (half-made ones)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._boot = _boot()
        (folder / "tmp").mkdir(parents=True, exist_ok=True)

    def block_path(self, digest: bytes) -> Path:
        """Where a block of its own lies."""
        name = digest.hex()
        return self.folder / "blocks" / name[:2] / name

    def file_path(self, root: bytes) -> Path:
        """Where the whole file with this root (binary CIDv1) lies."""
        name = str(Cid(root))
        return self.folder / "files" / name[-2:] / name

    def write_block(self, digest: bytes, data: bytes) -> None:
        """Put a block where it belongs, whole or not at all."""
        path = self.block_path(digest)
        if _size(path) == len(data):
            return
        temporary = self.temporary()
        temporary.write_bytes(data)
        self._place(temporary, path)

    def adopt(self, source: Path, path: Path, *, move: bool) -> None:
        """Give `source` the name `path` in the store: its only one (`move`), or a second one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if move:
            source.replace(path)
            return
        second = self.temporary()
        second.hardlink_to(source)
        second.replace(path)

    def temporary(self) -> Path:
        """A new name in `tmp/`."""
        return self.folder / "tmp" / uuid.uuid4().hex

    def stamp(self, path: Path) -> Stamp | None:
        """What the file at `path` looks like now; None when it is gone."""
        try:
            status = path.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        return Stamp(status.st_size, status.st_mtime_ns, status.st_ino, self._boot)

    def _place(self, temporary: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(path)


class Intake:
    """One import: collects rows and writes them in order, some thousand a transaction."""

    def __init__(self, index: Index, files: Files, *, profile: Profile, move: bool) -> None:
        self._index, self._files, self._profile, self._move = index, files, profile, move
        self._blocks: list[Block] = []
        self._owned: list[OwnedFile] = []

    def add(self, path: Path) -> Imported:
        """Import the file or folder at `path`; with `move` it is gone afterwards."""
        if path.is_dir():
            root = import_folder(path, self.sink, profile=self._profile, hidden=True, add_file=self._add_file)
        else:
            root = self._add_file(path)
        self._write()
        if self._move:
            _remove(path)
        return root

    def sink(self, cid: bytes, block: bytes) -> None:
        """Take a block that has no file to lie in."""
        digest = cid[-32:]
        inline = len(block) <= INLINE
        if not inline:
            self._files.write_block(digest, block)
        self._append(Block(digest, len(block), block if inline else None))

    def _add_file(self, path: Path) -> Imported:
        status = path.stat()
        if status.st_size <= INLINE:
            return import_file(path, self.sink, profile=self._profile)
        if self._move and status.st_nlink == 1 and status.st_dev == self._files.folder.stat().st_dev:
            return self._own(path, move=False)
        copy = self._files.temporary()
        try:
            _copy(path, copy)
            return self._own(copy, move=True)
        finally:
            copy.unlink(missing_ok=True)

    def _own(self, source: Path, *, move: bool) -> Imported:
        """Hash `source`, give it its place in the store, and note its blocks as slices of it."""
        before = self._files.stamp(source)
        leaves: list[tuple[bytes, int, int]] = []
        nodes: list[tuple[bytes, bytes]] = []
        got = import_file(
            source,
            lambda cid, block: nodes.append((cid, block)),
            profile=self._profile,
            leaf=lambda cid, at, length: leaves.append((cid, at, length)),
        )
        root = Cid(got.cid).v1().binary
        path = self._files.file_path(root)
        known = self._index.file(root)
        if known is None or known.stamp != self._files.stamp(path):
            self._files.adopt(source, path, move=move)
            stamp = self._files.stamp(path)
            if stamp is None or stamp != before:
                raise ContentError(f"{source} changed while it was imported: try again when nothing writes to it")
            path.chmod(0o444)
            self._owned.append(OwnedFile(root, stamp))
        self._note(root, leaves)
        for cid, block in nodes:
            self.sink(cid, block)
        return got

    def _note(self, root: bytes, leaves: list[tuple[bytes, int, int]]) -> None:
        around = 0
        for cid, at, length in leaves:
            if not self._profile.raw_leaves:
                around = leaf_overhead(length)
            self._append(Block(cid[-32:], length + around, None, Slice(root, at, length)))

    def _append(self, block: Block) -> None:
        self._blocks.append(block)
        if len(self._blocks) >= _BATCH:
            self._write()

    def _write(self) -> None:
        self._index.write(self._blocks, files=self._owned)
        self._blocks, self._owned = [], []


def _copy(source: Path, target: Path) -> None:
    """Copy bytes; where the file system can, by sharing them (`copy_file_range` makes reflinks)."""
    try:
        with source.open("rb") as reader, target.open("xb") as writer:
            while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
                pass
    except (OSError, AttributeError):  # other file systems, kernels and systems: plain bytes
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
