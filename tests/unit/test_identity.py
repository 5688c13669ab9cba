"""A node's identity: one key, one name, signatures that only it can make, and a file that only its owner can read."""

import concurrent.futures
import os
import subprocess
import sys

import pytest
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from nacl.signing import SigningKey

from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.identity import PREFIX, Identity, read_identity, verify

SEED = bytes(range(32))


def test_the_name_is_libp2ps_peer_id_of_the_key():
    assert Identity(SEED).node == ID.from_pubkey(create_new_key_pair(SEED).public_key).to_base58()


def test_a_signature_holds_for_its_node_and_data_only():
    one, other = Identity(SEED), Identity(bytes(32))
    signature = one.sign(b"data")
    assert verify(one.node, b"data", signature)
    assert not verify(one.node, b"other data", signature)
    assert not verify(other.node, b"data", signature)
    assert not verify(one.node, b"data", signature[:-1] + bytes([signature[-1] ^ 1]))


@pytest.mark.parametrize("signature", [b"", b"x" * 63, b"x" * 64, b"x" * 65, b"x" * 10_000])
def test_what_is_no_signature_does_not_hold(signature):
    assert not verify(Identity(SEED).node, b"data", signature)


@pytest.mark.parametrize(
    "node", ["", "0OIl", "n-one", "12D3KooW", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "1" * 52, "z" * 127]
)
def test_a_name_without_a_key_has_signed_nothing(node):
    assert not verify(node, b"data", b"x" * 64)


def test_a_signature_is_of_no_use_without_its_prefix():
    bare = SigningKey(SEED).sign(b"data").signature
    assert not verify(Identity(SEED).node, b"data", bare)
    assert verify(Identity(SEED).node, b"data", SigningKey(SEED).sign(PREFIX + b"data").signature)


def test_an_identity_is_made_once_and_kept_for_its_owner_alone(tmp_path):
    path = tmp_path / "nodes" / "key"
    one = read_identity(path)
    assert read_identity(path).node == one.node
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["key"]


def test_many_who_start_at_once_are_the_same_node(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read_identity(tmp_path / "key").node, range(32)))
    assert len(set(found)) == 1


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(SEED)
    path.chmod(0o644)
    assert read_identity(path).node == Identity(SEED).node
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_told_with_its_path_and_left_alone(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"short")
    with pytest.raises(ContentError, match=rf"{path} is damaged: 5 bytes.*move it away"):
        read_identity(path)
    assert path.read_bytes() == b"short"


def test_a_folder_in_its_place_is_told(tmp_path):
    with pytest.raises(ContentError, match=str(tmp_path)):
        read_identity(tmp_path)


def test_a_seed_of_another_length_is_refused():
    with pytest.raises(SpecError, match="5 bytes"):
        Identity(b"short")


def test_an_identity_needs_no_libp2p():
    code = """if True:
        import sys
        from bacalhau_node.identity import Identity, verify
        verify(Identity(bytes(32)).node, b"", b"")
        print("libp2p" in sys.modules)
    """
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": "node"},
    )
    assert run.stdout.strip() == "False"
