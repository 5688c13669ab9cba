"""UnixFS of a file that is not all there yet: hashed as it comes, with the CID that an import of it gives."""

from __future__ import annotations

from hashlib import sha256

from bacalhau_node.cid import DAG_PB, RAW, binary_prefix
from bacalhau_node.content.dagpb import leaf_frame, leaf_overhead
from bacalhau_node.content.unixfs import Imported, LeafSink, Profile, Sink, Tree, hash_leaf


class Growing:
    """`import_reader` for bytes that come one after the other, once; leaves by reference."""

    def __init__(self, sink: Sink, *, profile: Profile, leaf: LeafSink) -> None:
        self._tree, self._profile, self._leaf = Tree(sink, profile), profile, leaf
        self._head, self._tail = (b"", b"") if profile.raw_leaves else leaf_frame(profile.chunk)
        self._prefix = binary_prefix(
            RAW if profile.raw_leaves else DAG_PB, version=1 if profile.raw_leaves else profile.version
        )
        self._digest, self._filled = sha256(self._head), 0
        self.size = 0
        """Bytes that came."""

    @property
    def rest(self) -> int:
        """So many bytes at the end make a leaf that is not full."""
        return self._filled % self._profile.chunk

    def add(self, view: memoryview) -> None:
        """Take what comes next."""
        while view:
            if self._filled == self._profile.chunk:
                self._close()
            part = view[: self._profile.chunk - self._filled]
            self._digest.update(part)
            self._filled += len(part)
            self.size += len(part)
            view = view[len(part) :]

    def end(self, rest: bytes) -> Imported:
        """No more comes. `rest`: the last bytes once more, `self.rest` of them, since a leaf begins with its length."""
        if self._filled == self._profile.chunk:
            self._close()
        if rest or not self.size:
            cid, _, length = hash_leaf(lambda *_: rest, 0, len(rest), self._profile, keep=False)
            self._note(cid, length)
        return self._tree.root()

    def _close(self) -> None:
        self._digest.update(self._tail)
        self._note(self._prefix + self._digest.digest(), self._filled)
        self._digest, self._filled = sha256(self._head), 0

    def _note(self, cid: bytes, length: int) -> None:
        self._leaf(cid, self.size - length, length)
        self._tree.add(Imported(cid, length, length + (0 if self._profile.raw_leaves else leaf_overhead(length))))
