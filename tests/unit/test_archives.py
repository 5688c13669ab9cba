"""Archives as folders: what good ones give, and that no bad one writes where it must not, or more than it may."""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.fetched import Fetched
from bacalhau_node.ports import Access
from bacalhau_node.sharding import ContentRef
from bacalhau_node.sources import unpacking
from bacalhau_node.sources.archive import Unpacker
from bacalhau_node.sources.limits import Limits
from bacalhau_node.sources.local import LocalSource
from bacalhau_node.sources.unpacking import unpack
from bacalhau_node.spec import InputSource

QUICK = Limits(reserve=0)
FILES = {"a.csv": b"1\n", "b/c.csv": b"22\n", "b/.hidden": b"", "é b.csv": os.urandom(100_000)}


def tar(*members: tarfile.TarInfo | tuple[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=form) as made:
        for member in members:
            info, body = (
                (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            )
            info.size = len(body)
            made.addfile(info, io.BytesIO(body))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(*members: tuple[str, bytes], mode: int = 0o644, packed: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packed) as made:
        for name, body in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, packed
            made.writestr(info, body)
    return out.getvalue()


def unpacked(root: Path, data: bytes, limits: Limits = QUICK) -> dict[str, bytes]:
    """The files of an archive, after looking that nothing lies beside them."""
    archive, outside = root / "archive", root / "inner/outside"
    archive.write_bytes(data)
    outside.mkdir(parents=True)
    try:
        unpack(archive, outside / "root", name="x.tar", limits=limits)
    finally:
        assert {path.name for path in outside.iterdir()} <= {"root"}
        assert {path.name for path in root.iterdir()} == {"archive", "inner"}
    found = (outside / "root").rglob("*")
    return {str(path.relative_to(outside / "root")): path.read_bytes() for path in found if path.is_file()}


PACKED: dict[str, Callable[[], bytes]] = {
    "tar": lambda: tar(*FILES.items()),
    "gnu": lambda: tar(*FILES.items(), form=tarfile.GNU_FORMAT),
    "tar.gz": lambda: gzip.compress(tar(*FILES.items())),
    "tar.bz2": lambda: bz2.compress(tar(*FILES.items())),
    "tar.xz": lambda: lzma.compress(tar(*FILES.items())),
    "zip": lambda: zipped(*FILES.items()),
    "stored zip": lambda: zipped(*FILES.items(), packed=zipfile.ZIP_STORED),
    "lzma zip": lambda: zipped(*FILES.items(), packed=zipfile.ZIP_LZMA),
}


@pytest.mark.parametrize("kind", PACKED)
def test_every_kind_gives_its_files(tmp_path, kind):
    assert unpacked(tmp_path, PACKED[kind]()) == FILES


def test_links_inside_are_links_and_of_two_with_one_name_the_later_counts(tmp_path):
    data = tar(
        ("data/x", b"old"),
        special("to_x", tarfile.SYMTYPE, "data/x"),
        special("deep/up", tarfile.SYMTYPE, "../data"),
        special("hard", tarfile.LNKTYPE, "data/x"),
        ("data/x", b"new"),
    )
    files = unpacked(tmp_path, data)
    assert files["data/x"] == files["to_x"] == files["hard"] == b"new"
    assert (tmp_path / "inner/outside/root/deep/up").readlink() == Path("../data")


def test_a_zip_may_hold_links_too(tmp_path):
    out = io.BytesIO(zipped(("x", b"1")))
    with zipfile.ZipFile(out, "a") as made:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        made.writestr(info, "x")
    assert unpacked(tmp_path, out.getvalue()) == {"x": b"1", "link": b"1"}


def with_null() -> tarfile.TarInfo:
    info = tarfile.TarInfo("x")
    info.pax_headers = {"path": "a\0b"}
    return info


def crowded(count: int) -> bytes:
    """A zip that is a list of members and hardly anything else: a few bytes each here, hundreds when it is read."""
    data = zipped(("x", b""))
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    listed = data[start:end] * count
    size = len(listed).to_bytes(4, "little")
    return data[:start] + listed + data[end : end + 8] + b"\xff\xff" * 2 + size + data[end + 16 :]


LEADS_OUT = "leads out of it"
EVIL: dict[str, tuple[Callable[[], bytes], str]] = {
    "a name with ..": (lambda: tar(("../x", b"1")), LEADS_OUT),
    "a name with .. inside": (lambda: tar(("a/../../x", b"1")), LEADS_OUT),
    "a zip name with ..": (lambda: zipped(("../x", b"1")), LEADS_OUT),
    "a link out": (lambda: tar(special("l", tarfile.SYMTYPE, "../outside")), LEADS_OUT),
    "an absolute link": (lambda: tar(special("l", tarfile.SYMTYPE, "/etc/passwd")), LEADS_OUT),
    "a hard link out": (lambda: tar(special("l", tarfile.LNKTYPE, "../archive")), LEADS_OUT),
    "a write through a link": (
        lambda: tar(special("l", tarfile.SYMTYPE, ".."), ("l/x", b"1")),
        "holds l twice, as a file and as a folder",
    ),
    "a link through a link": (
        lambda: tar(
            ("a/b/q", b"1"),
            ("q", b"1"),
            special("a/b/up", tarfile.SYMTYPE, "../.."),
            special("z", tarfile.SYMTYPE, "a/b/up/../q"),
        ),
        LEADS_OUT,
    ),
    "a hard link to a link": (
        lambda: tar(("x", b"1"), special("l", tarfile.SYMTYPE, "x"), special("h", tarfile.LNKTYPE, "l")),
        "which is no file",
    ),
    "a link to nothing": (lambda: tar(("x", b"1"), special("l", tarfile.SYMTYPE, "y")), "which is not in it"),
    "a zipped link out": (lambda: zipped(("l", b"../../x"), mode=stat.S_IFLNK | 0o777), LEADS_OUT),
    "a device": (lambda: tar(special("null", tarfile.CHRTYPE)), "no file, folder or link"),
    "a pipe": (lambda: tar(special("pipe", tarfile.FIFOTYPE)), "no file, folder or link"),
    "a zipped pipe": (lambda: zipped(("pipe", b""), mode=stat.S_IFIFO | 0o644), "no file, folder or link"),
    "a null in a name": (lambda: tar(with_null()), LEADS_OUT),
    "a long name": (lambda: tar(("n" * 300, b"1")), "longer than a disk takes"),
    "a deep path": (lambda: tar(("d/" * 100 + "x", b"1")), "longer than a disk takes (101 levels)"),
    "a giant header": (lambda: tar(("n" * 3_000_000, b"1")), "a name of over"),
    "a file and a folder": (lambda: tar(("x", b"1"), ("x/y", b"1")), "twice, as a file and as a folder"),
    "a folder and a file": (lambda: tar(("x/y", b"1"), ("x", b"1")), "twice, as a folder and as a file"),
    "too many members": (lambda: tar(*((str(n), b"") for n in range(101))), "more than 100 files"),
    "nothing": (tar, "without anything in it"),
    "nothing zipped": (zipped, "without anything in it"),
    "a list of many members": (lambda: crowded(3_000), "a list of members of over 100000 bytes"),
    "a bomb": (lambda: gzip.compress(tar(("zeros", bytes(9_000_000)))), "refused as a bomb"),
    "a zip bomb": (lambda: zipped(("zeros", bytes(9_000_000))), "refused as a bomb"),
    "many small bombs": (lambda: zipped(*((str(n), bytes(900_000)) for n in range(10))), "refused as a bomb"),
    "a bomb of padding": (lambda: gzip.compress(tar(("x", b"1")) + bytes(0))[:-8] + b"12345678", "can't be unpacked"),
    "half a tar": (lambda: tar(("x", bytes(100_000)))[:50_000], "can't be unpacked"),
    "half a gz": (lambda: gzip.compress(tar(("x", os.urandom(100_000))))[:50_000], "can't be unpacked"),
    "half a zip": (lambda: zipped(("x", os.urandom(100_000)))[:50_000], "can't be unpacked"),
    "a flipped zip": (lambda: zipped(("x", b"a" * 100), packed=zipfile.ZIP_STORED).replace(b"aaa", b"aab", 1), "CRC"),
    "a plain file": (lambda: b"a,b\n1,2\n" * 1000, "is no archive that can be unpacked"),
    "a packed plain file": (lambda: gzip.compress(b"a,b\n1,2\n" * 1000), "is no archive that can be unpacked"),
    "an empty file": (lambda: b"", "is no archive that can be unpacked"),
}


@pytest.mark.parametrize("name", EVIL)
def test_a_bad_archive_is_one_clear_error_and_nothing_lies_beside_it(tmp_path, name, monkeypatch):
    monkeypatch.setattr(unpacking, "MAX_MEMBERS", 100)
    monkeypatch.setattr(unpacking, "RATIO_FREE", 8_000_000)
    monkeypatch.setattr(unpacking, "MAX_DIRECTORY", 100_000)
    make, problem = EVIL[name]
    with pytest.raises(ContentError) as caught:
        unpacked(tmp_path, make())
    assert problem in str(caught.value)
    assert "x.tar" in str(caught.value)


def test_an_absolute_name_loses_its_slash(tmp_path):
    assert unpacked(tmp_path, tar(("/etc/x", b"1"))) == {"etc/x": b"1"}


def test_what_unpacks_to_more_than_the_cap_is_refused(tmp_path):
    with pytest.raises(ContentError, match="more than 1000 bytes"):
        unpacked(tmp_path, zipped(("x", os.urandom(2000))), Limits(reserve=0, file=1000))


def test_what_does_not_fit_on_the_disk_is_refused(tmp_path):
    with pytest.raises(ContentError, match="no room for"):
        unpacked(tmp_path, zipped(("x", os.urandom(2000))), Limits(reserve=1 << 60))


def test_an_encrypted_zip_is_named(tmp_path):
    data = bytearray(zipped(("x", b"1" * 100)))
    for magic, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(magic) + at] |= 1
    with pytest.raises(ContentError, match="encrypted"):
        unpacked(tmp_path, bytes(data))


# --- as inputs ---


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    with contextlib.closing(BlockStore(tmp_path / "store")) as store:
        yield store


async def listed(store: BlockStore, path: Path) -> dict[str, bytes | str]:
    with contextlib.closing(Fetched(path.parent / "store")) as fetched:
        unpacker = Unpacker(store, fetched=fetched, folder=path.parent / "work", limits=QUICK)
        source = InputSource(source=str(path), unpack=True)
        entries = await asyncio.to_thread(lambda: unpacker.list(LocalSource(), source, index=3, access=Access()))
    assert not list((path.parent / "work").iterdir())
    assert {entry.source for entry in entries} == {3}
    assert [entry.path for entry in entries] == sorted((entry.path for entry in entries), key=os.fsencode)
    return {
        entry.path: store.read(entry.reference.cid) if isinstance(entry.reference, ContentRef) else "in place"
        for entry in entries
    }


async def test_an_input_that_is_an_archive_is_the_folder_in_it_whatever_it_is_called(store, tmp_path):
    (tmp_path / "data").write_bytes(PACKED["tar.gz"]())
    assert await listed(store, tmp_path / "data") == FILES


async def test_an_archive_is_unpacked_once_until_it_changes(store, tmp_path, monkeypatch):
    times = []
    monkeypatch.setattr(unpacking, "unpack", lambda *args, **named: (times.append(args), unpack(*args, **named)))
    for data in (PACKED["tar"](), PACKED["tar"](), PACKED["zip"]()):
        if not times or data != (tmp_path / "x").read_bytes():
            (tmp_path / "x").write_bytes(data)
        assert await listed(store, tmp_path / "x") == FILES
    assert len(times) == 2


async def test_an_archive_in_a_folder_is_a_folder_with_its_name_and_other_files_stay(store, tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/sub/x.ZIP").write_bytes(PACKED["zip"]())
    (tmp_path / "in/readme.txt").write_bytes(b"hello")
    found = await listed(store, tmp_path / "in")
    assert found == {"readme.txt": "in place", **{f"sub/x.ZIP/{name}": body for name, body in FILES.items()}}


async def test_a_folder_without_archives_is_the_authors_error(store, tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/sub/x.csv").write_bytes(b"1")
    with pytest.raises(SpecError, match="no file in it ends in"):
        await listed(store, tmp_path / "in")
