"""Aggregates of pieces against published figures, and proofs that are none."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node.content import aggregate
from bacalhau_node.content.aggregate import Aggregate, Proof, Way, holder, in_file
from bacalhau_node.content.piece import MAX_HEIGHT, ZEROS, Piece, above, commit
from bacalhau_node.errors import ContentError

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "aggregate.json").read_text())
SAMPLE, LARGE = VECTORS["sample"], VECTORS["large"]


def _piece(number: int, height: int) -> Piece:
    """One of a made-up root."""
    root = bytes((13, 14, 10, 1, 0, *map(int, str(number)))).ljust(32, b"\0")
    return Piece(root, height, in_file(32 << height))


def _large() -> Aggregate:
    sizes = [size << 20 for size in LARGE["mebibytes"]]
    return Aggregate([_piece(n, size.bit_length() - 6) for n, size in enumerate(sizes)], height=LARGE["height"])


def _way(known: dict) -> Way:
    return Way(known["index"], tuple(map(bytes.fromhex, known["path"])))


# --- what others have published ---


def test_the_published_sample_has_its_places_its_index_and_its_cid(tmp_path: Path) -> None:
    made = Aggregate([Piece.known(**known) for known in SAMPLE["pieces"]])
    assert list(made.offsets) == SAMPLE["offsets"]
    assert (made.piece.cid_v1, made.piece.padded) == (SAMPLE["cid_v1"], SAMPLE["padded"])
    assert hashlib.sha256(made.index).hexdigest() == SAMPLE["index_sha256"]
    index = tmp_path / "index"
    index.write_bytes(made.index)
    assert commit(index, threading.Event()).cid_v1 == SAMPLE["index_cid_v1"]


def test_the_published_aggregate_of_32_gib_has_its_root_and_its_proof() -> None:
    made, at = _large(), LARGE["piece"]
    assert (made.piece.root.hex(), made.piece.padded) == (LARGE["root"], 32 << 30)
    assert made.proof(at) == Proof(_way(LARGE["subtree"]), _way(LARGE["entry"]))
    assert holder(made.pieces[at], made.proof(at)) == made.piece


# --- the rules ---


def test_the_file_of_an_aggregate_has_the_commitment_that_is_made_of_its_pieces(tmp_path: Path) -> None:
    payloads = [bytes([number]) * size for number, size in enumerate((1, 127, 128, 5_000, 3))]
    pieces = []
    for number, payload in enumerate(payloads):
        (tmp_path / str(number)).write_bytes(payload)
        pieces.append(commit(tmp_path / str(number), threading.Event()))
    made = Aggregate(pieces)
    with (tmp_path / "whole").open("wb") as file:
        for payload, offset in zip(payloads, made.offsets, strict=True):
            file.seek(in_file(offset))
            file.write(payload)
        file.seek(in_file(made.index_offset))
        file.write(made.index)
    assert commit(tmp_path / "whole", threading.Event()) == made.piece


@given(st.lists(st.integers(2, 14), max_size=12), st.integers(0, 18))
def test_every_piece_lies_alone_below_the_index_and_is_proved(heights: list[int], least: int) -> None:
    pieces = [_piece(number, height) for number, height in enumerate(heights)]
    made = Aggregate(pieces, height=least)
    assert made.piece.height >= least
    end = 0
    for number, (piece, offset) in enumerate(zip(pieces, made.offsets, strict=True)):
        assert offset >= end
        assert offset % piece.padded == 0
        end = offset + piece.padded
        assert holder(piece, made.proof(number)) == made.piece
    assert end <= made.index_offset
    assert in_file(made.index_offset) + len(made.index) == made.piece.payload


def test_more_than_the_largest_sector_takes_is_refused() -> None:
    with pytest.raises(ContentError, match=r"2 pieces that reach to 68,719,476,736 bytes are more than the largest"):
        Aggregate([_piece(number, MAX_HEIGHT - 1) for number in range(2)])  # there is no room for an index
    assert Aggregate([_piece(0, MAX_HEIGHT - 1), _piece(1, MAX_HEIGHT - 2)]).piece.height == MAX_HEIGHT


def test_five_pieces_need_a_larger_index_than_four() -> None:
    assert [Aggregate([_piece(n, 2) for n in range(count)]).piece.height for count in (4, 5)] == [5, 15]


# --- proofs that are none ---


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda proof: Proof(proof.subtree, Way(proof.entry.index, proof.entry.path[:-1])), "different heights"),
        (lambda proof: Proof(Way(proof.subtree.index ^ 1, proof.subtree.path), proof.entry), "not in the same"),
        (lambda proof: Proof(proof.subtree, Way(proof.entry.index ^ 1, proof.entry.path)), "not in the same"),
        (lambda proof: Proof(Way(1 << 9, proof.subtree.path), proof.entry), "no tree has a node 512"),
        (lambda proof: Proof(Way(-1, proof.subtree.path), proof.entry), "no tree has a node -1"),
        (lambda proof: Proof(Way(0, (b"short", *proof.subtree.path[1:])), proof.entry), "no tree has a node 0"),
    ],
)
def test_a_proof_that_was_changed_proves_nothing(change, problem: str) -> None:
    made = _large()
    with pytest.raises(ContentError, match=problem):
        holder(made.pieces[0], change(made.proof(0)))


def test_a_proof_is_of_one_piece() -> None:
    made = _large()
    with pytest.raises(ContentError, match="not in the same"):
        holder(made.pieces[9], made.proof(3))


def test_an_entry_outside_of_the_index_proves_nothing() -> None:
    """Whoever makes an aggregate could put the bytes of an entry into a piece, where no provider looks for them."""
    piece = _piece(0, 6)
    node = root = above(aggregate._entry(piece, 0))
    for level in range(1, 6):
        root = above(root + ZEROS[level])
    made = Aggregate([piece, Piece(root, 6, in_file(32 << 6))])
    way = made.proof(1).subtree
    hidden = Way(way.index << 5, (*ZEROS[1:6], *way.path))
    assert hidden.root(node) == made.piece.root
    with pytest.raises(ContentError, match="outside of the index"):
        holder(piece, Proof(made.proof(0).subtree, hidden))


# --- what manifests say ---


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"cid_v1": "bafy"}, "is not the CID"),
        ({"cid_v1": "baga6ea4seaqnope"}, "is not the CID"),
        ({"cid_v1": ""}, "is not the CID"),
        ({"padded": 524287}, "no piece has"),
        ({"padded": 32}, "is not the CID"),
        ({"padded": 1 << 40}, "is not the CID"),
        ({"payload": 520193}, "no piece has 520193 bytes of payload in 524288"),
    ],
)
def test_a_manifest_of_no_piece_is_refused(changes: dict, problem: str) -> None:
    with pytest.raises(ContentError, match=problem):
        Piece.known(**SAMPLE["pieces"][0] | changes)
