"""The content store: blocks and whole files by CID, in one folder that a user's processes share.

Theory of operation. Small blocks lie in the index (SQLite), larger ones in `blocks/`, and files
that were imported whole lie in `files/` as they are, their blocks being slices of them. `put`
only remembers; `flush` writes everything remembered in one transaction, and whoever tells the world about
a CID flushes first. What the index claims is on disk (see `index` and `intake`), so a
process may die at any moment; blocks that were put and not flushed die with it, nothing else. Importing
something again always replaces what is there, so it also mends what was damaged.

**Verified reads.** Every block that is read is hashed and compared with its name. The one exception is
`file`: a whole file whose stamp (size, modification time, inode, boot) is the one that it had when the store
itself hashed it is handed out without hashing it again. A file with another stamp is hashed first.

**Threads.** All methods may be called from any thread at the same time. `put`, `get`, `has`
and `flush` wait at most for one transaction of another thread or process: milliseconds.

Nothing is ever deleted: pins are counted, collecting what is not pinned comes with them later.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from bacalhau_node.cid import DAG_JSON, RAW, Cid
from bacalhau_node.content.export import export
from bacalhau_node.content.index import Block, Index, OwnedFile
from bacalhau_node.content.intake import INLINE, Files, Intake
from bacalhau_node.content.reader import MAX_BLOCK, Reader
from bacalhau_node.content.unixfs import PROFILES, import_bytes, leaf_block
from bacalhau_node.errors import BugError, ContentError, SpecError

MAX_PUT = 1024 * 1024
"""Every node takes blocks up to this size; kubo's limit on the wire is twice that."""

MAX_READ = 16 * 1024**3
"""What `read` builds in memory at most; larger files are exported or mapped."""

_PENDING = 16 * 1024 * 1024  # bytes put and not flushed: beyond, `put` flushes itself
_CODECS = {"raw": RAW, "dag-json": DAG_JSON}


class BlockStore:
    """`ports.ContentStore` in `folder`, which is made when it is not there.

    `profile` (see `unixfs.PROFILES`) decides the CIDs of what is imported here; content of every
    profile is read. Raises `ContentError` for a store that is damaged or of a newer format,
    `SpecError` for an unknown profile.
    """

    def __init__(self, folder: Path, *, profile: str = "unixfs-v0-2015") -> None:
        if profile not in PROFILES:
            raise SpecError(f"{profile!r} is not a UnixFS profile: there are {', '.join(PROFILES)}")
        self.folder, self.profile = folder, PROFILES[profile]
        with self._writing():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files = Files(folder)
            self._index = Index(folder)
        self._lock = threading.RLock()  # of pins and flushes; `_pending` is only touched by single dict operations
        self._pending: dict[bytes, bytes] = {}
        self._pending_bytes = 0
        self._pins: dict[bytes, int] = {}

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
        """Make every `put`, `pin` and `unpin` so far durable, in one transaction. Quick."""
        with self._lock:
            pending = list(self._pending.items())
            if not pending and not self._pins:
                return
            blocks = []
            for digest, data in pending:
                inline = len(data) <= INLINE
                if not inline:
                    with self._writing():
                        self._files.write_block(digest, data)
                blocks.append(Block(digest, len(data), data if inline else None))
            self._index.write(blocks, pins=self._pins)
            self._pins = {}
            for digest, _ in pending:  # not before they can be read from the index
                self._pending.pop(digest, None)
            self._pending_bytes = sum(map(len, list(self._pending.values())))

    def add_bytes(self, data: bytes) -> str:
        """Import `data` as a UnixFS file and return its CID; what is over 4 KiB is written at once, as one file."""
        if len(data) <= INLINE:
            return str(Cid(import_bytes(data, self._remember, profile=self.profile).cid))
        path = self._files.temporary()
        try:
            with self._writing():
                path.write_bytes(data)
            return self.add_path(path, move=True)
        finally:
            path.unlink(missing_ok=True)

    def add_path(self, path: Path, *, move: bool = False) -> str:
        """Import a file or a folder as UnixFS, hidden names and symbolic links (as links) included.

        With `move` the store takes the files over without copying them, and `path` is gone afterwards; files
        with further hard links or on another disk are copied. A `path` that is itself a link is refused: whoever
        made it may not own what it leads to. In the index when it returns.
        """
        return str(Cid(Intake(self._index, self._files, profile=self.profile, move=move).add(path).cid))

    def list(self, cid: str) -> list[tuple[str, str, int]]:
        """All files below a UnixFS root, see `ports.ContentStore.list`."""
        return Reader(self, _parsed(cid)).listing()

    def read(self, cid: str) -> bytes:
        """A whole UnixFS file, verified."""
        root = _parsed(cid)
        return b"".join(Reader(self, root, max_bytes=MAX_READ).chunks(root))

    def file(self, cid: str) -> Path | None:
        """A file on disk with exactly this UnixFS file's bytes, if the store has it as one piece.

        It belongs to the store: read it, link to it, never write to it. Hashed only when its stamp has
        changed (see above); raises `ContentError` when its bytes are no longer the right ones.
        """
        root = _parsed(cid).v1().binary
        owned = self._index.file(root)
        if owned is None:
            return None
        path = self._files.file_path(root)
        if self._files.stamp(path) != owned.stamp:
            self._hash_again(owned)
        return path

    def export(self, cid: str, target: Path) -> None:
        """Write a UnixFS file or folder to `target` (which must not exist), verified, never outside of it."""
        root = _parsed(cid)
        export(Reader(self, root), root, target)

    def pin(self, cid: str) -> None:
        """Keep this root and all below it; counted. Durable after the next `flush`."""
        root = _parsed(cid)
        if not self.has(cid):
            raise ContentError(f"cannot pin {cid}: it is not in the content store {self.folder}")
        self._change_pin(root.v1().binary, 1)

    def unpin(self, cid: str) -> None:
        """Take one `pin` back."""
        root = _parsed(cid).v1().binary
        with self._lock:
            if self.pins(cid) < 1:
                raise BugError(f"{cid} was unpinned more often than it was pinned")
            self._change_pin(root, -1)

    def pins(self, cid: str) -> int:
        """How often this root is pinned now."""
        root = _parsed(cid).v1().binary
        with self._lock:
            return self._index.pins(root) + self._pins.get(root, 0)

    def close(self) -> None:
        """Flush and close."""
        try:
            self.flush()
        finally:
            self._index.close()

    def damage(self) -> Iterator[str]:
        """Read everything the index claims and say, a sentence each, what is missing or damaged."""
        for block in self._index.blocks():
            try:
                self._checked(block, Cid.raw(block.digest))
            except ContentError as error:
                yield str(error)
        for owned in self._index.files():
            try:
                self._hash_again(owned)
            except ContentError as error:
                yield str(error)

    def block(self, cid: Cid) -> bytes:
        """`get` for readers that hold the CID in bytes."""
        pending = self._pending.get(cid.digest)
        if pending is not None:
            return pending
        block = self._index.find(cid.digest)
        if block is None:
            raise ContentError(f"the block {cid} is not in the content store {self.folder}: import its data here first")
        return self._checked(block, cid)

    def holds(self, cid: Cid) -> bool:
        """`has` for those that hold the CID in bytes."""
        return cid.digest in self._pending or self._index.has(cid.digest)

    def keep(self, cid: Cid, block: bytes) -> None:
        """Store a block that came with its CID and was checked against it; what it links to must be here already.

        Quick but for every 16 MiB, which are then written; durable after the next `flush`.
        """
        if len(block) > MAX_BLOCK:
            raise ContentError(f"the block {cid} has {len(block)} bytes, over the limit of {MAX_BLOCK}")
        self._remember(cid.binary, block)

    def file_size(self, cid: Cid) -> int | None:
        """The size of a file that the index knows without reading it."""
        owned = self._index.file(cid.v1().binary)
        if owned is not None:
            return owned.stamp.size
        block = self._index.find(cid.digest) if cid.codec == RAW else None
        return None if block is None else block.size

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ContentError(
                f"cannot write to the content store {self.folder}: {error.strerror or error};"
                " make room, or set BACALHAU_DIR to a folder that may be written to",
            ) from error

    def _remember(self, cid: bytes, data: bytes) -> None:
        if self._pending.setdefault(cid[-32:], data) is data:
            self._pending_bytes += len(data)
            if self._pending_bytes > _PENDING:
                self.flush()

    def _change_pin(self, root: bytes, change: int) -> None:
        with self._lock:
            self._pins[root] = self._pins.get(root, 0) + change

    def _checked(self, block: Block, cid: Cid) -> bytes:
        data, place = block.data, f"the index of {self.folder}"
        if data is None:
            path = self._path(block)
            place = str(path)
            data = _read_slice(path, block, cid)
        if not cid.matches(data):
            raise ContentError(f"the block {cid} in {place} is damaged: import its data again to replace it")
        return data

    def _path(self, block: Block) -> Path:
        if block.slice is None:
            return self._files.block_path(block.digest)
        return self._files.file_path(block.slice.root)

    def _hash_again(self, owned: OwnedFile) -> None:
        """Compare a whole file with its blocks; raises `ContentError`, or notes the stamp that it has now."""
        root, path = Cid(owned.root), self._files.file_path(owned.root)
        stamp = self._files.stamp(path)
        if stamp is None or stamp.size != owned.stamp.size:
            raise _not_whole(root, path)
        with path.open("rb") as whole:
            for chunk in Reader(self, root).chunks(root, size=owned.stamp.size):
                if whole.read(len(chunk)) != chunk:
                    raise _not_whole(root, path)
        self._index.write((), files=(OwnedFile(owned.root, stamp),))


def _not_whole(root: Cid, path: Path) -> ContentError:
    return ContentError(f"{path}, which holds the file {root}, was changed or removed: import its data again")


def _read_slice(path: Path, block: Block, cid: Cid) -> bytes:
    try:
        if block.slice is None:
            return path.read_bytes()
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(handle, block.slice.length, block.slice.at)
        finally:
            os.close(handle)
    except OSError as error:
        raise ContentError(
            f"the block {cid} cannot be read from {path} ({error.strerror}): import its data again to replace it"
        ) from error
    return leaf_block(data, raw=block.size == block.slice.length)


def _parsed(cid: str) -> Cid:
    try:
        return Cid.parse(cid)
    except SpecError as error:
        raise ContentError(str(error)) from error
