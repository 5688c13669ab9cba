"""Content identifiers: bytes inside, text at the edges. Pure.

A CID names a block: version, codec (how to read the block) and the block's sha2-256. Version 0
is `Qm…`, base58btc of the multihash alone, always dag-pb; version 1 is `b…`, base32 of
version, codec and multihash. Both forms of one block share the 32-byte digest, so a store that
keys by digest answers to either. Other hashes, codecs and bases are refused by name.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final, Literal

import msgspec

from bacalhau_node.errors import SpecError

RAW: Final = 0x55
DAG_PB: Final = 0x70
DAG_JSON: Final = 0x0129

_HASH = b"\x12\x20"  # multihash: sha2-256, 32 bytes
_PREFIXES: dict[int, bytes] = {
    RAW: b"\x01\x55" + _HASH,
    DAG_PB: b"\x01\x70" + _HASH,
    DAG_JSON: b"\x01\xa9\x02" + _HASH,  # 0x0129 as a varint
}
_CODECS = {prefix: codec for codec, prefix in _PREFIXES.items()}

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUES58 = {ord(letter): value for value, letter in enumerate(_BASE58)}
_PAIRS58 = [a + b for a in _BASE58 for b in _BASE58]
_V0_TEXT = 46

_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_PAIRS32 = [a + b for a in _BASE32 for b in _BASE32]

# `int(text, 32)` is C, but its digits are 0-9a-v where multibase's are a-z2-7.
_TO_DIGITS = str.maketrans(_BASE32, "0123456789abcdefghijklmnopqrstuv")
_LETTERS32 = frozenset(_BASE32)


class Cid(msgspec.Struct, frozen=True, order=True, gc=False):
    """A checked content identifier; `binary` is its canonical byte form."""

    binary: bytes

    @staticmethod
    def parse(text: str) -> Cid:
        """The CID that `text` spells; raises `SpecError` saying what is wrong with it."""
        if text.startswith("Qm") and len(text) == _V0_TEXT:
            return Cid.decode(_from_base58(text))
        if text.startswith("b") and len(text) > _V0_TEXT:
            return Cid.decode(_from_base32(text))
        raise SpecError(f"{_shown(text)} is not a CID: one is 'Qm' with 44 more characters, or 'b' with 58 or 60")

    @staticmethod
    def decode(binary: bytes) -> Cid:
        """The CID in its byte form; raises `SpecError` for other hashes, codecs or lengths."""
        if (len(binary) == 34 and binary[:2] == _HASH) or binary[:-32] in _CODECS:
            return Cid(binary)
        raise SpecError(
            f"CID {_shown(binary.hex())} is not one this version reads:"
            " only sha2-256 of raw, dag-pb or dag-json blocks (CIDv0 or CIDv1)",
        )

    @staticmethod
    def of(block: bytes, *, codec: int = RAW, version: Literal[0, 1] = 1) -> Cid:
        """The CID of `block`. Version 0 exists for dag-pb only."""
        return Cid((_PREFIXES[codec] if version else _HASH) + sha256(block).digest())

    @staticmethod
    def raw(digest: bytes) -> Cid:
        """The CID of the raw block with this digest."""
        return Cid(_PREFIXES[RAW] + digest)

    @property
    def digest(self) -> bytes:
        """The 32 bytes of the block's sha2-256."""
        return self.binary[-32:]

    @property
    def codec(self) -> int:
        """How to read the block: `RAW`, `DAG_PB` or `DAG_JSON`."""
        return _CODECS.get(self.binary[:-32], DAG_PB)

    def matches(self, block: bytes) -> bool:
        """Whether `block` is the one that this CID names."""
        return sha256(block).digest() == self.binary[-32:]

    def v1(self) -> Cid:
        """The same block's CID in version 1."""
        return Cid(_PREFIXES[DAG_PB] + self.binary[2:]) if len(self.binary) == 34 else self

    def __str__(self) -> str:
        if self.binary[:2] == _HASH:
            return _to_base58(self.binary)
        return "b" + _to_base32(self.binary)


def binary_prefix(codec: int, *, version: Literal[0, 1]) -> bytes:
    """What precedes the digest in a CID's byte form, for code that makes many of one sort."""
    return _PREFIXES[codec] if version else _HASH


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "…")


def _to_base58(binary: bytes) -> str:
    # A multihash starts with 0x12, so there are no leading zeros to spell.
    number, pairs = int.from_bytes(binary, "big"), []
    while number:
        number, pair = divmod(number, 3364)  # 58 * 58
        pairs.append(_PAIRS58[pair])
    return "".join(reversed(pairs))


def _from_base58(text: str) -> bytes:
    number = 0
    for letter in text:
        value = _VALUES58.get(ord(letter))
        if value is None:
            raise SpecError(f"{_shown(text)} is not a CID: {letter!r} is not a base58 character")
        number = number * 58 + value
    return number.to_bytes(34, "big")


def _to_base32(binary: bytes) -> str:
    # Half the time of the standard library's, whose loop is in Python too.
    length = -(-len(binary) * 8 // 5)
    bits = 10 * -(-length // 2)
    number = int.from_bytes(binary, "big") << (bits - 8 * len(binary))
    return "".join([_PAIRS32[(number >> shift) & 1023] for shift in range(bits - 10, -1, -10)])[:length]


def _from_base32(text: str) -> bytes:
    body = text[1:]
    strange = set(body) - _LETTERS32
    if strange:
        raise SpecError(f"{_shown(text)} is not a CID: {min(strange)!r} is not a base32 character")
    size, spare = divmod(len(body) * 5, 8)
    number = int(body.translate(_TO_DIGITS), 32)
    if spare >= 5 or number & ((1 << spare) - 1):
        raise SpecError(f"{_shown(text)} is not a CID: its length or last character is wrong; was all of it copied?")
    return (number >> spare).to_bytes(size, "big")
