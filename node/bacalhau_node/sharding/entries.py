"""Entries: what a listing is made of, and what a plan hands to shards."""

from __future__ import annotations

import msgspec


class LocalStamp(msgspec.Struct, frozen=True, tag="local", gc=False):
    """A file of this machine, used in place: it must still be exactly this one when the shard ends."""

    path: str
    """Absolute, as bytes decoded by `os.fsdecode` (surrogates stand for bytes that are not UTF-8)."""
    size: int
    mtime_ns: int
    inode: int
    device: int


class ContentRef(msgspec.Struct, frozen=True, tag="cid", gc=False):
    """A file (or folder) named by its CID."""

    cid: str


class UrlRef(msgspec.Struct, frozen=True, tag="url", gc=False):
    """A file at a URL or in a bucket (`s3://…`), as it was when it was listed.

    `version` is what its server calls this state of it (an ETag, a version id, a date). Where it names none it is a
    mark of the listing: `~` and something that no other listing has, `?` for a file that could not be looked at.
    `sha256` (hex) is what the bytes must hash to, "" where nobody said.
    """

    url: str
    version: str = ""
    sha256: str = ""

    @property
    def pinned(self) -> bool:
        """Whether it can be one state of the file only, however often it is listed."""
        return bool(self.sha256) or (self.version != "" and self.version[0] not in "~?")


Reference = LocalStamp | ContentRef | UrlRef


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One file or folder of an input.

    `path` is its logical path below the mount, with `/` between levels; `source` is the index
    of the `--input` (or `--with`) that it came from; `size` is in bytes, all files below it for a folder.
    """

    path: str
    reference: Reference
    size: int
    source: int = 0


class Unusable(Entry, frozen=True, gc=False, kw_only=True):
    """Something that was listed and can't be read (`problem` says why): an error for whoever selects it."""

    problem: str


class Doubtful(Entry, frozen=True, gc=False, kw_only=True):
    """Something that could not be looked at when it was listed (`problem` says why): its shard tries again."""

    problem: str


Unit = tuple[Entry, ...]
"""Entries that stay together: one file, or all files of a folder that a pattern selected."""


def shown(path: str) -> str:
    """`path` for a message: as it is, or quoted and escaped when it holds a newline or bytes that are not UTF-8."""
    return path if path.isprintable() else repr(path)
