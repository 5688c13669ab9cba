"""Messages as bytes: one version byte, then MessagePack. Anything else is the sender's fault.

A message is at most `MAX_MESSAGE` bytes on either side, so a peer can neither send nor be
made to build a larger one. A newer version byte is refused by name, never guessed at.
"""

from __future__ import annotations

from typing import cast

import msgspec

from bacalhau_node.errors import BugError, ProtocolError, SpecError
from bacalhau_node.messages import Message

VERSION = 1
MAX_MESSAGE = 4 * 1024 * 1024

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """`message` as bytes; raises `BugError` when it is over `MAX_MESSAGE` (the maker has to split it)."""
    body = _encoder.encode(message)
    if len(body) >= MAX_MESSAGE:
        raise BugError(f"a {type(message).__name__} message of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
    return bytes((VERSION,)) + body


def decode(data: bytes) -> Message:
    """The message in `data`; raises `ProtocolError` for anything that is not exactly one."""
    if not data or len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(data)} bytes (1 to {MAX_MESSAGE} are allowed)")
    if data[0] != VERSION:
        raise ProtocolError(f"message version {data[0]}, this node speaks {VERSION}")
    try:
        return cast("Message", _decoder.decode(memoryview(data)[1:]))
    except (msgspec.DecodeError, SpecError, UnicodeDecodeError, RecursionError) as error:  # where garbage arrives
        raise ProtocolError(f"not a message: {error}") from error
