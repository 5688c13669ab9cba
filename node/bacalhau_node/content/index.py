"""The store's index: which block lies where, which files are whole, what is pinned, what was used when. SQLite.

Theory of operation. One row a block, keyed by its sha2-256, says where its bytes are: in the
row itself (`data`), in a file of its own (`data` and `file` empty), or in a slice of a whole file
(`file`, `at`, `length`), which the store owns or, where it has a `path`, somebody else. A slice shorter than the block
is the data of a dag-pb leaf: the few bytes around it are computed. `codec` says how the block's links are read, and is
`RAW` for all that have none; `used` is when (seconds since 1970) it was last put, imported or asked for.

**Files and rows.** Whatever the index claims is on disk whenever a process dies: files get their place in the same
transaction as their rows, before it is committed, and lose it in a later one than their rows. So the lock that
SQLite gives to writers orders the files too, among all processes, and nobody's file is removed
while its row is on the way.

Several processes of one user share an index: WAL lets them read while one writes, and SQLite's own locks order the
writers, so no lock file is needed beside it. Within a process one connection serves all threads
under a lock; transactions are kept to a few thousand rows, some milliseconds. WAL needs shared memory,
which network file systems lack: there the index uses a rollback journal. A commit survives the death of the
process; a power failure may undo the last ones, or take bytes from the files that they name: reading finds that.

The file is made with the first thing that is written: most nodes of a large network never store anything.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from bacalhau_node.cid import RAW
from bacalhau_node.content import schema
from bacalhau_node.errors import BugError, ContentError
from bacalhau_node.filesystem import on_network

BUSY_SECONDS = 20
"""How long a writer waits for another process's transaction, which lasts milliseconds."""

FRESH: Final = 300
"""Seconds for which a block that was used needs no new note of it (a guess: times only order what is collected)."""

Pins = Mapping[str, Mapping[bytes, int]]
"""Changes of counts, by owner and by root (binary CIDv1)."""

_SET = "used = excluded.used, codec = max(ifnull(codec, 0), excluded.codec)"
_PUT = "INSERT INTO block (digest, size, data, file, at, length, codec, used) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_PUT_BLOCK = f"""{_PUT} ON CONFLICT (digest) DO UPDATE
SET data = excluded.data, file = excluded.file, at = excluded.at, length = excluded.length, {_SET}"""
_PUT_LINKED = f"""{_PUT} ON CONFLICT (digest) DO UPDATE SET {_SET}"""
_MOVE_LINKED = """
UPDATE block SET file = ?, at = ?, length = ? WHERE digest = ? AND file IN (SELECT id FROM file WHERE path IS NOT NULL)
"""
_PUT_FILE = """
INSERT INTO file (root, size, mtime_ns, inode, boot, device, path) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (root) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns, inode = excluded.inode,
boot = excluded.boot, device = excluded.device, path = excluded.path
"""
_PUT_PIN = "INSERT INTO pin VALUES (?, ?, ?) ON CONFLICT (owner, cid) DO UPDATE SET count = count + excluded.count"
_BLOCKS = """
SELECT digest, block.size, data, root, at, length, codec, used, path IS NOT NULL FROM block
LEFT JOIN file ON file.id = block.file
"""
_FILES = """
SELECT root, size, mtime_ns, inode, boot, device, path FROM file
WHERE EXISTS (SELECT 1 FROM block WHERE digest = substr(root, -32))
"""


class Slice(msgspec.Struct, frozen=True, gc=False):
    """Where a block's data lies in the whole file of this root (binary CIDv1); `linked`: a file of somebody else."""

    root: bytes
    at: int
    length: int
    linked: bool = False


class Block(msgspec.Struct, frozen=True, gc=False):
    """One block: its bytes in the row, a slice of a whole file, or (neither) a file of its own.

    `codec` says how its links are read, `RAW`: it has none.
    """

    digest: bytes
    size: int
    data: bytes | None = None
    slice: Slice | None = None
    codec: int = RAW
    used: int = 0


class Stamp(msgspec.Struct, frozen=True, gc=False):
    """What a file looked like when the store itself hashed it, and in which run of the machine.

    After a crash of the machine a file may lack bytes that were never flushed, with its times
    intact: so a stamp of an earlier boot proves nothing. `device` is 0 for the store's own files.
    """

    size: int
    mtime_ns: int
    inode: int
    boot: str
    device: int = 0


class WholeFile(msgspec.Struct, frozen=True, gc=False):
    """A whole file, named by its root (binary CIDv1): the store's own, or the one at `path` that belongs to a user."""

    root: bytes
    stamp: Stamp
    path: Path | None = None


class Node(msgspec.Struct, frozen=True, gc=False):
    """What the collector has to know of a block. `size`: what it takes here, nothing for a linked one."""

    id: int
    digest: bytes
    size: int
    codec: int
    used: int


def _nothing() -> None:
    """There are no files to put in their place."""


class Index:
    """The index of the store in `folder`; raises `ContentError` when it is damaged, newer, missing or busy for long.

    `read` gives the bytes of a block that has a file of its own, where their look has to tell what they are.
    """

    def __init__(self, folder: Path, *, read: Callable[[bytes], bytes]) -> None:
        self._folder, self._path, self._read = folder, folder / "index.sqlite", read
        self._lock = threading.RLock()
        self._opened: sqlite3.Connection | None = None
        self._closed = False
        if self._path.exists():
            with self._guarded():
                self._open()
        else:
            self._refuse_orphans()

    def _open(self) -> sqlite3.Connection:
        if self._closed:
            raise sqlite3.ProgrammingError("it is closed")
        new = not self._path.exists()
        db = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            if new:  # there is nothing in it that four flushes would save
                db.execute("PRAGMA synchronous = OFF")
            db.execute(f"PRAGMA journal_mode = {'DELETE' if on_network(self._folder) else 'WAL'}")
            db.execute("PRAGMA synchronous = NORMAL")
            self._prepare(db)
            db.execute("PRAGMA shrink_memory")  # half of what opening took: a devstack has a thousand stores
        except BaseException:
            db.close()
            raise
        self._opened = db
        return db

    @property
    def _db(self) -> sqlite3.Connection:
        """The open index, made if there is none; under the lock."""
        return self._opened or self._open()

    def _is_empty(self) -> bool:
        """Whether nothing was ever written, here or by another process."""
        return self._opened is None and not self._closed and not self._path.exists()

    # --- reading ---

    def find(self, digest: bytes) -> Block | None:
        """The block with this digest, or None."""
        row = self._row(f"{_BLOCKS} WHERE digest = ?", digest)
        return None if row is None else _block(row)

    def use(self, digest: bytes) -> int | None:
        """The codec of a block that is here, else None; it counts as used, and whoever collects knows already."""
        row = self._row("SELECT used, codec FROM block WHERE digest = ?", digest)
        if row is None:
            return None
        now, codec = int(time.time()), int(row[1] or RAW)
        if row[0] is not None and now - row[0] < FRESH:
            return codec
        with self.transaction() as db:
            found = db.execute("UPDATE block SET used = ? WHERE digest = ?", (now, digest)).rowcount
        return codec if found else None

    def file(self, root: bytes) -> WholeFile | None:
        """The whole file with this root, or None."""
        row = self._row(f"{_FILES} AND root = ?", root)
        return None if row is None else _file(row)

    def files(self) -> list[WholeFile]:
        """Every whole file."""
        return [_file(row) for row in self.rows(f"{_FILES} ORDER BY root")]

    def blocks(self) -> Iterator[Block]:
        """Every block, in pages, so that others may write meanwhile."""
        last: bytes = b""
        while rows := self.rows(f"{_BLOCKS} WHERE digest > ? ORDER BY digest LIMIT 500", last):
            yield from map(_block, rows)
            last = rows[-1][0]

    def pins(self, cid: bytes, *, without: Collection[str] = ()) -> int:
        """How often this root is pinned, by all but some owners."""
        rows = self.rows("SELECT owner, count FROM pin WHERE cid = ?", cid)
        return sum(count for owner, count in rows if owner not in without)

    def pins_of(self, owner: str, cid: bytes) -> int:
        """How often this owner has pinned this root."""
        return sum(count for (count,) in self.rows("SELECT count FROM pin WHERE owner = ? AND cid = ?", owner, cid))

    def owners(self) -> list[str]:
        """Who has pinned something."""
        return [owner for (owner,) in self.rows("SELECT DISTINCT owner FROM pin ORDER BY owner")]

    def pinned(self) -> list[bytes]:
        """Every root that is pinned."""
        return [cid for (cid,) in self.rows("SELECT DISTINCT cid FROM pin")]

    def room(self) -> int:
        """How many bytes the store takes: its files, and the index so far as it is in use."""
        if self._is_empty():
            return 0
        own = "SELECT ifnull(sum(size), 0) FROM block WHERE data IS NULL AND file IS NULL"
        whole = "SELECT ifnull(sum(size), 0) FROM file WHERE path IS NULL"
        pages = "SELECT (page_count - freelist_count) * page_size FROM"
        pragmas = "pragma_page_count, pragma_freelist_count, pragma_page_size"
        return sum(int(self.rows(query)[0][0]) for query in (own, whole, f"{pages} {pragmas}"))

    # --- writing ---

    def write(
        self,
        blocks: Sequence[Block] = (),
        *,
        files: Iterable[WholeFile] = (),
        pins: Pins | None = None,
        released: Collection[str] = (),
        place: Callable[[], None] = _nothing,
    ) -> None:
        """Write files, blocks (their slices name files of this or an earlier call) and changes of pins at once.

        `place` puts the store's own files where they belong. `released`: owners whose pins go, before new ones come.
        """
        now = int(time.time())
        with self.transaction() as db:
            place()
            ids: dict[bytes, int] = {}
            for file in files:
                self._put_file(file)
            rows = [(block, self._block_row(block, ids, now)) for block in blocks]
            linked = [row for block, row in rows if block.slice is not None and block.slice.linked]
            db.executemany(_PUT_BLOCK, [row for block, row in rows if block.slice is None or not block.slice.linked])
            if linked:  # the store's own bytes are better than those of a file that may change
                db.executemany(_MOVE_LINKED, [(row[3], row[4], row[5], row[0]) for row in linked])
                db.executemany(_PUT_LINKED, linked)
            db.executemany("DELETE FROM pin WHERE owner = ?", [(owner,) for owner in released])
            changes = [
                (owner, cid, count) for owner, counts in (pins or {}).items() for cid, count in counts.items() if count
            ]
            db.executemany(_PUT_PIN, changes)
            if any(count < 0 for _, _, count in changes):  # it looks at all of them
                db.execute("DELETE FROM pin WHERE count <= 0")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction; no other thread or process writes meanwhile."""
        with self._lock, self._guarded(), _transaction(self._db) as db:
            yield db

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of a query about what is stored."""
        with self._lock, self._guarded():
            if self._is_empty():
                return []
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._closed = True
            if self._opened is not None:
                self._opened.close()

    def _prepare(self, db: sqlite3.Connection) -> None:
        schema.define(db, read=self._read)
        version = _version(db)
        if version < schema.VERSION:
            with _transaction(db):  # another process may have been quicker
                version = _version(db)
                if version == 0:
                    self._refuse_orphans()
                    schema.create(db)
                elif version < schema.VERSION:
                    schema.upgrade(db, version)
        elif version > schema.VERSION:
            raise schema.refuse(self._folder, version)

    def _refuse_orphans(self) -> None:
        if any(True for name in ("blocks", "files") for _ in (self._folder / name).glob("*/*")):
            raise ContentError(
                f"the content store {self._folder} has blocks but its index {self._path.name} is missing or empty:"
                " restore it from a backup, or move the folder away to start a new store",
            )

    def _put_file(self, file: WholeFile) -> None:
        stamp, path = file.stamp, None if file.path is None else os.fsencode(file.path)
        row = (file.root, stamp.size, stamp.mtime_ns, stamp.inode, stamp.boot, stamp.device, path)
        only_linked = " WHERE path IS NOT NULL" if path is not None else ""
        self._db.execute(_PUT_FILE + only_linked, row)

    def _block_row(self, block: Block, ids: dict[bytes, int], now: int) -> tuple[Any, ...]:
        if block.slice is None:
            return (block.digest, block.size, block.data, None, None, None, block.codec, now)
        root = block.slice.root
        if root not in ids:
            ids[root] = self._db.execute("SELECT id FROM file WHERE root = ?", (root,)).fetchone()[0]
        return (block.digest, block.size, None, ids[root], block.slice.at, block.slice.length, block.codec, now)

    def _row(self, query: str, key: bytes) -> tuple[Any, ...] | None:
        with self._lock, self._guarded():
            if self._is_empty():
                return None
            row: tuple[Any, ...] | None = self._db.execute(query, (key,)).fetchone()
            return row

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError as error:
            raise BugError(f"the content store {self._path.parent} was used after it was closed: {error}") from error
        except sqlite3.OperationalError as error:
            raise ContentError(f"the content store's index {self._path}: {error}{_advice(error)}") from error
        except sqlite3.DatabaseError as error:
            raise ContentError(
                f"the content store's index {self._path} is damaged ({error}): restore it from a backup,"
                f" or move the folder {self._path.parent} away to start a new store",
            ) from error


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """No other process writes meanwhile."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _advice(error: sqlite3.OperationalError) -> str:
    if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return f"; another process has been writing to it for {BUSY_SECONDS} s: try again when that has ended"
    return "; check that its disk has room and may be written to"


def _file(row: Sequence[Any]) -> WholeFile:
    root, *stamp, path = row
    return WholeFile(root, Stamp(*stamp), None if path is None else Path(os.fsdecode(path)))


def _block(row: Sequence[Any]) -> Block:
    digest, size, data, root, at, length, codec, used, linked = row
    place = None if root is None else Slice(root, at, length, bool(linked))
    return Block(digest, size, data, place, codec or RAW, used or 0)
