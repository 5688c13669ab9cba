"""Who a node is: an Ed25519 key on disk, the peer id that is its name, and signatures that others can check.

The public key lies inside the peer id (libp2p's short form: the key itself under the identity hash), so whoever knows a
node's name can check what it signed, and nobody has to be asked. A signature is over `PREFIX` and the data: it is of no
use where the same key signs something else, as libp2p does.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.ids import NodeId

if TYPE_CHECKING:
    from nacl.signing import VerifyKey

PREFIX = b"bacalhau-jupyter signature 1\n"
SEED_BYTES = 32
KEY_HEADER = bytes.fromhex("002408011220")
"""Identity hash of 36 bytes, which are a protobuf: key type Ed25519, then a key of 32 bytes."""

MISSING = "a node's identity needs PyNaCl and base58: pip install 'bacalhau-jupyter[network]'"


class Identity:
    """The key pair that grows out of `seed`."""

    def __init__(self, seed: bytes) -> None:
        try:
            import base58  # noqa: PLC0415 - optional, like the next one
            from nacl.signing import SigningKey  # noqa: PLC0415
        except ImportError as error:
            raise SpecError(f"{MISSING} ({error})") from error
        if len(seed) != SEED_BYTES:
            raise SpecError(f"a seed of {len(seed)} bytes: an Ed25519 key grows out of {SEED_BYTES}")
        self.seed = seed
        self._key = SigningKey(seed)
        self.node: NodeId = base58.b58encode(KEY_HEADER + bytes(self._key.verify_key)).decode()

    def sign(self, data: bytes) -> bytes:
        """The 64 bytes that prove that this node says `data`."""
        return bytes(self._key.sign(PREFIX + data).signature)


def verify(node: NodeId, data: bytes, signature: bytes) -> bool:
    """Whether `node` itself signed `data`; False for whatever is no Ed25519 peer id or no signature."""
    from nacl.exceptions import CryptoError  # noqa: PLC0415 - optional, and there where somebody has an identity

    key = _key_of(node)
    if key is None:
        return False
    try:
        key.verify(PREFIX + data, signature)
    except (CryptoError, ValueError, TypeError):
        return False
    return True


@lru_cache(4096)
def _key_of(node: NodeId) -> VerifyKey | None:
    import base58  # noqa: PLC0415 - optional
    from nacl.exceptions import CryptoError  # noqa: PLC0415 - optional
    from nacl.signing import VerifyKey  # noqa: PLC0415 - optional

    try:
        raw = base58.b58decode(node)
        return VerifyKey(raw.removeprefix(KEY_HEADER)) if raw.startswith(KEY_HEADER) else None
    except (CryptoError, ValueError):
        return None


def read_identity(path: Path) -> Identity:
    """The identity that is kept in `path`, made when there is none; only its owner may read the file.

    Raises `ContentError` when the file can't be read or written, or holds something else.
    """
    try:
        try:
            seed = path.read_bytes()
        except FileNotFoundError:
            seed = _made(path)
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise ContentError(f"the node's identity {path} can't be read: {error.strerror or error}") from error
    if len(seed) != SEED_BYTES:
        raise ContentError(
            f"the node's identity {path} is damaged: {len(seed)} bytes instead of {SEED_BYTES}; "
            "move it away, and the node gets a new identity"
        )
    return Identity(seed)


def _made(path: Path) -> bytes:
    """Write a new seed, all of it or nothing; that of whoever was faster counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(SEED_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink()
    return path.read_bytes()
