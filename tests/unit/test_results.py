"""One folder of many shards' files: names that clash, and a sealed result as an input."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.elsewhere import Elsewhere
from bacalhau_node.content.records import encode_outcome, seal
from bacalhau_node.errors import ContentError
from bacalhau_node.messages import Blob, Outcome, Value
from bacalhau_node.results import Names, ResultSource
from bacalhau_node.sources.ipfs import ContentSource
from bacalhau_node.spec import InputSource

STEP = st.sampled_from(["a", "b", "a.csv", "a.shard-1.csv", "a.shard-1"])


def placed(*shards: list[str]) -> list[str]:
    names = Names()
    return [names.place(path, index) for index, paths in enumerate(shards) for path in paths]


@pytest.mark.parametrize(
    ("shards", "together"),
    [
        ([["result.csv"], ["result.csv"]], ["result.csv", "result.shard-1.csv"]),
        ([["a"], ["a"], ["a"]], ["a", "a.shard-1", "a.shard-2"]),
        ([["d/x"], ["d/x", "d/y"]], ["d/x", "d/x.shard-1", "d/y"]),
        ([["a"], ["a/x", "a/y"]], ["a", "a.shard-1/x", "a.shard-1/y"]),  # a file, then a folder
        ([["a/x"], ["a"]], ["a/x", "a.shard-1"]),
        ([["r.csv", "r.shard-1.csv"], ["r.csv"]], ["r.csv", "r.shard-1.csv", "r.shard-1.2.csv"]),
        ([["e/"], ["e/"], ["e"]], ["e/", "e/", "e.shard-2"]),  # empty folders are one
    ],
)
def test_equal_names_of_shards_all_survive(shards: list[list[str]], together: list[str]) -> None:
    assert placed(*shards) == together


@given(st.lists(st.lists(st.lists(STEP, min_size=1, max_size=3).map("/".join), unique=True), max_size=4))
def test_no_two_files_ever_get_one_name_and_none_lies_in_another(shards: list[list[str]]) -> None:
    found = placed(*shards)
    assert len(set(found)) == len(found)
    folders = {str(parent) for path in found for parent in Path(path).parents}
    assert not folders & set(found)


# --- as an input ---


@pytest.fixture
def store(tmp_path: Path) -> BlockStore:
    return BlockStore(tmp_path / "store")


def _outcome(store: BlockStore, folder: Path, files: dict[str, str], value: bytes | None = None) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    outputs = store.add_path(folder) if files else None
    made = Value("json", "int", Blob(len(value), value)) if value is not None else Value()
    return encode_outcome(store, Outcome(ok=True, outputs=outputs, value=made)).record


def _listed(store: BlockStore, root: str, path: str = "") -> dict[str, bytes]:
    source = ResultSource(store, ContentSource(store, Elsewhere(store)))
    assert source.claims(f"ipfs://{root}{path}")
    entries = source.list(InputSource(source=f"ipfs://{root}{path}"), index=0)
    return {
        entry.path: source.open(entry.reference, scratch=store.folder / "scratch").read_bytes() for entry in entries
    }


def test_a_result_is_the_folder_of_what_its_shards_wrote(store: BlockStore, tmp_path: Path) -> None:
    records = [
        (0, _outcome(store, tmp_path / "0", {"result.csv": "a", "d/x": "x"}, b"1")),
        (3, _outcome(store, tmp_path / "3", {"result.csv": "b"}, b"2")),
    ]
    root = seal(store, records)
    together = {"result.csv": b"a", "d/x": b"x", "result.shard-3.csv": b"b"}
    assert _listed(store, root) == together
    assert _listed(store, root, "/outputs") == together
    assert _listed(store, root, "/d") == {"x": b"x"}
    assert _listed(store, root, "/result.csv") == {"result.csv": b"a"}
    assert _listed(store, root, "/values") == {"0.json": b"1", "3.json": b"2"}
    assert _listed(store, root, "/values/3.json") == {"3.json": b"2"}
    with pytest.raises(ContentError, match="has no nothing"):
        _listed(store, root, "/nothing")


def test_a_result_without_files_is_the_folder_of_its_values(store: BlockStore, tmp_path: Path) -> None:
    root = seal(store, [(n, _outcome(store, tmp_path / "no", {}, str(n).encode())) for n in range(11)])
    assert list(_listed(store, root)) == [f"{n:02}.json" for n in range(11)]
    empty = seal(store, [(0, _outcome(store, tmp_path / "no", {}))])
    with pytest.raises(ContentError, match="has no files and no values"):
        _listed(store, empty)


def test_a_result_that_is_elsewhere_says_where_to_go(store: BlockStore, tmp_path: Path) -> None:
    other = BlockStore(tmp_path / "other")
    root = seal(other, [(0, _outcome(other, tmp_path / "no", {}, b"1"))])
    with pytest.raises(ContentError, match="not on this node"):
        _listed(store, root)


def test_files_are_left_to_other_sources(store: BlockStore) -> None:
    source = ResultSource(store, ContentSource(store, Elsewhere(store)))
    for text in (store.add_bytes(b"a"), "ipfs://hello", "/data", "s3://b/p", "https://h/x"):
        assert not source.claims(text)
