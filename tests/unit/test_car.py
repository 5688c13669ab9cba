"""CAR archives: what is written is read, in whatever parts it comes; what is hostile is refused early."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node import dagjson
from bacalhau_node.cid import DAG_JSON, DAG_PB, RAW, Cid
from bacalhau_node.content import car
from bacalhau_node.content.dagpb import PbLink, encode_node, file_node, varint
from bacalhau_node.content.unixfs import PROFILES, import_bytes
from bacalhau_node.content.walk import Want, selected
from bacalhau_node.errors import ContentError

Blocks = dict[Cid, bytes]


class Shelf:
    """A shelf that checks the promise: nothing is kept before what it links to."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}

    def holds(self, cid: Cid) -> bool:
        return cid.digest in self.blocks

    def keep(self, cid: Cid, block: bytes) -> None:
        assert all(self.holds(child) for child in car.links(cid, block))
        self.blocks[cid.digest] = block


def _file(size: int = 3_000_000) -> tuple[Cid, Blocks]:
    blocks: Blocks = {}
    data = bytes(range(251)) * (size // 251 + 1)

    def sink(cid: bytes, block: bytes) -> None:
        blocks[Cid(cid)] = block

    root = import_bytes(data[:size], sink, profile=PROFILES["unixfs-v0-2015"])
    return Cid(root.cid), blocks


def _tree(depth: int, width: int) -> tuple[Cid, Blocks]:
    """DAG-JSON nodes over DAG-JSON nodes, `width` each, `depth` levels over raw leaves."""
    blocks: Blocks = {}
    level = []
    for number in range(width**depth):
        data = b"leaf %d" % number
        level.append(Cid.of(data, codec=RAW))
        blocks[level[-1]] = data
    while len(level) > 1:
        above = []
        for at in range(0, len(level), width):
            data = dagjson.encode({"part": [dagjson.Link(str(cid)) for cid in level[at : at + width]]})
            above.append(Cid.of(data, codec=DAG_JSON))
            blocks[above[-1]] = data
        level = above
    return level[0], blocks


def _below(blocks: Blocks, root: Cid) -> list[tuple[Cid, bytes]]:
    return list(selected(blocks.__getitem__, Want(root)))


def _archive(root: Cid, order: list[tuple[Cid, bytes]]) -> bytes:
    return car.header([root]) + b"".join(car.section(cid, block) for cid, block in order)


def _read(data: bytes, step: int) -> list[tuple[Cid, bytes]]:
    reader = car.CarReader()
    found = [pair for at in range(0, len(data), step) for pair in reader.feed(data[at : at + step])]
    reader.end()
    return found


@pytest.mark.parametrize("step", [1, 7, 4096, 10**9])
def test_an_archive_is_read_in_whatever_parts_it_comes(step):
    root, blocks = _tree(2, 5)
    order = _below(blocks, root)
    assert dict(order) == blocks
    reader = car.CarReader()
    data = _archive(root, order)
    assert [pair for at in range(0, len(data), step) for pair in reader.feed(data[at : at + step])] == order
    assert reader.roots == (root,)
    reader.end()


def test_the_header_is_the_one_that_others_write():
    # the CARv1 specification's example of a header, with the CID of b"" in place of its roots
    root = Cid.of(b"", codec=RAW)
    body = bytes.fromhex("a265726f6f747381d82a582500") + root.binary + bytes.fromhex("6776657273696f6e01")
    assert car.header([root]) == bytes((len(body),)) + body


@pytest.mark.parametrize("count", [0, 1, 23, 24, 256])
def test_headers_of_many_roots_come_back(count):
    roots = [Cid.of(b"%d" % number, codec=(RAW, DAG_PB, DAG_JSON)[number % 3]) for number in range(count)]
    reader = car.CarReader()
    reader.feed(car.header(roots))
    assert reader.roots == tuple(roots)


def test_versions_0_and_1_of_a_cid_travel_as_they_are():
    root, blocks = _file(600_000)
    assert str(root).startswith("Qm")
    assert dict(_read(_archive(root, list(blocks.items())), 1000)) == blocks


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "cut off"),
        (b"\x00", "not a CAR"),
        (b"\xff\xff\xff\xff\xff", "not a CAR"),
        (varint(car.MAX_HEADER + 1), "not a CAR"),
        (b"\x80\x80\x80\x80\x80", "not a CAR"),
        (b"\x01\xa0", "header"),
        (b"\x03\xa2\x65r", "header"),
        (b"\x0a\xa1\x67version\x01", "header"),
        (b"\x11\xa2\x67version\x02\x65roots\x80", "header"),
        (b"\x13\xa2\x67version\x01\x67version\x01", "header"),
        (b"\x11\xa2\x67version\x01\x65roots\x80" + varint(3 * 1024 * 1024), "not a CAR"),
        (b"\x11\xa2\x67version\x01\x65roots\x80" + b"\x02ab", "no usable name"),
        (b"\x11\xa2\x67version\x01\x65roots\x80" + b"\x00", "no usable name"),
        (b"\x11\xa2\x67version\x01\x65roots\x80" + b"\x20ab", "cut off"),
    ],
)
def test_what_is_no_archive_is_refused(data, text):
    with pytest.raises(ContentError, match=text):
        _read(data, 5)


def test_a_block_under_another_name_is_refused():
    true, false = Cid.of(b"true"), b"false"
    with pytest.raises(ContentError, match="another one"):
        _read(car.header([true]) + car.section(true, false), 100)


def test_too_many_roots_are_refused():
    roots = [Cid.of(b"%d" % number) for number in range(car.MAX_ROOTS + 1)]
    with pytest.raises(ContentError, match="roots"):
        car.CarReader().feed(car.header(roots))


@given(st.binary(max_size=300))
def test_garbage_is_refused_with_a_content_error(data):
    with pytest.raises(ContentError):
        _read(data, 64)


@given(st.data())
def test_one_flipped_bit_is_found(data):
    root, blocks = _tree(1, 3)
    archive = bytearray(_archive(root, _below(blocks, root)))
    start = len(car.header([root]))
    at = data.draw(st.integers(start, len(archive) - 1))
    archive[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ContentError):
        _read(bytes(archive), 50)


# --- taking in ---


@given(st.randoms(use_true_random=False), st.integers(1, 3), st.integers(2, 4))
def test_any_order_of_blocks_is_taken_and_nothing_before_what_it_links_to(random, depth, width):
    root, blocks = _tree(depth, width)
    order = list(blocks.items())
    random.shuffle(order)
    shelf = Shelf()
    taken = car.CarImport(shelf)
    for cid, block in order:
        taken.take(cid, block)
        taken.take(cid, block)
    taken.end()
    assert shelf.holds(root)
    assert len(shelf.blocks) == len(blocks)
    assert taken.bytes >= sum(map(len, blocks.values()))


def test_an_archive_without_a_part_leaves_no_root():
    root, blocks = _tree(2, 3)
    order = _below(blocks, root)
    lacking = order[-1][0]
    shelf = Shelf()
    taken = car.CarImport(shelf)
    for cid, block in order[:-1]:
        taken.take(cid, block)
    with pytest.raises(ContentError, match="belongs to it"):
        taken.end()
    assert not shelf.holds(root)
    taken.take(lacking, blocks[lacking])
    taken.end()
    assert shelf.holds(root)


def test_what_waits_is_bounded():
    nowhere = dagjson.Link(str(Cid.of(b"nowhere")))
    taken = car.CarImport(Shelf())

    def take(number: int) -> None:
        data = dagjson.encode({"n": number, "fill": "x" * 1_000_000, "to": nowhere})
        taken.take(Cid.of(data, codec=DAG_JSON), data)

    for number in range(16):
        take(number)
    with pytest.raises(ContentError, match="wait"):
        take(16)


def test_links_that_lead_nowhere_or_too_deep_are_content_errors():
    for codec, block in (
        (DAG_PB, b"\xff"),
        (DAG_PB, encode_node([PbLink(b"\x01\x02", b"", 1)], file_node([1]))),
        (DAG_JSON, b"{"),
        (DAG_JSON, b'{"/":"nonsense"}'),
        (DAG_JSON, b"[" * 100_000),
    ):
        with pytest.raises(ContentError):
            car.links(Cid.of(block, codec=codec), block)


def test_a_diamond_is_walked_once_each():
    leaf = Cid.of(b"leaf")
    low = dagjson.encode([dagjson.Link(str(leaf))] * 50)
    blocks: Blocks = {leaf: b"leaf", Cid.of(low, codec=DAG_JSON): low}
    name = Cid.of(low, codec=DAG_JSON)
    for _ in range(60):  # 50 to the power of 60 ways to the leaf
        data = dagjson.encode([dagjson.Link(str(name))] * 50)
        name = Cid.of(data, codec=DAG_JSON)
        blocks[name] = data
    assert len(_below(blocks, name)) == 62
