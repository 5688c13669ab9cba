"""What was fetched already: (URL, version) -> CID, so that a file comes over the network once and a rerun is by CID.

A version is what a server calls one state of a file (an ETag, a version id): the same pair always stands for the same
bytes. A URL into a bucket that is signed has another signature each time; `unsigned` tells what it is a URL of.

The table is a hint for all processes of a user, in the folder of the store that they share: that the content is
still there must be asked of the store, and losing the table costs only fetching again.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bacalhau_node.errors import ContentError
from bacalhau_node.filesystem import on_network

MOST = 500_000
"""Rows that are kept, the newest: about 200 bytes each, so a hundred megabytes at most."""

_BUSY_SECONDS = 20
_SCHEMA = """
CREATE TABLE IF NOT EXISTS fetched (
    id INTEGER PRIMARY KEY, url TEXT NOT NULL, version TEXT NOT NULL, cid TEXT NOT NULL, UNIQUE (url, version))
"""
_PUT = """
INSERT INTO fetched (url, version, cid) VALUES (?, ?, ?) ON CONFLICT (url, version) DO UPDATE SET cid = excluded.cid
"""

_SIGNATURE = re.compile(r"x-(?:amz|goog)-.*", re.IGNORECASE)
_AZURE = re.compile(r"s[eprstv]|ss|srt|spr|sip|sig|sdd|ses|sk(?:oid|tid|t|e|s|v)|saoid|suoid|scid")


def unsigned(url: str) -> str:
    """The URL without what signing it for a while has added, as S3, Google and Azure do; itself where it is not signed.

    It stands for the same object however often that is signed, but opens nothing: who may know what came by it
    must be one who had a good signature before.
    """
    place, mark, query = url.partition("?")
    given = query.split("&")
    azure = {"se", "sig", "sv"} <= {pair.partition("=")[0] for pair in given}
    kept = [pair for pair in given if not _signs(pair.partition("=")[0], azure=azure)]
    return f"{place}{mark if kept else ''}{'&'.join(kept)}"


def _signs(name: str, *, azure: bool) -> bool:
    return bool(_SIGNATURE.fullmatch(name) or (azure and _AZURE.fullmatch(name)))


class Fetched:
    """The table in `folder`, opened when it is first used. Quick, and for any thread; raises `ContentError`."""

    def __init__(self, folder: Path, *, most: int = MOST) -> None:
        self._path, self._most = folder / "fetched.sqlite", most
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def recall(self, url: str, version: str) -> str | None:
        """The CID of what this URL held when its version was `version`, if it was ever fetched."""
        with self._guarded() as db:
            row = db.execute("SELECT cid FROM fetched WHERE url = ? AND version = ?", (url, version)).fetchone()
        return None if row is None else str(row[0])

    def remember(self, url: str, version: str, cid: str) -> None:
        """Note what this version of the URL was; its content must be in the store, flushed, already."""
        self.remember_all([(url, version, cid)])

    def remember_all(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """`remember` many, (URL, version, CID), in one transaction."""
        with self._guarded() as db, db:
            db.execute("BEGIN IMMEDIATE")
            db.executemany(_PUT, rows)

    def close(self) -> None:
        """Close the table."""
        with self._lock:
            if self._db is not None:
                self._db.close()
            self._db = None

    @contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        """One user of the connection at a time, and errors that say which file."""
        with self._lock:
            try:
                if self._db is None:
                    self._db = self._open()
                yield self._db
            except (sqlite3.Error, OSError) as error:
                raise ContentError(
                    f"{self._path}: {error}; make room on its disk, or remove the file: it only saves fetching again"
                ) from error

    def _open(self) -> sqlite3.Connection:
        folder = self._path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            db.execute(f"PRAGMA journal_mode = {'DELETE' if on_network(folder) else 'WAL'}")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(_SCHEMA)
            db.execute("DELETE FROM fetched WHERE id <= (SELECT max(id) FROM fetched) - ?", (self._most,))
        except BaseException:
            db.close()
            raise
        return db
