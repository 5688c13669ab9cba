"""From a listing to a plan: which entries make which shard. Pure.

The structs here are the plan's own format; the functions that select and split follow.
"""

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


Reference = LocalStamp | ContentRef


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One file or folder of an input.

    `path` is its logical path below the mount, with `/` between levels; `source` is the index
    of the `--input` (or `--with`) that it came from; `size` is in bytes, all files below it for a folder.
    """

    path: str
    reference: Reference
    size: int
    source: int = 0
