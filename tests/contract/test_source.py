"""What every input source promises, and what each says when it can't keep it."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from bacalhau_node import sharding
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.elsewhere import Elsewhere
from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.fetched import Fetched
from bacalhau_node.ports import Access, Source
from bacalhau_node.sharding import ContentRef, Entry, LocalStamp, Unusable
from bacalhau_node.sources.ipfs import ContentSource
from bacalhau_node.sources.local import LocalSource
from bacalhau_node.sources.url import UrlSource
from bacalhau_node.spec import InputSource
from tests import hostile_http

NOBODY = 65534


@dataclass
class Case:
    """One source, and how to name a folder or file of this machine in its language."""

    source: Source
    name: Callable[[Path], str]
    foreign: str
    """A text of `--input` that it must not claim."""
    run: Callable[[Coroutine[object, object, None]], None] = asyncio.run
    """Runs its coroutines to their end."""


@contextlib.contextmanager
def _url_case(root: Path, store: BlockStore) -> Iterator[Case]:
    """A web server that shows the folder `root`, as good ones do."""
    with contextlib.closing(Fetched(root / "store")) as fetched, hostile_http.in_thread() as (server, loop):
        server.default = hostile_http.folder(root)

        def name(path: Path) -> str:
            return f"{server.url}/{quote(str(path.relative_to(root)))}{'/' * path.is_dir()}"

        def run(work: Coroutine[object, object, None]) -> None:
            asyncio.run_coroutine_threadsafe(work, loop).result(60)

        async def made() -> UrlSource:
            return UrlSource(store, fetched=fetched)

        source = asyncio.run_coroutine_threadsafe(made(), loop).result(60)
        yield Case(source, name, "/data", run)


@pytest.fixture(params=["local", "content", "url"])
def case(request, tmp_path) -> Iterator[Case]:
    if request.param == "local":
        yield Case(LocalSource(), str, "ipfs://bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi")
        return
    with contextlib.closing(BlockStore(tmp_path / "store")) as store:
        if request.param == "url":
            with _url_case(tmp_path, store) as case:
                yield case
            return
        yield Case(ContentSource(store, Elsewhere(store)), lambda path: f"ipfs://{store.add_path(path)}", "/data")


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def listed(case: Case, path: Path, index: int = 0) -> list[Entry]:
    return case.source.list(InputSource(source=case.name(path)), index=index)


def fetch(case: Case, entries: list[Entry]) -> dict[str, str]:
    """Have entries brought here; the CIDs that were told of them."""
    told: dict[str, str] = {}

    def hear(name: str, done: int, total: int | None, cid: str) -> None:
        assert total is None or done <= total
        told[name] = cid

    case.run(case.source.fetch(entries, access=Access(), told=hear))
    return told


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# --- every source ---


def test_it_claims_its_own_names_only(case, data):
    assert case.source.claims(case.name(data))
    assert not case.source.claims(case.foreign)
    assert not case.source.claims("data/relative")
    assert not case.source.claims("s3://bucket/data")


def test_every_file_is_listed_with_its_size_and_sorted_by_the_bytes_of_its_path(case, data):
    write(data, {"b.csv": b"22", "a/z": b"1", "a/.hidden": b"", "a.b": b"333", "é": b"4444", "Z": b"5"})
    entries = listed(case, data, index=3)
    assert [(entry.path, entry.size, entry.source) for entry in entries] == [
        ("Z", 1, 3),
        ("a.b", 3, 3),
        ("a/.hidden", 0, 3),
        ("a/z", 1, 3),
        ("b.csv", 2, 3),
        ("é", 4, 3),
    ]


def test_a_single_file_is_one_entry_with_its_own_name(case, data):
    write(data, {"one.csv": b"abc"})
    (entry,) = listed(case, data / "one.csv")
    assert entry.size == 3
    fetch(case, [entry])
    assert case.source.open(entry.reference, scratch=data).read_bytes() == b"abc"


def test_what_is_opened_holds_the_bytes_that_were_listed(case, data, tmp_path):
    files = {"a b.csv": b"1", "x/y z/'q\".csv": b"22", "new\nline": b"333", "x/empty": b"", "日本": os.urandom(300_000)}
    write(data, files)
    entries = listed(case, data)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    told = fetch(case, entries)
    opened = {entry.path: case.source.open(entry.reference, scratch=scratch).read_bytes() for entry in entries}
    assert opened == files
    assert set(told) <= set(files)
    assert "" not in told.values()
    assert fetch(case, entries) == told
    for entry in entries:
        case.source.check(entry.reference)


def test_the_check_ignores_what_another_source_listed(case):
    others = (
        LocalStamp("/nowhere", 1, 1, 1, 1),
        ContentRef("bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"),
    )
    foreign = others[1] if isinstance(case.source, LocalSource) else others[0]
    case.source.check(foreign)


# --- the local source ---

local = LocalSource()


def names(folder: Path) -> list[str]:
    return [entry.path for entry in local.list(InputSource(source=str(folder)), index=0)]


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything, so be somebody else for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_data(data, tmp_path_factory) -> Path:
    """A folder that others may get to."""
    for folder in (data, *data.parents):
        if folder.owner() == Path.home().owner() and folder.is_relative_to(tmp_path_factory.getbasetemp().parent):
            folder.chmod(0o755)
    return data


def test_names_that_are_not_utf8_survive(data):
    raw = b"gr\xfcn\n'.csv"
    (Path(os.fsdecode(os.fsencode(data) + b"/" + raw))).write_bytes(b"x")
    (entry,) = local.list(InputSource(source=str(data)), index=0)
    assert os.fsencode(entry.path) == raw
    assert local.open(entry.reference, scratch=data).read_bytes() == b"x"
    assert sharding.read_block(sharding.plan_block([entry])) == (entry,)


def test_an_empty_folder_is_an_entry_that_ends_in_a_slash(data):
    (data / "a/b").mkdir(parents=True)
    (entry,) = local.list(InputSource(source=str(data)), index=0)
    assert (entry.path, entry.size) == ("a/b/", 0)
    local.check(entry.reference)
    write(data, {"a/b/new": b""})
    with pytest.raises(ContentError, match="changed"):
        local.check(entry.reference)


def test_an_input_without_anything_is_an_empty_list(data):
    assert names(data) == []


def test_links_inside_the_input_are_followed(data):
    write(data, {"real/x.csv": b"1"})
    (data / "folder").symlink_to("real")
    (data / "file.csv").symlink_to(data / "real/x.csv")
    assert names(data) == ["file.csv", "folder/x.csv", "real/x.csv"]


def test_an_input_that_is_itself_a_link_is_followed(data, tmp_path):
    write(data, {"x": b"1", "in/y": b"2"})
    (data / "to_y").symlink_to("in/y")
    (tmp_path / "link").symlink_to(data)
    assert names(tmp_path / "link") == ["in/y", "to_y", "x"]


@pytest.mark.parametrize("target", ["elsewhere", "elsewhere/file", "data2"])
def test_a_link_that_leads_out_is_an_error_naming_it_and_its_target(data, tmp_path, target):
    write(tmp_path, {"elsewhere/file": b"", "data2/file": b""})
    (data / "sub").mkdir()
    (data / "sub/out").symlink_to(tmp_path / target)
    with pytest.raises(ContentError) as caught:
        names(data)
    assert str(data / "sub/out") in str(caught.value)
    assert f"leads out of {data}, to {tmp_path / target}" in str(caught.value)


@pytest.mark.parametrize(
    ("link", "target"), [("a/b/up", "../.."), ("a/b/up", "../b"), ("a/self", "self"), ("root", ".")]
)
def test_a_link_that_leads_in_a_circle_is_an_error_naming_it(data, link, target):
    write(data, {"a/b/file": b""})
    (data / link).symlink_to(target)
    with pytest.raises(ContentError, match=str(data / link)):
        names(data)


def test_two_links_that_lead_to_each_other_are_an_error(data):
    write(data, {"a/x": b"", "b/x": b""})
    (data / "a/to_b").symlink_to("../b")
    (data / "b/to_a").symlink_to("../a")
    with pytest.raises(ContentError, match="leads back to"):
        names(data)


def test_a_link_to_nothing_is_an_error_naming_it(data):
    (data / "broken").symlink_to("gone/file")
    with pytest.raises(ContentError, match=r"broken is a link to gone/file, which can't be followed"):
        names(data)


def test_a_hidden_link_that_leads_out_waits_until_it_is_selected(data):
    write(data, {"x.csv": b"1", ".venv/bin/activate": b""})
    (data / ".venv/bin/python").symlink_to("/usr/bin/env")
    entries = local.list(InputSource(source=str(data)), index=0)
    assert [entry.path for entry in entries if isinstance(entry, Unusable)] == [".venv/bin/python"]
    assert [unit[0].path for unit in sharding.select(entries, [])] == ["x.csv"]
    with pytest.raises(ContentError, match="leads out"):
        sharding.select(entries, [".venv/"])


def test_a_missing_folder_is_an_error_with_names_like_it(data):
    (data / "flights").mkdir()
    with pytest.raises(ContentError, match=f"no such file or folder: {data}/flihgts/2013. Did you mean {data}/flights"):
        names(data / "flihgts/2013")
    with pytest.raises(ContentError, match=f"{data} is there, and holds nothing with a name like zzz"):
        names(data / "zzz")


def test_a_path_below_a_file_is_an_error_naming_the_file(data):
    write(data, {"file": b""})
    with pytest.raises(ContentError, match=f"{data}/file is not a folder"):
        names(data / "file/x")


def test_an_input_whose_own_name_is_not_utf8_is_the_authors_error(data):
    folder = os.fsdecode(os.fsencode(data) + b"/gr\xfcn")
    Path(folder).mkdir()
    with pytest.raises(SpecError, match=r"not UTF-8.*name a folder above it"):
        local.list(InputSource(source=folder), index=0)


def test_a_null_character_is_the_authors_error():
    with pytest.raises(SpecError, match="null character"):
        local.list(InputSource(source="/a\0b"), index=0)


def test_an_unreadable_file_is_an_error_naming_it(open_data):
    write(open_data, {"secret.csv": b"1", "x.csv": b"2"})
    (open_data / "secret.csv").chmod(0)
    with without_privileges(), pytest.raises(ContentError, match=r"/secret\.csv can't be read: permission denied"):
        names(open_data)


def test_an_unreadable_folder_is_an_error_naming_it(open_data):
    write(open_data, {"sub/x.csv": b"1"})
    (open_data / "sub").chmod(0)
    with without_privileges(), pytest.raises(ContentError, match=r"/sub can't be listed: Permission denied"):
        names(open_data)
    (open_data / "sub").chmod(0o755)


def test_a_folder_that_may_be_listed_but_not_entered_is_an_error(open_data):
    write(open_data, {"sub/x.csv": b"1"})
    (open_data / "sub").chmod(0o444)
    with without_privileges(), pytest.raises(ContentError, match=r"/sub/x.csv can't be used: Permission denied"):
        names(open_data)
    (open_data / "sub").chmod(0o755)


def test_a_pipe_is_refused_by_name_and_never_opened(data):
    os.mkfifo(data / "pipe")
    with pytest.raises(ContentError, match=r"/pipe is a named pipe, not a file"):
        names(data)
    with pytest.raises(ContentError, match=r"/pipe is a named pipe, not a file"):
        names(data / "pipe")


def test_a_socket_and_a_device_are_refused_by_name(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(ContentError, match="is a socket"):
            names(data)
    with pytest.raises(ContentError, match="/dev/null is a device"):
        names(Path("/dev/null"))


def test_a_file_that_changed_is_an_error_with_both_sizes(data):
    write(data, {"x.csv": b"1"})
    (entry,) = local.list(InputSource(source=str(data)), index=0)
    (data / "x.csv").write_bytes(b"1234")
    with pytest.raises(ContentError, match=r"x\.csv changed while the job ran \(was 1 bytes at .*, is 4 bytes at"):
        local.check(entry.reference)
    with pytest.raises(ContentError, match="changed after the job was planned"):
        local.open(entry.reference, scratch=data)


def test_a_file_that_was_replaced_is_an_error_even_with_equal_size_and_time(data):
    write(data, {"x.csv": b"1"})
    (entry,) = local.list(InputSource(source=str(data)), index=0)
    write(data, {"new": b"2"})
    os.utime(data / "new", ns=(entry.reference.mtime_ns, entry.reference.mtime_ns))
    (data / "new").rename(data / "x.csv")
    with pytest.raises(ContentError, match="another file of the same size and time is in its place"):
        local.check(entry.reference)


def test_a_file_that_is_gone_is_an_error_naming_it(data):
    write(data, {"x.csv": b"1"})
    (entry,) = local.list(InputSource(source=str(data)), index=0)
    (data / "x.csv").unlink()
    with pytest.raises(ContentError, match=r"x\.csv was removed while the job ran"):
        local.check(entry.reference)


def test_times_outside_of_the_calendar_are_shown_too(data):
    write(data, {"x": b"1"})
    with pytest.raises(ContentError, match="s after 1970"):
        local.check(LocalStamp(str(data / "x"), 1, 10**21, 1, 1))


def test_odd_names_are_escaped_in_messages(data):
    (data / "a\nb").symlink_to("gone")
    with pytest.raises(ContentError) as caught:
        names(data)
    assert "\n" not in str(caught.value)
    assert r"a\nb" in str(caught.value)


def test_opening_what_another_source_listed_is_a_bug(data):
    with pytest.raises(BugError):
        local.open(ContentRef("bafy"), scratch=data)


@pytest.fixture
def deep(data) -> Iterator[Path]:
    """A file below 1,500 folders; removed here, since Python's own removal would recurse."""
    here = os.open(data, os.O_RDONLY)
    for _ in range(1_500):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    yield data
    subprocess.run(["rm", "-r", str(data / "d")], check=True)


def test_a_path_deeper_than_the_recursion_limit_is_listed(deep):
    entries = local.list(InputSource(source=str(deep)), index=0)
    assert [entry.path for entry in entries] == ["d/" * 1_500 + "x"]
    assert sharding.select(entries, ["*/"]) == [tuple(entries)]


@pytest.fixture
def many(data) -> Iterator[Path]:
    """100,000 empty files, which don't stay for the next runs to look at."""
    for number in range(100):
        (data / f"{number:02}").mkdir()
        for inner in range(1_000):
            os.close(os.open(f"{data}/{number:02}/{inner}", os.O_CREAT | os.O_WRONLY))
    yield data
    shutil.rmtree(data)


def test_a_hundred_thousand_files_are_listed_in_seconds(many):
    start = time.process_time()
    entries = local.list(InputSource(source=str(many)), index=0)
    assert len(entries) == 100_000
    assert time.process_time() - start < 10
