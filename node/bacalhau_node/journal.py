"""What was decided, before anyone is told: the rows of a node in one SQLite file.

Theory of operation. The journal holds state, not a log: one row for each job, each shard and
each result that is owed, and a later row of the same key takes the place of the earlier one.
So a restart reads what is, and nothing grows with the number of steps that led there. A row is
a MessagePack blob beside its key and its CRC-32 (SQLite finds damaged pages, not damaged content).

One `commit` is one transaction. With WAL and `synchronous=NORMAL` it is a write without a
flush: it survives the death of the process, and after a power cut the journal is whole but may
end a moment earlier. `durable` flushes each commit. On network file systems, where WAL
doesn't work, a rollback journal takes its place. The file is held exclusively while it is open.

Rows outlive the program that wrote them. Their fields are only ever added to, each with a default, so a row of an
older program is read as it stands and written anew when it changes next. What can't be had that way takes another
`VERSION`, and a step that rewrites the rows when the file is opened; the journal of a newer version is refused.

A journal that can't be read is an error and stays as it is: an empty one in its place would
say that the node owes nobody anything. So a new file is made beside its place and renamed
into it, and an empty file there is known to be damage. It is made with the first row: most nodes of a large network
never have one.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bacalhau_node.errors import ContentError
from bacalhau_node.filesystem import on_network
from bacalhau_node.ids import JobId
from bacalhau_node.protocol.events import ComputeRow, JobRow, Row, ShardRow

VERSION = 1
"""Format of file and rows, in SQLite's `user_version`."""

Key = tuple[int, str, int, int]
"""(kind, job, shard, attempt): its order is the order of `load`."""

OWED = 2
"""The kind of results that are owed; those before it are what the requester knows."""

_SCHEMA = f"""
BEGIN;
CREATE TABLE entry (
    kind INTEGER NOT NULL, job TEXT NOT NULL, shard INTEGER NOT NULL, attempt INTEGER NOT NULL,
    data BLOB NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (kind, job, shard, attempt));
PRAGMA user_version = {VERSION};
COMMIT;
"""
_PUT = """
INSERT INTO entry (kind, job, shard, attempt, data, crc) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (kind, job, shard, attempt) DO UPDATE SET data = excluded.data, crc = excluded.crc
"""
_DELETE = "DELETE FROM entry WHERE kind = ? AND job = ? AND shard = ? AND attempt = ?"
_FORGET = f"DELETE FROM entry WHERE kind < {OWED} AND job = ?"  # noqa: S608 - a number of our own
_LOAD = "SELECT data, crc FROM entry ORDER BY kind, job, shard, attempt"

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Row] = msgspec.msgpack.Decoder(Row)


def row_key(row: Row) -> Key:
    """What `row` is about; rows of one key replace each other. Jobs sort before shards, shards before results."""
    match row:
        case JobRow():
            return 0, row.job, 0, 0
        case ShardRow():
            return 1, row.job, row.shard, 0
        case ComputeRow(execution):
            return OWED, execution.job, execution.shard, execution.attempt


def is_forgotten(row: Row) -> bool:
    """Whether `row` takes its predecessor away and leaves nothing."""
    return isinstance(row, ComputeRow) and row.outcome is None


class SqliteJournal:
    """The journal of one node in the file `path`, made with the first commit. One call at a time, any thread."""

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self._path, self._durable = path, durable
        self._opened: sqlite3.Connection | None = None
        with self._told():
            if path.exists():
                self._open()
            else:
                _check_place(path)

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        self._opened = db
        return db

    @property
    def _db(self) -> sqlite3.Connection:
        """The open journal, made if there is none."""
        if self._opened is not None:
            return self._opened
        if not self._path.exists():
            _create(self._path)
            if self._durable:
                _flush(self._path.parent)
        return self._open()

    def commit(self, rows: Iterable[Row]) -> None:
        """Write all rows in one transaction, or none and raise `ContentError` when the disk won't take them."""
        latest = {row_key(row): row for row in rows}
        gone = [key for key, row in latest.items() if is_forgotten(row)]
        kept = [(*key, *_packed(row)) for key, row in latest.items() if not is_forgotten(row)]
        with self._told(), _transaction(self._db):
            self._db.executemany(_PUT, kept)
            self._db.executemany(_DELETE, gone)

    def forget(self, jobs: Iterable[JobId]) -> None:
        """Take away jobs and their shards in one transaction, or none and raise `ContentError`."""
        if self._opened is None:
            return
        with self._told(), _transaction(self._db):
            self._db.executemany(_FORGET, [(job,) for job in jobs])

    def load(self) -> list[Row]:
        """Every row: jobs, then shards, then results that are owed; raises `ContentError` for a damaged journal."""
        if self._opened is None:
            return []
        with self._told():
            if (finding := _one(self._db, "PRAGMA quick_check(1)")) != "ok":
                raise ContentError(self._damage(str(finding)))
            return [self._unpacked(data, crc) for data, crc in self._db.execute(_LOAD)]

    def close(self) -> None:
        """Write what is in the WAL into the file, and let go of it."""
        if self._opened is not None:
            self._opened.close()

    def _prepare(self, db: sqlite3.Connection) -> None:
        if self._path.stat().st_size == 0:
            raise ContentError(self._damage("it is empty"))
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # before the first access: WAL then needs no shared memory
        version = _one(db, "PRAGMA user_version")
        if version != VERSION:
            raise ContentError(self._other_version(version))
        db.execute(f"PRAGMA journal_mode = {_mode(self._path.parent)}")
        db.execute(f"PRAGMA synchronous = {'FULL' if self._durable else 'NORMAL'}")
        with _transaction(db):
            pass  # takes the lock, or says now that somebody else has it
        db.execute("PRAGMA shrink_memory")  # half of what opening took: a devstack has a thousand journals

    def _unpacked(self, data: bytes, crc: int) -> Row:
        if zlib.crc32(data) != crc:
            raise ContentError(self._damage("a row differs from its checksum"))
        try:
            return _decoder.decode(data)
        except msgspec.DecodeError as error:
            raise ContentError(self._damage(f"a row is not what this version writes: {error}")) from error

    # --- what went wrong ---

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors in words that say what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                raise ContentError(f"the journal {self._path} is in use by another process: end that first") from error
            raise ContentError(
                f"the journal {self._path} can't be used: {error}. Check that its disk has room and may be written to"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ContentError(self._damage(str(error))) from error
        except OSError as error:
            raise ContentError(f"the journal {self._path} can't be used: {error.strerror}") from error

    def _damage(self, finding: str) -> str:
        return (
            f"the journal {self._path} is damaged ({finding}). Move {self._path.name} and {self._path.name}-wal out of "
            f"{self._path.parent} to go on without it: its jobs are forgotten then, their results stay in the store"
        )

    def _other_version(self, version: object) -> str:
        if version == 0:
            return self._damage("it is a database of something else")
        return (
            f"the journal {self._path} has format {version}, this version of bacalhau-jupyter knows {VERSION}: "
            f"use the version that wrote it, or another BACALHAU_DIR"
        )


def _packed(row: Row) -> tuple[bytes, int]:
    data = _encoder.encode(row)
    return data, zlib.crc32(data)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _one(db: sqlite3.Connection, query: str) -> object:
    """The first column of the first row."""
    return db.execute(query).fetchone()[0]


def _check_place(path: Path) -> None:
    """Raise `ContentError` when a journal was here, `OSError` when there can't be one."""
    path.parent.stat()
    for suffix in ("-wal", "-journal"):
        if (rest := path.with_name(path.name + suffix)).exists():
            raise ContentError(
                f"{rest} belongs to {path.name}, which is not there: put that back, or move both away for a new journal"
            )


def _create(path: Path) -> None:
    """Make an empty journal, whole from the moment that it has its name."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    db = sqlite3.connect(fresh, isolation_level=None)
    try:
        db.execute("PRAGMA synchronous = OFF")  # flushed as a whole below: ten flushes would take longer than a cell
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute(f"PRAGMA journal_mode = {_mode(path.parent)}")
        db.executescript(_SCHEMA)
    finally:
        db.close()
    _flush(fresh)
    fresh.replace(path)


def _mode(folder: Path) -> str:
    return "DELETE" if on_network(folder) else "WAL"


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
