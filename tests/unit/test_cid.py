"""CIDs: the two spellings of a name, and what is said about a wrong one."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node.cid import DAG_JSON, DAG_PB, RAW, Cid
from bacalhau_node.errors import SpecError

EMPTY_V0 = "QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH"
EMPTY_RAW = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
EMPTY_LEAF = b"\x0a\x04\x08\x02\x18\x00"


def test_known_blocks_have_the_names_that_kubo_gives_them():
    assert str(Cid.of(b"")) == EMPTY_RAW
    assert str(Cid.of(EMPTY_LEAF, codec=DAG_PB, version=0)) == EMPTY_V0


@given(st.binary(max_size=100), st.sampled_from([(RAW, 1), (DAG_PB, 1), (DAG_JSON, 1), (DAG_PB, 0)]))
def test_text_and_bytes_are_two_spellings_of_the_same_cid(block, form):
    codec, version = form
    cid = Cid.of(block, codec=codec, version=version)
    assert Cid.parse(str(cid)) == cid == Cid.decode(cid.binary)
    assert (cid.codec, cid.digest) == (codec, sha256(block).digest())
    assert cid.matches(block)
    assert not cid.matches(block + b"x")


def test_both_versions_of_a_cid_name_the_same_block():
    v0 = Cid.parse(EMPTY_V0)
    v1 = v0.v1()
    assert str(v1).startswith("bafybei")
    assert (v1.codec, v1.digest) == (DAG_PB, v0.digest)
    assert v1.v1() is v1


def test_every_changed_character_is_noticed_or_names_something_else():
    for text in (EMPTY_V0, EMPTY_RAW):
        for at in range(len(text)):
            other = text[:at] + ("x" if text[at] != "x" else "y") + text[at + 1 :]
            try:
                assert str(Cid.parse(other)) == other
            except SpecError:
                continue


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not a CID"),
        ("hello", "is not a CID"),
        ("b", "is not a CID"),
        (EMPTY_V0[:-1], "44 more characters"),
        (EMPTY_V0 + "1", "44 more characters"),
        ("Qm0" + EMPTY_V0[3:], "'0' is not a base58 character"),
        (EMPTY_RAW[:-1], "was all of it copied"),
        (EMPTY_RAW[:-1] + "v", "last character is wrong"),
        (EMPTY_RAW + "a", "was all of it copied"),
        (EMPTY_RAW + "aa", "not one this version reads"),
        (EMPTY_RAW[:5] + "1" + EMPTY_RAW[6:], "'1' is not a base32 character"),
        (EMPTY_RAW.upper(), "is not a CID"),
        (f" {EMPTY_V0}", "is not a CID"),
        ("b\N{LATIN SMALL LETTER A WITH ACUTE}" + EMPTY_RAW[2:], "is not a base32 character"),
        ("bafyreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy", "not one this version reads"),  # dag-cbor
        ("bagaaierasords4njcts6vs7qvdjfcvgnume4hqohf65zsfguprqphs3icwea" + "a" * 500, "is not"),
    ],
)
def test_a_malformed_cid_is_refused_saying_what_is_wrong(text, problem):
    with pytest.raises(SpecError, match=problem) as caught:
        Cid.parse(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("binary", [b"", b"\x12\x20", b"\x12\x20" + b"x" * 31, b"\x01\x55\x12\x20" + b"x" * 33])
def test_a_binary_cid_of_another_length_is_refused(binary):
    with pytest.raises(SpecError):
        Cid.decode(binary)
