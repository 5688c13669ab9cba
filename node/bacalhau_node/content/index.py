"""The store's index: which block lies where, which files are whole, what is pinned. SQLite.

Theory of operation. One row a block, keyed by its sha2-256, says where its bytes are: in the
row itself (`data`), in a file of its own (`data` and `file` empty), or in a slice of a whole file
that the store owns (`file`, `at`, `length`). A slice shorter than the block is the data of a dag-pb
leaf: the few bytes around it are computed. Rows are written only after the files that they name, in transactions
of SQLite, so whatever the index claims is on disk whenever a process dies.

Several processes of one user share an index: WAL lets them read while one writes, and SQLite's own locks order the
writers, so no lock file is needed beside it. Within a process one connection serves all threads
under a lock; transactions are kept to a few thousand rows, some milliseconds. WAL needs shared memory,
which network file systems lack: there the index uses a rollback journal. A commit survives the death of the
process; a power failure may undo the last ones, or take bytes from the files that they name: reading finds that.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bacalhau_node.errors import BugError, ContentError
from bacalhau_node.filesystem import on_network

VERSION = 1
BUSY_SECONDS = 20
"""How long a writer waits for another process's transaction, which lasts milliseconds."""


_SCHEMA = """
CREATE TABLE file (
    id INTEGER PRIMARY KEY, root BLOB NOT NULL UNIQUE, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, boot TEXT NOT NULL);
CREATE TABLE block (
    digest BLOB PRIMARY KEY, size INTEGER NOT NULL, data BLOB,
    file INTEGER REFERENCES file (id), at INTEGER, length INTEGER);
CREATE TABLE pin (cid BLOB PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
"""
_PUT_BLOCK = """
INSERT INTO block (digest, size, data, file, at, length) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE
SET data = excluded.data, file = excluded.file, at = excluded.at, length = excluded.length
"""
_PUT_FILE = """
INSERT INTO file (root, size, mtime_ns, inode, boot) VALUES (?, ?, ?, ?, ?) ON CONFLICT (root) DO UPDATE
SET size = excluded.size, mtime_ns = excluded.mtime_ns, inode = excluded.inode, boot = excluded.boot RETURNING id
"""
_PUT_PIN = "INSERT INTO pin VALUES (?, ?) ON CONFLICT (cid) DO UPDATE SET count = count + excluded.count"


class Slice(msgspec.Struct, frozen=True, gc=False):
    """Where a block's data lies in the whole file of this root (binary CIDv1)."""

    root: bytes
    at: int
    length: int


class Block(msgspec.Struct, frozen=True, gc=False):
    """One block: its bytes in the row, a slice of a whole file, or (neither) a file of its own."""

    digest: bytes
    size: int
    data: bytes | None = None
    slice: Slice | None = None


class Stamp(msgspec.Struct, frozen=True, gc=False):
    """What a file looked like when the store itself hashed it, and in which run of the machine.

    After a crash of the machine a file may lack bytes that were never flushed, with its times
    intact: so a stamp of an earlier boot proves nothing.
    """

    size: int
    mtime_ns: int
    inode: int
    boot: str


class OwnedFile(msgspec.Struct, frozen=True, gc=False):
    """A whole file that the store owns, named by its root (binary CIDv1)."""

    root: bytes
    stamp: Stamp


class Index:
    """The index of the store in `folder`; raises `ContentError` when it is damaged, newer, missing or busy for long."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "index.sqlite"
        self._lock = threading.RLock()
        with self._guarded():
            self._db = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                self._db.execute(f"PRAGMA journal_mode = {'DELETE' if on_network(folder) else 'WAL'}")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._create(folder)
            except BaseException:
                self._db.close()
                raise

    def find(self, digest: bytes) -> Block | None:
        """The block with this digest, or None."""
        row = self._row(
            "SELECT digest, block.size, data, root, at, length FROM block LEFT JOIN file ON file.id = block.file"
            " WHERE digest = ?",
            digest,
        )
        return None if row is None else _block(row)

    def has(self, digest: bytes) -> bool:
        """Whether the index knows this block."""
        return self._row("SELECT 1 FROM block WHERE digest = ?", digest) is not None

    def file(self, root: bytes) -> OwnedFile | None:
        """The whole file with this root, or None."""
        row = self._row("SELECT root, size, mtime_ns, inode, boot FROM file WHERE root = ?", root)
        return None if row is None else OwnedFile(row[0], Stamp(*row[1:]))

    def pins(self, cid: bytes) -> int:
        """How often this root is pinned."""
        row = self._row("SELECT count FROM pin WHERE cid = ?", cid)
        return 0 if row is None else int(row[0])

    def write(
        self, blocks: Sequence[Block], *, files: Iterable[OwnedFile] = (), pins: Mapping[bytes, int] | None = None
    ) -> None:
        """Write files, blocks (their slices name files of this or an earlier call) and changes of pins at once."""
        with self._transaction() as db:
            ids = {file.root: db.execute(_PUT_FILE, _file_row(file)).fetchone()[0] for file in files}
            db.executemany(_PUT_BLOCK, [self._block_row(block, ids) for block in blocks])
            if pins:
                db.executemany(_PUT_PIN, list(pins.items()))
                db.execute("DELETE FROM pin WHERE count <= 0")

    def blocks(self) -> Iterator[Block]:
        """Every block, in pages, so that others may write meanwhile."""
        last: bytes = b""
        while True:
            rows = self._rows(
                "SELECT digest, block.size, data, root, at, length FROM block LEFT JOIN file ON file.id = block.file"
                " WHERE digest > ? ORDER BY digest LIMIT 500",
                last,
            )
            if not rows:
                return
            yield from map(_block, rows)
            last = rows[-1][0]

    def files(self) -> list[OwnedFile]:
        """Every whole file."""
        rows = self._rows("SELECT root, size, mtime_ns, inode, boot FROM file ORDER BY root")
        return [OwnedFile(row[0], Stamp(*row[1:])) for row in rows]

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._db.close()

    def _create(self, folder: Path) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            with self._transaction() as db:  # another process may have been quicker
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    self._refuse_orphans(folder)
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {VERSION}")
                    version = VERSION
        if version != VERSION:
            raise ContentError(
                f"the content store {folder} has format {version}, this program reads format {VERSION}:"
                " use the version that wrote it, or another folder",
            )

    def _refuse_orphans(self, folder: Path) -> None:
        if any(True for name in ("blocks", "files") for _ in (folder / name).glob("*/*")):
            raise ContentError(
                f"the content store {folder} has blocks but its index {self._path.name} is missing or empty:"
                " restore it from a backup, or move the folder away to start a new store",
            )

    def _block_row(self, block: Block, ids: dict[bytes, int]) -> tuple[Any, ...]:
        if block.slice is None:
            return (block.digest, block.size, block.data, None, None, None)
        root = block.slice.root
        if root not in ids:
            ids[root] = self._db.execute("SELECT id FROM file WHERE root = ?", (root,)).fetchone()[0]
        return (block.digest, block.size, None, ids[root], block.slice.at, block.slice.length)

    def _row(self, query: str, key: bytes) -> tuple[Any, ...] | None:
        with self._lock, self._guarded():
            row: tuple[Any, ...] | None = self._db.execute(query, (key,)).fetchone()
            return row

    def _rows(self, query: str, *keys: bytes) -> list[tuple[Any, ...]]:
        with self._lock, self._guarded():
            return self._db.execute(query, keys).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._guarded():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

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


def _advice(error: sqlite3.OperationalError) -> str:
    if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return f"; another process has been writing to it for {BUSY_SECONDS} s: try again when that has ended"
    return "; check that its disk has room and may be written to"


def _file_row(file: OwnedFile) -> tuple[Any, ...]:
    stamp = file.stamp
    return (file.root, stamp.size, stamp.mtime_ns, stamp.inode, stamp.boot)


def _block(row: Sequence[Any]) -> Block:
    digest, size, data, root, at, length = row
    return Block(digest, size, data, None if root is None else Slice(root, at, length))
