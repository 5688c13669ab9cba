"""UnixFS blocks -> files and folders: listing and reading, with nothing taken on trust.

Theory of operation. Blocks come from `Blocks.block`, which has checked each against its CID; what
they say may still be hostile, since anybody can make a valid block. So names that could leave a
folder are refused, a file's parts must have exactly the announced sizes, and everything is counted as it is
*expanded*: a few small blocks that name each other many times can spell petabytes.

Symbolic links are resolved here, over the listing, never by the file system: one that
leads out of the root is an error that names it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final, Literal, Protocol

import msgspec

from bacalhau_node.cid import DAG_PB, RAW, Cid
from bacalhau_node.content import dagpb, hamt
from bacalhau_node.content.unixfs import MAX_DEPTH
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.sharding import is_hidden, shown

MAX_BLOCK: Final = 2 * 1024 * 1024
"""What kubo accepts since 0.40."""
MAX_VISITS: Final = 10_000_000
"""Nodes and entries looked at in one call."""
MAX_NAME: Final = 255
_MAX_HOPS = 40  # links followed in one path, as the kernel does


class Blocks(Protocol):
    """Where a reader takes its blocks from."""

    def block(self, cid: Cid) -> bytes:
        """The verified bytes of a block; raises `ContentError`."""
        ...

    def file_size(self, cid: Cid) -> int | None:
        """The size of the file with this root, if it is known without reading it."""
        ...


class Item(msgspec.Struct, frozen=True, gc=False):
    """A file, folder or symbolic link at `path` (levels separated by "/", "" for the root)."""

    path: str
    kind: Literal["file", "folder", "symlink"]
    cid: Cid
    size: int = 0
    target: str = ""


class Reader:
    """Reads below `root`. One reader a call: it counts what it has expanded."""

    def __init__(self, blocks: Blocks, root: Cid, *, max_bytes: int | None = None) -> None:
        self._blocks, self._root = blocks, root
        self._visits, self._bytes, self._max_bytes = 0, 0, max_bytes

    def walk(self) -> Iterator[Item]:
        """Every item, folders before what is in them, by the bytes of their names; links are not followed."""
        return self._walk(self._root, "", 0)

    def listing(self) -> list[tuple[str, str, int]]:
        """(path, CID, size) of every file and of every empty folder (`path/`, size 0), sorted by the path's bytes.

        Links that stay inside the root count as what they lead to. Others are an error, but where they are hidden:
        there they are left out.
        """
        items = {item.path: item for item in self.walk()}
        found = list(self._files(items, _children(items), "", "", ()))
        return sorted(found, key=lambda entry: entry[0].encode("utf-8", "surrogateescape"))

    def chunks(self, cid: Cid, *, size: int | None = None) -> Iterator[bytes]:
        """The bytes of a file, part by part; `size`: how many there must be."""
        return self._parts(cid, size, 0)

    def _walk(self, cid: Cid, path: str, depth: int) -> Iterator[Item]:
        self._visit(depth, path)
        size = self._blocks.file_size(cid)
        if size is not None or cid.codec == RAW:
            yield Item(path, "file", cid, len(self._blocks.block(cid)) if size is None else size)
            return
        node = self._node(cid)
        if node.type in {dagpb.FOLDER, dagpb.HAMT}:
            yield Item(path, "folder", cid)
            for name, child in self._entries(node, path):
                yield from self._walk(child, f"{path}/{name}" if path else name, depth + 1)
        elif node.type == dagpb.SYMLINK:
            yield Item(path, "symlink", cid, target=_text(bytes(node.data)))
        elif node.type in {dagpb.FILE, dagpb.RAW_FILE}:
            yield Item(path, "file", cid, node.filesize)
        else:
            raise ContentError(f"{cid} is a UnixFS node of type {node.type}, neither a file nor a folder nor a link")

    def _entries(self, node: dagpb.Node, path: str) -> list[tuple[str, Cid]]:
        found: dict[bytes, Cid] = {}
        for name, child in self._links(node, 0):
            if name in found:
                raise ContentError(
                    f"the folder {path or self._root} names {_text(name)!r} twice: its data is not to be trusted"
                )
            found[name] = child
        folder = shown(path) or str(self._root)
        return [(_checked_name(name, folder), found[name]) for name in sorted(found)]

    def _links(self, node: dagpb.Node, depth: int) -> Iterator[tuple[bytes, Cid]]:
        if node.type == dagpb.FOLDER:
            yield from ((link.name, _child(link)) for link in node.links)
            return
        if node.fanout != dagpb.FANOUT:
            raise ContentError(
                f"a sharded folder of {self._root} has {node.fanout} slots, not {dagpb.FANOUT} as all have"
            )
        for link in node.links:
            if len(link.name) > hamt.PREFIX:
                yield link.name[hamt.PREFIX :], _child(link)
                continue
            self._visit(depth, "a sharded folder")
            below = self._node(_child(link))
            if below.type != dagpb.HAMT:
                raise ContentError(f"{_child(link)} is not a part of a sharded folder")
            yield from self._links(below, depth + 1)

    def _files(
        self,
        items: dict[str, Item],
        children: dict[str, list[str]],
        path: str,
        name: str,
        inside: tuple[str, ...],
    ) -> Iterator[tuple[str, str, int]]:
        """What is listed of `path` under `name`; `inside`: the folders that links have led to on the way."""
        self._visit(len(inside), name)
        item = items[path]
        if item.kind == "file":
            yield name, str(item.cid), item.size
        elif item.kind == "symlink":
            real = _followed(items, path, inside)
            if real is not None:
                yield from self._files(items, children, real, name, (*inside, real))
        elif children[path]:
            for child in children[path]:
                last = child.rpartition("/")[2]
                yield from self._files(items, children, child, f"{name}/{last}" if name else last, inside)
        elif name:
            yield f"{name}/", str(item.cid), 0

    def _parts(self, cid: Cid, expected: int | None, depth: int) -> Iterator[bytes]:
        self._visit(depth, str(cid))
        data, links = self._file_node(cid)
        total = len(data) + sum(size for _, size in links)
        if expected not in {None, total}:
            raise ContentError(f"the part {cid} of a file has {total} bytes where {expected} were announced")
        self._count(len(data))
        if data:
            yield data
        for link, size in links:
            yield from self._parts(_child(link), size, depth + 1)

    def _file_node(self, cid: Cid) -> tuple[bytes, list[tuple[dagpb.PbLink, int]]]:
        """A file node's own data, and its parts with their sizes."""
        if cid.codec == RAW:
            return self._blocks.block(cid), []
        node = self._node(cid)
        if node.type not in {dagpb.FILE, dagpb.RAW_FILE}:
            raise ContentError(f"{cid} is not a file but a folder or a link: name a file in it")
        if len(node.links) != len(node.blocksizes) or node.filesize != len(node.data) + sum(node.blocksizes):
            raise ContentError(f"the file {cid} contradicts itself about its size: its data is not to be trusted")
        return bytes(node.data), list(zip(node.links, node.blocksizes, strict=True))

    def _node(self, cid: Cid) -> dagpb.Node:
        if cid.codec != DAG_PB:
            raise ContentError(f"{cid} is neither a file nor a folder")
        block = self._blocks.block(cid)
        if len(block) > MAX_BLOCK:
            raise ContentError(f"the block {cid} has {len(block)} bytes, over the limit of {MAX_BLOCK}")
        return dagpb.decode_node(block)

    def _visit(self, depth: int, where: str) -> None:
        self._visits += 1
        if depth > MAX_DEPTH:
            raise ContentError(f"{shown(where):.100} in {self._root} lies over {MAX_DEPTH} levels deep")
        if self._visits > MAX_VISITS:
            raise ContentError(f"{self._root} expands to over {MAX_VISITS} entries")

    def _count(self, length: int) -> None:
        self._bytes += length
        if self._max_bytes is not None and self._bytes > self._max_bytes:
            raise ContentError(f"{self._root} expands to over {self._max_bytes} bytes")


def _followed(items: dict[str, Item], path: str, inside: tuple[str, ...]) -> str | None:
    """Where a link leads, for a listing; None for a hidden one that leads nowhere good."""
    try:
        real = resolve(items, path)
        if real not in items:
            raise _bad_link(items, path, "which does not exist")
        if not real or real in inside or path.startswith(f"{real}/"):
            raise _bad_link(items, path, "a folder around itself")
    except ContentError:
        if is_hidden(path):
            return None
        raise
    return real


def resolve(items: dict[str, Item], path: str) -> str:
    """Where the link at `path` leads, over `items`; perhaps to nothing, but never out: that is a `ContentError`."""
    current, hops = path.rpartition("/")[0], 0
    parts = _steps(items, items[path])
    while parts:
        part = parts.popleft()
        if part == "..":
            if not current:
                raise _bad_link(items, path, "out of its folder")
            current = current.rpartition("/")[0]
            continue
        following = f"{current}/{part}" if current else part
        item = items.get(following)
        if item is not None and item.kind == "symlink":
            hops += 1
            if hops > _MAX_HOPS:
                raise _bad_link(items, path, "in circles")
            parts.extendleft(reversed(_steps(items, item)))
        else:
            current = following
    return current


def _steps(items: dict[str, Item], link: Item) -> deque[str]:
    if link.target.startswith("/") or not link.target or "\0" in link.target:
        raise _bad_link(items, link.path, "out of its folder")
    return deque(step for step in link.target.split("/") if step not in {"", "."})


def _bad_link(items: dict[str, Item], path: str, where: str) -> ContentError:
    return ContentError(f"the link {shown(path)} leads to {items[path].target!r}, {where}: leave it out")


def _children(items: dict[str, Item]) -> dict[str, list[str]]:
    children: dict[str, list[str]] = {path: [] for path in items}
    for path in items:
        if path:
            children[path.rpartition("/")[0]].append(path)
    return children


def _child(link: dagpb.PbLink) -> Cid:
    try:
        return Cid.decode(link.cid)
    except SpecError as error:
        raise ContentError(f"a link that cannot be followed: {error}") from error


def _checked_name(name: bytes, folder: str) -> str:
    if name in {b"", b".", b".."} or b"/" in name or b"\0" in name or len(name) > MAX_NAME:
        raise ContentError(
            f"the folder {folder} holds the name {_text(name)!r:.300}, which no file may have: it is not to be trusted"
        )
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
