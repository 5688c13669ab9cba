"""The store's own files: where they lie, how they get there, and what they look like."""

# ruff: noqa: PTH101, PTH103, PTH105, PTH108, PTH120 - a `Path` takes as long to make as the system call that it is for
from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from bacalhau_node.cid import Cid
from bacalhau_node.content.index import Stamp, WholeFile
from bacalhau_node.content.session import Session
from bacalhau_node.content.unixfs import READ_FLAGS

Places = list[tuple[str, str]]
"""Finished files in the session's folder, and where they belong."""

_FICLONE: Final = 0x40049409
"""Linux's request for a file that shares the bytes of another one on disk."""


class Files:
    """The store's folders: `blocks/` (one file a block), `files/` (whole files), `tmp/` (what sessions work at)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.session = Session(folder / "tmp")
        self._boot = _boot()

    def block_path(self, digest: bytes) -> str:
        """Where a block of its own lies."""
        name = digest.hex()
        return f"{self.folder}/blocks/{name[:2]}/{name}"

    def read_block(self, digest: bytes) -> bytes:
        """The bytes of a block of its own, unchecked; raises `OSError`."""
        return Path(self.block_path(digest)).read_bytes()

    def file_path(self, root: bytes) -> str:
        """Where the store's own whole file with this root (binary CIDv1) lies."""
        name = str(Cid(root))
        return f"{self.folder}/files/{name[-2:]}/{name}"

    def path(self, file: WholeFile) -> Path:
        """Where a whole file lies."""
        return file.path or Path(self.file_path(file.root))

    def write_block(self, digest: bytes, data: bytes, places: Places) -> None:
        """Write a block to a temporary file, and note where it belongs."""
        made = self.session.temporary()
        places.append((made, self.block_path(digest)))
        Path(made).write_bytes(data)

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


def place(places: Iterable[tuple[str, str]]) -> None:
    """Give finished files their names in the store, over whatever has them: one that is there may be damaged."""
    for made, path in places:
        os.chmod(made, 0o444)  # whoever gets a link to it should not write to it by mistake
        try:
            os.replace(made, path)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.replace(made, path)


def discard(half_made: Iterable[str]) -> None:
    """Remove files that have not got their place, such as what a full disk left half-written."""
    for made in half_made:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)


def clone(path: str, target: int) -> bool:
    """Make the open file `target` share all bytes of the one at `path`; False where the file system can't."""
    source = os.open(path, READ_FLAGS)
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    finally:
        os.close(source)
    return True


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
