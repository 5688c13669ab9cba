"""Checked reads of what the index claims: bytes that are not the ones of their name are never handed out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from bacalhau_node.cid import DAG_PB, RAW, Cid
from bacalhau_node.content import car
from bacalhau_node.content.collect import lose
from bacalhau_node.content.dagpb import has_links, leaf_block, leaf_frame
from bacalhau_node.content.files import Files
from bacalhau_node.content.index import Block, Index, Stamp, WholeFile
from bacalhau_node.content.reader import Reader
from bacalhau_node.errors import ContentError
from bacalhau_node.sharding import shown

_HEAD = 16


class Disk:
    """Reads blocks and whole files; `reader.Blocks` for what is in the index."""

    def __init__(self, index: Index, files: Files) -> None:
        self._index, self._files = index, files

    def block(self, cid: Cid) -> bytes:
        """The bytes of one block, checked; raises `ContentError`."""
        block = self._index.find(cid.digest)
        if block is None:
            folder = self._files.folder
            raise ContentError(f"the block {cid} is not in the content store {folder}: import its data here first")
        return self._checked(block, cid)

    def to_send(self, cid: Cid) -> bytes:
        """`block`, not hashed where it lies in a file of the store that has not changed since the store hashed it."""
        block = self._index.find(cid.digest)
        if block is None or block.slice is None or block.slice.linked:
            return self.block(cid)
        whole = self._index.file(block.slice.root)
        data, status = _read(self._files.file_path(block.slice.root), block, cid)
        if whole is not None and self._files.stamp_of(status, linked=False) == whole.stamp:
            return data
        return self._checked(block, cid)

    def is_leaf(self, cid: Cid) -> bool:
        """Whether a block that is here has no links, read by this CID's codec."""
        block = self._index.find(cid.digest)
        if block is None:
            return False
        if cid.codec == DAG_PB and not has_links(self._head(block), block.size):
            return True
        try:
            return is_leaf(cid, self._checked(block, cid))
        except ContentError:
            return False

    def _head(self, block: Block) -> bytes:
        """The first bytes of a block, unchecked; none where they can't be read at once."""
        if block.data is not None:
            return block.data[:_HEAD]
        if block.slice is None:
            place, at = self._files.block_path(block.digest), 0
        elif block.slice.length < block.size:
            return leaf_frame(block.slice.length)[0]
        elif not block.slice.linked:
            place, at = self._files.file_path(block.slice.root), block.slice.at
        else:
            return b""
        try:
            with Path(place).open("rb", buffering=0) as file:
                file.seek(at)
                return file.read(_HEAD)
        except OSError:
            return b""

    def file_size(self, cid: Cid) -> int | None:
        """The size of a file that the index knows without reading it."""
        whole = self._index.file(cid.v1().binary)
        if whole is not None:
            return whole.stamp.size
        block = self._index.find(cid.digest) if cid.codec == RAW else None
        return None if block is None else block.size

    def file(self, root: Cid) -> Path | None:
        """The path of a file that is here as one piece, hashed only when its stamp is another one."""
        whole = self._index.file(root.v1().binary)
        if whole is None:
            return None
        if self._files.stamp(whole) != whole.stamp:
            self._hash_again(whole)
        return self._files.path(whole)

    def damage(self) -> Iterator[str]:
        """Read everything; says, a sentence each, what is missing or damaged."""
        for block in self._index.blocks():
            try:
                self._checked(block, Cid.raw(block.digest))
            except ContentError as error:
                yield str(error)
        for whole in self._index.files():
            try:
                self._hash_again(whole)
            except ContentError as error:
                yield str(error)

    def _checked(self, block: Block, cid: Cid) -> bytes:
        if block.slice is not None and block.slice.linked:
            return self._linked(block, cid)
        data, place = block.data, f"the index of {self._files.folder}"
        if data is None:
            place = self._path(block)
            data, _ = _read(place, block, cid)
        if not cid.matches(data):
            raise ContentError(f"the block {cid} in {place} is damaged: import its data again to replace it")
        return data

    def _path(self, block: Block) -> str:
        if block.slice is None:
            return self._files.block_path(block.digest)
        return self._files.file_path(block.slice.root)

    def _linked(self, block: Block, cid: Cid) -> bytes:
        """A block that lies in a file of a user, which may have changed at any time."""
        assert block.slice is not None, "only slices are linked"
        whole = self._index.file(block.slice.root)
        if whole is None or whole.path is None:  # lost, or replaced by the store's own, since the block was found
            return self.block(cid)
        stamp = self._files.stamp(whole)
        if stamp is not None and _same(stamp, whole):
            data, _ = _read(str(whole.path), block, cid)
            if cid.matches(data):
                return data
        return self._lose(whole)

    def _lose(self, whole: WholeFile) -> NoReturn:
        lose(self._index, self._files, whole.root)
        raise ContentError(f"{shown(str(whole.path))} changed since it was added to the content store: add it again")

    def _hash_again(self, whole: WholeFile) -> None:
        """Compare a whole file with its blocks; raises `ContentError`, or notes the stamp that it has now."""
        root, path = Cid(whole.root), self._files.path(whole)
        stamp = self._files.stamp(whole)
        if whole.path is not None and (stamp is None or not _same(stamp, whole)):
            self._lose(whole)
        if stamp is None or stamp.size != whole.stamp.size:
            raise _not_whole(root, path)
        with path.open("rb") as file:
            for chunk in Reader(self, root).chunks(root, size=whole.stamp.size):
                if file.read(len(chunk)) != chunk:
                    raise _not_whole(root, path)
        self._index.write(files=(WholeFile(whole.root, stamp, whole.path),))


def is_leaf(cid: Cid, block: bytes) -> bool:
    """Whether a block has no links, read by this CID's codec; not if it can't be read so."""
    try:
        return not car.links(cid, block)
    except ContentError:
        return False


def _same(stamp: Stamp, whole: WholeFile) -> bool:
    """Whether a linked file looks as it did, in this run of the machine or an earlier one."""
    return msgspec.structs.replace(stamp, boot=whole.stamp.boot) == whole.stamp


def _not_whole(root: Cid, path: Path) -> ContentError:
    return ContentError(f"{path}, which holds the file {root}, was changed or removed: import its data again")


def _read(path: str, block: Block, cid: Cid) -> tuple[bytes, os.stat_result]:
    """The bytes of a block that lies in a file, unchecked, and what the file looked like when they had been read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            length, at = (block.size, 0) if block.slice is None else (block.slice.length, block.slice.at)
            data, status = os.pread(handle, length, at), os.fstat(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise ContentError(
            f"the block {cid} cannot be read from {path} ({error.strerror}): import its data again to replace it"
        ) from error
    return leaf_block(data, raw=block.size == length), status
