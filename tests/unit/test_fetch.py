"""Content from others: only what was asked for, only what is right, from whoever has it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node import dagjson
from bacalhau_node.cid import DAG_JSON, DAG_PB, RAW, Cid
from bacalhau_node.content import car, incoming, unixfs
from bacalhau_node.content import fetch as fetching
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.dagpb import PbLink, encode_node, file_node, folder_node, symlink_node, varint
from bacalhau_node.content.fetch import Fetched, fetch, listing
from bacalhau_node.content.gateway import Gateway
from bacalhau_node.content.grants import Grants
from bacalhau_node.content.hamt import build_hamt
from bacalhau_node.content.providers import StreamProvider
from bacalhau_node.content.reader import Reader
from bacalhau_node.content.unixfs import PROFILES, import_bytes, import_links
from bacalhau_node.content.walk import Want, expand, selected, steps_of
from bacalhau_node.errors import ContentError, NodeUnreachable, SpecError
from bacalhau_node.ports import Provider, Scope
from bacalhau_node.transports.memory import MemoryHub, MemoryTransport

Blocks = dict[bytes, bytes]
ReadOnly = Mapping[bytes, bytes]
KIB = 1024
V0, V1 = PROFILES["unixfs-v0-2015"], PROFILES["cidv1-256k-174"]


class Shelf:
    """A shelf that checks the promise: nothing is kept before what it links to."""

    def __init__(self, room: float = float("inf")) -> None:
        self.blocks: Blocks = {}
        self.held = 0
        self._room = room

    def holds(self, cid: Cid) -> bool:
        return cid.digest in self.blocks

    def block(self, cid: Cid) -> bytes:
        return self.blocks[cid.digest]

    def keep(self, cid: Cid, block: bytes) -> None:
        assert cid.matches(block)
        assert all(self.holds(child) for child in car.links(cid, block))
        if sum(map(len, self.blocks.values())) + len(block) > self._room:
            raise ContentError("the disk is full")
        self.blocks[cid.digest] = block

    def flush(self) -> None:
        pass

    def file_size(self, _cid: Cid) -> int | None:
        return None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def text(self, cid: str) -> bytes:
        root = Cid.parse(cid)
        return b"".join(Reader(self, root).chunks(root))


class Peer:
    """A provider that has `blocks`. `spoil` changes the parts of its archives, `raw` says whether it gives blocks."""

    def __init__(
        self,
        name: str,
        blocks: ReadOnly,
        *,
        spoil: Callable[[bytes], AsyncIterator[bytes]] | None = None,
        raw: bool = True,
    ) -> None:
        self.name, self.blocks = name, blocks
        self.archives: list[tuple[str, Scope]] = []
        self.singles: list[Cid] = []
        self._spoil, self._raw = spoil or cut, raw

    def archive(self, root: Cid, path: str = "", scope: Scope = "all") -> tuple[bytes, bool]:
        """What it sends, and whether that is all: a gateway's answer ends where a block is missing or malformed."""
        data = car.header([root])
        try:
            for cid, block in selected(lambda cid: self.blocks[cid.digest], Want(root, steps_of(path), scope)):
                data += car.section(cid, block)
        except (KeyError, ContentError):
            return data, False
        return data, True

    async def car(self, root: Cid, *, path: str = "", scope: Scope = "all") -> AsyncIterator[bytes]:
        self.archives.append((path, scope))
        if root.digest not in self.blocks:
            raise ContentError("it answers 404")
        data, whole = self.archive(root, path, scope)
        async for part in self._spoil(data):
            yield part
        if not whole:
            raise NodeUnreachable("it broke off")

    async def block(self, cid: Cid, *, root: Cid) -> bytes:
        self.singles.append(cid)
        await asyncio.sleep(0)
        if not self._raw:
            raise NodeUnreachable("it does not answer")
        if cid.digest not in self.blocks:
            raise ContentError("it answers 404")
        return self.blocks[cid.digest]


async def cut(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 300_000):
        yield data[at : at + 300_000]


async def parts(*found: bytes) -> AsyncIterator[bytes]:
    for part in found:
        yield part


def broken(at: int) -> Callable[[bytes], AsyncIterator[bytes]]:
    async def spoil(data: bytes) -> AsyncIterator[bytes]:
        yield data[:at]
        raise NodeUnreachable("it broke off")

    return spoil


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(fetching, "_PAUSE", 0.001)


@cache
def file(data: bytes, *, profile: unixfs.Profile = V0) -> tuple[Cid, ReadOnly]:
    blocks: Blocks = {}
    root = import_bytes(data, lambda cid, block: blocks.update({cid[-32:]: block}), profile=profile)
    return Cid(root.cid), MappingProxyType(blocks)


def tree(files: dict[str, bytes], *, profile: unixfs.Profile = V0, hamt: bool = False) -> tuple[Cid, Blocks]:
    """A folder with these files, by path."""
    blocks: Blocks = {}

    def sink(cid: bytes, block: bytes) -> None:
        blocks[cid[-32:]] = block

    def folder(inside: dict[str, bytes]) -> PbLink:
        below: dict[str, dict[str, bytes]] = {}
        found = []
        for path, data in inside.items():
            name, _, rest = path.partition("/")
            if rest:
                below.setdefault(name, {})[rest] = data
            else:
                done = import_bytes(data, sink, profile=profile)
                found.append(PbLink(done.cid, name.encode(), done.tsize))
        for name, rest in below.items():
            found.append(PbLink(folder(rest).cid, name.encode(), 1))
        found.sort(key=lambda link: link.name)
        if hamt:
            return build_hamt(found, lambda block, _: node(sink, block))
        return import_links(found, sink, profile=profile)

    return Cid(folder(files).cid), blocks


def node(sink: Callable[[bytes, bytes], None], block: bytes) -> PbLink:
    cid = Cid.of(block, codec=DAG_PB)
    sink(cid.binary, block)
    return PbLink(cid.binary, b"", len(block))


def unixfs_node(blocks: Blocks, links: list[tuple[str, Cid]], data: bytes | None = None) -> Cid:
    """A UnixFS node of our own making: a folder unless `data` says what it is."""
    made = encode_node([PbLink(cid.binary, name.encode(), 1) for name, cid in links], data or folder_node())
    cid = Cid.of(made, codec=DAG_PB)
    blocks[cid.digest] = made
    return cid


def json_node(blocks: Blocks, value: object) -> Cid:
    block = dagjson.encode(value)
    cid = Cid.of(block, codec=DAG_JSON)
    blocks[cid.digest] = block
    return cid


async def refused(shelf: Shelf, root: Cid, providers: list[Provider], **options: object) -> str:
    with pytest.raises(ContentError) as caught:
        await fetch(shelf, root, providers, patience=5.0, **options)
    assert not shelf.holds(root)
    assert not shelf.held
    return str(caught.value)


# --- what is right ---


@pytest.mark.parametrize("profile", [V0, V1])
@pytest.mark.parametrize("size", [0, 1, 256 * KIB, 3_000_000])
async def test_a_file_comes_in_one_answer(profile, size):
    data = content(size)
    root, blocks = file(data, profile=profile)
    shelf, peer = Shelf(), Peer("peer", blocks)
    told: list[int] = []
    fetched = await fetch(shelf, root, [peer], told=told.append)
    assert shelf.text(fetched.cid) == data
    assert shelf.blocks == blocks
    total = sum(map(len, blocks.values()))
    assert fetched == Fetched(str(root), total, {"peer": len(peer.archive(root)[0])})
    assert told[-1] == total
    assert told == sorted(told)
    assert peer.archives == [("", "all")]
    assert not peer.singles


NAMES = st.text("abcdeé. ", min_size=1, max_size=3).filter(lambda name: name.strip(".") and "/" not in name)
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=40), min_size=1, max_size=8
)


def apart(files: dict[str, bytes]) -> bool:
    """Whether no file is also a folder."""
    return not any(other.startswith(f"{path}/") for path in files for other in files)


@given(TREES.filter(apart), st.sampled_from([V0, V1]), st.booleans())
def test_a_tree_that_became_an_archive_becomes_the_same_tree(files, profile, hamt):
    root, blocks = tree(files, profile=profile, hamt=hamt)
    shelf = Shelf()
    asyncio.run(fetch(shelf, root, [Peer("peer", blocks)]))
    assert shelf.blocks == blocks
    assert {path: shelf.text(cid) for path, cid, _ in Reader(shelf, root).listing()} == files


@given(TREES.filter(apart), st.booleans(), st.data())
def test_every_path_leads_to_its_file_and_to_no_other(files, hamt, data):
    root, blocks = tree(files, hamt=hamt)
    path = data.draw(st.sampled_from(sorted(files)))
    shelf = Shelf()
    fetched = asyncio.run(fetch(shelf, root, [Peer("peer", blocks)], path=path, scope="entity"))
    assert shelf.text(fetched.cid) == files[path]


@given(st.data())
def test_any_flipped_bit_of_an_archive_is_found(data):
    root, blocks = tree({"a": b"one", "b/c": b"two" * 20, "b/d": b"three"})
    archive = bytearray(Peer("", blocks).archive(root)[0])
    at = data.draw(st.integers(0, len(archive) - 1))
    archive[at] ^= 1 << data.draw(st.integers(0, 7))
    shelf = Shelf()
    liar = Peer("liar", blocks, spoil=lambda _: parts(bytes(archive)), raw=False)
    with contextlib.suppress(ContentError):
        asyncio.run(fetch(shelf, root, [liar]))
    assert all(blocks[digest] == block for digest, block in shelf.blocks.items())
    assert not shelf.holds(root) or shelf.blocks == blocks


@pytest.mark.parametrize("profile", [V0, V1])
async def test_one_file_of_a_hundred_brings_its_own_blocks_and_those_on_the_way(profile):
    files = {f"day/{number:03}.csv": content(300 * KIB, number) for number in range(100)}
    root, blocks = tree(files, profile=profile, hamt=True)
    shelf, peer = Shelf(), Peer("peer", blocks)
    fetched = await fetch(shelf, root, [peer], path="day/042.csv", scope="entity")
    own, its = file(files["day/042.csv"], profile=profile)
    assert fetched.cid == str(own)
    assert shelf.blocks == its
    way = fetched.bytes - sum(map(len, its.values()))
    assert 0 < way < 20 * KIB  # the top folder, the trie's root and at most some nodes below it
    assert peer.archives == [("day/042.csv", "entity")]


async def test_what_is_here_costs_no_request():
    root, blocks = tree({"a": b"one", "b": b"two"})
    shelf, peer = Shelf(), Peer("peer", blocks)
    await fetch(shelf, root, [peer])
    again = Peer("again", blocks)
    assert await fetch(shelf, root, [again]) == Fetched(str(root), 0, {})
    assert (await fetch(shelf, root, [again], path="b")).bytes == 0
    assert await fetch(shelf, root, []) == Fetched(str(root), 0, {})
    assert not again.archives
    assert not again.singles


async def test_half_of_it_being_here_only_the_other_half_is_asked_for():
    data = content(4_000_000)
    root, blocks = file(data, profile=V1)
    shelf, peer = Shelf(), Peer("peer", blocks)
    leaves = [cid for cid, block in selected(lambda cid: blocks[cid.digest], Want(root)) if cid.codec == RAW]
    for cid in leaves[::2]:
        shelf.keep(cid, blocks[cid.digest])
    fetched = await fetch(shelf, root, [peer])
    assert shelf.text(fetched.cid) == data
    assert sorted(peer.singles) == sorted(leaves[1::2])
    assert fetched.bytes == sum(len(blocks[cid.digest]) for cid in [root, *leaves[1::2]])


async def test_a_part_that_occurs_twice_in_one_file_does_not_look_as_if_it_had_been_here():
    data = content(256 * KIB) * 20
    root, blocks = file(data, profile=V1)
    shelf, peer = Shelf(), Peer("peer", blocks)
    fetched = await fetch(shelf, root, [peer])
    assert len(blocks) == 2
    assert shelf.text(fetched.cid) == data
    assert not peer.singles


async def test_every_codec_that_is_known_comes_with_what_it_links_to():
    blocks: Blocks = {}
    folder, more = tree({"x": b"1"})
    blocks |= more
    leaf = Cid.of(b"raw leaf")
    blocks[leaf.digest] = b"raw leaf"
    record = json_node(blocks, {"outputs": dagjson.Link(str(folder)), "list": [{"leaf": dagjson.Link(str(leaf))}]})
    root = json_node(blocks, {"records": [dagjson.Link(str(record))] * 3})
    shelf = Shelf()
    await fetch(shelf, root, [Peer("peer", blocks)])
    assert shelf.blocks == blocks


async def test_a_part_of_a_dag_is_looked_at_and_not_kept_as_if_it_were_whole():
    root, blocks = tree({"a": b"one", "b/c": b"two"})
    for scope in ("block", "entity"):
        shelf = Shelf()
        fetched = await fetch(shelf, root, [Peer("peer", blocks)], scope=scope)
        assert fetched.bytes == len(blocks[root.digest])
        assert not shelf.blocks


# --- listings ---


@given(TREES.filter(apart), st.sampled_from([V0, V1]), st.booleans())
def test_a_listing_from_afar_is_the_one_of_who_has_it_all(files, profile, hamt):
    root, blocks = tree(files, profile=profile, hamt=hamt)
    whole = Shelf()
    whole.blocks = blocks
    assert asyncio.run(listing(Shelf(), root, [Peer("peer", blocks)])) == Reader(whole, root).listing()


async def test_a_listing_brings_no_file_but_its_first_block():
    files = {f"{number}.csv": content(1_000_000, number) for number in range(10)}
    for profile in (V0, V1):
        root, blocks = tree(files, profile=profile)
        shelf, peer = Shelf(), Peer("peer", blocks)
        found = await listing(shelf, root, [peer])
        assert [(path, size) for path, _, size in found] == [(path, 1_000_000) for path in sorted(files)]
        assert len(peer.singles) == 10
        assert not shelf.blocks


async def test_a_listing_of_raw_blocks_asks_for_none_of_them():
    files = {f"{number}.csv": content(1_000, number) for number in range(10)}
    root, blocks = tree(files, profile=V1)
    peer = Peer("peer", blocks)
    assert [size for _, _, size in await listing(Shelf(), root, [peer])] == [1_000] * 10
    assert not peer.singles


# --- broken, slow, gone ---


async def test_an_answer_that_breaks_off_anywhere_goes_on_block_by_block():
    data = content(900_000)
    root, blocks = file(data)
    archive = Peer("", blocks).archive(root)[0]
    ends = [0]
    for cid, block in selected(lambda cid: blocks[cid.digest], Want(root)):
        ends.append(archive.index(block, ends[-1]) + len(block))
        assert cid.matches(block)
    for at in sorted({end + around for end in ends for around in (-1, 0, 1)} & set(range(len(archive)))):
        shelf, peer = Shelf(), Peer("peer", blocks, spoil=broken(at))
        if at == 0:
            peer = Peer("peer", blocks, spoil=lambda _: parts())
        providers = [peer, Peer("other", blocks)]
        fetched = await fetch(shelf, root, providers)
        assert shelf.text(fetched.cid) == data
        assert fetched.bytes == sum(map(len, blocks.values()))


async def test_what_came_before_an_answer_broke_is_not_asked_for_again():
    data = content(2_000_000)
    root, blocks = file(data)
    half = Peer("half", blocks, spoil=broken(1_000_000), raw=False)
    shelf = Shelf()
    text = await refused(shelf, root, [half])
    assert re.search(r"bytes came.*Asked: half \(\d+\.\d s\): it does not answer", text)
    here = set(shelf.blocks)
    assert len(here) == 3
    peer = Peer("peer", blocks)
    fetched = await fetch(shelf, root, [peer])
    assert shelf.text(fetched.cid) == data
    assert not {cid.digest for cid in peer.singles} & here


async def test_an_answer_that_ends_too_early_is_completed_by_others():
    root, blocks = file(content(2_000_000))
    shelf = Shelf()
    short = Peer("short", blocks, spoil=lambda data: parts(data[:700_000]), raw=False)
    fetched = await fetch(shelf, root, [short, Peer("other", blocks)])
    assert set(fetched.sources) == {"short", "other"}
    assert shelf.blocks == blocks


async def test_missing_blocks_come_from_several_providers_at_once():
    root, blocks = file(content(5_000_000), profile=V1)
    digests = sorted(blocks)
    some = {digest: blocks[digest] for digest in digests[::2]} | {root.digest: blocks[root.digest]}
    rest = {digest: blocks[digest] for digest in digests[1::2]}
    first = Peer("first", blocks, spoil=broken(2_000), raw=False)
    one, two = Peer("one", some), Peer("two", rest)
    shelf = Shelf()
    fetched = await fetch(shelf, root, [first, one, two])
    assert shelf.blocks == blocks
    assert {"one", "two"} <= set(fetched.sources)
    assert one.singles
    assert two.singles
    for peer in (one, two):
        assert len(set(peer.singles)) == len(peer.singles)  # nobody is asked twice for what it lacks


async def test_who_has_nothing_is_followed_by_who_has_it():
    root, blocks = file(content(500_000))
    shelf, other = Shelf(), Peer("other", blocks)
    await fetch(shelf, root, [Peer("empty", {}), other])
    assert other.archives == [("", "all")]


async def test_an_error_says_who_was_asked_what_each_answered_and_how_long_it_took():
    root, blocks = file(content(500_000))

    async def gone(_: bytes) -> AsyncIterator[bytes]:
        raise NodeUnreachable("no route to it")
        yield b""

    text = await refused(Shelf(), root, [Peer("one", {}), Peer("two", blocks, spoil=gone)])
    assert re.search(
        rf"{root} could not be fetched \(nothing came\)\. Asked: one \(0\.\d s\): it answers 404;"
        r" two \(0\.\d s\): no route to it\. Make sure",
        text,
    )
    assert "nobody is known" in await refused(Shelf(), root, [])


async def test_a_block_that_nobody_has_is_an_error_and_what_came_stays():
    root, blocks = file(content(2_000_000), profile=V1)
    lost = next(digest for digest in blocks if digest != root.digest)
    peer = Peer("peer", {digest: block for digest, block in blocks.items() if digest != lost})
    shelf = Shelf()
    text = await refused(shelf, root, [peer])
    assert "at least 1 block did not" in text
    assert "it answers 404" in text
    assert len(shelf.blocks) == len(blocks) - 2


async def test_who_sends_nothing_is_dropped_after_a_while():
    root, blocks = file(content(500_000))

    async def silent(data: bytes) -> AsyncIterator[bytes]:
        yield data[:100]
        await asyncio.Event().wait()

    peer = Peer("silent", blocks, spoil=silent)
    shelf = Shelf()
    fetched = await fetch(shelf, root, [peer, Peer("other", blocks)], patience=0.05)
    assert shelf.blocks == blocks
    assert fetched.sources["silent"] == 100
    with pytest.raises(ContentError, match=r"silent \(0\.\d s\): nothing came for 0\.05 s"):
        await fetch(Shelf(), root, [peer], patience=0.05)


async def test_who_sends_a_byte_now_and_then_is_dropped_too():
    root, blocks = file(content(500_000))

    async def slow(data: bytes) -> AsyncIterator[bytes]:
        for at in range(len(data)):
            yield data[at : at + 1]
            await asyncio.sleep(0.01)

    with pytest.raises(ContentError, match="nothing came"):
        await fetch(Shelf(), root, [Peer("slow", blocks, spoil=slow)], patience=0.05)


async def test_single_blocks_that_do_not_come_are_waited_for_no_longer():
    root, blocks = file(content(500_000))
    peer = Peer("peer", blocks, spoil=broken(1_000))

    async def never(cid: Cid, *, root: Cid) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    peer.block = never  # type: ignore[method-assign]
    with pytest.raises(ContentError, match="nothing came"):
        await fetch(Shelf(), root, [peer, peer], patience=0.05)


async def test_a_fetch_that_was_cancelled_goes_on_where_it_was():
    data = content(2_000_000)
    root, blocks = file(data)
    reached = asyncio.Event()

    async def stops(data: bytes) -> AsyncIterator[bytes]:
        yield data[:1_200_000]
        await asyncio.Event().wait()

    shelf = Shelf()
    task = asyncio.create_task(fetch(shelf, root, [Peer("peer", blocks, spoil=stops)], told=lambda _: reached.set()))
    await asyncio.wait_for(reached.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not shelf.holds(root)
    here = set(shelf.blocks)
    assert here
    peer = Peer("peer", blocks)
    await fetch(shelf, root, [peer])
    assert shelf.text(str(root)) == data
    assert not {cid.digest for cid in peer.singles} & here
    assert not shelf.held


# --- lies ---


async def forever(first: bytes, more: bytes) -> AsyncIterator[bytes]:
    yield first
    while True:
        yield more


def other_archive() -> bytes:
    root, blocks = file(content(400_000, 99))
    return Peer("", blocks).archive(root)[0]


def flipped(data: bytes) -> bytes:
    return data[:-5] + bytes((data[-5] ^ 1,)) + data[-4:]


def header(data: bytes) -> bytes:
    return data[: data[0] + 1]


def with_unasked(data: bytes) -> bytes:
    return header(data) + car.section(Cid.of(b"unasked"), b"unasked") + data[len(header(data)) :]


LIES: dict[str, Callable[[bytes], AsyncIterator[bytes]]] = {
    "another block": lambda data: parts(flipped(data)),
    "a block that nobody asked for": lambda data: parts(with_unasked(data)),
    "the archive of something else": lambda _: parts(other_archive()),
    "no archive": lambda _: parts(b"<html>404</html>" * 10),
    "a length without an end": lambda data: parts(header(data), b"\xff" * 20),
    "a length over the limit": lambda data: parts(header(data), varint(3 * KIB * KIB)),
    "zeros without an end": lambda _: forever(b"", bytes(1000)),
}


@pytest.mark.parametrize("lie", LIES)
async def test_who_lies_is_dropped_and_named_and_others_are_asked(lie):
    data = content(1_000_000)
    root, blocks = file(data)
    shelf = Shelf()
    liar = Peer("liar", blocks, spoil=LIES[lie])
    text = await refused(shelf, root, [liar])
    assert re.search(r"liar \(\d\.\d s\): .*: it is not to be trusted", text)
    assert not liar.singles
    assert set(shelf.blocks) <= set(blocks)
    fetched = await fetch(shelf, root, [Peer("liar", blocks, spoil=LIES[lie]), Peer("honest", blocks)])
    assert shelf.blocks == blocks
    assert shelf.text(fetched.cid) == data


async def test_blocks_that_are_here_already_are_not_taken_without_end(monkeypatch):
    monkeypatch.setattr(incoming, "MAX_USELESS", 1_000_000)
    root, blocks = file(content(1_000_000), profile=V1)
    leaf = next(Cid.raw(digest) for digest in blocks if digest != root.digest)
    again = car.section(leaf, blocks[leaf.digest])
    first = car.header([root]) + car.section(root, blocks[root.digest])
    text = await refused(Shelf(), root, [Peer("liar", blocks, spoil=lambda _: forever(first, again))])
    assert "of blocks that are here already: it is not to be trusted" in text


@pytest.mark.parametrize("wrong", [b"", b"x", bytes(3 * KIB * KIB)])
async def test_a_single_block_that_is_another_one_drops_its_sender(wrong):
    root, blocks = file(content(1_000_000))
    first = Peer("first", blocks, spoil=broken(1_000), raw=False)
    liar = Peer("liar", dict.fromkeys(blocks, wrong))
    assert "liar" in (text := await refused(Shelf(), root, [first, liar]))
    assert "something else as the block" in text
    shelf = Shelf()
    fetched = await fetch(shelf, root, [first, liar, Peer("honest", blocks)])
    assert shelf.blocks == blocks
    assert "honest" in fetched.sources


# --- content that is itself hostile: nobody could do better ---


async def one_sentence(root: Cid, blocks: Blocks, **options: object) -> str:
    other = Peer("other", blocks)
    text = await refused(Shelf(), root, [Peer("peer", blocks), other], **options)
    assert not other.archives
    assert not other.singles
    return text


@pytest.mark.parametrize(
    ("codec", "block", "why"),
    [
        (DAG_PB, b"\xff\xff", "not a dag-pb block"),
        (DAG_JSON, b"{", "not a DAG-JSON block"),
        (DAG_JSON, b"[" * 1000, "not a DAG-JSON block"),
        (
            DAG_PB,
            encode_node([PbLink(b"\x01\x71\x12\x20" + bytes(32), b"x", 1)], folder_node()),
            "raw, dag-pb or dag-json",
        ),
    ],
)
async def test_malformed_blocks_and_foreign_codecs_are_the_contents_fault(codec, block, why):
    root = Cid.of(block, codec=codec)
    assert why in await one_sentence(root, {root.digest: block})


async def test_more_bytes_than_allowed_are_not_taken():
    root, blocks = file(content(5_000_000))
    assert "over 1,000,000 bytes" in await one_sentence(root, blocks, limit=1_000_000)
    shelf = Shelf()
    await fetch(shelf, root, [Peer("peer", blocks)], limit=5_000_000)
    assert shelf.blocks == blocks


async def test_a_file_that_claims_too_much_is_refused_before_it_comes():
    blocks: Blocks = {}
    leaf, more = file(content(1_000))
    blocks |= more
    root = unixfs_node(blocks, [("", leaf)] * 3, file_node([1_000, 10**15, 1_000]))
    shelf = Shelf()
    text = await refused(shelf, root, [Peer("peer", blocks)], limit=1_000_000)
    assert "over 1,000,000 bytes" in text
    assert not shelf.blocks


async def test_a_part_that_is_named_very_often_counts_very_often():
    blocks: Blocks = {}
    name, more = file(content(1_000))
    blocks |= more
    for _ in range(8):  # 50 to the power of 8 ways to a file of 1,000 bytes
        name = unixfs_node(blocks, [(f"{number:02}", name) for number in range(50)])
    shelf = Shelf()
    with pytest.raises(ContentError, match="over 1,000,000,000 bytes"):
        await fetch(shelf, name, [Peer("peer", blocks)], limit=1_000_000_000)
    await fetch(Shelf(), name, [Peer("peer", blocks)])  # without a limit: ten blocks, who reads them counts again


async def test_what_lies_too_deep_is_refused():
    blocks: Blocks = {}
    name = Cid.of(b"leaf")
    blocks[name.digest] = b"leaf"
    for _ in range(300):
        name = json_node(blocks, [dagjson.Link(str(name))])
    assert "blocks deep" in await one_sentence(name, blocks)


async def test_a_full_disk_is_nobody_elses_fault():
    root, blocks = file(content(1_000_000))
    other = Peer("other", blocks)
    with pytest.raises(ContentError, match="the disk is full"):
        await fetch(Shelf(room=600_000), root, [Peer("peer", blocks), other])
    assert not other.archives


# --- paths ---


@pytest.mark.parametrize("path", ["..", "a/../b", "a//b", "./a", "a/.", "a\0b", "/".join("a" * 200)])
async def test_paths_that_no_folder_can_hold_are_refused_before_anybody_is_asked(path):
    root, blocks = tree({"a": b"one"})
    peer = Peer("peer", blocks)
    with pytest.raises(SpecError, match="not a path below a CID"):
        await fetch(Shelf(), root, [peer], path=path)
    assert not peer.archives


@pytest.mark.parametrize("hamt", [False, True])
@pytest.mark.parametrize(("path", "why"), [("b", "no such name"), ("a/x", "it is a file"), ("d/x", "no such name")])
async def test_a_path_that_leads_nowhere_is_known_to_and_nobody_else_is_asked(path, why, hamt):
    root, blocks = tree({"a": b"one", "d/e": b"two"}, hamt=hamt)
    text = await one_sentence(root, blocks, path=path)
    assert "there is no" in text
    assert why in text


async def test_links_are_not_followed_and_blocks_of_other_codecs_are_no_folders():
    blocks: Blocks = {}
    link = unixfs_node(blocks, [], symlink_node(b"../../etc"))
    record = json_node(blocks, {"x": 1})
    root = unixfs_node(blocks, [("json", record), ("link", link)])
    assert "it is a symbolic link" in await one_sentence(root, blocks, path="link/passwd")
    assert "it is no folder" in await one_sentence(root, blocks, path="json/x")


async def test_a_name_that_occurs_twice_leads_nowhere():
    (one, blocks), (two, more) = file(b"one"), file(b"two")
    blocks = {**blocks, **more}
    root = unixfs_node(blocks, [("a", one), ("a", two)])
    assert "names a twice" in await one_sentence(root, blocks, path="a")


# --- ranges ---


@given(st.data())
def test_a_range_brings_the_blocks_that_hold_its_bytes_and_no_others(data):
    size = data.draw(st.sampled_from([0, 1, 262_144, 262_145, 2_000_000]))
    root, blocks = file(content(size))
    first = data.draw(st.integers(-size - 5, size + 5))
    stop = data.draw(st.none() | st.integers(-size - 5, size + 5))
    found = list(selected(lambda cid: blocks[cid.digest], Want(root, scope="entity", span=(first, stop))))
    offsets = range(0, size, 262_144)
    wanted = range(size)[first:stop]
    covered = [at for at in offsets if wanted and at < wanted.stop and at + 262_144 > wanted.start]
    assert len(found) == (1 if size <= 262_144 else 1 + len(covered))
    assert found[0][0] == root


def test_a_range_of_a_file_that_contradicts_itself_is_refused():
    blocks: Blocks = {}
    leaf, _ = file(b"x" * 100)
    root = unixfs_node(blocks, [("", leaf)] * 3, file_node([100]))
    with pytest.raises(ContentError, match="contradicts itself"):
        expand(Want(root, scope="entity", span=(0, 5)), blocks[root.digest])


# --- over a network's streams ---


async def test_a_node_is_asked_over_its_stream_and_gives_what_its_token_opens(tmp_path):
    data = content(3_000_000)
    store, other = BlockStore(tmp_path / "store"), BlockStore(tmp_path / "other")
    root, secret = Cid.parse(store.add_bytes(data)), Cid.parse(store.add_bytes(b"secret"))
    grants, hub = Grants(), MemoryHub()
    grants.open("token", [str(root)])
    here, there = MemoryTransport(hub, "here"), MemoryTransport(hub, "there")
    there.serve(Gateway(store, grants).answering())
    peer = StreamProvider(here, "there", token="token")
    leaf = car.links(root, store.block(root))[3]
    assert await peer.block(leaf, root=root) == store.block(leaf)
    for cid, below in ((secret, secret), (secret, root), (leaf, leaf), (leaf, secret)):
        with pytest.raises(ContentError, match="not here, or not for you"):
            await peer.block(cid, root=below)
    for token in (None, "other"):
        with pytest.raises(ContentError, match="not here, or not for you"):
            await fetch(other, root, [StreamProvider(here, "there", token=token)])
    fetched = await fetch(other, root, [peer])
    assert other.read(fetched.cid) == data
    grants.close("token")
    with pytest.raises(ContentError, match="not for you"):
        await peer.block(root, root=root)
    with pytest.raises(NodeUnreachable):
        await StreamProvider(here, "nobody").block(root, root=root)
    store.close()
    other.close()


async def test_a_node_that_is_asked_nonsense_says_so():
    hub = MemoryHub()
    here, there = MemoryTransport(hub, "here"), MemoryTransport(hub, "there")
    there.serve(Gateway(Shelf(), Grants()).answering())  # type: ignore[arg-type]  # it never gets that far
    deep = b"\x82\xa3cid\xa1x\xa1y" + b"\x91" * 60_000 + b"\xc0"
    for question in (b"", b"\xc1", b"\x81\xa3cid\xa1x", b"\x81\xa3cid\xa2\xff\xfe", deep):
        answer = b"".join([part async for part in here.request("there", question)])
        assert answer[:1] == b"\x02"


async def test_bytes_that_came_as_a_raw_file_are_no_node_that_has_all_below_it(tmp_path):
    root, blocks = file(content(600_000))
    node = blocks[root.digest]
    with contextlib.closing(BlockStore(tmp_path / "store")) as store:
        raw = Cid.of(node, codec=RAW)
        await fetch(store, raw, [Peer("peer", {raw.digest: node})])
        assert store.holds(raw)
        assert not store.holds(root)
        await fetch(store, root, [Peer("peer", blocks)])
        assert store.read(str(root)) == content(600_000)
