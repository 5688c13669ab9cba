"""Secrets in text: masked in every form, wherever the pieces of a stream are cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node.errors import SpecError
from bacalhau_node.masking import LONGEST, MaskedStream, Secrets, gathered

TOKEN = "s3cr3t-t0ken"
GAP = "\n[... 12 bytes left out ...]\n"


def _streamed(secrets: Secrets, pieces: list[str]) -> str:
    stream = MaskedStream(secrets)
    return "".join([*map(stream.feed, pieces), stream.end()])


@pytest.mark.parametrize("cut", range(len(TOKEN) + 3))
def test_a_secret_is_masked_wherever_a_stream_is_cut(cut):
    text = f"a{TOKEN}b\n"
    assert _streamed(Secrets({"KEY": TOKEN}), [text[:cut], text[cut:]]) == "a***b\n"


@given(st.lists(st.text("abn\n", max_size=6), max_size=12), st.text("ab\n", min_size=4, max_size=7))
def test_pieces_never_show_what_the_whole_text_hides_and_lose_nothing_else(pieces, value):
    secrets, text = Secrets({"KEY": value}), "".join(pieces)
    shown = _streamed(secrets, pieces)
    assert shown == secrets.mask(text)
    assert value not in shown
    if value.strip() not in text:
        assert shown == text


def test_a_text_without_secrets_waits_for_nothing():
    stream = MaskedStream(Secrets({"KEY": TOKEN}))
    assert stream.feed("working s\n") == "working s\n"
    assert stream.feed("50 % ") == "50 % "


def test_one_secret_that_begins_another_is_masked_with_it():
    secrets = Secrets({"SHORT": "abcdef", "LONG": "abcdefghij"})
    assert _streamed(secrets, ["abcdef", "ghij abcdef", " x"]) == "*** *** x"


def test_a_secret_that_repr_or_json_escapes_is_masked_as_they_write_it():
    value = "pass\tword\\with\"quote'"
    secrets = Secrets({"KEY": value})
    assert secrets.mask(f"{value} | {value!r} | {json.dumps(value)}") == "*** | '***' | \"***\""


def test_the_lines_of_a_long_secret_are_masked_one_by_one():
    secrets = Secrets({"KEY": "-----BEGIN-----\nMIIEvQIBADANBg\n-----END-----\n"})
    assert secrets.mask("line: MIIEvQIBADANBg.") == "line: ***."


@pytest.mark.parametrize("cut", range(1, len(TOKEN)))
def test_what_is_left_of_a_secret_beside_a_gap_is_masked(cut):
    secrets = Secrets({"KEY": TOKEN})
    head, tail = f"x {TOKEN[:cut]}", f"{TOKEN[cut:]} y"
    assert secrets.mask(f"{head}{GAP}{tail}") == f"x ***{GAP}*** y"
    assert _streamed(secrets, [head, GAP, tail]) == f"x ***{GAP}*** y"


def test_bytes_that_are_no_text_stay_as_they_are():
    assert Secrets({"KEY": TOKEN}).mask_bytes(b"\xff" + TOKEN.encode() + b"\xfe") == b"\xff***\xfe"


def test_no_repr_shows_a_value():
    assert repr(Secrets({"KEY": TOKEN})) == "Secrets(KEY)"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("KEY", "abc", "has 3 characters"),
        ("KEY", "x" * (LONGEST + 1), f"has {LONGEST + 1} characters"),
        ("KEY", "null\0inside", "no environment variable can"),
        ("KEY", "lone \ud800 surrogate", "no environment variable can"),
        ("1KEY", TOKEN, "a name is of letters"),
        ("KEY=X", TOKEN, "a name is of letters"),
    ],
)
def test_what_cannot_be_a_secret_is_refused_without_telling_it(name, value, why):
    with pytest.raises(SpecError, match=why) as error:
        Secrets({name: value})
    assert value not in str(error.value)


def test_a_value_comes_from_the_environment_before_the_notebook():
    found = gathered(("A", "B"), {"A": "environment"}, {"A": "notebook", "B": "variable"})
    assert found == {"A": "environment", "B": "variable"}


def test_a_value_that_is_nowhere_or_no_text_is_an_error():
    with pytest.raises(SpecError, match="--secret A: no environment variable is called so"):
        gathered(("A",), {})
    with pytest.raises(SpecError, match="--secret A: the variable is of type int"):
        gathered(("A",), {}, {"A": 7})
