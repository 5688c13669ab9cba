"""The tables of the store's index, and the way there from older formats.

A store of an older format is brought to the present one when it is opened, in one transaction: a process that dies
in it leaves the old one. A newer format is refused, since what it means is not known here.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bacalhau_node.cid import DAG_JSON, DAG_PB, RAW
from bacalhau_node.content.dagpb import decode_node
from bacalhau_node.errors import ContentError

VERSION: Final = 2
"""Format of the store, in SQLite's `user_version`."""

_FILE = """
CREATE TABLE file (
    id INTEGER PRIMARY KEY, root BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    inode INTEGER NOT NULL, boot TEXT NOT NULL, device INTEGER NOT NULL DEFAULT 0, path BLOB)"""
_BLOCK = """
CREATE TABLE block (
    digest BLOB PRIMARY KEY, size INTEGER NOT NULL, file INTEGER REFERENCES file (id), at INTEGER, length INTEGER,
    codec INTEGER, used INTEGER, data BLOB)"""
_PIN = """
CREATE TABLE pin (
    owner TEXT NOT NULL, cid BLOB NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (owner, cid)) WITHOUT ROWID"""
_INDEXES = (
    "CREATE INDEX block_used ON block (used)",
    "CREATE INDEX block_file ON block (file) WHERE file IS NOT NULL",
    "CREATE INDEX block_own ON block (size) WHERE data IS NULL AND file IS NULL",
    "CREATE INDEX pin_cid ON pin (cid)",
)

ADOPT: Final = """
UPDATE block SET used = ?, codec = codec_by_look(digest, file, data) WHERE used IS NULL"""
"""Fills in what format 1 doesn't know; its value is the time."""


def create(db: sqlite3.Connection) -> None:
    """Make the tables of the present format in an empty database, within the caller's transaction."""
    for statement in (_FILE, _BLOCK, _PIN, *_INDEXES):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {VERSION}")


def upgrade(db: sqlite3.Connection, version: int) -> None:
    """Bring a database of an older format to the present one, within the caller's transaction."""
    if version < 2:
        _to_2(db)
    db.execute(f"PRAGMA user_version = {VERSION}")


def refuse(folder: Path, version: int) -> ContentError:
    """What to raise for a format that nobody here knows."""
    return ContentError(
        f"the content store {folder} has format {version}, this program reads formats 1 to {VERSION}:"
        " use the version that wrote it, or another folder",
    )


def define(db: sqlite3.Connection, *, read: Callable[[bytes], bytes]) -> None:
    """Give the connection what `ADOPT` needs; `read` gives the bytes of a block that has a file of its own."""

    def codec(digest: bytes, file: int | None, data: bytes | None) -> int:
        if file is not None:
            return RAW
        try:
            return _by_look(read(digest) if data is None else data)
        except OSError:
            return RAW  # whoever reads it is told that it is missing

    db.create_function("codec_by_look", 3, codec)


def _to_2(db: sqlite3.Connection) -> None:
    """Format 1 knew no files in place, no owners of pins, no times of use, and not which blocks have links."""
    for statement in (
        "ALTER TABLE file ADD COLUMN device INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE file ADD COLUMN path BLOB",
        "ALTER TABLE block ADD COLUMN codec INTEGER",
        "ALTER TABLE block ADD COLUMN used INTEGER",
        "ALTER TABLE pin RENAME TO pin_1",
        _PIN,
        "INSERT INTO pin SELECT '', cid, count FROM pin_1",
        "DROP TABLE pin_1",
        *_INDEXES,
    ):
        db.execute(statement)
    db.execute(ADOPT, (int(time.time()),))


def _by_look(data: bytes) -> int:
    """How a block's links would be read, judged by its bytes alone; `RAW` when it has none."""
    if data[:1] in (b"{", b"["):
        return DAG_JSON
    try:
        return DAG_PB if decode_node(data).links else RAW
    except ContentError:
        return RAW
