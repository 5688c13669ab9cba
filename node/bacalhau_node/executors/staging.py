"""Files into and out of the folder that a slot's container sees.

Theory of operation (DESIGN section 6). A container's mounts are fixed when it is made, long
before anyone knows which files its shards will get. So every slot has one folder on the
store's file system, bound into its container, and each shard's files are put there when the
slot becomes free. Four ways, the cheapest that works for the file:

1. a hard link: nothing is copied, the mount is read-only, so the original is safe;
2. a reflink (`FICLONE`): another file system object over the same blocks, copied on write;
3. a copy, up to `COPY_LIMIT` bytes;
4. a link to the file below a root that the job's containers have bound read-only.

Whether a hard link helps depends on who reads: a node that runs as root starts containers as
another user, for whom the file's mode has to allow it; if it does not, the file is copied.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from bacalhau_node.errors import BugError, ContentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bacalhau_node.ports import StagedFile

MAX_LEVELS: Final = 128
"""Folders in each other that a shard may leave: as many as are stored."""

COPY_LIMIT: Final = 64 * 1024 * 1024
"""Largest file that is copied for a shard: a third of a second on a slow disk (DESIGN section 6)."""
_FICLONE: Final = 0x40049409
_NO_LINK: Final = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)
"""Answers that mean "not by a hard link here": other file system, not ours, too many links already."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads the staged files: the user that the container runs as, seen from this machine."""

    uid: int
    gid: int

    def may_read(self, status: os.stat_result) -> bool:
        """Whether this user may read a file of this status."""
        if status.st_uid == self.uid:
            return bool(status.st_mode & 0o400)
        if status.st_gid == self.gid:
            return bool(status.st_mode & 0o040)
        return bool(status.st_mode & 0o004)


class NeedsRoot(Exception):
    """`file` can be neither linked nor copied: the containers of its job must have its root bound."""

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self.file = file


def stage(
    files: Iterable[StagedFile], places: Mapping[str, Path], reader: Reader, *, roots: Mapping[Path, str] | None = None
) -> None:
    """Put every file where its `mount` says, seen through `places`: mount target -> folder on this machine.

    `roots` are folders that the container has bound: path -> where they lie in it. Raises
    `NeedsRoot` without touching the file, `ContentError` for one that can't be read.
    """
    made: set[Path] = set()
    for file in files:
        target = locate(file.mount, places)
        folder = target if file.mount.endswith("/") else target.parent
        if folder not in made:
            _folders(folder, places.values())
            made.add(folder)
        if not file.mount.endswith("/"):
            _place(file.path, target, reader, limit=COPY_LIMIT, roots=roots)


def locate(mount: str, places: Mapping[str, Path]) -> Path:
    """The path on this machine behind the path `mount` in the container."""
    path = PurePosixPath(mount)
    if ".." in path.parts:
        raise BugError(f"a shard's file is to lie at {mount!r}, which leads out of its folder")
    for prefix in sorted(places, key=len, reverse=True):
        if path.is_relative_to(prefix):
            return places[prefix] / path.relative_to(prefix)
    raise BugError(f"a shard's file is to lie at {mount!r}, and the container has only {sorted(places)} for files")


def mirror(source: Path, target: Path, reader: Reader) -> None:
    """A copy of the small tree `source` at `target`, by hard links where possible."""
    _folder(target)
    for folder, folders, names in os.walk(source):
        below = target / Path(folder).relative_to(source)
        for name in folders:
            _folder(below / name)
        for name in names:
            _place(Path(folder, name), below / name, reader)


def clear(folder: Path) -> None:
    """Remove everything in `folder`, which itself stays: it is bound into a container."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def destroy(folder: Path) -> None:
    """Remove `folder` whose container is gone, whatever modes the shard gave to what it left there."""
    left = [folder] if folder.exists() else []
    while left:
        each = left.pop()
        each.chmod(0o700)
        left += [path for path in each.iterdir() if path.is_dir() and not path.is_symlink()]
    shutil.rmtree(folder, ignore_errors=True)


def take_out(folder: Path, target: Path) -> Path | None:
    """Move what a shard left in `folder` to the new folder `target`; None when it left nothing. Raises `OSError`.

    Only what is no folder is moved, into folders made anew: a process that outlived its shard may hold those of its
    own open, and would change what is in them, into a link to a file of this machine, while it is read.
    """
    if not any(True for _ in folder.iterdir()):
        return None
    target.mkdir(parents=True)
    with _opened(folder) as source, _opened(target) as fresh:
        _move_out(source, fresh, levels=MAX_LEVELS)
    return target


def _move_out(source: int, target: int, *, levels: int) -> None:
    """Move from one open folder to another; each step is by name in a folder that is held, and follows no link."""
    if not levels:
        raise OSError(errno.ELOOP, f"its folders are over {MAX_LEVELS} levels deep")
    with os.scandir(source) as scan:
        entries = list(scan)
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            os.rename(entry.name, entry.name, src_dir_fd=source, dst_dir_fd=target)
            continue
        os.mkdir(entry.name, dir_fd=target)
        with _opened(entry.name, source) as inner, _opened(entry.name, target) as fresh:
            _move_out(inner, fresh, levels=levels - 1)
        os.rmdir(entry.name, dir_fd=source)


@contextmanager
def _opened(name: str | Path, folder: int | None = None) -> Iterator[int]:
    """A folder by its descriptor; never what a link leads to."""
    handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        yield handle
    finally:
        os.close(handle)


def unfit(outputs: Path) -> str | None:
    """What in the outputs is neither a file, nor a folder, nor a link to one inside: a sentence, or None."""
    root = outputs.resolve()
    for base, folders, names in os.walk(outputs):
        for name in (*folders, *names):
            path = Path(base, name)
            shown = f"outputs/{path.relative_to(outputs)}"
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                return f"{shown} is a link to {path.readlink()}, outside of outputs: copy the file instead"
            if not path.is_symlink() and not path.is_file() and not path.is_dir():
                return f"{shown} is neither a file nor a folder: remove it before the cell ends"
    return None


def used(folder: Path) -> int:
    """Bytes on the disk below `folder`; files that vanish meanwhile count nothing."""
    total, left = 0, [str(folder)]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue
    return total


def _place(
    source: Path, target: Path, reader: Reader, *, limit: int | None = None, roots: Mapping[Path, str] | None = None
) -> None:
    """Show `source` at `target`: by a link, else a copy of up to `limit` bytes (None: any), else through a root."""
    try:
        real = source.resolve() if source.is_symlink() else source
        status = real.stat()
        if (reader.may_read(status) and _link(real, target)) or _clone(real, target):
            return
        if limit is None or status.st_size <= limit:
            _copy(real, target)
            return
    except OSError as error:
        raise ContentError(f"{source} can't be given to the shard: {error.strerror}") from error
    if not reader.may_read(status):
        raise ContentError(
            f"{source} may not be read by user {reader.uid}, as whom the shard runs, and is too large to copy "
            f"({status.st_size} bytes): `chmod a+r` it"
        )
    for root, inside in (roots or {}).items():
        if source.is_relative_to(root):
            target.symlink_to(f"{inside}/{source.relative_to(root)}")
            return
    raise NeedsRoot(source)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    return True


def _clone(source: Path, target: Path) -> bool:
    with source.open("rb") as reading, target.open("xb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
        except OSError:
            target.unlink()
            return False
        os.fchmod(writing.fileno(), 0o644)
    return True


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    target.chmod(0o644)


def _folders(folder: Path, places: Iterable[Path]) -> None:
    """Make `folder` and what is missing above it, readable for the container whatever the umask is."""
    missing = []
    known = set(places)
    while folder not in known and not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        _folder(each)


def _folder(path: Path) -> None:
    path.mkdir()
    path.chmod(0o755)
