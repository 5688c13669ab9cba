"""Unpacking archives that nobody trusts: tar (plain, gzip, bzip2, xz) and zip, known by their first bytes.

Theory of operation. What an archive says of itself is believed by nobody. Members are read in order, once, and written
below a new folder, with every byte that comes out counted: what unpacks to more than the disk or the limits allow ends
there. Regular files and folders are made as they come; links only when all is written, and only to what is in the
archive, so no write can pass through one. (Python's own `filter="data"` resolves links on the disk while it
writes, which has been tricked more than once.) Names are relative, without `..`; a leading `/` is taken off, as
tar does; devices and pipes are refused.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Final, Protocol, cast

from bacalhau_node.errors import ContentError
from bacalhau_node.sharding import shown
from bacalhau_node.sources.limits import Limits

KINDS: Final = "tar, tar.gz, tar.bz2, tar.xz, zip"

MAX_MEMBERS: Final = 200_000
MAX_LEVELS: Final = 64
MAX_NAME: Final = 255
MAX_PATH: Final = 4_096
MAX_HEADER: Final = 1 << 20
"""Bytes that a tar may spend on the names of one member."""

MAX_DIRECTORY: Final = 32 << 20
"""Bytes of a zip's list of its members, which is read whole and takes seven times as much memory."""

MAX_RATIO: Final = 500
RATIO_FREE: Final = 64 << 20
"""Beyond so many bytes, an archive that unpacks to so many times its size is a bomb: real data reaches 100, seldom."""

_BLOCK: Final = 1 << 20
_LINK: Final = 4_096  # bytes of a link's target
_BROKEN: Final = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,  # an encrypted zip
    ValueError,
    OSError,
)


class Bytes(Protocol):
    """What reads like a file, from its start again if need be."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        ...

    def seek(self, offset: int, /) -> int:
        """Go there."""
        ...


@dataclass(frozen=True)
class Member:
    """Something in an archive: a folder, a file (`open` gives its bytes), or a link."""

    path: str
    kind: str
    open: Callable[[], IO[bytes] | None] = lambda: None
    target: str = ""
    """Of a symbolic link: as it is written, beside it; of a hard link: a path in the archive."""


def unpack(archive: Path, root: Path, *, name: str, limits: Limits) -> None:
    """Unpack `archive` into the new folder `root`; raises `ContentError`. `name` is for messages."""
    try:
        with archive.open("rb") as file:
            members = _members_of(file, archive.stat().st_size, shown(name))
            _Writer(root, shown(name), limits=limits, packed=archive.stat().st_size).write(members)
    except _BROKEN as error:
        raise ContentError(f"{shown(name)} can't be unpacked: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)[:200] or type(error).__name__


def _members_of(file: IO[bytes], size: int, name: str) -> Iterator[Member]:
    """The members, by what the file begins with."""
    start = file.read(512)
    file.seek(0)
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return _zip(file, name)
    stream = _unpacked(file, start)
    if not _is_tar(stream.read(512)):
        raise ContentError(f"{name} is no archive that can be unpacked ({KINDS}): leave `unpack` out")
    stream.seek(0)
    return _tar(_Counting(stream, size, name), name)


def _unpacked(file: IO[bytes], start: bytes) -> Bytes:
    """What is in a file that was packed as a whole; the file itself if it was not."""
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    return lzma.LZMAFile(file) if start.startswith(b"\xfd7zXZ\0") else file


def _is_tar(block: bytes) -> bool:
    """Whether this is the first block of a tar: a header whose checksum is right, or the end of an empty one."""
    if len(block) < 512:
        return False
    try:
        return not any(block) or bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"))
    except tarfile.HeaderError:
        return False


# --- what is in them ---


class _Counting:
    """What comes out of a packed tar, names and padding too: never far more than went in, nor a giant header."""

    def __init__(self, stream: Bytes, packed: int, name: str) -> None:
        self._stream, self._most, self._name = stream, max(RATIO_FREE, packed * MAX_RATIO), name
        self.count = 0
        self.header: int | None = None
        """Where the header that is being read has to end."""

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        if self.count > self._most:
            raise ContentError(f"{self._name} unpacks to more than {MAX_RATIO} times its size: it is refused as a bomb")
        if self.header is not None and self.count > self.header:
            raise ContentError(f"{self._name} has a member with a name of over {MAX_HEADER} bytes")
        return data


def _tar(stream: _Counting, name: str) -> Iterator[Member]:
    stream.header = MAX_HEADER
    with tarfile.open(fileobj=stream, mode="r|", bufsize=64 << 10, errorlevel=2) as tar:  # type: ignore[call-overload]
        while True:
            stream.header = stream.count + MAX_HEADER
            member = tar.next()
            stream.header = None
            if member is None:
                return
            tar.members.clear()  # they would all be kept
            yield _tar_member(tar, member, name)


def _tar_member(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> Member:
    path = member.name
    if member.isdir():
        return Member(path, "folder")
    if member.isreg():
        return Member(path, "file", partial(tar.extractfile, member))
    if member.issym() or member.islnk():
        return Member(path, "symlink" if member.issym() else "hardlink", target=member.linkname)
    raise ContentError(f"{name} holds {shown(path[:200])}, which is no file, folder or link: it is not unpacked")


class _Sparing:
    """A zip's file, of which nobody reads more at once than a list of members may have."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        data = self._file.read(size if 0 <= size <= MAX_DIRECTORY else MAX_DIRECTORY + 1)
        if len(data) > MAX_DIRECTORY:
            raise ContentError(f"{self._name} has a list of members of over {MAX_DIRECTORY} bytes")
        return data


def _zip(file: IO[bytes], name: str) -> Iterator[Member]:
    with zipfile.ZipFile(cast("IO[bytes]", _Sparing(file, name))) as archive:
        for info in archive.infolist():
            mode = info.external_attr >> 16
            if info.is_dir():
                yield Member(info.filename, "folder")
            elif stat.S_ISLNK(mode):
                with archive.open(info) as link:
                    yield Member(info.filename, "symlink", target=os.fsdecode(link.read(_LINK)))
            elif stat.S_IFMT(mode) in (0, stat.S_IFREG):
                yield Member(info.filename, "file", partial(archive.open, info))
            else:
                raise ContentError(f"{name} holds {shown(info.filename[:200])}, which is no file, folder or link")


# --- writing them ---


@dataclass
class _Writer:
    """Writes members below `root`; `packed` is the archive's size."""

    root: Path
    name: str
    limits: Limits
    packed: int
    bytes: int = 0
    links: dict[str, Member] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def write(self, members: Iterator[Member]) -> None:
        """All of them; links last."""
        self.root.mkdir()
        for count, member in enumerate(members):
            if count >= MAX_MEMBERS:
                raise ContentError(f"{self.name} holds more than {MAX_MEMBERS} files")
            path = self._path(member.path)
            if path:
                self._place(path, member)
        for path, member in self.links.items():
            self._link(path, member)
        if not self.kinds:
            raise ContentError(f"{self.name} is an archive without anything in it")

    def _path(self, path: str) -> str:
        """Where a member goes; "" for the root itself."""
        levels = [level for level in path.split("/") if level not in ("", ".")]
        lengths = [len(os.fsencode(level)) for level in levels]
        if ".." in levels or "\0" in path:
            raise ContentError(f"{self.name} holds {path[:200]!r}, a path that leads out of it: it is not unpacked")
        if len(levels) > MAX_LEVELS or max(lengths, default=0) > MAX_NAME or sum(lengths) > MAX_PATH:
            raise ContentError(
                f"{self.name} holds a path longer than a disk takes ({len(levels)} levels): {path[:60]!r}…"
            )
        return "/".join(levels)

    def _place(self, path: str, member: Member) -> None:
        self._parents(path)
        before = self.kinds.get(path)
        if before is not None and (before == "folder") != (member.kind == "folder"):
            raise ContentError(f"{self.name} holds {shown(path)} twice, as a folder and as a file")
        self.kinds[path] = member.kind
        self.links.pop(path, None)
        place = self.root / path
        if member.kind == "folder":
            place.mkdir(exist_ok=True)
            return
        place.unlink(missing_ok=True)  # of two with one name the later counts, as for tar
        if member.kind == "file":
            self._file(place, member)
        else:
            self.links[path] = member

    def _parents(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        if not parent or self.kinds.get(parent) == "folder":
            return
        if parent in self.kinds:
            raise ContentError(f"{self.name} holds {shown(parent)} twice, as a file and as a folder")
        self._parents(parent)
        (self.root / parent).mkdir()
        self.kinds[parent] = "folder"

    def _file(self, place: Path, member: Member) -> None:
        reader = member.open()
        if reader is None:
            return
        with reader, place.open("xb") as out:
            while block := reader.read(_BLOCK):
                self._count(len(block))
                out.write(block)

    def _count(self, size: int) -> None:
        self.bytes += size
        if self.bytes > max(RATIO_FREE, self.packed * MAX_RATIO):
            raise ContentError(f"{self.name} unpacks to more than {MAX_RATIO} times its size: it is refused as a bomb")
        if self.bytes > self.limits.file:
            raise ContentError(f"{self.name} unpacks to more than {self.limits.file} bytes, the most that is unpacked")
        self.limits.check_room(self.root, size)

    def _link(self, path: str, member: Member) -> None:
        """Make a link to something in the archive."""
        start = path.rpartition("/")[0].split("/") if member.kind == "symlink" and "/" in path else []
        target = self._resolved(start, member.target)
        known = target is not None and (target == "" or target in self.kinds)
        if target is None or (member.target.startswith("/") and member.kind == "symlink"):
            raise ContentError(
                f"{self.name} holds {shown(path)}, a link that leads out of it, to {member.target[:200]!r}"
            )
        if not known:
            raise ContentError(f"{self.name} holds {shown(path)}, a link to {shown(target[:200])}, which is not in it")
        place = self.root / path
        if member.kind == "symlink":
            place.symlink_to(member.target)
        elif self.kinds[target] == "file":
            place.hardlink_to(self.root / target)
        else:
            raise ContentError(f"{self.name} holds {shown(path)}, a hard link to {shown(target)}, which is no file")

    def _resolved(self, start: Sequence[str], target: str) -> str | None:
        """The path in the archive to which a link in the folder `start` leads; None for one outside of it."""
        levels = list(start)
        for level in target.split("/"):
            if level == "..":
                if not levels or "/".join(levels) in self.links:  # where that one leads to is another place's parent
                    return None
                levels.pop()
            elif level not in ("", "."):
                levels.append(level)
        return "/".join(levels)
