"""Files and folders -> UnixFS blocks with the CIDs that kubo gives.

Theory of operation. A file is cut into chunks; each chunk is a leaf block; leaves are grouped
into nodes of at most `width` links, those into nodes again, until one is left: its CID names the
file. All leaves lie at one depth: a lone last child gets its node too. A folder is a node whose links
are sorted by the bytes of their names; one over the profile's limit becomes a trie (`hamt`).
Which chunk size, width, leaf form and limit apply is the **profile**: the same bytes have
another CID under another profile, so a profile is named wherever a CID is made.

Nothing here stores anything: blocks go to a `sink(cid, block)`, so the same code only hashes, fills
a store or streams an archive. Whoever can rebuild the leaves from the file passes `leaf` instead of
taking their bytes. Leaves of larger files, and files of middling size, are read and hashed in a few threads, since
hashing releases the interpreter's lock: 1.7 times the speed on two cores.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal

import msgspec

from bacalhau_node.cid import DAG_PB, RAW, binary_prefix
from bacalhau_node.content.dagpb import (
    PbLink,
    encode_node,
    file_node,
    folder_node,
    leaf_block,
    leaf_frame,
    leaf_overhead,
    symlink_node,
)
from bacalhau_node.content.hamt import build_hamt
from bacalhau_node.errors import ContentError
from bacalhau_node.sharding import shown

Sink = Callable[[bytes, bytes], None]
"""Takes a block: its CID in bytes, its bytes."""

LeafSink = Callable[[bytes, int, int], None]
"""Takes a leaf by reference: its CID in bytes, where its data lies in the file, how long it is."""

ReadAt = Callable[[int, int], bytes | memoryview]
"""(offset, length) -> exactly that many bytes of a file, good until the same thread's next call; in several threads."""

Leaf = tuple[bytes, bytes, int]
"""CID in bytes, block (empty where nobody wants it), length of the data."""

StrPath = str | os.PathLike[str]

Finish = Callable[[], "Imported"]
AddFile = Callable[[str, os.stat_result], Finish]
"""Imports a file, in any thread; what it returns is called by the importing thread, in the order of the folder."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """How bytes become blocks. The numbers are kubo's (IPIP-0499)."""

    name: str
    version: Literal[0, 1]
    raw_leaves: bool
    chunk: int
    width: int
    folder_limit: Literal["links", "block"]
    """What of a folder may measure 256 KiB at most: its names and CIDs, or its whole block."""


_CHUNK, _WIDTH = 262_144, 174

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        # what `ipfs add` gives
        Profile(name="unixfs-v0-2015", version=0, raw_leaves=False, chunk=_CHUNK, width=_WIDTH, folder_limit="links"),
        # `ipfs add --cid-version=1`
        Profile(name="cidv1-256k-174", version=1, raw_leaves=True, chunk=_CHUNK, width=_WIDTH, folder_limit="links"),
        Profile(name="unixfs-v1-2025", version=1, raw_leaves=True, chunk=1_048_576, width=1024, folder_limit="block"),
    )
}

MAX_DEPTH: Final = 128
"""Levels of folders that are imported and read: bounds the recursion, and what a stranger's tree may cost."""

READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""How sources are opened: no link is followed that was put in a file's place, and no pipe is waited for."""

_FOLDER_LIMIT = 262_144
_ZEROS = bytes(64)
_RUN = 8  # leaves hashed by one task of the pool
_WORTH_A_THREAD = 128 * 1024  # bytes of a file; with smaller ones threads mostly wait for the interpreter's lock
_AHEAD = 32  # entries of a folder that may be under way
_WRITE = 256 * 1024  # for more at once Linux takes huge pages: a virtual machine's host may have to make them first
_THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class Imported(msgspec.Struct, frozen=True, gc=False):
    """What an import gave: the root's binary CID, the file's own bytes, and those with all blocks around them."""

    cid: bytes
    size: int
    tsize: int


def import_bytes(data: bytes, sink: Sink, *, profile: Profile) -> Imported:
    """Import `data` as a file."""
    return import_reader(lambda at, length: data[at : at + length], len(data), sink, profile=profile)


def import_file(
    path: StrPath, sink: Sink, *, profile: Profile, leaf: LeafSink | None = None, copy: int | None = None
) -> Imported:
    """Import a regular file; raises `ContentError` when it changes meanwhile, is something else or can't be read.

    `copy`: an open file that gets the very bytes that are hashed.
    """
    try:
        handle = os.open(path, READ_FLAGS)
        try:
            return _import_handle(path, handle, sink, profile=profile, leaf=leaf, copy=copy)
        finally:
            os.close(handle)
    except OSError as error:
        raise unreadable(path, error) from error


def import_folder(
    path: StrPath, sink: Sink, *, profile: Profile, hidden: bool, add_file: AddFile | None = None
) -> Imported:
    """Import a folder with all below it; symbolic links are kept as links, never followed.

    `hidden`: with the names that start with a dot (`ipfs add` leaves them out). `add_file`
    replaces `import_file` for the regular files. `sink` is called by this thread only. Raises `ContentError` for what
    is no file, folder or link, naming it.
    """

    def add(file: str, _: os.stat_result) -> Finish:
        blocks: list[tuple[bytes, bytes]] = []
        got = import_file(file, lambda cid, block: blocks.append((cid, block)), profile=profile)

        def finish() -> Imported:
            for cid, block in blocks:
                sink(cid, block)
            return got

        return finish

    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="bacalhau-import")
    try:
        return _Folders(sink, profile, hidden=hidden, add=add_file or add, pool=pool).add(os.fspath(path), 0)
    finally:
        pool.shutdown(cancel_futures=True)


def hash_path(path: StrPath, *, profile: Profile, hidden: bool = True) -> Imported:
    """What an import of a file or folder gives; nothing is stored anywhere."""

    def add(file: str, _: os.stat_result) -> Finish:
        got = import_file(file, _ignore, profile=profile, leaf=_ignore)
        return lambda: got

    if stat.S_ISDIR(os.lstat(path).st_mode):
        return import_folder(path, _ignore, profile=profile, hidden=hidden, add_file=add)
    return import_file(path, _ignore, profile=profile, leaf=_ignore)


def import_reader(read: ReadAt, size: int, sink: Sink, *, profile: Profile, leaf: LeafSink | None = None) -> Imported:
    """Import `size` bytes that `read` gives; `leaf` takes the leaves by reference in place of `sink`."""
    return import_leaves(_leaves(read, size, profile, keep=leaf is None), sink, profile=profile, leaf=leaf)


def import_leaves(leaves: Iterable[Leaf], sink: Sink, *, profile: Profile, leaf: LeafSink | None) -> Imported:
    """Import a file of which all leaves are hashed, in their order."""
    tree, at = Tree(sink, profile), 0
    for cid, block, length in leaves:
        if leaf is None:
            sink(cid, block)
        else:
            leaf(cid, at, length)
        tree.add(Imported(cid, length, length + (0 if profile.raw_leaves else leaf_overhead(length))))
        at += length
    return tree.root()


def _ignore(*_: object) -> None:
    """Nobody wants the blocks."""


def hash_leaf(pieces: Iterable[bytes | memoryview], length: int, profile: Profile) -> Leaf:
    """The leaf, without its block, whose `length` bytes of data come in these pieces."""
    head, tail = (b"", b"") if profile.raw_leaves else leaf_frame(length)
    digest = sha256(head)
    for piece in pieces:
        digest.update(piece)
    digest.update(tail)
    codec = RAW if profile.raw_leaves else DAG_PB
    return binary_prefix(codec, version=profile.version) + digest.digest(), b"", length


class Tree:
    """The nodes above the leaves, built as the leaves come: one unfinished node a level."""

    def __init__(self, sink: Sink, profile: Profile) -> None:
        self._sink, self._profile = sink, profile
        self._levels: list[list[Imported]] = [[]]

    def add(self, item: Imported, level: int = 0) -> None:
        """Take the next leaf."""
        if level == len(self._levels):
            self._levels.append([])
        if len(self._levels[level]) == self._profile.width:
            self._close(level)
        self._levels[level].append(item)

    def root(self) -> Imported:
        """No more comes."""
        level = 0
        while level < len(self._levels) - 1 or len(self._levels[level]) > 1:
            self._close(level)
            level += 1
        return self._levels[level][0]

    def _close(self, level: int) -> None:
        items, self._levels[level] = self._levels[level], []
        links = [PbLink(item.cid, b"", item.tsize) for item in items]
        block = encode_node(links, file_node([item.size for item in items]))
        node = _store_node(block, sum(item.tsize for item in items), self._sink, self._profile)
        self.add(Imported(node.cid, sum(item.size for item in items), node.tsize), level + 1)


class _Folders:
    """Imports folders, those below first; files of middling size in threads, several at once."""

    def __init__(self, sink: Sink, profile: Profile, *, hidden: bool, add: AddFile, pool: ThreadPoolExecutor) -> None:
        self._sink, self._profile, self._hidden, self._add_file, self._pool = sink, profile, hidden, add, pool
        self._own_thread = range(_WORTH_A_THREAD, _RUN * profile.chunk + 1)  # larger ones have threads for their leaves

    def add(self, path: str, depth: int) -> Imported:
        if depth >= MAX_DEPTH:
            raise ContentError(f"cannot import {shown(path)}: it lies {MAX_DEPTH} folders deep or more")
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise unreadable(path, error) from error
        chosen = [entry for entry in entries if self._hidden or not entry.name.startswith(".")]
        links, size = [], 0
        for entry, item in zip(chosen, self._items(chosen, depth), strict=True):
            links.append(PbLink(item.cid, os.fsencode(entry.name), item.tsize))
            size += item.size
        root = import_links(links, self._sink, profile=self._profile)
        return Imported(root.cid, size, root.tsize)

    def _items(self, entries: list[os.DirEntry[str]], depth: int) -> Iterator[Imported]:
        """What each entry becomes, in order; some are on their way while an earlier one is waited for."""
        waiting: deque[Callable[[], Imported]] = deque()
        for entry in entries:
            waiting.append(self._begun(entry, depth))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()

    def _begun(self, entry: os.DirEntry[str], depth: int) -> Callable[[], Imported]:
        path = entry.path
        if entry.is_symlink():
            return lambda: self._link(path)
        if entry.is_dir(follow_symlinks=False):
            return lambda: self.add(path, depth + 1)
        if not entry.is_file(follow_symlinks=False):
            raise ContentError(f"cannot import {shown(path)}: it is a socket, pipe or device; leave it out")
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError as error:
            raise unreadable(path, error) from error
        if status.st_size in self._own_thread:
            future = self._pool.submit(self._add_file, path, status)
            return lambda: future.result()()  # noqa: PLW0108 - both calls are for later
        return lambda: self._add_file(path, status)()  # noqa: PLW0108 - both calls are for later

    def _link(self, path: str) -> Imported:
        try:
            target = os.fsencode(Path(path).readlink())
        except OSError as error:
            raise unreadable(path, error) from error
        node = _store_node(encode_node((), symlink_node(target)), 0, self._sink, self._profile)
        return Imported(node.cid, 0, node.tsize)


def import_links(links: list[PbLink], sink: Sink, *, profile: Profile) -> PbLink:
    """Make the folder that holds these links, which are sorted by the bytes of their names."""
    if profile.folder_limit == "links":
        large = sum(len(link.name) + len(link.cid) for link in links) > _FOLDER_LIMIT
        block = b"" if large else encode_node(links, folder_node())
    else:
        block = encode_node(links, folder_node())
        large = len(block) > _FOLDER_LIMIT
    if large:
        return build_hamt(links, lambda node, below: _store_node(node, below, sink, profile))
    return _store_node(block, sum(link.tsize for link in links), sink, profile)


def unreadable(path: StrPath, error: OSError) -> ContentError:
    """What to raise when the system refuses to hand out `path`."""
    if error.errno == errno.ELOOP:
        return ContentError(f"cannot import {shown(os.fspath(path))}: it is a symbolic link; name what it leads to")
    name = error.filename if isinstance(error.filename, str) else os.fspath(path)
    return ContentError(f"cannot import {shown(name)}: {error.strerror or error}")


def changed(path: StrPath) -> ContentError:
    """What to raise when `path` is no longer what it was when its import began."""
    return ContentError(f"{shown(os.fspath(path))} changed while it was imported: try again when nothing writes to it")


def _import_handle(
    path: StrPath, handle: int, sink: Sink, *, profile: Profile, leaf: LeafSink | None, copy: int | None
) -> Imported:
    before = os.fstat(handle)
    if not stat.S_ISREG(before.st_mode):
        raise ContentError(f"cannot import {shown(os.fspath(path))}: it is not a regular file")
    buffer = _Buffer(min(profile.chunk, before.st_size))
    sparse = copy is not None and before.st_blocks * 512 < before.st_size
    if copy is not None and sparse:
        os.ftruncate(copy, before.st_size)  # zeros become holes there

    def read(at: int, length: int) -> memoryview:
        data = buffer.view[:length]
        if os.preadv(handle, (data,), at) != length:
            raise changed(path)
        if copy is not None and not (sparse and _is_hole(data)):
            write_at(copy, data, at)
        return data

    root = import_reader(read, before.st_size, sink, profile=profile, leaf=leaf)
    after = os.fstat(handle)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise changed(path)
    return root


class _Buffer(threading.local):
    """A place for one chunk in each thread: new memory for every chunk would cost a fifth of the time."""

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))


def _is_hole(data: memoryview) -> bool:
    """Whether there are only zeros: mostly told by the first bytes."""
    return data[:64] == _ZEROS[: len(data[:64])] and bytes(data) == bytes(len(data))


def write_at(handle: int, data: memoryview, at: int) -> None:
    """Write all of it: a full disk takes a part, and says so at the next try only."""
    while data:
        written = os.pwrite(handle, data[:_WRITE], at)
        data, at = data[written:], at + written


def _store_node(block: bytes, below: int, sink: Sink, profile: Profile) -> PbLink:
    cid = binary_prefix(DAG_PB, version=profile.version) + sha256(block).digest()
    sink(cid, block)
    return PbLink(cid, b"", len(block) + below)


def _leaves(read: ReadAt, size: int, profile: Profile, *, keep: bool) -> Iterator[Leaf]:
    """Every leaf in order, with its block if `keep`; an empty file has one empty leaf."""

    def leaf(at: int) -> Leaf:
        data = read(at, min(profile.chunk, size - at))
        cid, _, length = hash_leaf((data,), len(data), profile)
        return cid, leaf_block(data, raw=profile.raw_leaves) if keep else b"", length

    def run(start: int) -> list[Leaf]:
        stop = min(start + _RUN * profile.chunk, size)
        return [leaf(at) for at in range(start, max(stop, start + 1), profile.chunk)]

    runs = range(0, max(size, 1), _RUN * profile.chunk)
    if len(runs) == 1 or _THREADS == 1:
        for start in runs:
            yield from run(start)
        return
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="bacalhau-hash") as pool:
        waiting: deque[Future[list[Leaf]]] = deque()
        for start in runs:
            waiting.append(pool.submit(run, start))
            if len(waiting) > 2 * _THREADS:  # bounds the memory: blocks wait here when they are kept
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
