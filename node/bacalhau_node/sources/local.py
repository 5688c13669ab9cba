"""Files and folders of this machine, used in place.

Theory of operation. Nothing is read or copied when a folder is listed: each file gets a
**stamp** (size, time, inode, device), and a shard is right only if the stamp is the same
before it starts and after it ends. So terabytes are ready in the time it takes to list them,
and a file that changes under a running job is an error, never a wrong number.

Links are followed as long as they stay below the input: one that leads out would bring files
that nobody named, and may lead to nothing on another day. What is hidden and can't be used is
listed as `Unusable`, an error only for a job that selects it: a `.venv` beside the data, with
its links to the system's Python, is no reason to refuse the data.
"""

# A Path for each of a hundred thousand names would cost more than its stat:
# ruff: noqa: PTH112, PTH114, PTH115, PTH116, PTH118, PTH119, PTH208

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.ports import Access, Told
from bacalhau_node.sharding import Entry, LocalStamp, Reference, Unusable, is_hidden, shown
from bacalhau_node.spec import InputSource

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class LocalSource:
    """`--input /absolute/path`: a folder with all that lies below it, or one file."""

    def claims(self, source: str) -> bool:
        """Whether `source` is an absolute path; relative ones are made absolute where they are typed."""
        return source.startswith("/")

    def list(self, source: InputSource, *, index: int) -> list[Entry]:
        """Every file, and every empty folder as an entry that ends in "/", sorted by the bytes of the path.

        Hidden ones too. Raises `ContentError` naming what is missing, unreadable, not a file, or a
        link that leads out, in a circle or to nothing.
        """
        root = source.source.rstrip("/") or "/"
        if "\0" in root:
            raise SpecError(f"--input {root!r}: a path can't hold a null character")
        if any("\ud800" <= letter <= "\udfff" for letter in root):
            raise SpecError(f"--input {root!r}: its name is not UTF-8, which a job can't carry; name a folder above it")
        try:
            found = os.stat(root)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ContentError(_missing(root)) from error
        except OSError as error:
            raise ContentError(f"{shown(root)} can't be used: {error.strerror}") from error
        if stat.S_ISDIR(found.st_mode):
            entries = list(_Walk(root, index).entries())
            entries.sort(key=lambda entry: os.fsencode(entry.path))
            return entries
        if problem := _file_problem(root, found):
            raise ContentError(problem)
        return [_entry(os.path.basename(root), root, found, index)]

    async def fetch(self, entries: Sequence[Entry], *, access: Access, told: Told) -> None:  # noqa: ARG002 - nothing moves
        """Nothing has to be brought here; raises `ContentError` for anybody's job but one's own."""
        if not access.own and entries:
            raise ContentError(f"{shown(entries[0].path)} lies on its requester's machine, and came here without a CID")

    def open(self, reference: Reference, *, scratch: Path) -> Path:  # noqa: ARG002 - files are used in place
        """The file itself; raises `ContentError` when it is no longer the one that was listed."""
        if not isinstance(reference, LocalStamp):
            raise BugError(f"a local source was asked to open {reference!r}")
        _compare(reference, "after the job was planned")
        return Path(reference.path)

    def check(self, reference: Reference) -> None:
        """Raise `ContentError` if a local file is no longer the one that was listed."""
        if isinstance(reference, LocalStamp):
            _compare(reference, "while the job ran")


@dataclass(frozen=True)
class _Folder:
    """A folder on the way: its path as named, its logical path (ends in "/" or is empty), and where it really is."""

    path: str
    logical: str
    real: str
    parent: _Folder | None

    def holds(self, real: str) -> bool:
        """Whether `real` is this folder or one that was gone through to get here."""
        folder: _Folder | None = self
        while folder is not None and folder.real != real:
            folder = folder.parent
        return folder is not None


class _Walk:
    """One pass over everything below `root`, without recursion: paths may be deep."""

    def __init__(self, root: str, index: int) -> None:
        self._root, self._index = root, index
        self._real_root = os.path.realpath(root)
        self._inside = self._real_root.rstrip("/") + "/"
        self._waiting = [_Folder(root.rstrip("/"), "", self._real_root, None)]

    def entries(self) -> Iterator[Entry]:
        """All entries, in the order that the file system has them."""
        while self._waiting:
            yield from self._folder(self._waiting.pop())

    def _folder(self, folder: _Folder) -> Iterator[Entry]:
        try:
            with os.scandir(folder.path or "/") as scan:
                children = list(scan)
            if not children and folder.logical:
                yield _entry(folder.logical, folder.path, os.stat(folder.path), self._index)
        except FileNotFoundError:
            return  # it went away while its parent was listed: then it isn't there
        except OSError as error:
            yield self._unusable(folder.logical, folder.path, f"can't be listed: {error.strerror}")
            return
        for child in children:
            yield from self._child(folder, child)

    def _child(self, folder: _Folder, child: os.DirEntry[str]) -> Iterator[Entry]:
        path, logical = f"{folder.path}/{child.name}", folder.logical + child.name
        real = f"{folder.real.rstrip('/')}/{child.name}"
        try:
            if child.is_symlink():
                real = os.path.realpath(path, strict=True)
                if problem := self._link_problem(folder, real):
                    yield self._unusable(logical, path, problem)
                    return
            found = child.stat()
        except OSError as error:
            if child.is_symlink():
                yield self._unusable(logical, path, _broken(path, error))
            elif not isinstance(error, FileNotFoundError):
                yield self._unusable(logical, path, f"can't be used: {error.strerror}")
            return
        if stat.S_ISDIR(found.st_mode):
            self._waiting.append(_Folder(path, logical + "/", real, folder))
        elif problem := _file_problem(path, found):
            yield self._unusable(logical, path, problem.removeprefix(f"{shown(path)} "))
        else:
            yield _entry(logical, path, found, self._index)

    def _link_problem(self, folder: _Folder, real: str) -> str | None:
        if real != self._real_root and not real.startswith(self._inside):
            return (
                f"is a link that leads out of {shown(self._root)}, to {shown(real)}: "
                f"name that place with an --input of its own, or put the data in place of the link"
            )
        if folder.holds(real):
            return f"is a link that leads back to {shown(real)}, which it lies in: remove it"
        return None

    def _unusable(self, logical: str, path: str, problem: str) -> Unusable:
        """What is hidden waits for somebody to select it; anything else is an error now."""
        text = f"{shown(path)} {problem}"
        if not is_hidden(logical):
            raise ContentError(text)
        return Unusable(logical, LocalStamp(path, 0, 0, 0, 0), 0, self._index, problem=text)


def _entry(logical: str, path: str, found: os.stat_result, index: int) -> Entry:
    size = 0 if logical.endswith("/") else found.st_size
    return Entry(logical, LocalStamp(path, size, found.st_mtime_ns, found.st_ino, found.st_dev), size, index)


def _file_problem(path: str, found: os.stat_result) -> str | None:
    """Why `path` is no file that a shard could read, or None. A pipe would hang whoever opens it."""
    if kind := _SPECIAL.get(stat.S_IFMT(found.st_mode)):
        return f"{shown(path)} is {kind}, not a file: move it out of the input"
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        return f"{shown(path)} can't be read: permission denied. Change its mode, or leave it out of the input"
    return None


def _broken(path: str, error: OSError) -> str:
    try:
        target = os.readlink(path)
    except OSError:
        target = "?"
    return f"is a link to {shown(target)}, which can't be followed ({error.strerror}): remove it, or mend it"


def _missing(path: str) -> str:
    """What is not there, the part of the way that is, and names that look alike."""
    parent, name = os.path.split(path)
    while parent != "/" and not os.path.lexists(parent):
        parent, name = os.path.split(parent)
    text = f"no such file or folder: {shown(path)}"
    if os.path.islink(path):
        return f"{text} (a link to {shown(os.readlink(path))}, which is not there)"
    if not os.path.isdir(parent):
        return f"{text} ({shown(parent)} is not a folder)"
    try:
        near = difflib.get_close_matches(name, os.listdir(parent), n=3)
    except OSError:
        near = []
    if near:
        return f"{text}. Did you mean {' or '.join(shown(os.path.join(parent, one)) for one in near)}?"
    return f"{text} ({shown(parent)} is there, and holds nothing with a name like {shown(name)})"


def _compare(stamp: LocalStamp, when: str) -> None:
    name = shown(stamp.path)
    try:
        found = os.stat(stamp.path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ContentError(f"{name} was removed {when}: put it back, and run the job again") from error
    except OSError as error:
        raise ContentError(f"{name} became unusable {when}: {error.strerror}") from error
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    now = LocalStamp(stamp.path, size, found.st_mtime_ns, found.st_ino, found.st_dev)
    if now == stamp:
        return
    if (now.size, now.mtime_ns) == (stamp.size, stamp.mtime_ns):
        what = "another file of the same size and time is in its place"
    else:
        what = f"was {stamp.size} bytes at {_time(stamp)}, is {now.size} bytes at {_time(now)}"
    raise ContentError(f"{name} changed {when} ({what}): run the job again, or with --pin to work on a copy")


def _time(stamp: LocalStamp) -> str:
    """Local time to the millisecond; a file's time may be far outside of what a calendar holds."""
    seconds = stamp.mtime_ns / 1e9
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f} s after 1970"
