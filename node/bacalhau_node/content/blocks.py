"""The content store: blocks and whole files by CID, in one folder that a user's processes share.

Theory of operation. Small blocks (`ROW`) lie in the index (SQLite), larger ones in `blocks/`, and files
that were imported whole lie in `files/` as they are, their blocks being slices of them; those that were linked lie
where their owner has them. `put` only remembers; `flush` writes everything remembered in one transaction, and whoever
tells the world about a CID flushes first. What the index claims is on disk (see `index` and `intake`), so a
process may die at any moment; blocks that were put and not flushed die with it, nothing else. Importing
something again always replaces what is there, so it also mends what was damaged.

**Verified reads.** Every block that is read is hashed and compared with its name. The exceptions are
`file` and `to_send`: a whole file whose stamp (size, modification time, inode, boot) is the one that it had when the
store itself hashed it is handed out without hashing it again, and so are its blocks to those who hash them anyway. A
file with another stamp is hashed first; a linked one whose stamp is another has changed, and is forgotten with all that
contains it.

**What stays.** What is pinned stays, and what was used within the hour or within a hold (see `session`); the rest is
collected when the store has grown over its limit, least recently used first (see `collect`).

**Threads.** All methods may be called from any thread at the same time. `put`, `get`, `has`, `pin`
and `flush` wait at most for one transaction of another thread or process: milliseconds.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

from bacalhau_node.cid import DAG_JSON, DAG_PB, RAW, Cid
from bacalhau_node.content.collect import Collection
from bacalhau_node.content.dagpb import has_links
from bacalhau_node.content.disk import Disk, is_leaf
from bacalhau_node.content.draft import Draft
from bacalhau_node.content.export import export
from bacalhau_node.content.files import Files, Places, discard, place
from bacalhau_node.content.index import Block, Index
from bacalhau_node.content.intake import Hashed, How, Intake
from bacalhau_node.content.reader import MAX_BLOCK, Reader
from bacalhau_node.content.room import Room
from bacalhau_node.content.session import sweep
from bacalhau_node.content.unixfs import PROFILES, Imported, import_bytes
from bacalhau_node.errors import BugError, ContentError, SpecError

MAX_PUT = 1024 * 1024
"""Every node takes blocks up to this size; kubo's limit on the wire is twice that."""

ROW: Final = 64 * 1024
"""Blocks that are put, and files that are given as bytes, lie in the index up to this size: making and naming a file
takes the time of hashing a megabyte. (Files that are files already may stay so, see `intake.INLINE`.)"""

MAX_READ = 16 * 1024**3
"""What `read` builds in memory at most; larger files are exported or mapped."""

LIMIT: Final = 20 * 1024**3
"""Bytes that a store may take, or a tenth of its disk where that is less, before it is collected."""

_PENDING, _PENDING_BLOCKS = (
    16 * 1024 * 1024,
    4_096,
)  # bytes, blocks put and not flushed: beyond, `put` flushes itself
_CODECS = {"raw": RAW, "dag-json": DAG_JSON}


class BlockStore:
    """`ports.ContentStore` in `folder`, which is made when it is not there.

    `profile` (see `unixfs.PROFILES`) decides the CIDs of what is imported here; content of every
    profile is read. `limit`: bytes that the store may take before it is collected, see `LIMIT`. Raises `ContentError`
    for a store that is damaged or of a newer format, `SpecError` for an unknown profile.
    """

    def __init__(self, folder: Path, *, profile: str = "unixfs-v0-2015", limit: int | None = None) -> None:
        if profile not in PROFILES:
            raise SpecError(f"{profile!r} is not a UnixFS profile: there are {', '.join(PROFILES)}")
        self.folder, self.profile = folder, PROFILES[profile]
        with self._writing():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files = Files(folder)
            self._index = self._opened()
            sweep(folder / "tmp")
            limit = min(LIMIT, shutil.disk_usage(folder).total // 10) if limit is None else limit
        self._disk = Disk(self._index, self._files)
        self._lock = threading.RLock()  # of pins and flushes; `_pending` is only touched by single dict operations
        self._pending: dict[bytes, tuple[int, bytes]] = {}
        self._pending_bytes = 0
        self._pins: dict[str, dict[bytes, int]] = {}  # by owner
        self._released: set[str] = set()
        self._room = Room(limit, measure=self._index.room, collect=self._collect)

    def put(self, data: bytes, *, codec: Literal["raw", "dag-json"] = "raw") -> str:
        """Store one block of at most 1 MiB and return its CID. Quick; durable after the next `flush`."""
        if len(data) > MAX_PUT:
            raise BugError(f"a block of {len(data)} bytes was put, at most {MAX_PUT} are allowed: use add_bytes")
        cid = Cid.of(data, codec=_CODECS[codec])
        self._remember(cid.binary, data)
        return str(cid)

    def get(self, cid: str) -> bytes:
        """The verified bytes of one block; raises `ContentError` when it is missing or damaged. Quick."""
        return self.block(_parsed(cid))

    def has(self, cid: str) -> bool:
        """Whether the block is here. Quick."""
        return self.holds(_parsed(cid))

    def flush(self) -> None:
        """Make every `put`, `pin`, `unpin` and `release` so far durable, in one transaction. Quick."""
        with self._lock:
            pending = list(self._pending.items())
            if not pending and not self._pins and not self._released:
                return
            blocks, places = [], Places()
            try:
                with self._writing():
                    for digest, (codec, data) in pending:
                        inline = len(data) <= ROW
                        if not inline:
                            self._files.write_block(digest, data, places)
                        blocks.append(Block(digest, len(data), data if inline else None, codec=codec))
                    self._index.write(blocks, pins=self._pins, released=self._released, place=lambda: place(places))
            finally:
                discard(made for made, _ in places)
            self._pins, self._released = {}, set()
            for digest, _ in pending:  # not before they can be read from the index
                self._pending.pop(digest, None)
            written, self._pending_bytes = (
                self._pending_bytes,
                sum(len(data) for _, data in list(self._pending.values())),
            )
        self._room.grew(written)

    def add_bytes(self, data: bytes) -> str:
        """Import `data` as a UnixFS file and return its CID; what is over 64 KiB is written at once, as one file."""
        if len(data) <= ROW:
            return str(Cid(import_bytes(data, self._remember, profile=self.profile).cid))
        path = Path(self._files.session.temporary())
        try:
            with self._writing():
                path.write_bytes(data)
            return self.add_path(path, move=True)
        finally:
            path.unlink(missing_ok=True)

    def draft(self) -> Draft:
        """A new empty file, for what comes part by part; to be closed. Raises `OSError`."""
        return Draft(self._files, profile=self.profile, adopt=self._adopt, add=self._add_now, small=ROW)

    def add_path(self, path: Path, *, move: bool = False, link: bool = False) -> str:
        """Import a file or a folder as UnixFS, hidden names and symbolic links (as links) included.

        With `move` the store takes the files over without copying them, and `path` is gone afterwards; files
        with further hard links or on another disk are copied. With `link` files over 4 KiB stay where they are, and
        are read there: one that has changed since is a `ContentError`, and then missing. A `path` that is itself a link
        is refused: whoever made it may not own what it leads to. In the index when it returns.
        """
        if move and link:
            raise BugError(f"{path} was to be moved into the store and to stay where it is")
        how: How = "move" if move else "link" if link else "copy"
        intake = Intake(self._index, self._files, profile=self.profile, how=how)
        with self.hold():
            root = intake.add(path)
        self._room.grew(intake.size)
        return str(Cid(root.cid))

    def list(self, cid: str) -> list[tuple[str, str, int]]:
        """All files below a UnixFS root, see `ports.ContentStore.list`."""
        root = _parsed(cid)
        self._used(root)
        return Reader(self, root).listing()

    def read(self, cid: str) -> bytes:
        """A whole UnixFS file, verified."""
        root = _parsed(cid)
        self._used(root)
        return b"".join(Reader(self, root, max_bytes=MAX_READ).chunks(root))

    def file(self, cid: str) -> Path | None:
        """A file on disk with exactly this UnixFS file's bytes, if the store has it as one piece.

        It belongs to the store or to a user: read it, link to it, never write to it. Hashed only when its stamp has
        changed (see above); raises `ContentError` when its bytes are no longer the right ones.
        """
        root = _parsed(cid)
        self._used(root)
        return self._disk.file(root)

    def export(self, cid: str, target: Path) -> None:
        """Write a UnixFS file or folder to `target` (which must not exist), verified, never outside of it."""
        root = _parsed(cid)
        self._used(root)
        export(Reader(self, root), root, target)

    # --- what stays ---

    def pin(self, cid: str, *, owner: str = "") -> None:
        """Keep this root and all below it; counted for each owner. Durable after the next `flush`."""
        root = _parsed(cid)
        if not self.holds(root):
            raise ContentError(f"cannot pin {cid}: it is not in the content store {self.folder}")
        self._change_pin(owner, root, 1)

    def unpin(self, cid: str, *, owner: str = "") -> None:
        """Take one `pin` back."""
        root = _parsed(cid)
        with self._lock:
            held = 0 if owner in self._released else self._index.pins_of(owner, root.v1().binary)
            if held + self._pins.get(owner, {}).get(root.v1().binary, 0) < 1:
                raise BugError(f"{cid} was unpinned more often than it was pinned")
            self._change_pin(owner, root, -1)

    def pins(self, cid: str) -> int:
        """How often this root is pinned now, by all owners."""
        root = _parsed(cid).v1().binary
        with self._lock:
            pending = sum(counts.get(root, 0) for counts in self._pins.values())
            return self._index.pins(root, without=self._released) + pending

    def release(self, owner: str) -> None:
        """Take all pins of this owner back. Durable after the next `flush`."""
        with self._lock:
            self._pins.pop(owner, None)
            self._released.add(owner)

    def owners(self) -> Sequence[str]:
        """Who has pinned something, sorted; asked of the index, so after a `flush`."""
        return self._index.owners()

    def hold(self) -> AbstractContextManager[None]:
        """Until it ends nothing is collected that was put, imported, asked for or read since it began."""
        return self._files.session.hold()

    def collect(self, *, keep: int = 0) -> int:
        """Remove what is neither pinned nor held, least recently used first, until `keep` bytes are left."""
        with suppress(ContentError):  # what is not written yet was used just now; a full disk is why room is made
            self.flush()
        return self._collect(keep)

    def close(self) -> None:
        """Flush and close."""
        try:
            self.flush()
        finally:
            self._room.close()
            self._index.close()
            self._files.session.close()

    # --- blocks, for those that hold the CID in bytes ---

    def damage(self) -> Iterator[str]:
        """Read everything the index claims and say, a sentence each, what is missing or damaged."""
        return self._disk.damage()

    def block(self, cid: Cid) -> bytes:
        """`get` for readers that hold the CID in bytes."""
        pending = self._pending.get(cid.digest)
        if pending is not None:
            return pending[1]
        return self._disk.block(cid)

    def to_send(self, cid: Cid) -> bytes:
        """`block` for those who send it on to somebody who checks it; not hashed again where `file` would not."""
        pending = self._pending.get(cid.digest)
        return self._disk.to_send(cid) if pending is None else pending[1]

    def holds(self, cid: Cid) -> bool:
        """`has` for those that hold the CID in bytes.

        Bytes that came as a raw block, and are a node with links too, are here as a raw block only.
        """
        pending = self._pending.get(cid.digest)
        codec = self._index.use(cid.digest) if pending is None else pending[0]
        if codec != RAW or cid.codec == RAW:
            return codec is not None
        return self._disk.is_leaf(cid) if pending is None else is_leaf(cid, pending[1])

    def keep(self, cid: Cid, block: bytes) -> None:
        """Store a block that came with its CID and was checked against it; what it links to must be here already.

        Quick but for every 16 MiB or few thousand, which are then written; durable after the next `flush`.
        """
        if len(block) > MAX_BLOCK:
            raise ContentError(f"the block {cid} has {len(block)} bytes, over the limit of {MAX_BLOCK}")
        self._remember(cid.binary, block)

    def file_size(self, cid: Cid) -> int | None:
        """The size of a file that the index knows without reading it."""
        return self._disk.file_size(cid)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ContentError(
                f"cannot write to the content store {self.folder}: {error.strerror or error};"
                " make room, or set BACALHAU_DIR to a folder that may be written to",
            ) from error

    def _opened(self) -> Index:
        try:
            return Index(self.folder, read=self._files.read_block)
        except BaseException:
            self._files.session.close()
            raise

    def _remember(self, cid: bytes, data: bytes) -> None:
        codec = Cid(cid).codec
        kept = (RAW if codec == DAG_PB and not has_links(data) else codec, data)
        before = self._pending.setdefault(cid[-32:], kept)
        if before[0] < kept[0]:  # what came as a raw block comes as a node with links
            self._pending[cid[-32:]] = kept
        if before is kept:
            self._pending_bytes += len(data)
            if self._pending_bytes > _PENDING or len(self._pending) > _PENDING_BLOCKS:
                self.flush()

    def _add_now(self, data: bytes) -> str:
        cid = self.add_bytes(data)
        self.flush()
        return cid

    def _adopt(self, path: str, hashed: Hashed) -> Imported:
        intake = Intake(self._index, self._files, profile=self.profile, how="move")
        with self.hold(), self._writing():
            root = intake.adopt(path, hashed)
        self._room.grew(intake.size)
        return root

    def _used(self, root: Cid) -> None:
        """Note that what is below `root` is read; a disk that can't take the note is no reason not to read it."""
        with suppress(ContentError):
            self._index.use(root.digest)

    def _change_pin(self, owner: str, root: Cid, change: int) -> None:
        with self._lock:
            counts = self._pins.setdefault(owner, {})
            counts[root.v1().binary] = counts.get(root.v1().binary, 0) + change

    def _collect(self, keep: int) -> int:
        with self._writing():
            return Collection(self._index, self._files, stop=self._room.closing.is_set).run(keep=keep)


@lru_cache(4096)
def _parsed(cid: str) -> Cid:
    try:
        return Cid.parse(cid)
    except SpecError as error:
        raise ContentError(str(error)) from error
