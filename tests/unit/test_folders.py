"""Folders made of what is in the store: they have the CIDs that an import of the same files gives."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.folders import store_folder
from bacalhau_node.errors import ContentError


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[BlockStore]:
    with contextlib.closing(BlockStore(tmp_path_factory.mktemp("store"))) as store:
        yield store


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trees")


def imported(store: BlockStore, folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(data)
    return store.add_path(folder)


def made(store: BlockStore, files: dict[str, bytes]) -> str:
    listed = [(path, "" if path.endswith("/") else store.add_bytes(data), len(data)) for path, data in files.items()]
    return store_folder(store, listed, profile=store.profile)


NAMES = st.sampled_from(["a", "b", "é", "A", ".x", "sp ace", "日本"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
TREES = st.dictionaries(PATHS, st.binary(max_size=30), min_size=1, max_size=12)


def apart(files: dict[str, bytes]) -> bool:
    """Whether no file is also a folder."""
    return not any(other.startswith(f"{path}/") for path in files for other in files)


@given(TREES.filter(apart))
def test_a_folder_of_stored_files_has_the_cid_of_an_import(store, folder, files):
    with tempfile.TemporaryDirectory(dir=folder) as name:
        assert made(store, files) == imported(store, Path(name), files)


@pytest.mark.parametrize(
    "files", [{"none/": b"", "in/none/": b""}, {"large": bytes(600_000), "in/large": bytes(70_000)}]
)
def test_empty_folders_and_large_files_are_in_it(store, tmp_path, files):
    assert made(store, files) == imported(store, tmp_path, files)


def test_a_folder_that_is_too_large_for_one_block_is_a_trie(store, tmp_path):
    files = {f"a-name-that-is-rather-long-{number:05}.csv": b"x" for number in range(5000)}
    assert made(store, files) == imported(store, tmp_path, files)


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a")])
def test_nothing_is_a_file_and_a_folder(store, paths):
    with pytest.raises(ContentError, match="give one of the two another name"):
        made(store, dict.fromkeys(paths, b""))
