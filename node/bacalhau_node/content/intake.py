"""Taking files and folders into the store: copied, taken over, or read where they lie.

Theory of operation. A regular file over `INLINE` bytes stays one file: it gets a second name (a hard link) in
the session's folder, is hashed, and gets its place in the very transaction that writes its rows; only when the whole
import is in the index are the names outside removed. A process that dies in between leaves the source as it was
and a store whose index is true; the same import, repeated, finds what is there. What
is to stay outside, or has more names there, is copied first, and the copy is what is hashed. A **linked**
file is hashed where it lies, and its stamp is kept to tell when it has changed.

Blocks are indexed before whatever links to them: a root in the index has everything below it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

from bacalhau_node.cid import DAG_PB, RAW, Cid, binary_prefix
from bacalhau_node.content.dagpb import has_links, leaf_overhead
from bacalhau_node.content.index import Block, Index, Slice, Stamp, WholeFile
from bacalhau_node.content.session import Session
from bacalhau_node.content.unixfs import READ_FLAGS, Imported, Profile, changed, import_file, import_folder, unreadable

INLINE: Final = 4096
"""Blocks and whole files up to this size live in the index: a page of it is cheaper than a file."""

How = Literal["copy", "move", "link"]

_BATCH = 2000  # rows a transaction: some milliseconds for whoever waits
_PLACES = 200  # files that get their place in one transaction
_RAW = binary_prefix(RAW, version=1)

Places = list[tuple[Path, Path]]
"""Finished files in the session's folder, and where they belong."""


class Files:
    """The store's folders: `blocks/` (one file a block), `files/` (whole files), `tmp/` (what sessions work at)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.session = Session(folder / "tmp")
        self._boot = _boot()

    def block_path(self, digest: bytes) -> Path:
        """Where a block of its own lies."""
        name = digest.hex()
        return self.folder / "blocks" / name[:2] / name

    def read_block(self, digest: bytes) -> bytes:
        """The bytes of a block of its own, unchecked; raises `OSError`."""
        return self.block_path(digest).read_bytes()

    def file_path(self, root: bytes) -> Path:
        """Where the store's own whole file with this root (binary CIDv1) lies."""
        name = str(Cid(root))
        return self.folder / "files" / name[-2:] / name

    def path(self, file: WholeFile) -> Path:
        """Where a whole file lies."""
        return file.path or self.file_path(file.root)

    def write_block(self, digest: bytes, data: bytes, places: Places) -> None:
        """Write a block to a temporary file, and note where it belongs."""
        made = self.session.temporary()
        places.append((made, self.block_path(digest)))
        made.write_bytes(data)

    def stamp(self, file: WholeFile) -> Stamp | None:
        """What a whole file looks like now; None when it is gone."""
        try:
            status = self.path(file).stat(follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return self.stamp_of(status, linked=file.path is not None)

    def stamp_of(self, status: os.stat_result, *, linked: bool) -> Stamp:
        """What `status` says of a file."""
        device = status.st_dev if linked else 0
        return Stamp(status.st_size, status.st_mtime_ns, status.st_ino, self._boot, device)


def place(places: Iterable[tuple[Path, Path]]) -> None:
    """Give finished files their names in the store, over whatever has them: one that is there may be damaged."""
    for made, path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.chmod(0o444)  # whoever gets a link to it should not write to it by mistake
        made.replace(path)


def discard(places: Iterable[tuple[Path, Path]]) -> None:
    """Remove those that have not got their place, such as what a full disk left half-written."""
    for made, _ in places:
        made.unlink(missing_ok=True)


class Intake:
    """One import: collects rows and files and writes them in order, some thousand a transaction."""

    def __init__(self, index: Index, files: Files, *, profile: Profile, how: How) -> None:
        self._index, self._files, self._profile, self._how = index, files, profile, how
        self._blocks: list[Block] = []
        self._whole: list[WholeFile] = []
        self._places: Places = []
        self.size = 0
        """Bytes that were stored so far, without those of linked files."""

    def add(self, path: Path) -> Imported:
        """Import the file or folder at `path`; a moved one is gone afterwards."""
        try:
            folder = stat.S_ISDIR(path.lstat().st_mode)
            if folder:
                root = import_folder(path, self.sink, profile=self._profile, hidden=True, add_file=self._add_file)
            else:
                root = self._add_file(path)
            self._write()
            if self._how == "move":
                shutil.rmtree(path) if folder else path.unlink()
        except OSError as error:
            raise unreadable(path, error) from error
        finally:
            discard(self._places)
        return root

    def sink(self, cid: bytes, block: bytes) -> None:
        """Take a block that has no file to lie in."""
        digest = cid[-32:]
        inline = len(block) <= INLINE
        if not inline:
            self._files.write_block(digest, block, self._places)
        self.size += len(block)
        codec = DAG_PB if cid[:-32] != _RAW and has_links(block) else RAW
        self._append(Block(digest, len(block), block if inline else None, codec=codec))

    def _add_file(self, path: Path) -> Imported:
        status = path.lstat()
        if status.st_size <= INLINE or not stat.S_ISREG(status.st_mode):  # what is no file is refused there
            return import_file(path, self.sink, profile=self._profile)
        if self._how == "link":
            return self._hash(path, path, WholeFile(b"", self._files.stamp_of(status, linked=True), path.absolute()))
        held = self._files.session.temporary()
        try:
            self._hold(path, held, links=status.st_nlink)
            stamp = self._files.stamp_of(held.lstat(), linked=False)
            return self._hash(path, held, WholeFile(b"", stamp))
        except BaseException:
            held.unlink(missing_ok=True)
            raise

    def _hold(self, path: Path, held: Path, *, links: int) -> None:
        """Make `held` the same file as `path`, or a copy where it has other names, lies elsewhere, or is to stay."""
        if self._how == "move" and links == 1:
            with contextlib.suppress(OSError):  # another disk, or one without hard links
                held.hardlink_to(path)
                return
        _copy(path, held)

    def _hash(self, path: Path, held: Path, file: WholeFile) -> Imported:
        """Hash `held`, which is the file at `path` or a copy of it, and note its blocks as slices of it."""
        linked = file.path is not None
        leaves: list[tuple[bytes, int, int]] = []
        nodes: list[tuple[bytes, bytes]] = []
        got = import_file(
            held,
            lambda cid, block: nodes.append((cid, block)),
            profile=self._profile,
            leaf=lambda cid, at, length: leaves.append((cid, at, length)),
        )
        if self._files.stamp_of(held.lstat(), linked=linked) != file.stamp:
            raise changed(path)
        root = Cid(got.cid).v1().binary
        if not linked:
            self._places.append((held, self._files.file_path(root)))
            self.size += got.size
        self._whole.append(WholeFile(root, file.stamp, file.path))
        for cid, at, length in leaves:
            around = 0 if self._profile.raw_leaves else leaf_overhead(length)
            self._append(Block(cid[-32:], length + around, None, Slice(root, at, length, linked)))
        for cid, block in nodes:
            self.sink(cid, block)
        return got

    def _append(self, block: Block) -> None:
        self._blocks.append(block)
        if len(self._blocks) >= _BATCH or len(self._places) >= _PLACES:
            self._write()

    def _write(self) -> None:
        self._index.write(self._blocks, files=self._whole, place=lambda: place(self._places))
        self._blocks, self._whole, self._places = [], [], []


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


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
