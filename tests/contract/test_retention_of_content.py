"""What a content store keeps and what it lets go: pins, holds, use, collections, files that stay with their owner."""

import contextlib
import fcntl
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bacalhau_node
from bacalhau_node import dagjson
from bacalhau_node.cid import DAG_PB, Cid
from bacalhau_node.content import car
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.collect import Collection
from bacalhau_node.content.dagpb import PbLink, encode_node, folder_node
from bacalhau_node.content.unixfs import PROFILES
from bacalhau_node.errors import BugError, ContentError

BIG = os.urandom(600_000)
HOURS = 3 * 3600
PATIENCE = 20.0


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def reopen(folder) -> Iterator[Callable[..., BlockStore]]:
    """Open the store of the test: once more each time, as another process would."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(contextlib.closing(BlockStore(folder, **options)))


@pytest.fixture
def store(reopen) -> BlockStore:
    return reopen()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def age(store: BlockStore, *, seconds: int = HOURS, only: str | None = None) -> None:
    """As if everything here, or one block, had been used last so many seconds ago."""
    store.flush()
    if not (store.folder / "index.sqlite").exists():
        return  # nothing was ever stored
    where, values = ("", ()) if only is None else (" WHERE digest = ?", (Cid.parse(only).digest,))
    with contextlib.closing(sqlite3.connect(store.folder / "index.sqlite", timeout=20)) as database, database:
        database.execute(f"UPDATE block SET used = used - ?{where}", (seconds, *values))


def on_disk(store: BlockStore) -> int:
    """How many files of its own the store has."""
    return sum(1 for name in ("blocks", "files") for _ in store.folder.glob(f"{name}/*/*"))


def whole(store: BlockStore, root: str) -> int:
    """How many blocks there are below a root; raises `ContentError` if one is missing."""
    waiting, seen = [Cid.parse(root)], set()
    while waiting:
        cid = waiting.pop()
        waiting += [child for child in car.links(cid, store.block(cid)) if child not in seen]
        seen.add(cid)
    return len(seen)


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(bacalhau_node.__file__).parents[1])},
    )


# --- files that stay with their owner ---


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "in", {"a.bin": BIG, "sub/b.bin": BIG[::-1], "sub/small": b"small"})


@pytest.mark.parametrize("profile", PROFILES)
def test_a_linked_folder_has_the_cid_of_a_copied_one_and_is_read_where_it_lies(reopen, tmp_path, data, profile):
    store = reopen(profile=profile)
    cid = store.add_path(data, link=True)
    assert on_disk(store) <= 1  # a file's root, where it is too large for the index
    listed = {path: file for path, file, _ in store.list(cid)}
    assert store.file(listed["a.bin"]) == data / "a.bin"
    assert store.file(listed["sub/small"]) is None
    assert {path: store.read(file) for path, file in listed.items()} == {
        "a.bin": BIG,
        "sub/b.bin": BIG[::-1],
        "sub/small": b"small",
    }
    store.export(cid, tmp_path / "out")
    assert (tmp_path / "out/sub/b.bin").read_bytes() == BIG[::-1]
    assert not list(store.damage())
    with contextlib.closing(BlockStore(tmp_path / "other", profile=profile)) as other:
        assert other.add_path(data) == cid


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replace(path: Path) -> None:
    path.with_suffix(".new").write_bytes(BIG)
    times = path.stat()
    os.utime(path.with_suffix(".new"), ns=(times.st_atime_ns, times.st_mtime_ns))
    path.with_suffix(".new").replace(path)


def flip(path: Path) -> None:
    """Nothing but the bytes tells of it."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(500_000)
        file.write(bytes((BIG[500_000] ^ 1,)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [append, replace, flip, Path.unlink])
def test_a_linked_file_that_changed_is_an_error_and_then_missing_with_all_that_contains_it(store, data, change):
    cid = store.add_path(data, link=True)
    listed = {path: file for path, file, _ in store.list(cid)}
    parent = store.put(dagjson.encode({"folder": dagjson.Link(cid)}), codec="dag-json")
    store.flush()
    change(data / "a.bin")
    with pytest.raises(ContentError, match=rf"{data}/a\.bin changed since it was added .*add it again"):
        store.read(listed["a.bin"])
    assert not any(map(store.has, (listed["a.bin"], cid, parent)))
    assert store.file(listed["a.bin"]) is None
    with pytest.raises(ContentError, match="is not in the content store"):
        store.read(listed["a.bin"])
    assert store.read(listed["sub/b.bin"]) == BIG[::-1]
    assert not list(store.damage())
    (data / "a.bin").write_bytes(BIG)
    assert store.add_path(data, link=True) == cid
    assert store.read(listed["a.bin"]) == BIG


@pytest.mark.parametrize("change", [append, replace, Path.unlink])
def test_a_linked_file_with_another_stamp_is_not_handed_out(store, data, change):
    cid = store.add_path(data / "a.bin", link=True)
    change(data / "a.bin")
    with pytest.raises(ContentError, match="changed since it was added"):
        store.file(cid)
    assert not store.has(cid)


def test_a_linked_file_is_hashed_again_in_another_run_of_the_machine(data, reopen, monkeypatch):
    monkeypatch.setattr("bacalhau_node.content.files._boot", lambda: "before")
    cid = reopen().add_path(data / "a.bin", link=True)
    monkeypatch.undo()
    assert reopen().file(cid) == data / "a.bin"
    flip(data / "a.bin")
    assert reopen().file(cid) == data / "a.bin"  # its stamp was noted in this run
    monkeypatch.setattr("bacalhau_node.content.files._boot", lambda: "after")
    with pytest.raises(ContentError, match="changed since it was added"):
        reopen().file(cid)


def test_bytes_that_the_store_has_itself_are_not_read_from_a_linked_file(store, data, tmp_path):
    cid = store.add_path(data / "a.bin")
    assert store.add_path(data / "a.bin", link=True) == cid
    (data / "a.bin").unlink()
    assert store.read(cid) == BIG
    linked = store.add_path(data / "sub/b.bin", link=True)
    assert store.add_bytes(BIG[::-1]) == linked
    (data / "sub/b.bin").unlink()
    assert store.read(linked) == store.file(linked).read_bytes() == BIG[::-1]
    assert not list(store.damage())


def test_a_file_with_two_linked_copies_is_read_from_the_later_one(store, data):
    (data / "copy").write_bytes(BIG)
    cid = store.add_path(data / "a.bin", link=True)
    assert store.add_path(data / "copy", link=True) == cid
    (data / "a.bin").unlink()
    assert store.read(cid) == BIG


def test_a_file_cannot_be_moved_and_stay(store, data):
    with pytest.raises(BugError, match="to stay where it is"):
        store.add_path(data, move=True, link=True)
    assert (data / "a.bin").exists()


# --- what stays and what goes ---


def test_what_nobody_pinned_goes_after_a_while_and_what_is_pinned_stays_whole(store, tmp_path):
    for name in ("kept", "gone"):
        write(tmp_path / name, {"big": os.urandom(600_000), "sub/small": os.urandom(100), "equal": BIG})
    kept, gone = (store.add_path(tmp_path / name) for name in ("kept", "gone"))
    lone = store.put(os.urandom(50_000))
    blocks = whole(store, kept)
    store.pin(kept)
    age(store)
    assert store.collect() > 600_000
    assert (store.has(kept), store.has(gone), store.has(lone)) == (True, False, False)
    assert whole(store, kept) == blocks
    assert on_disk(store) == 2
    assert not list(store.damage())
    store.unpin(kept)
    age(store)
    store.collect()
    assert (store.has(kept), on_disk(store)) == (False, 0)
    assert store.add_path(tmp_path / "gone") == gone
    store.export(gone, tmp_path / "out")


def test_what_was_put_imported_read_or_asked_for_lately_stays(store):
    cids = [store.add_bytes(os.urandom(100_000 + number)) for number in range(6)]
    age(store)
    cids.append(store.put(b"new"))
    store.read(cids[0])
    store.file(cids[1])
    assert store.has(cids[2])
    store.list(cids[3])
    store.collect()
    assert [cid in cids[:4] or cid == cids[6] for cid in cids] == list(map(store.has, cids))


def test_a_pin_that_was_not_flushed_counts_too(store):
    cid = store.put(b"x")
    age(store)
    store.pin(cid)
    age(store, only=cid)
    store.collect()
    assert store.has(cid)


def test_a_part_that_a_kept_and_a_collected_file_share_stays(store):
    """The second file has the first one's bytes in front: the shared leaf is now read from it."""
    part = os.urandom(262_144)
    first, second = store.add_bytes(part), store.add_bytes(part + BIG)
    store.pin(first)
    age(store)
    store.collect()
    assert (store.has(first), store.has(second)) == (True, False)
    assert store.read(first) == part
    assert store.file(second) is None
    assert not list(store.damage())
    assert store.read(store.add_bytes(part + BIG)) == part + BIG


def test_least_recently_used_goes_first_until_what_is_left_fits(store):
    cids = [store.add_bytes(os.urandom(100_000)) for _ in range(6)]
    for hours, cid in enumerate(cids):
        age(store, seconds=HOURS + 3600 * hours, only=cid)
    store.pin(cids[5])
    store.collect(keep=350_000)
    assert list(map(store.has, cids)) == [True, True, False, False, False, True]
    assert on_disk(store) == 3


def test_a_part_that_is_used_more_than_its_folder_outlives_it(store, tmp_path):
    cid = store.add_path(write(tmp_path / "in", {"a": BIG, "b": BIG[::-1]}))
    a, b = (file for _, file, _ in store.list(cid))
    age(store)
    store.read(a)
    store.collect()
    assert (store.has(cid), store.has(a), store.has(b)) == (False, True, False)
    assert store.read(a) == BIG


def test_a_linked_file_is_forgotten_and_never_removed(store, data):
    cid = store.add_path(data, link=True)
    age(store)
    store.collect()
    assert not store.has(cid)
    assert (data / "a.bin").read_bytes() == BIG
    assert not list(store.damage())


def test_links_are_followed_from_every_sort_of_block_and_damage_stops_nobody(store):
    leaf = Cid.parse(store.put(b"leaf"))
    node = encode_node([PbLink(leaf.binary, b"name", 1)], folder_node())
    pb = Cid.of(node, codec=DAG_PB)
    store.keep(pb, node)
    root = store.put(dagjson.encode({"deep": [{"link": dagjson.Link(str(pb))}]}), codec="dag-json")
    store.put(b"\xff" * 5000, codec="dag-json")
    store.pin(root)
    age(store)
    store.collect()
    assert whole(store, root) == 3


def test_pins_belong_to_owners_who_may_take_them_all_back(store, reopen):
    a, b = store.put(b"a"), store.put(b"b")
    for cid, owner in ((a, "x"), (a, "x"), (b, "x"), (a, "y"), (a, "")):
        store.pin(cid, owner=owner)
    store.flush()
    assert (store.pins(a), store.pins(b), store.owners()) == (4, 1, ["", "x", "y"])
    store.release("x")
    assert (store.pins(a), store.pins(b)) == (2, 0)
    with pytest.raises(BugError, match="unpinned more often"):
        store.unpin(b, owner="x")
    store.pin(b, owner="x")
    store.flush()
    other = reopen()
    assert (other.pins(a), other.pins(b), other.owners()) == (2, 1, ["", "x", "y"])
    other.unpin(a, owner="y")
    other.release("x")
    other.release("nobody")
    other.flush()
    assert (store.pins(a), store.pins(b), store.owners()) == (1, 0, [""])


_HOLDER = """
    import sys
    from pathlib import Path
    from bacalhau_node.content.blocks import BlockStore

    store = BlockStore(Path(sys.argv[1]))
    with store.hold():
        print(store.add_bytes(sys.argv[2].encode() * 100_000), flush=True)
        sys.stdin.read()
    print("over", flush=True)
    sys.stdin.read()
"""


def _time_passes(store: BlockStore) -> None:
    """Everything in the store, holds included, happened hours earlier."""
    age(store)
    for lock in store.folder.glob("tmp/*/lock"):
        since = int(lock.read_bytes())
        if since:
            lock.write_bytes(b"%016d" % (since - HOURS))


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_a_hold_of_any_process_keeps_what_was_used_since_it_began(store, folder, end):
    with run(_HOLDER, folder, "x") as holder:
        old = store.put(b"old")
        age(store)
        cid = holder.stdout.readline().strip()
        _time_passes(store)
        store.collect()
        assert (store.has(cid), store.has(old)) == (True, False)
        age(store, only=cid)
        if end == "killed":
            holder.kill()
            holder.wait()
        else:
            holder.stdin.close()
            holder.wait()
        store.collect()
        assert not store.has(cid)


def test_what_the_dead_left_half_made_is_removed_and_what_the_living_make_is_not(store, folder):
    with run(_HOLDER, folder, "x") as holder:
        holder.stdout.readline()
        (theirs,) = {path.parent for path in folder.glob("tmp/*/lock")} - {store._files.session.folder}
        mine = Path(store._files.session.temporary())
        for path in (mine, theirs / "half"):
            path.write_bytes(b"half")
        BlockStore(folder).close()
        assert mine.exists()
        assert (theirs / "half").exists()
        holder.kill()
        holder.wait()
    BlockStore(folder).close()
    assert mine.exists()
    assert not theirs.exists()


def test_a_store_over_its_limit_collects_by_itself(reopen):
    store = reopen(limit=2_000_000)
    cids = [store.add_bytes(os.urandom(500_000))]
    store.pin(cids[0])
    store.flush()
    for _ in range(7):
        cids.append(store.add_bytes(os.urandom(500_000)))
        if (collecting := store._room._thread) is not None:
            collecting.join()  # what was put since it began would look, once aged, as if it had been there before
        age(store)
    cids.append(store.add_bytes(os.urandom(500_000)))
    deadline = time.monotonic() + PATIENCE
    while on_disk(store) > 3:
        assert time.monotonic() < deadline, f"{on_disk(store)} files are left"
        store.put(os.urandom(10))
        store.flush()
    assert list(map(store.has, cids)) == [True, *[False] * 6, True, True]


def test_files_without_a_row_go_and_foreign_ones_stay(store):
    store.pin(store.add_bytes(BIG))
    store.put(BIG)
    store.flush()
    orphan = store.folder / "blocks/ab" / ("ab" * 32)
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"left by a crash")
    foreign = store.folder / "blocks/ab/README"
    foreign.write_bytes(b"mine")
    store.collect()
    assert (orphan.exists(), foreign.exists(), on_disk(store)) == (False, True, 3)


# --- whatever happens, in whatever order ---

contents = st.integers(0, 5)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(contents, min_size=1, max_size=4)),
        st.tuples(st.just("node"), st.lists(contents, min_size=1, max_size=3)),
        st.tuples(st.sampled_from(["pin", "unpin", "use", "age"]), contents),
        st.tuples(st.just("collect"), st.sampled_from([0, 300_000, 10**9])),
    ),
    max_size=25,
)


PAYLOADS = [bytes((number,)) * size for number, size in enumerate((10, 5000, 262_145, 300_000, 100_000, 4096))]


class Story:
    """Does to a store what a list of steps says, and remembers what was put there."""

    def __init__(self, store: BlockStore, folder: Path) -> None:
        self.store, self.folder, self.roots = store, folder, list[str]()

    def add(self, contents: list[int]) -> None:
        files = {f"{at}": PAYLOADS[content] for at, content in enumerate(contents)}
        self.roots.append(self.store.add_path(write(self.folder / f"{len(self.roots)}", files), move=True))

    def node(self, wanted: list[int]) -> None:
        links = [dagjson.Link(root) for root in self.roots[: len(wanted)] if self.store.has(root)]
        node = dagjson.encode({"links": links, "number": len(self.roots)})
        self.roots.append(self.store.put(node, codec="dag-json"))

    def pin(self, number: int) -> None:
        for root in self.roots[number : number + 1]:
            if self.store.has(root):
                self.store.pin(root)

    def unpin(self, number: int) -> None:
        for root in self.roots[number : number + 1]:
            if self.store.pins(root):
                self.store.unpin(root)

    def use(self, number: int) -> None:
        for root in self.roots[number : number + 1]:
            self.store.has(root)

    def age(self, number: int) -> None:
        age(self.store, seconds=1000 * number)

    def collect(self, keep: int) -> None:
        pinned = [root for root in self.roots if self.store.pins(root)]
        self.store.collect(keep=keep)
        assert all(map(self.store.has, pinned))


@settings(max_examples=60)
@given(steps)
def test_what_is_here_is_whole_and_what_is_pinned_is_here(steps):
    with tempfile.TemporaryDirectory() as name, contextlib.closing(BlockStore(Path(name, "store"))) as store:
        story = Story(store, Path(name))
        for what, value in steps:
            getattr(story, what)(value)
        for root in filter(store.has, story.roots):
            whole(store, root)
        assert not list(store.damage())


@pytest.mark.parametrize("deed", ["ask", "import"])
def test_what_somebody_asks_for_or_imports_during_a_collection_is_there_whole_or_not_at_all(
    store, folder, tmp_path, deed
):
    other, files = BlockStore(folder), {"big": BIG, "sub/small": b"small", "sub/middle": BIG[:5000]}
    cid = store.add_path(write(tmp_path / "in", files))
    outcomes = set()
    for moment in range(1, 30):
        store.add_path(tmp_path / "in")
        age(store)
        calls, there = 0, False

        def now(moment: int = moment) -> bool:
            nonlocal calls, there
            calls += 1
            if calls == moment:
                if deed == "import":
                    other.add_path(tmp_path / "in")
                there = other.has(cid)
            return False

        Collection(store._index, store._files, stop=now).run(keep=0)
        if there:
            assert whole(other, cid) == 8
            store.export(cid, tmp_path / f"out-{moment}")
        assert not list(store.damage())
        outcomes.add((calls >= moment, there))
    assert outcomes == {(True, True), (True, deed == "import"), (False, False)}
    other.close()


_WRITER = """
    import random, sys, time
    from pathlib import Path
    from bacalhau_node import dagjson
    from bacalhau_node.cid import Cid
    from bacalhau_node.content import car, index
    from bacalhau_node.content.blocks import BlockStore

    def whole(cid):
        return 1 + sum(map(whole, car.links(cid, store.block(cid))))

    index.FRESH = 0
    chance = random.Random(sys.argv[2])
    store, until = BlockStore(Path(sys.argv[1])), time.monotonic() + 4
    rounds = found = 0
    while time.monotonic() < until:
        rounds += 1
        data = bytes((chance.randrange(40),)) * chance.choice((10, 5000, 300_000, 600_000))
        with store.hold():
            cid = store.add_bytes(data)
            root = store.put(dagjson.encode({"data": dagjson.Link(cid)}), codec="dag-json")
            if chance.random() < 0.5:
                store.flush()
            old = store.put(dagjson.encode({"old": chance.randrange(3), "root": dagjson.Link(root)}), codec="dag-json")
            store.flush()
            time.sleep(chance.random() / 100)
            assert store.read(cid) == data
            assert whole(Cid.parse(old)) >= 3
        with store.hold():
            if store.has(root):
                found += 1
                assert whole(Cid.parse(root)) >= 2
    print(rounds, found)
"""
_COLLECTOR = """
    import sys
    from pathlib import Path
    from bacalhau_node.content import collect
    from bacalhau_node.content.blocks import BlockStore

    collect.GRACE, collect.FRESH = -10, 0  # everything but what is held may go at once
    store = BlockStore(Path(sys.argv[1]))
    print(flush=True)
    while True:
        print(store.collect(), flush=True)
"""


def test_nobody_loses_what_they_hold_to_collections_of_another_process(folder, reopen):
    with contextlib.ExitStack() as stack:
        collector = stack.enter_context(run(_COLLECTOR, folder))
        stack.callback(collector.kill)
        writers = [stack.enter_context(run(_WRITER, folder, seed)) for seed in range(3)]
        for writer in writers:
            rounds, _ = writer.communicate()[0].split()
            assert writer.returncode == 0
            assert int(rounds) > 5
        collector.kill()
        assert sum(int(freed) for freed in collector.stdout.read().split()) > 1_000_000
    assert not list(reopen().damage())


def test_a_collection_that_is_killed_at_any_moment_leaves_a_true_store(folder, reopen, tmp_path):
    chance = random.Random(7)
    store = reopen()
    kept = store.add_path(write(tmp_path / "kept", {f"{i}": os.urandom(5000 + i) for i in range(50)}))
    store.pin(kept)
    for number in range(8):
        for part in range(3):
            files = {f"{i}": os.urandom(6000) for i in range(100)} | {"big": os.urandom(300_000)}
            store.add_path(write(tmp_path / f"{number}-{part}", files), move=True)
        age(store)
        with run(_COLLECTOR, folder) as collector:
            collector.stdout.readline()
            time.sleep(chance.random() / 20)  # the moment of the kill: no condition to wait for
            collector.send_signal(signal.SIGKILL)
        assert list(store.damage()) == []
        assert whole(store, kept) == 51
    age(store)
    store.collect()
    assert on_disk(store) == 50


def test_only_one_process_collects_at_a_time(store, reopen):
    store.add_bytes(BIG)
    age(store)
    with collecting(store):
        assert reopen().collect() == 0
    assert reopen().collect() >= len(BIG)


@contextlib.contextmanager
def collecting(store: BlockStore) -> Iterator[None]:
    with (store.folder / "collecting").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- a disk that is full ---

_FULL = """
    import os, sys
    from pathlib import Path
    from bacalhau_node.content.blocks import BlockStore
    from bacalhau_node.errors import ContentError

    disk, source = Path(sys.argv[1]), Path(sys.argv[2])
    store = BlockStore(disk / "store", limit=1 << 40)
    kept = store.add_bytes(b"kept" * 100_000)
    store.pin(kept)
    store.flush()
    held = []
    def full(act):
        for number in range(1000):
            try:
                act(number)
            except ContentError as error:
                assert any(word in str(error) for word in ("No space left", "disk is full")), error
                return
        raise AssertionError("the disk is never full")
    full(lambda number: held.append(store.add_path(source / str(number))))
    assert not [path for path in disk.glob("store/tmp/*/*") if path.name != "lock"]
    full(lambda number: (held.append(store.put(os.urandom(5000))), store.flush()))
    assert store.read(kept) == b"kept" * 100_000
    assert list(store.damage()) == []
    for cid in held[:-1]:
        store.get(cid)
    assert store.collect() == 0
    (disk / "ballast").unlink()
    store.flush()
    assert store.get(held[-1])
    assert store.add_path(source / "0") == held[0]
    print("good")
"""


def test_a_full_disk_is_an_error_in_the_middle_of_an_import_and_costs_nothing_that_was_there(tmp_path):
    for number in range(100):
        write(tmp_path / "in", {f"{number}/{i}": os.urandom(50_000) for i in range(4)})
    (tmp_path / "disk").mkdir()
    script = textwrap.dedent(_FULL)
    mounted = """
        mount -t tmpfs -o size=8m none "$1" && head -c 2000000 /dev/zero > "$1/ballast" && exec "$3" -c "$4" "$1" "$2"
    """
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, "sh"]
    ran = subprocess.run(
        [*command, tmp_path / "disk", tmp_path / "in", sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(Path(bacalhau_node.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.stdout, ran.returncode) == ("good\n", 0), ran.stderr


# --- stores of older formats ---

_FORMAT_1 = """
    CREATE TABLE file (
        id INTEGER PRIMARY KEY, root BLOB NOT NULL UNIQUE, size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, boot TEXT NOT NULL);
    CREATE TABLE block (
        digest BLOB PRIMARY KEY, size INTEGER NOT NULL, data BLOB,
        file INTEGER REFERENCES file (id), at INTEGER, length INTEGER);
    CREATE TABLE pin (cid BLOB PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO file SELECT id, root, size, mtime_ns, inode, boot FROM new.file;
    INSERT INTO block SELECT digest, size, data, file, at, length FROM new.block;
    INSERT INTO pin SELECT cid, sum(count) FROM new.pin GROUP BY cid;
    PRAGMA user_version = 1;
"""


def _as_format_1(folder: Path) -> None:
    """What the program of format 1 would have written for the same content."""
    with contextlib.closing(sqlite3.connect(folder / "old.sqlite", isolation_level=None)) as old:
        old.execute("ATTACH ? AS new", (str(folder / "index.sqlite"),))
        old.executescript(_FORMAT_1)
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    (folder / "old.sqlite").rename(folder / "index.sqlite")


def test_a_store_of_format_1_goes_on_with_all_that_it_had(folder, tmp_path, reopen):
    files = {f"{i:04}": b"%d" % i for i in range(300)} | {"big": BIG, "middle": BIG[:5000]}
    with contextlib.closing(BlockStore(folder)) as store:
        cid = store.add_path(write(tmp_path / "in", files))
        record = store.put(dagjson.encode({"outputs": dagjson.Link(cid), "text": "x" * 5000}), codec="dag-json")
        loose = store.add_bytes(BIG[::-1])
        small = store.put(b"small")
        for _ in range(2):
            store.pin(record)
    _as_format_1(folder)
    store, other = reopen(), reopen()
    assert (store.pins(record), store.owners()) == (2, [""])
    assert not list(store.damage())
    store.collect()
    assert all(map(other.has, (cid, record, loose, small)))
    age(store)
    store.collect()
    assert list(map(other.has, (cid, record, loose, small))) == [True, True, False, False]
    assert whole(other, record) == len(files) + 5
    assert other.read({path: file for path, file, _ in other.list(cid)}["big"]) == BIG
    store.unpin(record)
    assert store.pins(record) == 1


def test_what_a_program_of_format_1_writes_meanwhile_is_found_and_followed(store, folder):
    """One that was started before the store was upgraded."""
    leaf = store.put(b"leaf")
    node = dagjson.encode({"link": dagjson.Link(leaf)})
    store.flush()
    root = Cid.of(node, codec=0x0129)
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as old, old:
        old.execute("INSERT INTO block (digest, size, data) VALUES (?, ?, ?)", (root.digest, len(node), node))
    age(store)
    store.collect()
    assert whole(store, str(root)) == 2
    age(store)
    store.collect()
    assert not store.has(str(root))
