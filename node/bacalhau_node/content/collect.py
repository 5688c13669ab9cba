"""Removing what nobody needs from a store that others use at the same time.

Theory of operation. The rule that all readers of a store rely on is: *what is here has everything below it here*.
So a collection **marks** whole trees, in this order: what is pinned; what was used after the **horizon**; then,
least recently used last, as much as may stay. What is left without a mark goes, and nothing that was
marked links to it.

The horizon lies `GRACE` back, or where the oldest hold of a living process began, if that is longer ago. It gives
everybody the time to pin what they put, imported, or asked for: each of these notes the time of use in the index before
it answers. Such notes may come while a collection runs, so the nodes that have links are removed in one transaction,
which first marks whatever was used since the marking began; a tree is therefore found whole or not at all. What has no
links follows in small transactions, each passing over what was used meanwhile. Files go last: those that no row names
any more, looked at while nobody else can write rows (see `index`); so what a crash has left without a row goes too. One
process collects at a time; others find that it is done.

A linked file that has changed is the other way in which blocks get lost: `lose` removes its blocks
and all nodes above them, so the rule holds again.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from bacalhau_node.cid import RAW, Cid, binary_prefix
from bacalhau_node.content import car
from bacalhau_node.content.files import Files
from bacalhau_node.content.index import FRESH, Index, Node
from bacalhau_node.content.schema import ADOPT
from bacalhau_node.content.session import sweep
from bacalhau_node.errors import ContentError, SpecError

log = logging.getLogger(__name__)

GRACE: Final = 3600
"""Seconds after which something that was used and not pinned may be collected (a guess: jobs pin within seconds)."""

_PAGE = 500
_NODE = """
SELECT rowid, digest, CASE WHEN file IN (SELECT id FROM file WHERE path IS NOT NULL) THEN 0 ELSE size END, codec, used
FROM block
"""


class Stopped(Exception):
    """The collection was asked to end; what it has done so far is whole."""


class Collection:
    """One collection. `stop` is asked between steps; what was removed until then stays removed."""

    def __init__(self, index: Index, files: Files, *, stop: Callable[[], bool] = lambda: False) -> None:
        self._index, self._files, self._stop = index, files, stop
        self._marked: set[int] = set()
        self._size = 0

    def run(self, *, keep: int) -> int:
        """Remove what is neither pinned nor held, least recently used first, until `keep` bytes are left.

        Returns how many bytes were freed.
        """
        with _alone(self._files.folder) as alone:
            if not alone:
                return 0
            before = self._index.room()
            began = int(time.time())
            oldest = sweep(self._files.session.folder.parent)
            horizon = began - GRACE if oldest is None else min(began - GRACE, oldest - FRESH)
            with self._index.transaction() as db:
                db.execute(ADOPT, (began,))  # what a program of format 1 wrote
            with contextlib.suppress(Stopped):
                self._mark_all(horizon, keep)
                self._remove_rows(horizon, began)
                self._remove_files()
            return max(0, before - self._index.room())

    # --- marking ---

    def _mark_all(self, horizon: int, keep: int) -> None:
        self._mark_at([cid[-32:] for cid in self._index.pinned()])
        for node in self._by_use():
            if node.used < horizon and keep <= self._size:
                return
            marked = self._mark([node])
            if node.used < horizon and self._size > keep:
                self._marked.difference_update(marked)
                return

    def _by_use(self) -> Iterator[Node]:
        """All blocks, the latest used first, in pages; one that is used meanwhile may come twice or not at all."""
        used, at = 1 << 62, 1 << 62
        while rows := self._index.rows(
            f"{_NODE} WHERE (used, rowid) < (?, ?) ORDER BY used DESC, rowid DESC LIMIT {_PAGE}", used, at
        ):
            self._go_on()
            yield from (Node(*row) for row in rows if row[0] not in self._marked)
            at, *_, used = rows[-1]

    def _mark_at(self, digests: list[bytes]) -> None:
        for at in range(0, len(digests), _PAGE):
            self._mark(list(self._nodes(digests[at : at + _PAGE])))

    def _mark(self, nodes: list[Node]) -> list[int]:
        """Mark these blocks and all below them; returns those that had no mark before."""
        found = []
        waiting: list[bytes] = []
        while nodes or waiting:
            self._go_on()
            for node in nodes:
                if node.id not in self._marked:
                    self._marked.add(node.id)
                    self._size += node.size
                    found.append(node.id)
                    waiting += [child.digest for child in links(self._index, self._files, node)]
            nodes = list(self._nodes(waiting[-_PAGE:])) if waiting else []
            del waiting[-_PAGE:]
        return found

    def _nodes(self, digests: list[bytes]) -> Iterator[Node]:
        marks = ",".join("?" * len(digests))
        return (Node(*row) for row in self._index.rows(f"{_NODE} WHERE digest IN ({marks})", *digests))

    def _go_on(self) -> None:
        if self._stop():
            raise Stopped

    # --- removing ---

    def _remove_rows(self, horizon: int, began: int) -> None:
        nodes = [node for node in self._unmarked(horizon) if node.codec != RAW]
        meanwhile = int(time.time())
        self._mark_at(self._used_since(began))  # the most of it while others may write
        with self._index.transaction() as db:
            self._mark_at(self._used_since(meanwhile))
            _delete(db, nodes, self._marked, horizon)
        leaves = self._unmarked(horizon)
        while batch := list(islice(leaves, _PAGE)):
            with self._index.transaction() as db:
                _delete(db, batch, self._marked, horizon)
        with self._index.transaction() as db:
            db.execute("DELETE FROM file WHERE id NOT IN (SELECT file FROM block WHERE file IS NOT NULL)")

    def _used_since(self, moment: int) -> list[bytes]:
        return [digest for (digest,) in self._index.rows("SELECT digest FROM block WHERE used >= ?", moment - 1)]

    def _unmarked(self, horizon: int) -> Iterator[Node]:
        """All blocks without a mark that were used before the horizon, in pages."""
        last = 0
        while rows := self._index.rows(f"{_NODE} WHERE rowid > ? ORDER BY rowid LIMIT {_PAGE}", last):
            self._go_on()
            yield from (Node(*row) for row in rows if row[0] not in self._marked and row[4] < horizon)
            last = rows[-1][0]

    def _remove_files(self) -> None:
        """Remove every file of the store that no row names."""
        own = "SELECT 1 FROM block WHERE digest = ? AND data IS NULL AND file IS NULL"
        whole = "SELECT 1 FROM file WHERE root = ? AND path IS NULL"
        for folder, query, key in (("blocks", own, _digest), ("files", whole, _root)):
            paths = (self._files.folder / folder).glob("*/*")
            while batch := list(islice(paths, _PAGE)):
                self._go_on()
                with self._index.transaction() as db:
                    for path in batch:
                        name = key(path.name)
                        if name is not None and db.execute(query, (name,)).fetchone() is None:
                            path.unlink(missing_ok=True)


def lose(index: Index, files: Files, root: bytes) -> None:
    """Forget the linked file with this root: its blocks, and all nodes that are not whole without them."""
    found = index.rows("SELECT id FROM file WHERE root = ? AND path IS NOT NULL", root)
    if not found:
        return
    file = found[0][0]
    gone = {digest for (digest,) in index.rows("SELECT digest FROM block WHERE file = ?", file)} | {root[-32:]}
    above = _nodes_above(index, files)
    waiting = list(gone)
    while waiting:
        more = above.get(waiting.pop(), set()) - gone
        gone |= more
        waiting += more
    with index.transaction() as db:
        db.executemany("DELETE FROM block WHERE digest = ?", [(digest,) for digest in gone])
        db.execute("DELETE FROM file WHERE id = ?", (file,))


def _nodes_above(index: Index, files: Files) -> dict[bytes, set[bytes]]:
    """For every block that is linked to, the nodes that link to it."""
    above: dict[bytes, set[bytes]] = {}
    for row in index.rows(f"{_NODE} WHERE codec != ?", RAW):
        node = Node(*row)
        for child in links(index, files, node):
            above.setdefault(child.digest, set()).add(node.digest)
    return above


def links(index: Index, files: Files, node: Node) -> list[Cid]:
    """What a block links to; nothing for one that is damaged or gone: whoever reads it is told."""
    if node.codec == RAW:
        return []
    block = index.find(node.digest)
    if block is None:
        return []
    try:
        data = files.read_block(node.digest) if block.data is None else block.data
        return car.links(Cid(binary_prefix(node.codec, version=1) + node.digest), data)
    except (OSError, ContentError) as error:
        log.warning("a damaged block of the content store links to nothing: %s", error)
        return []


def _delete(db: sqlite3.Connection, nodes: list[Node], marked: set[int], horizon: int) -> None:
    digests = [(node.digest, horizon) for node in nodes if node.id not in marked]
    db.executemany("DELETE FROM block WHERE digest = ? AND used < ?", digests)


def _digest(name: str) -> bytes | None:
    """What a file in `blocks/` is named for; None for something else that lies there."""
    try:
        return bytes.fromhex(name)
    except ValueError:
        return None


def _root(name: str) -> bytes | None:
    try:
        return Cid.parse(name).binary
    except SpecError:
        return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether nobody else collects in this store, and nobody will until the end."""
    handle = os.open(folder / "collecting", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield _taken(handle)
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
