"""What every content store promises: names that never lie, files that come back, nothing lost or invented."""

import contextlib
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bacalhau_node
from bacalhau_node.cid import DAG_JSON, DAG_PB, RAW, Cid
from bacalhau_node.content import index as index_module
from bacalhau_node.content.blocks import ROW, BlockStore
from bacalhau_node.content.dagpb import PbLink, encode_node, folder_node, leaf_frame
from bacalhau_node.content.intake import INLINE
from bacalhau_node.content.unixfs import PROFILES, hash_path
from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.ports import ContentStore

ABSENT = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
BIG = os.urandom(1_000_000)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def reopen(folder) -> Iterator[Callable[[], BlockStore]]:
    """Open the store of the test: once more each time, as another process would."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(BlockStore(folder)))


@pytest.fixture
def store(reopen) -> BlockStore:
    return reopen()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: a file's bytes, a link's target, None for a folder."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


def _half_made(store: BlockStore) -> list[Path]:
    """What lies in `tmp/` beside the locks of those who live."""
    return [path for path in store.folder.glob("tmp/*/*") if path.name != "lock"]


def test_it_is_the_port(store):
    _: ContentStore = store


# --- blocks ---


@pytest.mark.parametrize("size", [0, 1, 300, ROW, ROW + 1, 1024 * 1024])
@pytest.mark.parametrize("codec", ["raw", "dag-json"])
def test_a_block_can_be_read_at_once_and_after_a_flush_by_everyone(store, reopen, size, codec):
    data = os.urandom(size)
    cid = store.put(data, codec=codec)
    assert (store.has(cid), store.get(cid)) == (True, data)
    assert not reopen().has(cid)
    store.flush()
    assert store.get(cid) == reopen().get(cid) == data


def test_equal_blocks_have_equal_names_and_are_kept_once(store, folder):
    assert store.put(b"x") == store.put(b"x") == str(Cid.of(b"x"))
    for _ in range(2):
        store.put(BIG)
        store.flush()
    assert len(list(folder.glob("blocks/*/*"))) == 1


def test_both_versions_of_a_cid_find_the_block(store):
    v0 = store.add_bytes(b"data")
    assert v0.startswith("Qm")
    assert store.get(str(Cid.parse(v0).v1())) == store.get(v0)


def test_an_absent_block_is_an_error_naming_it(store, folder):
    assert not store.has(ABSENT)
    for act in (store.get, store.read, store.list, store.pin):
        with pytest.raises(ContentError, match=f"{ABSENT}.*is not in the content store {folder}"):
            act(ABSENT)
    with pytest.raises(ContentError, match=ABSENT):
        store.export(ABSENT, folder / "out")
    assert store.file(ABSENT) is None


def test_a_text_that_is_no_cid_is_an_error_saying_so(store, folder):
    for act in (store.get, store.has, store.read, store.list, store.file, store.pin, store.unpin):
        with pytest.raises(ContentError, match="'nonsense' is not a CID"):
            act("nonsense")


def test_a_block_over_the_limit_is_the_callers_bug(store):
    with pytest.raises(BugError, match="use add_bytes"):
        store.put(bytes(1024 * 1024 + 1))


def test_many_puts_do_not_grow_in_memory_without_bound(store, reopen):
    cids = [store.put(os.urandom(1024 * 1024)) for _ in range(40)]
    other = reopen()
    assert sum(map(other.has, cids)) >= 20
    assert all(map(store.has, cids))


def test_however_small_blocks_are_few_thousand_of_them_wait(store):
    """Else an archive of a million tiny ones is a gigabyte of memory and a minute's transaction."""
    for number in range(5_000):
        block = number.to_bytes(4, "big")
        store.keep(Cid.of(block, codec=RAW), block)
    assert len(store._pending) < 1_000  # 4,096 were written


def test_closing_flushes_and_a_closed_store_is_a_bug_to_use(folder, reopen):
    store = BlockStore(folder)
    cid = store.put(b"x")
    store.close()
    assert reopen().get(cid) == b"x"
    with pytest.raises(BugError, match="after it was closed"):
        store.get(ABSENT)


# --- files and folders ---

sizes = st.sampled_from([0, 1, 100, INLINE, INLINE + 1, ROW, ROW + 1, 262_144, 262_145, 600_000])
names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda name: name not in {".", ".."}
)
trees = st.recursive(
    st.tuples(sizes, st.integers(0, 3)),
    lambda inner: st.dictionaries(names, inner, max_size=5),
    max_leaves=12,
)


def grow(path: Path, node: object) -> None:
    if isinstance(node, dict):
        path.mkdir()
        for name, child in node.items():
            grow(path / name, child)
        return
    size, seed = node
    path.write_bytes(hashlib.shake_128(bytes((seed,))).digest(size))


@settings(max_examples=40)
@given(trees, st.sampled_from(list(PROFILES)), st.booleans())
def test_what_is_imported_and_exported_is_the_same(shape, profile, move):
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.closing(BlockStore(Path(name, "store"), profile=profile)) as store,
    ):
        source, target = Path(name, "source"), Path(name, "target")
        grow(source, shape)
        before = tree(source) if source.is_dir() else source.read_bytes()
        cid = store.add_path(source, move=move)
        assert source.exists() is not move
        store.export(cid, target)
        assert (tree(target) if target.is_dir() else target.read_bytes()) == before
        assert not list(store.damage())
        files = (
            {path: data for path, data in before.items() if isinstance(data, bytes)}
            if target.is_dir()
            else {"": before}
        )
        listed = {path: store.read(file) for path, file, _ in store.list(cid) if not path.endswith("/")}
        assert listed == files
        assert store.add_path(target) == cid


@pytest.mark.parametrize("size", [0, INLINE, INLINE + 1, 262_144, 1_000_000])
def test_bytes_and_a_file_with_them_have_the_same_cid(store, tmp_path, size):
    (tmp_path / "file").write_bytes(BIG[:size])
    cid = store.add_bytes(BIG[:size])
    assert cid == store.add_path(tmp_path / "file")
    assert store.read(cid) == BIG[:size]
    assert store.list(cid) == [("", cid, size)]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("size", [0, 1, ROW, ROW + 1, 262_144, 262_145, 524_288, 1_048_576, 1_048_577, 2_500_000])
def test_a_draft_becomes_the_file_that_was_written_to_it_in_whatever_parts(folder, profile, size):
    data = (BIG * 3)[:size]
    with contextlib.closing(BlockStore(folder, profile=profile)) as store, contextlib.closing(store.draft()) as draft:
        draft.write(0, [b"something else"])
        draft.start_again()
        parts = [(at, data[at : at + 1_048_576]) for at in range(0, size, 1_048_576)]
        with ThreadPoolExecutor(3) as pool:  # in any order
            for at, part in reversed(parts):
                pool.submit(draft.write, at, [part[i : i + 70_001] for i in range(0, len(part), 70_001)])
        cid = draft.finish()
        assert store.read(cid) == data
        assert size <= ROW or store.file(cid).read_bytes() == data
        assert not list(store.damage())
        assert cid == store.add_bytes(data)
        with contextlib.closing(BlockStore(folder)) as other:
            assert other.has(cid)


@pytest.mark.parametrize("size", [10, ROW + 1])
def test_a_raw_block_that_looks_like_a_node_is_none_until_it_comes_as_one(store, size):
    links = [PbLink(Cid.parse(ABSENT).binary, b"x" * size, 5)]
    for codec, node in (
        (DAG_PB, encode_node(links, folder_node())),
        (DAG_JSON, b'[{"/":"%s"},"%s"]' % (ABSENT.encode(), b"x" * size)),
    ):
        raw, cid = Cid.of(node), Cid.of(node, codec=codec)
        store.put(node)
        for _ in ("pending", "flushed"):
            assert store.holds(raw)
            assert not store.holds(cid)
            store.flush()
        store.put(node)
        store.keep(cid, node)
        for _ in ("pending", "flushed"):
            assert store.holds(raw)
            assert store.holds(cid)
            store.flush()


@pytest.mark.parametrize("size", [10, ROW + 1, 262_144])
def test_a_leaf_is_here_by_either_name(store, tmp_path, size):
    block = b"".join((leaf_frame(size)[0], BIG[:size], leaf_frame(size)[1]))
    (tmp_path / "file").write_bytes(block)
    for add in (
        lambda: store.put(block),
        lambda: store.add_path(tmp_path / "file"),
        lambda: store.add_bytes(BIG[:size]),
    ):
        add()
        store.flush()
        assert store.holds(Cid.of(block, codec=DAG_PB))
        assert store.holds(Cid.of(block))


@pytest.mark.parametrize("parts", [[(0, b"x" * 1000), (1000, b"y")], [(0, b"x" * 1_048_576), (2_097_152, b"y")]])
def test_a_draft_whose_parts_do_not_fit_together_is_never_finished(store, parts):
    with contextlib.closing(store.draft()) as draft:
        for at, part in parts:
            draft.write(at, [part])
        with pytest.raises(BugError, match=f"a part of a draft begins at {parts[1][0]}"):
            draft.finish()


def test_a_draft_that_is_not_finished_leaves_nothing(store):
    with contextlib.closing(store.draft()) as draft:
        draft.write(0, [BIG])
        assert draft.folder.is_dir()
    assert {path.name for path in store.folder.glob("tmp/*/*")} == {"lock"}
    assert not list(store.folder.glob("files/*/*"))


def test_a_listing_has_every_file_and_every_empty_folder_sorted_by_the_bytes_of_the_path(store, tmp_path):
    write(tmp_path / "in", {"b": b"22", "a/z": b"1", "a.b": b"333", "é": BIG, ".hidden": b""})
    (tmp_path / "in/a/empty").mkdir()
    (tmp_path / "in/link").symlink_to("a/z")
    cid = store.add_path(tmp_path / "in")
    assert [(path, size) for path, _, size in store.list(cid)] == [
        (".hidden", 0),
        ("a.b", 3),
        ("a/empty/", 0),
        ("a/z", 1),
        ("b", 2),
        ("link", 1),
        ("é", len(BIG)),
    ]
    (tmp_path / "nothing").mkdir()
    assert store.list(store.add_path(tmp_path / "nothing")) == []


def test_a_folder_of_thousands_of_files_becomes_a_trie_and_comes_back(store, tmp_path):
    files = {f"measurement-{i:05d}.csv": b"%d\n" % i for i in range(6000)}
    cid = store.add_path(write(tmp_path / "in", files), move=True)
    assert [path for path, _, _ in store.list(cid)] == sorted(files)
    store.export(cid, tmp_path / "out")
    assert tree(tmp_path / "out") == files


def test_an_imported_copy_is_served_after_the_original_changed(store, tmp_path):
    write(tmp_path / "in", {"x": BIG, "y": b"small"})
    cid = store.add_path(tmp_path / "in")
    write(tmp_path / "in", {"x": b"other", "y": b"other"})
    store.export(cid, tmp_path / "out")
    assert tree(tmp_path / "out") == {"x": BIG, "y": b"small"}


def test_a_file_that_is_moved_in_is_not_copied(store, tmp_path):
    path = tmp_path / "big"
    path.write_bytes(BIG)
    inode = path.stat().st_ino
    file = store.file(store.add_path(path, move=True))
    assert file.stat().st_ino == inode
    assert file.stat().st_nlink == 1
    assert not path.exists()


def test_a_file_with_another_name_outside_is_copied_though_it_is_moved_in(store, tmp_path):
    (tmp_path / "big").write_bytes(BIG)
    os.link(tmp_path / "big", tmp_path / "other")
    cid = store.add_path(tmp_path / "big", move=True)
    assert not (tmp_path / "big").exists()
    (tmp_path / "other").write_bytes(b"changed")
    assert store.read(cid) == BIG


def test_a_whole_file_is_handed_out_and_a_small_or_foreign_one_is_not(store, tmp_path):
    assert store.file(store.add_bytes(BIG)).read_bytes() == BIG
    assert store.file(store.add_bytes(b"small")) is None
    (tmp_path / "in").mkdir()
    assert store.file(store.add_path(tmp_path / "in")) is None


def test_the_inside_of_a_file_is_not_mistaken_for_the_file(store):
    """A raw CID with the digest of a file's root names the root's bytes, not the file's."""
    root = Cid.parse(store.add_bytes(BIG))
    assert store.file(str(Cid.raw(root.digest))) is None
    assert store.read(str(Cid.raw(root.digest))) == store.get(str(root))


def test_what_is_missing_a_pipe_or_a_link_cannot_be_imported_and_is_named(store, tmp_path):
    write(tmp_path / "in", {"x": b"1"})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_folder").symlink_to("in")
    (tmp_path / "to_file").symlink_to("in/x")
    for name, problem in {
        "gone": "No such file",
        "pipe": "not a regular file",
        "to_file": "symbolic link",
        "to_folder": "symbolic link",
    }.items():
        with pytest.raises(ContentError, match=f"{tmp_path}/{name}: .*{problem}"):
            store.add_path(tmp_path / name, move=True)
    assert tree(tmp_path / "in") == {"x": b"1"}


def test_a_failed_move_leaves_the_source_as_it_was(store, tmp_path):
    write(tmp_path / "in", {"a": BIG, "b": b"small"})
    os.mkfifo(tmp_path / "in/z")
    with pytest.raises(ContentError):
        store.add_path(tmp_path / "in", move=True)
    assert (tmp_path / "in/a").read_bytes() == BIG
    assert not _half_made(store)


# --- export ---


def test_an_export_refuses_what_is_there(store, tmp_path):
    cid = store.add_bytes(b"x")
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to("nothing")
    for name in ("file", "folder", "broken"):
        with pytest.raises(ContentError, match=f"{name} exists already"):
            store.export(cid, tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_failed_export_leaves_nothing_behind(store, tmp_path):
    write(tmp_path / "in", {"a": b"1", "b": BIG})
    cid = store.add_path(tmp_path / "in")
    file = next(path for path in store.folder.glob("files/*/*"))
    file.chmod(0o644)
    file.write_bytes(BIG[:-1] + bytes((BIG[-1] ^ 1,)))
    (tmp_path / "out").mkdir()
    with pytest.raises(ContentError, match="damaged"):
        store.export(cid, tmp_path / "out/x")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ContentError, match=r"cannot write .*/gone/x: No such file or directory; make room"):
        store.export(cid, tmp_path / "gone/x")


def test_links_are_exported_as_links_and_never_lead_out(store, tmp_path):
    write(tmp_path / "in", {"a/x": b"1"})
    (tmp_path / "in/to_x").symlink_to("a/x")
    (tmp_path / "in/a/broken").symlink_to("../nothing")
    cid = store.add_path(tmp_path / "in")
    store.export(cid, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "in")
    for target in ("/etc", "../..", "a/../../x"):
        (tmp_path / "in/out").unlink(missing_ok=True)
        (tmp_path / "in/out").symlink_to(target)
        with pytest.raises(ContentError, match=r"the link out leads to .* out of its folder"):
            store.export(store.add_path(tmp_path / "in"), tmp_path / "escaped")


TWINS = {"A": b"1", "a": b"2", "\N{LATIN SMALL LETTER E WITH ACUTE}": b"3", "e\N{COMBINING ACUTE ACCENT}": b"4"}


def test_names_that_differ_in_case_or_composition_only_are_different_names(store, tmp_path):
    cid = store.add_path(write(tmp_path / "in", TWINS))
    store.export(cid, tmp_path / "out")
    assert tree(tmp_path / "out") == TWINS


@pytest.mark.parametrize("twin", ["file", "folder", "link"])
def test_a_disk_on_which_two_names_are_one_is_told_of(store, tmp_path, monkeypatch, twin):
    write(tmp_path / "in", {"A": b"1"})
    if twin == "file":
        write(tmp_path / "in", {"a": b"2"})
    elif twin == "folder":
        write(tmp_path / "in", {"a/x": b"2"})
    else:
        (tmp_path / "in/a").symlink_to("A")
    cid = store.add_path(tmp_path / "in")
    monkeypatch.setattr("bacalhau_node.content.export._place", lambda made, item: made / item.path.lower())
    with pytest.raises(ContentError, match=f"cannot write a: another item has the same name on the disk of {tmp_path}"):
        store.export(cid, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".bacalhau*"))


def _sparse(path: Path, size: int) -> Path:
    """A file of zeros with a few bytes in the middle and at its end, most of which takes no room."""
    with path.open("wb") as file:
        for at in (size // 2, size - 3):
            file.seek(at)
            file.write(b"end")
    return path


@pytest.mark.parametrize("how", [{}, {"move": True}, {"link": True}])
def test_a_sparse_file_takes_no_more_room_in_the_store(store, tmp_path, how):
    path, size = _sparse(tmp_path / "sparse", 64 * 1024 * 1024 + 5), 64 * 1024 * 1024 + 5
    expected = str(Cid(hash_path(path, profile=store.profile).cid))
    cid = store.add_path(path, **how)
    assert cid == expected
    assert store.list(cid) == [("", cid, size)]
    assert store.file(cid).stat().st_blocks * 512 < 2 * 1024 * 1024
    assert not list(store.damage())


# --- damage ---


@pytest.mark.parametrize("where", ["inline", "block", "file"])
@given(data=st.data())
@settings(max_examples=25)
def test_any_flipped_bit_is_found_and_importing_again_mends_it(where, data):
    payload = BIG[: {"inline": 1000, "block": 100_000, "file": 400_000}[where]]
    with tempfile.TemporaryDirectory() as name, contextlib.closing(BlockStore(Path(name, "store"))) as store:
        add = store.add_bytes if where == "file" else store.put
        cid = add(payload)
        store.flush()
        bit = data.draw(st.integers(0, len(payload) * 8 - 1))
        _flip(store, where, cid, bit)
        with pytest.raises(ContentError, match="damaged"):
            store.read(cid)
        assert len(list(store.damage())) >= 1
        add(payload)
        store.flush()
        assert store.read(cid) == payload
        assert not list(store.damage())


def _flip(store: BlockStore, where: str, cid: str, bit: int) -> None:
    if where == "inline":
        database = sqlite3.connect(store.folder / "index.sqlite")
        with contextlib.closing(database), database:
            digest = Cid.parse(cid).digest
            (data,) = database.execute("SELECT data FROM block WHERE digest = ?", (digest,)).fetchone()
            database.execute("UPDATE block SET data = ? WHERE digest = ?", (_flipped(data, bit), digest))
        return
    (path,) = store.folder.glob("blocks/*/*" if where == "block" else "files/*/*")
    path.chmod(0o644)
    times = path.stat()
    path.write_bytes(_flipped(path.read_bytes(), bit))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk would: no time tells of it


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_whole_file_that_somebody_wrote_to_is_not_handed_out(store):
    cid = store.add_bytes(BIG)
    path = store.file(cid)
    path.chmod(0o644)
    path.write_bytes(BIG[::-1])
    with pytest.raises(ContentError, match="damaged"):
        store.file(cid)
    path.write_bytes(BIG)
    assert store.file(cid).read_bytes() == BIG
    path.write_bytes(BIG + b"more")
    with pytest.raises(ContentError, match="changed or removed: import its data again"):
        store.file(cid)
    path.unlink()
    with pytest.raises(ContentError, match="changed or removed"):
        store.file(cid)
    with pytest.raises(ContentError, match="cannot be read from"):
        store.read(cid)
    assert store.file(store.add_bytes(BIG)).read_bytes() == BIG


@pytest.mark.parametrize("profile", PROFILES)
def test_a_block_that_is_sent_is_hashed_unless_its_file_is_the_one_that_was_hashed(folder, profile):
    with contextlib.closing(BlockStore(folder, profile=profile)) as store:
        root = Cid.parse(store.add_bytes(BIG))
        leaf = next(Cid.raw(block.digest) for block in store._index.blocks() if block.slice is not None)
        assert store.to_send(root) == store.block(root)
        assert store.to_send(leaf) == store.block(leaf)
        assert store.to_send(Cid.parse(store.put(b"pending"))) == b"pending"
        path = store.file(str(root))
        path.chmod(0o644)
        path.write_bytes(BIG[::-1])
        with pytest.raises(ContentError, match="damaged"):
            store.to_send(leaf)
        with pytest.raises(ContentError, match="is not in the content store"):
            store.to_send(Cid.parse(ABSENT))


def test_a_stamp_of_an_earlier_boot_proves_nothing(folder, reopen, monkeypatch):
    """After a power failure a file may have its size and time but not its bytes."""
    monkeypatch.setattr("bacalhau_node.content.files._boot", lambda: "before")
    cid = reopen().add_bytes(BIG)
    monkeypatch.undo()
    path = reopen().file(cid)
    times = path.stat()
    monkeypatch.setattr("bacalhau_node.content.files._boot", lambda: "after")
    path.chmod(0o644)
    path.write_bytes(bytes(len(BIG)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ContentError, match="damaged"):
        reopen().file(cid)


def test_a_damaged_index_is_an_error_and_stays_as_it_is(folder):
    BlockStore(folder).close()
    index = folder / "index.sqlite"
    index.write_bytes(b"garbage" * 1000)
    with pytest.raises(ContentError, match=r"index\.sqlite is damaged .*move the folder"):
        BlockStore(folder)
    assert index.read_bytes() == b"garbage" * 1000


def test_a_lost_index_is_an_error_and_never_a_new_store(folder):
    with contextlib.closing(BlockStore(folder)) as store:
        store.add_bytes(BIG)
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    with pytest.raises(ContentError, match=r"has blocks but its index .* is missing or empty"):
        BlockStore(folder)
    assert list(folder.glob("files/*/*"))


def test_a_newer_format_and_an_unknown_profile_are_refused_by_name(folder):
    BlockStore(folder).close()
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(ContentError, match="has format 7, this program reads formats 1 to 2"):
        BlockStore(folder)
    with pytest.raises(SpecError, match="'v9' is not a UnixFS profile: there are unixfs-v0-2015"):
        BlockStore(folder, profile="v9")


def test_another_writer_that_never_ends_is_an_error_saying_so(store, folder, monkeypatch):
    store.put(b"x")
    store.flush()
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(index_module, "BUSY_SECONDS", 0)
        impatient = BlockStore(folder)
        impatient.put(b"y")
        with pytest.raises(ContentError, match="another process has been writing"):
            impatient.close()
        other.execute("ROLLBACK")
    store.flush()


def test_a_network_file_system_is_told_by_the_mount_that_is_nearest(tmp_path):
    table = tmp_path / "mounts"
    table.write_text(
        f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path}/a\\040b nfs4 rw 0 0\n/dev/sdb {tmp_path}/a\\040b/c xfs rw 0 0\n"
    )
    assert index_module.on_network(tmp_path / "a b/store", table=table)
    for path in (tmp_path, tmp_path / "a b/c/store", tmp_path / "a"):
        assert not index_module.on_network(path, table=table)
    assert not index_module.on_network(tmp_path, table=tmp_path / "none")


def test_the_index_needs_no_shared_memory_on_a_network_file_system(folder, monkeypatch):
    monkeypatch.setattr(index_module, "on_network", lambda _: True)
    with contextlib.closing(BlockStore(folder)) as store:
        cid = store.put(b"x")
        store.flush()
        assert store.get(cid) == b"x"
        assert {path.name for path in folder.glob("index*")} == {"index.sqlite"}


def test_a_folder_that_cannot_be_written_to_is_an_error_naming_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ContentError, match=f"cannot write to the content store {tmp_path}/file/store: Not a directory"):
        BlockStore(tmp_path / "file/store")


def test_a_full_disk_is_an_error_and_what_was_put_is_still_there(store, folder):
    """A file in the place of the blocks' folder stands for a disk that refuses them."""
    data = os.urandom(ROW + 1)
    digest = Cid.of(data).digest.hex()
    (folder / "blocks").write_bytes(b"")
    cid = store.put(data)
    with pytest.raises(ContentError, match=f"cannot write to the content store {folder}"):
        store.flush()
    assert store.get(cid) == data
    (folder / "blocks").unlink()
    store.flush()
    assert (folder / "blocks" / digest[:2] / digest).read_bytes() == data


# --- pins ---


def test_pins_are_counted_and_shared(store, reopen):
    cid = store.add_bytes(BIG)
    assert store.pins(cid) == 0
    store.pin(cid)
    store.pin(str(Cid.parse(cid).v1()))
    assert store.pins(cid) == 2
    store.flush()
    other = reopen()
    other.unpin(cid)
    other.flush()
    assert (store.pins(cid), other.pins(cid)) == (1, 1)
    store.unpin(cid)
    assert store.pins(cid) == 0
    with pytest.raises(BugError, match="unpinned more often"):
        store.unpin(cid)
    store.flush()
    assert reopen().pins(cid) == 0


def test_pins_of_two_stores_add_up_when_both_flush(store, reopen):
    cid, other = store.add_bytes(BIG), reopen()
    for holder in (store, other):
        holder.pin(cid)
    for holder in (store, other):
        holder.flush()
    assert store.pins(cid) == other.pins(cid) == 2


# --- several threads, several processes, sudden ends ---


def test_threads_may_put_get_flush_and_import_at_once(store, tmp_path):
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(60):
                data = b"%d" % (i // 2) * 100
                cid = store.put(data)
                assert store.get(cid) == data
                store.pin(cid)
                if i % 20 == number:
                    path = write(tmp_path / f"{number}-{i}", {"big": BIG, "own": b"%d" % number})
                    assert store.read(store.list(store.add_path(path, move=True))[0][1]) == BIG
                store.flush()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [store.pins(str(Cid.of(b"%d" % i * 100))) for i in range(30)] == [8] * 30
    assert not list(store.damage())


_SHARER = """
    import sys
    from pathlib import Path
    from bacalhau_node.content.blocks import BlockStore

    work = Path(sys.argv[1])
    store = BlockStore(work / "store")
    for i in range(50):
        store.pin(store.put(b"%d" % i * 100))
        store.flush()
    store.pin(store.add_path(work / "in"))
    store.pin(store.add_path(Path(sys.argv[2]), move=True))
    store.close()
"""


def run(script: str, *arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(bacalhau_node.__file__).parents[1])},
    )


def test_processes_share_a_store_from_the_first_moment(tmp_path, reopen):
    write(tmp_path / "in", {"big": BIG})
    for number in range(4):
        write(tmp_path / f"in-{number}", {"big": BIG, "own": b"%d" % number * 5000})
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(run(_SHARER, tmp_path, tmp_path / f"in-{number}")) for number in range(4)]
    assert [process.returncode for process in processes] == [0] * 4
    store = reopen()
    assert [store.pins(str(Cid.of(b"%d" % i * 100))) for i in range(50)] == [4] * 50
    assert store.pins(store.add_path(tmp_path / "in")) == 4
    assert not list(store.damage())


_VICTIM = """
    import os, sys
    from pathlib import Path
    from bacalhau_node.content.blocks import BlockStore

    work = Path(sys.argv[1])
    store = BlockStore(work / "store")
    for round in range(1_000_000):
        source = work / f"in-{os.getpid()}-{round}"
        source.mkdir()
        for name in range(20):
            (source / f"small-{name}").write_bytes(os.urandom(100))
        for name in range(5):
            (source / f"big-{name}").write_bytes(os.urandom(300_000))
        print(flush=True)
        cid = store.add_path(source, move=True)
        print("imported", cid, flush=True)
        block = store.put(os.urandom(50_000))
        store.pin(block)
        store.flush()
        print("flushed", block, flush=True)
"""


def test_a_process_killed_at_any_moment_leaves_a_true_store(tmp_path, reopen):
    """Killed again and again, a little later each time, in the middle of imports and flushes."""
    promised: dict[str, str] = {}
    for lines in range(1, 11):
        with run(_VICTIM, tmp_path) as victim:
            for _ in range(lines):
                _note_promise(victim.stdout.readline(), promised)
            victim.send_signal(signal.SIGKILL)
            for line in victim.stdout:
                _note_promise(line, promised)
        store = reopen()
        assert list(store.damage()) == []
    for cid, what in promised.items():
        if what == "imported":
            assert len(store.list(cid)) == 25
        else:
            assert (len(store.get(cid)), store.pins(cid)) == (50_000, 1)
    assert {"imported", "flushed"} == set(promised.values())
    _nothing_lost_and_complete(store, tmp_path)


def _note_promise(line: str, promised: dict[str, str]) -> None:
    if line.strip():
        what, cid = line.split()
        promised[cid] = what


def _nothing_lost_and_complete(store: BlockStore, work: Path) -> None:
    """Sources of unfinished moves are still there or, their import done, partly removed; importing them again works."""
    for source in work.glob("in-*"):
        before = {path: data for path, data in tree(source).items() if data is not None}
        cid = store.add_path(source, move=True)
        assert {path: store.read(file) for path, file, _ in store.list(cid)} == before
    assert not list(work.glob("in-*"))
    assert not list(store.damage())
