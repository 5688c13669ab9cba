"""UnixFS: the CIDs that kubo gives, and readers that trust no block."""

import hashlib
import json
import os
import threading
from functools import cache
from pathlib import Path

import mmh3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node.cid import DAG_PB, RAW, Cid
from bacalhau_node.content import car, dagpb, reader, unixfs
from bacalhau_node.content.dagpb import PbLink, decode_node, encode_node, file_node, folder_node, symlink_node
from bacalhau_node.content.reader import Reader
from bacalhau_node.content.unixfs import (
    PROFILES,
    hash_path,
    import_bytes,
    import_file,
    import_folder,
    import_links,
    import_reader,
)
from bacalhau_node.errors import ContentError

VECTORS = json.loads((Path(__file__).parents[1] / "vectors/unixfs.json").read_text())["vectors"]
WITH_HIDDEN = {
    "unixfs-v0-2015": "QmWFMTtUg45JtAFsRG3AsdjCKCbkykF88XfGQFTB4QfWjy",
    "cidv1-256k-174": "bafybeigw5523d4fvajniui54pd7gvz2pa4n2hhxib6rpmvnpvlgk4mmiyu",
    "unixfs-v1-2025": "bafybeigw5523d4fvajniui54pd7gvz2pa4n2hhxib6rpmvnpvlgk4mmiyu",
}
V0, V1 = PROFILES["unixfs-v0-2015"], PROFILES["cidv1-256k-174"]

TREES: dict[str, dict[str, bytes]] = {
    "uni": {
        "ąęź.txt": "zażółć".encode(),
        "日本/データ.csv": "列\n1\n".encode(),
        "sp ace+%2C.txt": b"percent",
        "😀.md": b"emoji",
        "A": b"A",
        "a": b"a",
        "\N{LATIN SMALL LETTER E WITH ACUTE}": b"nfc",
        "e\N{COMBINING ACUTE ACCENT}": b"nfd",
    },
    "hid": {".hidden": b"h", "seen": b"s"},
    "sym": {"foo": b"content"},
    "d1000": {f"{i}": b"%d\n" % i for i in range(1000)},
    "d5000mid": {f"file-{i:05d}.txt": b"%d\n" % i for i in range(5000)},
    "d5000long": {f"measurement-{i:05d}.csv": b"%d\n" % i for i in range(5000)},
}


@cache
def content(size: int) -> bytes:
    return hashlib.shake_128(b"vec-%d" % size).digest(size)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    for name, files in TREES.items():
        write(root / name, files)
    (root / "sym/bar").symlink_to("foo")
    write(root / "tree", {"a.txt": b"alpha\n", "sub/b.bin": content(262_145), "sub/deep/deeper/c.csv": b"x,y\n1,2\n"})
    (root / "tree/empty").mkdir()
    return root


def nowhere(_cid: bytes, _block: bytes) -> None:
    """A sink for those who only want the name."""


class Memory(dict):
    """Blocks by digest, for readers; hostile ones too, since nothing is checked when they come in."""

    def sink(self, cid: bytes, block: bytes) -> None:
        self[cid[-32:]] = block

    def add(self, block: bytes, codec: int = DAG_PB) -> Cid:
        cid = Cid.of(block, codec=codec)
        self[cid.digest] = block
        return cid

    def folder(self, *links: tuple[bytes, Cid]) -> Cid:
        return self.add(encode_node([PbLink(cid.binary, name, 1) for name, cid in links], folder_node()))

    def file(self, *parts: tuple[Cid, int]) -> Cid:
        links = [PbLink(cid.binary, b"", size) for cid, size in parts]
        return self.add(encode_node(links, file_node([size for _, size in parts])))

    def link(self, target: bytes) -> Cid:
        return self.add(encode_node((), symlink_node(target)))

    def block(self, cid: Cid) -> bytes:
        if cid.digest not in self:
            raise ContentError(f"{cid} is missing")
        return self[cid.digest]

    def file_size(self, cid: Cid) -> int | None:
        return None

    def list(self, root: Cid) -> list[str]:
        return [path for path, _, _ in Reader(self, root).listing()]

    def read(self, root: Cid) -> bytes:
        return b"".join(Reader(self, root).chunks(root))


@pytest.fixture
def memory() -> Memory:
    return Memory()


# --- names ---


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", [name for name in VECTORS if name.startswith("files/") and len(name) < 14])
def test_a_file_has_the_cid_that_kubo_gives_it(name, profile):
    data = content(int(name.removeprefix("files/")))
    got = import_bytes(data, nowhere, profile=PROFILES[profile])
    assert (str(Cid(got.cid)), got.size) == (VECTORS[name][profile], len(data))


@pytest.mark.slow
def test_a_file_of_300_mb_has_the_cids_that_kubo_gives_it():
    data = hashlib.shake_128(b"vec-300000000").digest(300_000_000)
    for profile, cid in VECTORS["files/300000000"].items():
        assert str(Cid(import_bytes(data, nowhere, profile=PROFILES[profile]).cid)) == cid


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", [name for name in VECTORS if not name.startswith("files/")])
def test_a_folder_has_the_cid_that_kubo_gives_it(trees, name, profile):
    got = import_folder(trees / name, nowhere, profile=PROFILES[profile], hidden=False)
    assert str(Cid(got.cid)) == VECTORS[name][profile]


@pytest.mark.parametrize("profile", PROFILES)
def test_hidden_files_are_part_of_a_folder_when_asked_for(trees, profile):
    got = import_folder(trees / "hid", nowhere, profile=PROFILES[profile], hidden=True)
    assert str(Cid(got.cid)) == WITH_HIDDEN[profile]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", TREES)
def test_what_was_imported_is_read_back(trees, memory, name, profile):
    got = import_folder(trees / name, memory.sink, profile=PROFILES[profile], hidden=True)
    root = Cid(got.cid)
    listed = {path: (Cid.parse(cid), size) for path, cid, size in Reader(memory, root).listing()}
    expected = TREES[name] | ({"bar": b"content"} if name == "sym" else {})
    assert {path: size for path, (_, size) in listed.items()} == {path: len(data) for path, data in expected.items()}
    assert {path: memory.read(cid) for path, (cid, _) in listed.items()} == expected


@pytest.mark.parametrize("profile", PROFILES)
def test_leaves_by_reference_name_the_same_blocks(memory, profile):
    """Whoever takes leaves as (offset, length) can rebuild every block from the file."""
    data, rebuilt = content(45_613_057), Memory()

    def leaf(cid: bytes, at: int, length: int) -> None:
        rebuilt[cid[-32:]] = dagpb.leaf_block(data[at : at + length], raw=PROFILES[profile].raw_leaves)

    def read(at: int, length: int) -> bytes:
        return data[at : at + length]

    got = import_reader(read, len(data), rebuilt.sink, profile=PROFILES[profile], leaf=leaf)
    assert got == import_bytes(data, memory.sink, profile=PROFILES[profile])
    assert rebuilt == memory
    assert memory.read(Cid(got.cid)) == data


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Files of every sort: for the importing thread, for one of their own, and with threads for their leaves."""
    sizes = [0, 1, 5000, 16 * 1024, 100_000, 300_000, 8 * 262_144, 8 * 262_144 + 1, 9_000_000]
    files = {f"{size}-{copy}": content(size) for size in sizes for copy in range(3)}
    files |= {f"many/{number:03}": b"%d" % number * 5000 for number in range(100)}
    return write(tmp_path_factory.mktemp("mixed"), files)


@pytest.mark.parametrize("profile", PROFILES)
def test_one_way_only_hashes_stores_and_streams_in_one_order_on_one_thread(mixed, memory, profile):
    threads, archive = set(), bytearray()

    def sink(cid: bytes, block: bytes) -> None:
        threads.add(threading.get_ident())
        memory.sink(cid, block)
        archive.extend(car.section(Cid(cid), block))

    hashed = hash_path(mixed, profile=PROFILES[profile])
    got = import_folder(mixed, sink, profile=PROFILES[profile], hidden=True)
    assert got == hashed
    assert threads == {threading.get_ident()}
    first = bytes(archive)
    archive.clear()
    import_folder(mixed, sink, profile=PROFILES[profile], hidden=True)
    assert archive == first
    come = car.CarReader().feed(car.header([Cid(got.cid)]) + first)
    assert {cid.digest: block for cid, block in come} == memory
    for name in ("0-0", "300000-1", "9000000-2", "many/042"):
        assert hash_path(mixed / name, profile=PROFILES[profile]).cid in {cid.binary for cid, _ in come}


def test_a_folder_with_one_file_that_can_t_be_read_is_an_error_naming_it(mixed, tmp_path):
    for name in ("a", "z"):
        (tmp_path / name).symlink_to(mixed / "many")
    (tmp_path / "b").mkdir()
    for number in range(50):
        (tmp_path / f"b/{number}").write_bytes(content(100_000))
    gone = tmp_path / "b/25"

    def add(path: str, status: os.stat_result) -> unixfs.Finish:
        if path == str(gone):
            gone.unlink()
        got = import_file(path, nowhere, profile=V0)
        return lambda: got

    with pytest.raises(ContentError, match=r"cannot import .*/b/25: No such file"):
        import_folder(tmp_path, nowhere, profile=V0, hidden=True, add_file=add)


def test_a_folder_of_100_000_files_is_a_trie_that_is_read_in_bounds(memory):
    file = memory.add(b"x", RAW)
    links = [PbLink(file.binary, b"%06d" % number, 1) for number in range(100_000)]
    root = Cid(import_links(links, memory.sink, profile=V0).cid)
    assert memory.list(root) == [f"{number:06d}" for number in range(100_000)]
    assert max(map(len, memory.values())) < reader.MAX_BLOCK


def test_more_chunks_than_fit_one_node_nest_and_read_back(memory):
    data = os.urandom(400)
    tiny = unixfs.Profile(name="tiny", version=1, raw_leaves=True, chunk=2, width=3, folder_limit="links")
    for size in (0, 1, 6, 7, 18, 19, 54, 55, 400):
        root = Cid(import_bytes(data[:size], memory.sink, profile=tiny).cid)
        assert memory.read(root) == data[:size]


def test_a_file_that_shrinks_while_it_is_imported_is_an_error(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(bytes(1_000_000))
    with pytest.raises(ContentError, match="changed while it was imported"):
        import_file(path, lambda *_: os.truncate(path, 10), profile=V0)


def test_a_file_that_is_written_while_it_is_imported_is_an_error(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(bytes(600_000))

    def append(_cid: bytes, _block: bytes) -> None:
        with path.open("ab") as log:
            log.write(b"x")

    with pytest.raises(ContentError, match="changed while it was imported"):
        import_file(path, append, profile=V0)


def test_what_is_no_file_folder_or_link_is_an_error_naming_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ContentError, match="/pipe: it is a socket, pipe or device"):
        import_folder(tmp_path, nowhere, profile=V0, hidden=True)
    with pytest.raises(ContentError, match="/pipe: it is not a regular file"):
        import_file(tmp_path / "pipe", nowhere, profile=V0)
    with pytest.raises(ContentError, match="gone: No such file"):
        import_file(tmp_path / "gone", nowhere, profile=V0)


def test_folders_deeper_than_they_can_be_read_are_not_imported(tmp_path, memory):
    deepest = tmp_path / "/".join("d" * (unixfs.MAX_DEPTH - 1))
    write(deepest, {"x": b"1"})
    root = Cid(import_folder(tmp_path, memory.sink, profile=V0, hidden=True).cid)
    assert memory.list(root) == ["d/" * (unixfs.MAX_DEPTH - 1) + "x"]
    (deepest / "d").mkdir()
    with pytest.raises(ContentError, match=f"lies {unixfs.MAX_DEPTH} folders deep or more"):
        import_folder(tmp_path, nowhere, profile=V0, hidden=True)


# --- hostile blocks ---


@given(st.binary(max_size=200))
def test_any_bytes_are_a_node_or_a_content_error(data):
    try:
        decode_node(data)
    except ContentError:
        return


@given(st.data())
def test_a_damaged_node_is_a_node_or_a_content_error(data):
    block = bytearray(encode_node([PbLink(Cid.of(b"x").binary, b"name", 300)] * 2, file_node([1, 500])))
    at = data.draw(st.integers(0, len(block) - 1))
    block[at] ^= data.draw(st.integers(1, 255))
    try:
        decode_node(bytes(block))
    except ContentError:
        return


@given(st.data())
def test_a_tree_with_damaged_nodes_is_read_or_a_content_error(data):
    """Whoever makes the blocks makes their hashes too: every node here is valid by its name."""
    memory = Memory()

    def damaged(cid: Cid) -> Cid:
        block = bytearray(memory.block(cid))
        for _ in range(data.draw(st.integers(0, 2))):
            block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
        return memory.add(bytes(block), cid.codec)

    part = damaged(memory.add(b"12345", RAW))
    file = damaged(memory.file((part, 5), (part, 5)))
    folder = damaged(memory.folder((b"file", file), (b"link", damaged(memory.link(b"../file"))), (b"part", part)))
    trie = damaged(memory.add(encode_node([PbLink(file.binary, b"07file", 1)], dagpb.hamt_node(1 << 7))))
    root = damaged(memory.folder((b"file", file), (b"folder", folder), (b"trie", trie)))
    try:
        for _, cid, size in Reader(memory, root).listing():
            assert len(memory.read(Cid.parse(cid))) == size
    except ContentError:
        return


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc", b"nul\0", b"x" * 256])
def test_a_name_that_could_leave_its_folder_is_refused(memory, name):
    root = memory.folder((name, memory.add(b"x", RAW)))
    with pytest.raises(ContentError, match=f"the folder {root} holds the name .*, which no file may have"):
        memory.list(root)


def test_a_name_that_comes_twice_is_refused(memory):
    x, y = memory.add(b"x", RAW), memory.add(b"y", RAW)
    with pytest.raises(ContentError, match="names 'a' twice"):
        memory.list(memory.folder((b"a", x), (b"a", y)))


def test_a_file_that_lies_about_its_size_is_refused(memory):
    part = memory.add(b"12345", RAW)
    assert memory.read(memory.file((part, 5), (part, 5))) == b"1234512345"
    with pytest.raises(ContentError, match="has 5 bytes where 6 were announced"):
        memory.read(memory.file((part, 6)))
    liar = memory.add(encode_node([PbLink(part.binary, b"", 5)], file_node([5, 5])))
    with pytest.raises(ContentError, match="contradicts itself"):
        memory.read(liar)


def test_a_folder_is_not_read_as_a_file_nor_as_a_part_of_one(memory):
    folder = memory.folder()
    with pytest.raises(ContentError, match="not a file"):
        memory.read(folder)
    with pytest.raises(ContentError, match="not a file"):
        memory.read(memory.file((folder, 0)))


def test_few_blocks_that_expand_to_many_entries_are_refused(memory, monkeypatch):
    monkeypatch.setattr(reader, "MAX_VISITS", 10_000)
    folder = memory.add(b"x", RAW)
    for _ in range(20):
        folder = memory.folder(*((b"%d" % i, folder) for i in range(10)))
    with pytest.raises(ContentError, match="expands to over 10000 entries"):
        memory.list(folder)


def test_few_blocks_that_expand_to_many_bytes_are_refused(memory):
    part, size = memory.add(bytes(1000), RAW), 1000
    for _ in range(10):
        part, size = memory.file(*[(part, size)] * 10), size * 10
    with pytest.raises(ContentError, match="expands to over 1000000 bytes"):
        for _ in Reader(memory, part, max_bytes=1_000_000).chunks(part):
            pass


def test_empty_parts_cost_too(memory, monkeypatch):
    monkeypatch.setattr(reader, "MAX_VISITS", 10_000)
    part = memory.add(b"", RAW)
    for _ in range(20):
        part = memory.file(*[(part, 0)] * 10)
    with pytest.raises(ContentError, match="expands to over 10000 entries"):
        memory.read(part)


def test_folders_and_files_that_are_too_deep_are_refused(memory):
    folder = part = memory.add(b"x", RAW)
    for _ in range(unixfs.MAX_DEPTH + 1):
        folder, part = memory.folder((b"d", folder)), memory.file((part, 1))
    for act in (lambda: memory.list(folder), lambda: memory.read(part)):
        with pytest.raises(ContentError, match="levels deep"):
            act()


def test_a_block_over_the_limit_is_refused(memory):
    x = memory.add(b"x", RAW)
    huge = memory.folder(*((b"%0200d" % i, x) for i in range(reader.MAX_BLOCK // 200)))
    with pytest.raises(ContentError, match="over the limit"):
        memory.list(huge)


def test_a_sharded_folder_with_a_foreign_part_is_refused(memory):
    part = memory.folder()
    root = memory.add(encode_node([PbLink(part.binary, b"00", 1)], dagpb.hamt_node(1)))
    with pytest.raises(ContentError, match="not a part of a sharded folder"):
        memory.list(root)


def test_a_sharded_folder_of_another_width_is_refused(memory):
    narrow = b"\x08\x05\x12\x01\x01\x28\x22\x30\x10"
    root = memory.add(encode_node([PbLink(memory.add(b"x", RAW).binary, b"0name", 1)], narrow))
    with pytest.raises(ContentError, match="has 16 slots, not 256"):
        memory.list(root)


def test_a_node_of_another_type_is_neither_file_nor_folder(memory):
    with pytest.raises(ContentError, match="a UnixFS node of type 3, neither a file nor a folder"):
        memory.list(memory.add(encode_node((), b"\x08\x03")))


def test_a_size_that_fits_no_file_is_refused(memory):
    with pytest.raises(ContentError, match="a number is cut off or too long"):
        memory.list(memory.add(encode_node((), b"\x08\x02\x18" + dagpb.varint(1 << 63))))


def test_a_block_of_another_codec_is_neither_file_nor_folder(memory):
    cid = Cid.parse("baguqeeraaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
    with pytest.raises(ContentError, match="neither a file nor a folder"):
        memory.list(memory.folder((b"x", cid)))


def test_names_with_equal_hashes_are_an_error_naming_them(monkeypatch, tmp_path):
    monkeypatch.setattr(unixfs, "_FOLDER_LIMIT", 0)
    monkeypatch.setattr(mmh3, "hash64", lambda _name, signed: (7, 0))
    with pytest.raises(ContentError, match="b'a', b'b': their hashes are equal"):
        import_folder(write(tmp_path, {"a": b"", "b": b""}), nowhere, profile=V0, hidden=True)


# --- links ---


def test_links_inside_the_root_count_as_what_they_lead_to(memory):
    file = memory.add(b"123", RAW)
    root = memory.folder(
        (b"to_file", memory.link(b"real/x")),
        (b"to_folder", memory.link(b"./real//")),
        (b"to_link", memory.link(b"to_folder/../real/back/to_file")),
        (b"real", memory.folder((b"x", file), (b"back", memory.link(b".")))),
    )
    with pytest.raises(ContentError, match="a folder around itself"):
        memory.list(root)
    root = memory.folder(
        (b"to_file", memory.link(b"real/x")),
        (b"to_folder", memory.link(b"./real//")),
        (b"to_link", memory.link(b"to_folder/../real/x")),
        (b"real", memory.folder((b"x", file))),
    )
    assert memory.list(root) == ["real/x", "to_file", "to_folder/x", "to_link"]


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (b"/etc/passwd", "out of its folder"),
        (b"../x", "out of its folder"),
        (b"sub/../../x", "out of its folder"),
        (b"", "out of its folder"),
        (b"link", "in circles"),
        (b"other", "in circles"),
        (b"nothing", "does not exist"),
        (b"file/x", "does not exist"),
        (b".", "a folder around itself"),
    ],
)
def test_a_link_that_leads_nowhere_good_is_an_error_naming_it_unless_hidden(memory, target, problem):
    def root(name: bytes) -> Cid:
        file, other = memory.add(b"x", RAW), memory.link(name)
        return memory.folder(
            (name, memory.link(target)), (b"file", file), (b".other", other), (b"sub", memory.folder())
        )

    if target == b"other":
        target = b".other"
    with pytest.raises(ContentError, match=problem) as caught:
        memory.list(root(b"link"))
    assert "the link link leads to" in str(caught.value)
    target = b".link" if target == b"link" else target
    assert memory.list(root(b".link")) == ["file", "sub/"]


def test_links_that_multiply_what_is_listed_are_bounded(memory, monkeypatch):
    monkeypatch.setattr(reader, "MAX_VISITS", 10_000)
    folders = [(b"0", memory.folder((b"x", memory.add(b"", RAW))))]
    for level in range(1, 8):
        links = [(b"%d" % i, memory.link(b"../%d" % (level - 1))) for i in range(10)]
        folders.append((b"%d" % level, memory.folder(*links)))
    with pytest.raises(ContentError, match="expands to over 10000 entries"):
        memory.list(memory.folder(*folders))


def test_names_that_are_not_utf8_survive(memory):
    root = memory.folder((b"caf\xe9", memory.add(b"x", RAW)))
    assert [os.fsencode(path) for path in memory.list(root)] == [b"caf\xe9"]
