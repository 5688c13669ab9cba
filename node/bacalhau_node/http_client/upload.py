"""A job's local inputs on their way to a node: hashed where they lie, and only what the node lacks is sent.

Theory of operation. What goes along is what the job selects: the inputs are listed and held against the patterns
here, as a node in this process would do, and the selected files make a UnixFS tree whose leaves stay
references into the files: nothing is copied on this side, and hidden files that nobody named stay here. If the
node has the tree's root it has everything (see `content.car`). Otherwise it is asked which blocks
are missing; those are sent in archives of some megabytes, children before parents. When a
connection breaks, what arrived stays there: the rest is asked for again and sent in smaller archives.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from bacalhau_node.api import shapes
from bacalhau_node.cid import Cid
from bacalhau_node.content import car
from bacalhau_node.content.dagpb import PbLink, leaf_block
from bacalhau_node.content.unixfs import (
    MAX_DEPTH,
    PROFILES,
    Imported,
    Profile,
    import_bytes,
    import_file,
    import_folder,
    import_links,
)
from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.http_client.connection import BROKEN, LONG, Connection
from bacalhau_node.sharding import Entry, LocalStamp, select, shown
from bacalhau_node.sources.listing import is_list
from bacalhau_node.sources.local import LocalSource
from bacalhau_node.spec import InputSource, JobSpec

PROFILE: Final = PROFILES["unixfs-v0-2015"]

LARGEST: Final = 16 * 1024 * 1024
"""Bytes of blocks in one archive: so much is sent again at most when a connection breaks."""
SMALLEST: Final = 256 * 1024

ASKED: Final = 5_000
"""CIDs in one question."""

Progress = Callable[[int, int], None]
"""Called with (bytes sent, bytes to send)."""


@dataclass(frozen=True, slots=True)
class _Slice:
    """A leaf's data in a local file."""

    path: str
    at: int
    length: int


@dataclass
class Tree:
    """The blocks of local files, children before parents; leaves by reference. `hashed`: roots known from before."""

    hashed: dict[LocalStamp, Imported]
    reuse: bool
    profile: Profile = PROFILE
    blocks: dict[bytes, bytes | _Slice] = field(default_factory=dict)
    reused: bool = False
    files: int = 0
    size: int = 0

    def add(self, entries: Iterable[Entry]) -> str:
        """The root CID of a folder that holds these entries at their paths."""
        items: Iterable[tuple[str, object]] = (
            (entry.path.rstrip("/"), {} if entry.path.endswith("/") else entry) for entry in entries
        )
        return str(Cid(self._folder(_nested(items), 0).cid))

    def add_path(self, path: Path) -> str:
        """The CID of a file or folder as it lies there, hidden names and links included."""

        def add(file: str) -> Imported:
            found = self._import(file)
            self.files, self.size = self.files + 1, self.size + found.size
            return found

        def later(file: str, _: os.stat_result) -> Callable[[], Imported]:
            return lambda: add(file)

        if path.is_dir():
            found = import_folder(path, self._sink, profile=self.profile, hidden=True, add_file=later)
        else:
            found = add(str(path))
        return str(Cid(found.cid))

    def read(self, cid: bytes) -> bytes:
        """The bytes of one block, checked; raises `ContentError` when its file has changed."""
        block = self.blocks[cid]
        if isinstance(block, bytes):
            return block
        raw = self.profile.raw_leaves
        with contextlib.suppress(OSError):
            handle = os.open(block.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = leaf_block(os.pread(handle, block.length, block.at), raw=raw)
            finally:
                os.close(handle)
            if Cid(cid).matches(data):
                return data
        raise ContentError(
            f"{shown(block.path)} changed while it was sent: run the job again when nothing writes to it"
        )

    def length(self, cid: bytes) -> int:
        """About how many bytes a block has."""
        block = self.blocks[cid]
        return len(block) if isinstance(block, bytes) else block.length

    def _folder(self, content: dict[str, object], depth: int) -> PbLink:
        if depth >= MAX_DEPTH:
            raise ContentError(f"an input lies {MAX_DEPTH} folders deep or more")
        found = []
        for name, item in sorted(content.items(), key=lambda pair: os.fsencode(pair[0])):
            link = self._folder(item, depth + 1) if isinstance(item, dict) else self._file(item)
            found.append(PbLink(link.cid, os.fsencode(name), link.tsize))
        return import_links(found, self._sink, profile=self.profile)

    def _file(self, entry: object) -> PbLink:
        if not isinstance(entry, Entry) or not isinstance(entry.reference, LocalStamp):
            raise BugError(f"{entry!r} is not a local file")
        stamp = entry.reference
        known = self.hashed.get(stamp) if self.reuse else None
        self.reused = self.reused or known is not None
        if known is None:
            known = self._import(os.path.realpath(stamp.path))
        LocalSource().check(stamp)
        self.hashed[stamp] = known
        self.files += 1
        self.size += stamp.size
        return PbLink(known.cid, b"", known.tsize)

    def _import(self, path: str) -> Imported:
        def leaf(cid: bytes, at: int, length: int) -> None:
            self.blocks.setdefault(cid, _Slice(path, at, length))

        return import_file(Path(path), self._sink, profile=self.profile, leaf=leaf)

    def _sink(self, cid: bytes, block: bytes) -> None:
        self.blocks.setdefault(cid, block)


def folder_cid(files: Mapping[str, bytes]) -> str:
    """The CID of a folder with these files, by relative path; nothing is kept of it."""

    def node(content: dict[str, object]) -> PbLink:
        found = []
        for name, item in sorted(content.items(), key=lambda pair: os.fsencode(pair[0])):
            if isinstance(item, dict):
                link = node(item)
            else:
                done = import_bytes(item, _nowhere, profile=PROFILE)  # type: ignore[arg-type]  # a folder or bytes
                link = PbLink(done.cid, b"", done.tsize)
            found.append(PbLink(link.cid, os.fsencode(name), link.tsize))
        return import_links(found, _nowhere, profile=PROFILE)

    return str(Cid(node(_nested(files.items())).cid))


def _nested(items: Iterable[tuple[str, object]]) -> dict[str, object]:
    """(path, what lies there) as folders in folders."""
    root: dict[str, object] = {}
    for path, item in items:
        *folders, name = path.split("/")
        below = root
        for folder in folders:
            below = below.setdefault(folder, {})  # type: ignore[assignment]  # a path is a file's or a folder's
        below[name] = item
    return root


def _nowhere(_cid: bytes, _block: bytes) -> None:
    """A sink for blocks that only their names are wanted of."""


# --- which files ---


def is_local(source: InputSource) -> bool:
    """Whether it names a file or folder of this machine."""
    return LocalSource().claims(source.source)


def goes_whole(source: InputSource) -> bool:
    """Whether patterns are meant for what is in it, which only the node sees: an archive, a list of URLs."""
    return source.unpack or is_list(source.source)


def _listed(sources: Sequence[InputSource]) -> list[Entry]:
    local = LocalSource()
    return [
        entry for index, source in enumerate(sources) if is_local(source) for entry in local.list(source, index=index)
    ]


def _selected(spec: JobSpec) -> list[Entry]:
    """The files of local inputs that the job takes; patterns may also be meant for inputs that the node has."""
    listed = [entry for entry in _listed(spec.inputs) if not goes_whole(spec.inputs[entry.source])]
    if all(is_local(source) and not goes_whole(source) for source in spec.inputs):
        return [entry for unit in select(listed, spec.globs) for entry in unit]
    found: dict[tuple[int, str], Entry] = {}
    for globs in [[glob] for glob in spec.globs] or [[]]:
        with contextlib.suppress(SpecError):
            found |= {(entry.source, entry.path): entry for unit in select(listed, globs) for entry in unit}
    whole = [entry for entry in _listed(spec.inputs) if goes_whole(spec.inputs[entry.source])]
    return [*found.values(), *(entry for entry in whole if not entry.path.endswith("/"))]


def _placed(sources: Sequence[InputSource], entries: Sequence[Entry], tree: Tree) -> tuple[InputSource, ...]:
    """The sources with local ones named by CID."""
    found = []
    for index, source in enumerate(sources):
        if is_local(source):
            own = [entry for entry in entries if entry.source == index]
            root = tree.add(own)
            alone = len(own) == 1 and _path(own[0]) == source.source
            where = f"ipfs://{root}/{own[0].path}" if alone else f"ipfs://{root}"
            source = msgspec.structs.replace(source, source=where)  # noqa: PLW2901 - the same one, named otherwise
        found.append(source)
    return tuple(found)


def _path(entry: Entry) -> str:
    return entry.reference.path if isinstance(entry.reference, LocalStamp) else ""


def build(spec: JobSpec, tree: Tree) -> JobSpec:
    """The spec with its local inputs named by CID, their blocks in `tree`. Reads every file that is not in `hashed`."""
    inputs, shared = _selected(spec), [entry for entry in _listed(spec.shared) if not entry.path.endswith("/")]
    return msgspec.structs.replace(
        spec, inputs=_placed(spec.inputs, inputs, tree), shared=_placed(spec.shared, shared, tree)
    )


def roots(spec: JobSpec) -> list[str]:
    """The CIDs that a spec's inputs are named by."""
    return [source.source.removeprefix("ipfs://").partition("/")[0] for source in (*spec.inputs, *spec.shared)]


# --- sending ---


async def upload(
    connection: Connection, spec: JobSpec, hashed: dict[LocalStamp, Imported], progress: Progress | None
) -> tuple[JobSpec, tuple[str, ...]]:
    """The spec with local inputs named by CID and present on the node, and sentences about what was sent."""
    if not any(map(is_local, (*spec.inputs, *spec.shared))):
        return spec, ()
    tree = Tree(hashed, reuse=True)
    placed = await asyncio.to_thread(build, spec, tree)
    own = [root for root, source in zip(roots(placed), (*spec.inputs, *spec.shared), strict=True) if is_local(source)]
    if not await missing(connection, own):
        return placed, (f"{_files(tree.files)} ({tree.size:,} bytes): all of it is on the node already",)
    if tree.reused:
        tree = Tree(hashed, reuse=False)
        placed = await asyncio.to_thread(build, spec, tree)
    sent = await send(connection, tree, progress)
    return placed, (f"{_files(tree.files)} ({tree.size:,} bytes): {sent:,} bytes were sent to the node",)


def _files(count: int) -> str:
    return f"{count:,} local file{'s' * (count != 1)}"


async def missing(connection: Connection, cids: Sequence[str]) -> list[str]:
    """Those that the node lacks."""
    found: list[str] = []
    for at in range(0, len(cids), ASKED):
        asked = shapes.MissingRequest(list(cids[at : at + ASKED]))
        found += (await connection.ask("POST", "/v0/blocks/missing", shapes.MissingAnswer, body=asked)).missing
    return found


async def send(connection: Connection, tree: Tree, progress: Progress | None) -> int:
    """Send every block of `tree` that the node lacks; returns their bytes."""
    names = {str(Cid(cid)): cid for cid in tree.blocks}
    queue = deque(names[text] for text in await missing(connection, list(names)))
    total, sent = sum(map(tree.length, queue)), 0
    limit, retry = LARGEST, connection.retry()
    while queue:
        group = _next(queue, tree, limit)
        archive = await asyncio.to_thread(_archive, group, tree)
        try:
            await connection.once("POST", "/v0/car", shapes.CarAnswer, data=archive, seconds=LONG)
            left: list[bytes] = []
        except BROKEN as error:
            await retry.again(error)
            left = [names[text] for text in await missing(connection, [str(Cid(cid)) for cid in group])]
            queue.extendleft(reversed(left))
            limit = max(limit // 4, SMALLEST)
        if len(left) < len(group):
            retry.progress()
        if not left:
            limit = min(limit * 2, LARGEST)
        sent += sum(map(tree.length, group)) - sum(map(tree.length, left))
        if progress is not None:
            progress(sent, total)
    return total


def _next(queue: deque[bytes], tree: Tree, limit: int) -> list[bytes]:
    """The first blocks of the queue, of `limit` bytes or one block."""
    group: list[bytes] = []
    size = 0
    while queue and (not group or size + tree.length(queue[0]) <= limit):
        size += tree.length(queue[0])
        group.append(queue.popleft())
    return group


def _archive(group: Sequence[bytes], tree: Tree) -> bytes:
    parts = [car.header([Cid(group[-1])])]
    parts += [car.section(Cid(cid), tree.read(cid)) for cid in group]
    return b"".join(parts)
