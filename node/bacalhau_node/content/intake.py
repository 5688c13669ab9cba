"""Taking files and folders into the store: copied, or taken over where they lie.

Theory of operation. A regular file over `INLINE` bytes stays one file: it gets a second name (a hard link) in
`tmp/`, is hashed, renamed to its place, and then the index learns of it; only when the whole import is
in the index are the names outside removed. A process that dies in between leaves the source as it was
and a store whose index is true; the same import, repeated, finds what is there. What
is to stay outside, or has more names there, is copied first, and the copy is what is hashed.

Blocks are indexed before whatever links to them: a root in the index has everything below it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import Final

from bacalhau_node.cid import Cid
from bacalhau_node.content.dagpb import leaf_overhead
from bacalhau_node.content.index import Block, Index, OwnedFile, Slice, Stamp
from bacalhau_node.content.unixfs import READ_FLAGS, Imported, Profile, changed, import_file, import_folder, unreadable

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
        if _holds(path, data):
            return
        temporary = self.temporary()
        try:
            temporary.write_bytes(data)
            self.place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # what a full disk left half-written

    def place(self, made: Path, path: Path) -> None:
        """Give a finished file its name in the store, over whatever has it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        made.chmod(0o444)  # whoever gets a link to it should not write to it by mistake
        made.replace(path)

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


class Intake:
    """One import: collects rows and writes them in order, some thousand a transaction."""

    def __init__(self, index: Index, files: Files, *, profile: Profile, move: bool) -> None:
        self._index, self._files, self._profile, self._move = index, files, profile, move
        self._blocks: list[Block] = []
        self._owned: list[OwnedFile] = []

    def add(self, path: Path) -> Imported:
        """Import the file or folder at `path`; with `move` it is gone afterwards."""
        try:
            folder = stat.S_ISDIR(path.lstat().st_mode)
            if folder:
                root = import_folder(path, self.sink, profile=self._profile, hidden=True, add_file=self._add_file)
            else:
                root = self._add_file(path)
            self._write()
            if self._move:
                shutil.rmtree(path) if folder else path.unlink()
        except OSError as error:
            raise unreadable(path, error) from error
        return root

    def sink(self, cid: bytes, block: bytes) -> None:
        """Take a block that has no file to lie in."""
        digest = cid[-32:]
        inline = len(block) <= INLINE
        if not inline:
            self._files.write_block(digest, block)
        self._append(Block(digest, len(block), block if inline else None))

    def _add_file(self, path: Path) -> Imported:
        status = path.lstat()
        if status.st_size <= INLINE or not stat.S_ISREG(status.st_mode):  # what is no file is refused there
            return import_file(path, self.sink, profile=self._profile)
        held = self._files.temporary()
        try:
            self._hold(path, held, links=status.st_nlink)
            return self._own(path, held)
        finally:
            held.unlink(missing_ok=True)

    def _hold(self, path: Path, held: Path, *, links: int) -> None:
        """Make `held` the same file as `path`, or a copy where it has other names, lies elsewhere, or is to stay."""
        if self._move and links == 1:
            with contextlib.suppress(OSError):  # another disk, or one without hard links
                held.hardlink_to(path)
                return
        _copy(path, held)

    def _own(self, path: Path, held: Path) -> Imported:
        """Hash the file `held`, give it its place in the store, and note its blocks as slices of it."""
        stamp = self._files.stamp(held)
        leaves: list[tuple[bytes, int, int]] = []
        nodes: list[tuple[bytes, bytes]] = []
        got = import_file(
            held,
            lambda cid, block: nodes.append((cid, block)),
            profile=self._profile,
            leaf=lambda cid, at, length: leaves.append((cid, at, length)),
        )
        if stamp is None or self._files.stamp(held) != stamp:
            raise changed(path)
        root = Cid(got.cid).v1().binary
        self._files.place(held, self._files.file_path(root))  # one that is there may be damaged: the new one is not
        self._owned.append(OwnedFile(root, stamp))
        for cid, at, length in leaves:
            around = 0 if self._profile.raw_leaves else leaf_overhead(length)
            self._append(Block(cid[-32:], length + around, None, Slice(root, at, length)))
        for cid, block in nodes:
            self.sink(cid, block)
        return got

    def _append(self, block: Block) -> None:
        self._blocks.append(block)
        if len(self._blocks) >= _BATCH:
            self._write()

    def _write(self) -> None:
        self._index.write(self._blocks, files=self._owned)
        self._blocks, self._owned = [], []


def _copy(source: Path, target: Path) -> None:
    """Copy bytes; where the file system can, by sharing them (`copy_file_range` makes reflinks)."""
    with os.fdopen(os.open(source, READ_FLAGS), "rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        before = os.fstat(reader.fileno())
        with contextlib.suppress(OSError, AttributeError):  # not between these file systems, or not on this one
            while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
                pass
        shutil.copyfileobj(reader, writer, 1 << 20)  # what is left, perhaps all of it
        after = os.fstat(reader.fileno())
        written = os.fstat(writer.fileno()).st_size
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise changed(source)
    if written != after.st_size:  # a full disk takes a part of the last write, and says so at the next one only
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
