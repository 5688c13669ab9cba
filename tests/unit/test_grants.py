"""Capabilities: what a token opens, what is public, and that a block is given only below a root that is open."""

from __future__ import annotations

import msgspec
import pytest

from bacalhau_node import dagjson
from bacalhau_node.cid import DAG_JSON, DAG_PB, Cid
from bacalhau_node.content import gateway as gateways
from bacalhau_node.content.dagpb import encode_node, folder_node
from bacalhau_node.content.gateway import Gateway, Question, gathered
from bacalhau_node.content.grants import Grants, new_token
from bacalhau_node.errors import ContentError, SpecError

FOLDER = encode_node((), folder_node())
OLD, NEW = Cid.of(FOLDER, codec=DAG_PB, version=0), Cid.of(FOLDER, codec=DAG_PB)
OTHER = Cid.of(b"other")


class Store:
    """Blocks in memory that count how often they are read."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.read: list[Cid] = []

    def put(self, value: object) -> Cid:
        block = value if isinstance(value, bytes) else dagjson.encode(value)
        cid = Cid.of(block) if isinstance(value, bytes) else Cid.of(block, codec=DAG_JSON)
        self.blocks[cid.digest] = block
        return cid

    def block(self, cid: Cid) -> bytes:
        self.read.append(cid)
        if cid.digest not in self.blocks:
            raise ContentError(f"{cid} is missing")
        return self.blocks[cid.digest]

    to_send = block

    def holds(self, cid: Cid) -> bool:
        return cid.digest in self.blocks


def _link(cid: Cid) -> dagjson.Link:
    return dagjson.Link(str(cid))


def test_tokens_are_long_and_never_the_same():
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == 43 and token.isascii() for token in tokens)


def test_a_token_opens_its_roots_in_either_version_and_nothing_else():
    grants = Grants()
    grants.open("token", [str(OLD)])
    assert grants.allows("token", OLD)
    assert grants.allows("token", NEW)
    assert not grants.allows("token", OTHER)
    for token in (None, "", "Token", "token "):
        assert not grants.allows(token, OLD)
    grants.open("token", [str(OTHER)])
    assert grants.allows("token", OLD)
    assert grants.allows("token", OTHER)
    grants.close("token")
    grants.close("token")
    assert not grants.allows("token", OLD)


def test_a_token_that_opens_no_cid_is_refused_whole():
    grants = Grants()
    with pytest.raises(SpecError):
        grants.open("token", [str(OLD), "nonsense"])
    assert not grants.allows("token", OLD)


def test_what_is_public_needs_no_token_until_it_is_withdrawn_as_often_as_published():
    grants = Grants()
    grants.publish(str(OLD))
    grants.publish(str(NEW))
    for token in (None, "any"):
        assert grants.allows(token, OLD)
        assert not grants.allows(token, OTHER)
    grants.withdraw(str(OLD))
    assert grants.public() == [NEW]
    grants.withdraw(str(OLD))
    grants.withdraw(str(OLD))
    assert not grants.allows(None, OLD)
    assert not grants.public()


def _three_levels(store: Store) -> tuple[Cid, Cid, list[Cid]]:
    leaves = [store.put(b"leaf %d" % number) for number in range(50)]
    middle = [store.put({"to": [_link(leaf) for leaf in leaves[at : at + 10]]}) for at in range(0, 50, 10)]
    return store.put([_link(cid) for cid in middle]), middle[3], leaves


def test_a_block_is_given_below_an_open_root_and_nowhere_else():
    store, grants = Store(), Grants()
    root, middle, leaves = _three_levels(store)
    hidden = store.put(b"hidden")
    grants.open("token", [str(root)])
    gateway = Gateway(store, grants)
    for cid in (root, middle, leaves[0], leaves[49]):
        assert gateway.allows("token", cid, root=root)
        assert not gateway.allows("other", cid, root=root)
        assert not gateway.allows(None, cid, root=root)
    assert not gateway.allows("token", hidden, root=root)
    assert not gateway.allows("token", hidden, root=hidden)
    assert not gateway.allows("token", leaves[0])
    assert not gateway.allows("token", leaves[0], root=middle)


def test_blocks_below_what_is_public_need_no_root_in_the_question():
    store, grants = Store(), Grants()
    root, middle, leaves = _three_levels(store)
    gateway = Gateway(store, grants)
    assert not gateway.allows(None, leaves[7])
    grants.publish(str(root))
    assert gateway.allows(None, leaves[7])
    assert gateway.allows(None, middle)
    assert not gateway.allows(None, store.put(b"hidden"))
    grants.withdraw(str(root))
    assert not gateway.allows(None, leaves[7])


def test_what_lies_below_a_root_is_read_once_and_no_further_than_need_be():
    store, grants = Store(), Grants()
    root, _, leaves = _three_levels(store)
    grants.open("token", [str(root)])
    gateway = Gateway(store, grants)
    assert gateway.allows("token", leaves[3], root=root)
    assert len(store.read) == 2
    for cid in (*leaves, store.put(b"hidden"), *leaves, store.put(b"more")):
        gateway.allows("token", cid, root=root)
    assert len(store.read) == 6
    assert not set(leaves) & set(store.read)


def test_a_block_that_is_missing_here_hides_only_what_is_below_it():
    store, grants = Store(), Grants()
    root, middle, leaves = _three_levels(store)
    del store.blocks[middle.digest]
    grants.open("token", [str(root)])
    gateway = Gateway(store, grants)
    assert gateway.allows("token", leaves[49], root=root)
    assert not gateway.allows("token", leaves[35], root=root)


def test_what_is_remembered_is_bounded(monkeypatch):
    store, grants = Store(), Grants()
    root, _, leaves = _three_levels(store)
    roots = [store.put([_link(root), number]) for number in range(10)]
    grants.open("token", map(str, roots))
    monkeypatch.setattr(gateways, "MAX_KNOWN", 60)
    gateway = Gateway(store, grants)
    for one in (*roots, *roots):
        assert gateway.allows("token", leaves[49], root=one)
        assert sum(map(len, gateway._below.values())) <= 60
    monkeypatch.setattr(gateways, "MAX_KNOWN", 20)
    assert not Gateway(store, grants).allows("token", leaves[49], root=roots[0])


def test_small_parts_are_joined_and_empty_ones_end_nothing():
    large = b"c" * (3 * 1024 * 1024 + 5)
    found = list(gathered([b"", b"a" * 10, b"b" * 20, large, b"", b"d"]))
    assert b"".join(found) == b"a" * 10 + b"b" * 20 + large + b"d"
    assert [len(part) for part in found] == [30, len(large), 1]
    assert not list(gathered([b"", b""]))


async def test_a_part_of_an_answer_over_a_stream_has_a_mebibyte_at_most():
    store, grants = Store(), Grants()
    root = store.put(bytes(2 * 1024 * 1024))
    grants.publish(str(root))
    for form in ("car", "raw"):
        question = msgspec.msgpack.encode(Question(str(root), form=form))
        parts = [part async for part in Gateway(store, grants).answering()("asker", question)]
        assert max(map(len, parts)) <= 1024 * 1024
        assert b"".join(parts).endswith(bytes(2 * 1024 * 1024))
        assert parts[0] == b"\0"


def test_a_file_that_reads_like_a_folder_opens_nothing_that_it_names():
    """Whoever ran a job chose the bytes of its outputs: read by another codec they would link to all that is here."""
    store, grants = Store(), Grants()
    secret = store.put(b"of somebody else")
    forged = dagjson.encode({"x": _link(secret)})
    file = store.put(forged)
    root = store.put({"outputs": _link(file)})
    disguised = Cid.of(forged, codec=DAG_JSON)
    assert disguised.digest == file.digest
    gateway = Gateway(store, grants)
    grants.open("one", [str(file)])
    grants.open("two", [str(root)])
    assert gateway.allows("one", file)
    assert gateway.allows("two", file, root=root)
    assert not gateway.allows("one", disguised)
    assert not gateway.allows("one", secret, root=disguised)
    assert not gateway.allows("two", disguised, root=root)
    grants.publish(str(root))
    assert gateway.allows(None, file)
    assert not gateway.allows(None, disguised)
