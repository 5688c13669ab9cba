"""Inputs by CID: which are understood, what is listed, and what is handed out."""

import contextlib
import os
from pathlib import Path

import pytest

from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.sharding import ContentRef, Entry, LocalStamp
from bacalhau_node.sources.ipfs import ContentSource
from bacalhau_node.spec import InputSource

ABSENT = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
BIG = os.urandom(300_000)


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(BlockStore(tmp_path / "store")) as store:
        yield store


@pytest.fixture
def source(store):
    return ContentSource(store)


@pytest.fixture
def root(store, tmp_path):
    """A folder in the store."""
    for name, data in {"a.csv": b"1", "year/01.csv": b"22", "year/02.csv": BIG, "years.txt": b""}.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "in/none").mkdir()
    return store.add_path(tmp_path / "in")


def listed(source: ContentSource, text: str) -> list[tuple[str, int]]:
    return [(entry.path, entry.size) for entry in source.list(InputSource(source=text), index=2)]


def test_cids_and_ipfs_addresses_are_claimed_and_nothing_else(source):
    for text in (ABSENT, f"ipfs://{ABSENT}", f"ipfs://{ABSENT}/a/b", "ipfs://nonsense"):
        assert source.claims(text)
    for text in ("/data", "data", "https://example.org/x", "s3://bucket/x", ABSENT[:-1], f"/ipfs/{ABSENT}", ""):
        assert not source.claims(text)


def test_a_folder_is_listed_with_its_files_and_empty_folders(source, root):
    everything = [("a.csv", 1), ("none/", 0), ("year/01.csv", 2), ("year/02.csv", len(BIG)), ("years.txt", 0)]
    assert listed(source, root) == listed(source, f"ipfs://{root}") == listed(source, f"ipfs://{root}/") == everything
    (entry, *_) = source.list(InputSource(source=root), index=2)
    assert (entry.source, type(entry.reference)) == (2, ContentRef)


def test_a_path_names_a_folder_or_a_file_below_the_cid(source, root):
    assert listed(source, f"ipfs://{root}/year") == [("01.csv", 2), ("02.csv", len(BIG))]
    assert listed(source, f"ipfs://{root}/year/01.csv") == [("01.csv", 2)]
    assert listed(source, f"ipfs://{root}/none") == []
    with pytest.raises(ContentError, match=f"there is no 2024 in {root}, which holds a.csv, none/, year/01.csv"):
        listed(source, f"ipfs://{root}/2024")


def test_a_file_is_one_entry_named_by_its_cid(source, store):
    cid = store.add_bytes(b"data")
    assert source.list(InputSource(source=cid), index=0) == [Entry(cid, ContentRef(cid), 4, 0)]


def test_what_is_not_here_is_an_error_that_says_what_this_version_does_not_do(source):
    with pytest.raises(ContentError, match=f"{ABSENT} is not in this node's content store.*does not fetch from other"):
        listed(source, ABSENT)
    with pytest.raises(SpecError, match="'nonsense' is not a CID"):
        listed(source, "ipfs://nonsense")


def test_the_stores_own_file_is_handed_out_and_small_ones_are_written_once(source, root, store, tmp_path):
    entries = {entry.path: entry for entry in source.list(InputSource(source=root), index=0)}
    large, small = entries["year/02.csv"].reference, entries["year/01.csv"].reference
    assert source.open(large, scratch=tmp_path) == store.file(large.cid)
    first = source.open(small, scratch=tmp_path)
    assert (first.read_bytes(), first.parent) == (b"22", tmp_path)
    assert source.open(small, scratch=tmp_path) == first


def test_a_file_of_the_store_that_a_shard_wrote_to_is_noticed(source, root, tmp_path):
    entries = {entry.path: entry for entry in source.list(InputSource(source=root), index=0)}
    reference = entries["year/02.csv"].reference
    path = source.open(reference, scratch=tmp_path)
    source.check(reference)
    path.chmod(0o644)
    path.write_bytes(b"x" * len(BIG))
    with pytest.raises(ContentError, match="damaged"):
        source.check(reference)


def test_what_another_source_listed_is_not_checked_and_never_opened(source):
    stamp = LocalStamp("/nowhere", 1, 1, 1, 1)
    source.check(stamp)
    with pytest.raises(BugError):
        source.open(stamp, scratch=Path("/nowhere"))
