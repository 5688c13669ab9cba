"""Canonical DAG-JSON: one spelling for each value."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node import dagjson
from bacalhau_node.dagjson import Link
from bacalhau_node.errors import ContentError, SpecError

CID = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
    | st.binary()
    | st.just(Link(CID)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")).filter("/".__ne__), inner),
    max_leaves=20,
)


@given(values)
def test_what_is_written_is_read_back_and_written_the_same_again(value):
    data = dagjson.encode(value)
    back = dagjson.decode(data)
    assert back == value
    assert dagjson.encode(back) == data


def test_the_spelling_is_the_one_of_the_specification():
    value = {"b": [1, 1.0, None, True], "a": Link(CID), "é": b"\xff\x00", "aa": "ü"}
    assert dagjson.encode(value) == (
        b'{"a":{"/":"' + CID.encode() + b'"},"aa":"\xc3\xbc","b":[1,1.0,null,true],"\xc3\xa9":{"/":{"bytes":"/wA"}}}'
    )


@given(st.dictionaries(st.text(st.characters(codec="utf-8")).filter("/".__ne__), st.integers(0, 9), min_size=2))
def test_keys_are_sorted_by_their_bytes_whatever_the_order_they_came_in(value):
    data = dagjson.encode(value)
    assert data == dagjson.encode(dict(reversed(value.items())))
    assert list(dagjson.decode(data)) == sorted(value, key=str.encode)


def test_integers_and_floats_stay_what_they_are():
    assert [type(item) for item in dagjson.decode(dagjson.encode([1, 1.0, 1e300, -0.0]))] == [int, float, float, float]


def test_tuples_are_written_as_lists():
    assert dagjson.encode((1, (2,))) == b"[1,[2]]"


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, {1: 2}, {"/": 1}, {1, 2}, 2**64, -(2**63) - 1, "\ud800", {"\ud800": 1}, object(), bytearray()],
)
def test_what_has_no_spelling_is_refused(value):
    with pytest.raises(SpecError, match="no DAG-JSON form"):
        dagjson.encode([value])


def test_depth_is_bounded_on_both_sides():
    value = []
    for _ in range(dagjson.MAX_DEPTH - 1):
        value = [value]
    assert dagjson.decode(dagjson.encode(value)) == value
    with pytest.raises(SpecError, match="nested"):
        dagjson.encode([value])
    with pytest.raises(ContentError, match="nested"):
        dagjson.decode(b"[" + dagjson.encode(value) + b"]")
    with pytest.raises(ContentError):
        dagjson.decode(b"[" * 100_000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b'"\xff"',
        b"NaN",
        b"1e999",
        b"9" * 9999,
        b'{"/":1}',
        b'{"/":{"bytes":1}}',
        b'{"/":{"bytes":"/w","x":1}}',
        b'{"/":"x","y":1}',
        b'{"/":{"bytes":"!"}}',
        b'{"/":{"bytes":"a"}}',
        b'{"/":{"bytes":"/w=="}}',
        b'{"/":{"bytes":"/x"}}',
        '{"/":{"bytes":"é"}}'.encode(),
    ],
)
def test_what_is_not_dag_json_is_a_content_error(data):
    with pytest.raises(ContentError, match="not a DAG-JSON block"):
        dagjson.decode(data)


def test_a_link_shows_as_its_cid():
    assert str(Link(CID)) == CID
