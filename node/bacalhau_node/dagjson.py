"""Canonical DAG-JSON: one value, one spelling, so equal values have equal CIDs. Pure.

Maps are sorted by key and written without blanks; a `Link` is `{"/": "cid"}` and bytes are
`{"/": {"bytes": "base64 without padding"}}`; floats keep a point or an exponent, integers have
neither. What has no such spelling (NaN, infinities, keys that are not text, a key "/", integers over 64
bits, lone surrogates) is refused, never bent.
"""

from __future__ import annotations

import binascii
import math
from typing import Any

import msgspec

from bacalhau_node.errors import ContentError, SpecError

MAX_DEPTH = 128
"""Levels of maps and lists: bounds the recursion, for what we write and for what others sent."""

_INT64 = 2**63  # wider integers are legal DAG-JSON, but few readers keep them exact

_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder()


class Link(msgspec.Struct, frozen=True, gc=False):
    """A link to another block, by the text of its CID."""

    cid: str

    def __str__(self) -> str:
        return self.cid


def encode(value: Any) -> bytes:
    """`value` as canonical DAG-JSON.

    `value` is made of None, bool, int, float, str, bytes, `Link`, list, tuple and dict with text keys.
    Raises `SpecError` for anything else.
    """
    try:
        return _encoder.encode(_plain(value, MAX_DEPTH))
    except UnicodeEncodeError as error:
        raise SpecError(f"this value has no DAG-JSON form: {error}") from error


def decode(data: bytes) -> Any:
    """The value in `data`: dict, list, str, int, float, bool, None, bytes and `Link`; raises `ContentError`."""
    try:
        return _rich(_decoder.decode(data), MAX_DEPTH)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContentError(f"not a DAG-JSON block: {error}") from error


def _plain(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind is str or kind is bool or value is None or (kind is int and -_INT64 <= value < 2 * _INT64):
        return value
    if kind is Link:
        return {"/": value.cid}
    if kind is bytes:
        return {"/": {"bytes": _to_base64(value)}}
    if depth == 0:
        raise SpecError(f"this value has no DAG-JSON form: it is nested over {MAX_DEPTH} levels")
    if kind is dict:
        return {_key(key): _plain(item, depth - 1) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [_plain(item, depth - 1) for item in value]
    if kind is float and math.isfinite(value):
        return value
    raise SpecError(f"this value has no DAG-JSON form: {value!r:.80} ({kind.__name__})")


def _key(key: object) -> str:
    if type(key) is not str or key == "/":
        raise SpecError(f"this value has no DAG-JSON form: {key!r:.80} as a key of a map")
    return key


def _rich(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind is dict:
        _deeper(depth)
        if "/" in value:
            return _special(value)
        return {key: _rich(item, depth - 1) for key, item in value.items()}
    if kind is list:
        _deeper(depth)
        return [_rich(item, depth - 1) for item in value]
    return value


def _deeper(depth: int) -> None:
    if depth == 0:
        raise ContentError(f"not a DAG-JSON block: it is nested over {MAX_DEPTH} levels")


def _special(value: dict[str, Any]) -> Link | bytes:
    match value:
        case {"/": str(cid), **rest} if not rest:
            return Link(cid)
        case {"/": {"bytes": str(text), **more}, **rest} if not more and not rest:
            return _from_base64(text)
        case _:
            raise ContentError(f"not a DAG-JSON block: {value!r:.80} is neither a link nor bytes")


def _to_base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).rstrip(b"=").decode("ascii")


def _from_base64(text: str) -> bytes:
    try:
        data = binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError as error:  # binascii.Error is one; so is text that is not ASCII
        raise ContentError(f"not a DAG-JSON block: {text[:40]!r} is not base64") from error
    if _to_base64(data) != text:  # padding, or bits beyond the last byte
        raise ContentError(f"not a DAG-JSON block: {text[:40]!r} is not canonical base64")
    return data
