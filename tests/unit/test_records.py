"""Answers, records and roots: what a result is called, and that it comes back."""

import contextlib
import os

import msgspec
import pytest

from bacalhau_node import dagjson
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.records import ROOT_LIMIT, encode_outcome, read_record, read_root, seal
from bacalhau_node.dagjson import Link
from bacalhau_node.errors import ContentError
from bacalhau_node.messages import INLINE_LIMIT, Blob, Frame, Outcome, ShardError, Value

BIG = os.urandom(INLINE_LIMIT + 1)

OUTCOME = Outcome(
    ok=True,
    value=Value("json", "int", Blob(2, b"42")),
    stdout=Blob(6, b"hello\n"),
    seconds=0.25,
    max_rss=1 << 20,
    executor="docker",
)
FAILED = Outcome(
    ok=False,
    exit_code=1,
    stderr=Blob(4, b"\xff\x00\n\n"),
    cut=7,
    error=ShardError(
        "exception", "KeyError", "'x'", (Frame("cell", 3, "<module>", "d['x']", in_cell=True),), ("add a key",)
    ),
    executor="sandbox",
)


def blob(data: bytes) -> Blob:
    return Blob(len(data), data)


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(BlockStore(tmp_path / "store")) as store:
        yield store


@pytest.mark.parametrize("outcome", [OUTCOME, FAILED, Outcome(ok=True)])
def test_an_outcome_comes_back_from_its_record(store, outcome):
    named = encode_outcome(store, outcome)
    assert msgspec.structs.replace(named, answer="", record="") == outcome
    store.flush()
    assert read_record(store, named.record) == named


def test_equal_values_have_equal_answers_whoever_computed_them_and_when(store):
    first = encode_outcome(store, OUTCOME)
    later = encode_outcome(
        store, msgspec.structs.replace(OUTCOME, seconds=9.0, executor="sandbox", stdout=blob(b"other"), max_rss=1)
    )
    assert first.answer == later.answer
    assert first.record != later.record


@pytest.mark.parametrize(
    "change",
    [
        {"value": Value("json", "int", Blob(2, b"43"))},
        {"value": Value("json", "float", Blob(2, b"42"))},
        {"value": Value("repr", "int", Blob(2, b"42"))},
        {"outputs": "QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH"},
    ],
)
def test_a_different_value_or_output_is_a_different_answer(store, change):
    other = encode_outcome(store, msgspec.structs.replace(OUTCOME, **change))
    assert other.answer != encode_outcome(store, OUTCOME).answer
    assert read_record(store, other.record) == other


def test_large_bytes_become_files_of_the_store(store):
    named = encode_outcome(
        store, msgspec.structs.replace(OUTCOME, value=Value("bytes", "bytes", blob(BIG)), stdout=blob(BIG))
    )
    assert named.value.blob == named.stdout == Blob(len(BIG), None, store.add_bytes(BIG))
    assert store.file(named.stdout.cid).read_bytes() == BIG
    assert read_record(store, named.record) == named


@pytest.mark.parametrize("data", [b"", b"small", BIG[:-1], BIG])
def test_the_answer_does_not_depend_on_how_the_bytes_were_handed_in(store, data):
    inline = Value("bytes", "bytes", blob(data))
    stored = Value("bytes", "bytes", Blob(len(data), None, store.add_bytes(data)))
    answers = {
        encode_outcome(store, msgspec.structs.replace(OUTCOME, value=value)).answer for value in (inline, stored)
    }
    assert len(answers) == 1


def test_a_record_holds_what_readers_of_dag_json_expect(store):
    named = encode_outcome(store, OUTCOME)
    record = dagjson.decode(store.get(named.record))
    assert record["answer"] == Link(named.answer)
    assert record["stdout"] == {"bytes": b"hello\n"}
    assert dagjson.decode(store.get(named.answer)) == {
        "value": {"kind": "json", "type": "int", "bytes": b"42"},
        "outputs": None,
    }


@pytest.mark.parametrize("count", [0, 1, ROOT_LIMIT, ROOT_LIMIT + 1, 2 * ROOT_LIMIT + 5])
def test_a_root_of_any_size_comes_back_in_order(store, count):
    cid = encode_outcome(store, OUTCOME).record
    records = [(shard * 3, cid) for shard in range(count)]
    assert read_root(store, seal(store, records)) == records


def test_a_block_that_is_something_else_is_an_error_naming_it(store):
    record = encode_outcome(store, OUTCOME).record
    for cid, read in (
        (record, read_root),
        (seal(store, [(0, record)]), read_record),
        (store.put(b"text"), read_root),
        (store.put(b'{"shards":[[-1,{"/":"x"}]]}', codec="dag-json"), read_root),
    ):
        with pytest.raises(ContentError):
            read(store, cid)
    with pytest.raises(ContentError, match=f"{record} is not a root"):
        read_root(store, record)
