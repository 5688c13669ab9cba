"""Which blocks a request is about: the one rule for who sends them and for who checks what is sent. Pure.

Theory of operation. A request names a root, a path below it and a scope, as the trustless gateway specification has
them. It is answered by a walk: a **want** is a block and what is wanted of it, and `expand` says which wants
follow once its bytes are known. The sender follows them depth first (`selected`), the receiver knows from
them which block may come, and takes no other. Nothing is believed: whoever calls `expand` has checked the
block against its CID, and what it says may still be hostile.

The path leads through UnixFS folders, plain ones and tries, by exact names; neither symbolic links nor other
codecs are followed. At its end begins the scope: `block`, that one block; `entity`, the whole file, or the
listing of a folder; `all`, everything below. `span` takes a part of a file. `names` is what a listing with sizes
needs, and is asked only of oneself: folders, and the first block of each file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal

import msgspec

from bacalhau_node.cid import DAG_PB, RAW, Cid
from bacalhau_node.content import car, dagpb, hamt
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.ports import Scope
from bacalhau_node.sharding import shown

MAX_DEPTH: Final = 256
"""Blocks from the root down to the deepest: 128 folders, with files and records below and above them."""

MAX_STEPS: Final = 128
"""Levels of a path."""

Span = tuple[int, int | None]
"""Bytes of a file as a Python slice names them: from, and up to (None: the end); below 0, from its end."""

_FILES = {dagpb.FILE, dagpb.RAW_FILE}


class Want(msgspec.Struct, frozen=True, gc=False):
    """A block, and what is wanted of it: `steps` is the path that is still to go, `level` that of a folder's trie."""

    cid: Cid
    steps: tuple[bytes, ...] = ()
    scope: Scope | Literal["names"] = "all"
    span: Span | None = None
    depth: int = 0
    level: int = 0

    @property
    def key(self) -> object:
        """Equal where the same is wanted of the same block, however deep it lies."""
        binary = self.cid.v1().binary
        return (binary, self.steps, self.span, self.level) if self.steps or self.span else binary


class Expanded(msgspec.Struct, frozen=True, gc=False):
    """What follows from a block.

    `whole`: nothing that it links to is left out. `absent`: why the path ends here. `size`: the bytes of the file that
    begins here, as it says itself.
    """

    below: list[Want]
    whole: bool = False
    absent: str = ""
    size: int | None = None


def steps_of(path: str) -> tuple[bytes, ...]:
    """The levels of a path below a root; raises `SpecError` for one that no folder can hold."""
    path = path.strip("/")
    steps = tuple(path.encode("utf-8", "surrogateescape").split(b"/")) if path else ()
    if len(steps) > MAX_STEPS or {b"", b".", b".."} & set(steps) or any(b"\0" in step for step in steps):
        raise SpecError(
            f"{shown(path)!r:.300} is not a path below a CID: write folder/file, at most {MAX_STEPS} levels"
        )
    return steps


def expand(want: Want, block: bytes) -> Expanded:
    """What follows from the checked bytes of a wanted block; raises `ContentError` for malformed content."""
    if want.depth > MAX_DEPTH:
        raise ContentError(f"{want.cid} lies over {MAX_DEPTH} blocks deep: its data is not to be trusted")
    if want.steps:
        return _step(want, block)
    if want.cid.codec == RAW:
        return Expanded([], whole=True, size=len(block))
    if want.cid.codec == DAG_PB:
        return _unixfs(want, dagpb.decode_node(block))
    links = car.links(want.cid, block)
    return Expanded([_below(want, cid) for cid in links] if want.scope == "all" else [], whole=_whole(want, links))


def selected(get: Callable[[Cid], bytes], want: Want) -> Iterator[tuple[Cid, bytes]]:
    """The blocks of a request, each once, parents first and depth first: always in the same order."""
    waiting, sent, done = [want], set[bytes](), set[object]()
    while waiting:
        want = waiting.pop()
        if want.key in done:
            continue
        done.add(want.key)
        block = get(want.cid)
        if want.cid.digest not in sent:
            sent.add(want.cid.digest)
            yield want.cid, block
        waiting += reversed(expand(want, block).below)


def resolved(get: Callable[[Cid], bytes], want: Want) -> tuple[list[Cid], str]:
    """The CIDs of the root and of each level of the path, as far as it leads, and why it leads no further ("" if not).

    The blocks of a trie between two levels are no levels.
    """
    found, absent = [want.cid], ""
    while want.steps and not absent:
        further = expand(want, get(want.cid))
        absent = further.absent
        for below in further.below:
            if len(below.steps) < len(want.steps):
                found.append(below.cid)
            want = below
    return found, absent


# --- the path ---


def _step(want: Want, block: bytes) -> Expanded:
    """One level down, or to the next node of a folder's trie."""
    name = want.steps[0]
    if want.cid.codec != DAG_PB:
        return Expanded([], absent=_absent(want, "it is no folder"))
    node = dagpb.decode_node(block)
    if node.type == dagpb.FOLDER:
        found = [link for link in node.links if link.name == name]
    elif node.type == dagpb.HAMT:
        return _step_in_trie(want, node)
    else:
        return Expanded([], absent=_absent(want, f"it is {_kind(node)}, no folder"))
    return _next_level(want, found)


def _step_in_trie(want: Want, node: dagpb.Node) -> Expanded:
    name = want.steps[0]
    if node.fanout != dagpb.FANOUT or want.level >= hamt.LEVELS:
        raise ContentError(f"{want.cid} is not a part of a sharded folder as all are made")
    slot = b"%02X" % hamt.hashed(name)[want.level]
    nodes = [link for link in node.links if link.name == slot]
    if len(nodes) == 1:
        return Expanded([_below(want, child_of(nodes[0]), steps=want.steps, level=want.level + 1)])
    return _next_level(want, [link for link in node.links if link.name == slot + name])


def _next_level(want: Want, found: list[dagpb.PbLink]) -> Expanded:
    if len(found) > 1:
        raise ContentError(f"the folder {want.cid} names {_text(want.steps[0])} twice: its data is not to be trusted")
    if not found:
        return Expanded([], absent=_absent(want, "the folder has no such name"))
    return Expanded([_below(want, child_of(found[0]), steps=want.steps[1:])])


def _absent(want: Want, why: str) -> str:
    return f"there is no {_text(want.steps[0])} in {want.cid}: {why}"


def _kind(node: dagpb.Node) -> str:
    return "a symbolic link" if node.type == dagpb.SYMLINK else "a file"


def _text(name: bytes) -> str:
    return f"{shown(name.decode('utf-8', 'surrogateescape')):.255}"


# --- what the path leads to ---


def _unixfs(want: Want, node: dagpb.Node) -> Expanded:
    if node.type in _FILES:
        return _file(want, node)
    links = list(node.links)
    if want.scope == "block":
        links = []
    elif want.scope == "entity":
        links = [link for link in links if node.type == dagpb.HAMT and len(link.name) == hamt.PREFIX]
    below = [_below(want, cid) for cid in map(child_of, links) if want.scope != "names" or cid.codec != RAW]
    return Expanded(below, whole=_whole(want, node.links))


def _file(want: Want, node: dagpb.Node) -> Expanded:
    links = node.links if want.scope in {"all", "entity"} else ()
    if want.span is None:
        below = [_below(want, child_of(link)) for link in links]
        return Expanded(below, whole=len(links) == len(node.links), size=node.filesize)
    if len(links) != len(node.blocksizes) or node.filesize != len(node.data) + sum(node.blocksizes):
        raise ContentError(f"the file {want.cid} contradicts itself about its size: its data is not to be trusted")
    return Expanded(_within(want, node), whole=not links)


def _within(want: Want, node: dagpb.Node) -> list[Want]:
    """The parts of a file that hold bytes of the span."""
    first, stop, _ = slice(*(want.span or (0, None))).indices(node.filesize)
    below, at = [], len(node.data)
    for link, size in zip(node.links, node.blocksizes, strict=True):
        part = max(0, first - at), min(size, stop - at)
        if part[0] < part[1]:
            below.append(_below(want, child_of(link), span=None if part == (0, size) else part))
        at += size
    return below


def _whole(want: Want, links: Sequence[object]) -> bool:
    return want.scope == "all" or not links


def _below(want: Want, cid: Cid, *, steps: tuple[bytes, ...] = (), level: int = 0, span: Span | None = None) -> Want:
    """The want of something that this one's block links to."""
    if steps or want.steps:
        span = want.span
    return Want(cid, steps, want.scope, span, want.depth + 1, level)


def child_of(link: dagpb.PbLink) -> Cid:
    """The CID of a link; raises `ContentError` for one that can't be followed."""
    try:
        return Cid.decode(link.cid)
    except SpecError as error:
        raise ContentError(f"a link that can't be followed: {error}") from error
