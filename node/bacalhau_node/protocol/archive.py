"""What a node record must be like, and each record only once in a process.

Theory of operation. A record travels as bytes with a signature of its node over just these bytes. An **archive** opens
it: it checks sizes, decodes, checks that the id in it is that of the key that signed, and keeps the outcome for as
long as anybody holds it. All nodes of one process share an archive, so a thousand views of a thousand nodes hold a
thousand records, each verified once. What is refused here is refused by every node, whatever its clock and view:
whoever hands on such a record is at fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

import msgspec
from msgspec import structs

from bacalhau_node.errors import ProtocolError
from bacalhau_node.ids import NodeId
from bacalhau_node.messages import NodeRecord, Signed
from bacalhau_node.protocol import ranking

MAX_RECORD: Final = 8 * 1024
"""Bytes of a record; most have about one thousand."""

MAX_ADDRESSES: Final = 16
MAX_ADDRESS: Final = 256
MAX_SIGNATURE: Final = 256
"""Characters and bytes; Ed25519 has 64 of these."""

MAX_VERSION: Final = 2**63 - 1

Verify = Callable[[NodeId, bytes, bytes], bool]
"""Whether this node's key made this signature (last) over these bytes."""

Sign = Callable[[bytes], bytes]

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(NodeRecord)


@dataclass(slots=True, frozen=True, eq=False, weakref_slot=True)
class Held:
    """A record that was verified, of `node`. `key` and `stamp` are its node and version in a digest, 8 bytes each."""

    node: NodeId
    record: NodeRecord
    signed: Signed
    key: bytes
    stamp: bytes
    packed: bytes

    def beats(self, other: Held) -> bool:
        """Whether it takes the place of `other`; of two records with one version everybody keeps the same."""
        return (self.stamp, self.signed.record) > (other.stamp, other.signed.record)


def key(node: NodeId) -> bytes:
    """What stands for a node in a digest."""
    return ranking.key(node).to_bytes(8, "big")


def stamp(version: int) -> bytes:
    """What stands for a version in a digest; orders like it."""
    return version.to_bytes(8, "big")


class Archive:
    """The verified records of a process, by `verify`."""

    def __init__(self, verify: Verify) -> None:
        self._verify = verify
        self._opened: WeakValueDictionary[Signed, Held] = WeakValueDictionary()

    def __len__(self) -> int:
        """How many different records are held by somebody."""
        return len(self._opened)

    def open(self, signed: Signed) -> Held:
        """The record in it; raises `ProtocolError` that says what is wrong with it."""
        held = self._opened.get(signed)
        if held is None:
            record = _decoded(signed)
            if not self._verify(record.node, signed.record, signed.signature):
                raise ProtocolError(f"a record of node {record.node} that its key did not sign")
            held = self._keep(record, signed)
        return held

    def own(self, record: NodeRecord, sign: Sign) -> Held:
        """A record that this node makes, without the images and labels that make it too long."""
        data = _encoder.encode(record)
        while len(data) > MAX_RECORD and (record.images or record.labels):
            record = _shorter(record)
            data = _encoder.encode(record)
        return self._keep(record, Signed(data, sign(data)))

    def _keep(self, record: NodeRecord, signed: Signed) -> Held:
        record = structs.replace(record, node=sys.intern(record.node))
        name, version = key(record.node), stamp(record.version)
        held = self._opened[signed] = Held(record.node, record, signed, name, version, name + version)
        return held


def _shorter(record: NodeRecord) -> NodeRecord:
    if record.images:
        return structs.replace(record, images=record.images[: len(record.images) // 2])
    return structs.replace(record, labels={})


def _decoded(signed: Signed) -> NodeRecord:
    if len(signed.record) > MAX_RECORD or len(signed.signature) > MAX_SIGNATURE:
        raise ProtocolError(f"a record of {len(signed.record)} bytes (at most {MAX_RECORD} are allowed)")
    try:
        record = _decoder.decode(signed.record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a record that can't be read: {error}") from error
    if len(record.addresses) > MAX_ADDRESSES or any(len(one) > MAX_ADDRESS for one in record.addresses):
        raise ProtocolError(f"a record of node {record.node} with {len(record.addresses)} addresses, or too long ones")
    if not 0 < record.version <= MAX_VERSION:
        raise ProtocolError(f"a record of node {record.node} with the version {record.version}")
    return record
