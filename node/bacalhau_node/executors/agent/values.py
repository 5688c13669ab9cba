"""The value of a cell, in the first form that fits it: a table, an array, JSON, a picture, its `repr`."""

from __future__ import annotations

import io
import json
import math
import os
import sys

from .pictures import drawn_figure, encode_mime
from .tables import encode_table
from .travel import INLINE, CannotTravel, Muted, Value, is_a
from .words import safe_message, safe_repr, shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .frames import Header

EXTENSION = {"json": "json", "arrow": "arrow", "npy": "npy", "bytes": "bin", "mime": "mime.json", "repr": "txt"}

SCALAR = (int, str, bool, float)
"""What JSON gives back as it was, whatever the value."""
PLAIN = (*SCALAR, list, tuple, dict)
"""What is neither a table nor an array nor a picture."""


def travelling(value: Any, scratch: str) -> tuple[Header, bytes]:
    """Header and body of a value; a large one goes to a file, under its final name only when it is whole."""
    try:
        encoded = encode_value(value)
    except CannotTravel:
        raise
    except Exception as error:  # the user's own object, and the libraries that write it
        text = "the cell's value, a %s, can't travel: %s: %s"
        reason = shorten(safe_message(error), 1000)
        raise CannotTravel(text % (type(value).__name__, type(error).__name__, reason)) from error
    head: Header = {"kind": encoded.kind, "type": encoded.type}
    if encoded.write is None and len(encoded.data) <= INLINE:
        return {"exit_code": 0, "value": head}, encoded.data
    head["file"] = "value." + EXTENSION[encoded.kind]
    target = os.path.join(scratch, head["file"])
    os.makedirs(scratch, exist_ok=True)
    if encoded.write is not None:
        encoded.write(target + ".part")
    else:
        with open(target + ".part", "wb") as file:
            file.write(encoded.data)
    os.rename(target + ".part", target)
    return {"exit_code": 0, "value": head}, b""


def encode_value(value: Any) -> Value:
    """`value` in the first form that fits it; what pyplot has drawn where none fits, as a notebook would show.

    Raises `CannotTravel` for a table that Arrow can't hold.
    """
    name = type(value).__name__
    if value is Muted:
        return Value("none", "NoneType")
    if value is None:
        return encode_mime(drawn_figure(), "Figure") or Value("none", "NoneType")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Value("bytes", name, bytes(value))
    plain = type(value) in PLAIN
    for attempt in (encode_json,) if plain else (encode_table, encode_array, encode_json, encode_mime):
        result = attempt(value, name)
        if result is not None:
            return result
    return encode_mime(drawn_figure(), "Figure") or Value(
        "repr", name, safe_repr(value).encode("utf-8", "backslashreplace")
    )


def encode_array(value: Any, _name: str) -> Value | None:
    """NumPy arrays of plain numbers, strings, times or records."""
    if not is_a(value, "numpy", "ndarray") or value.dtype.hasobject:
        return None
    np = sys.modules["numpy"]
    if value.nbytes <= INLINE // 2:
        sink = io.BytesIO()
        np.save(sink, value, allow_pickle=False)
        return Value("npy", "ndarray", sink.getvalue())

    def write(path: str) -> None:
        with open(path, "wb") as file:
            np.save(file, value, allow_pickle=False)

    return Value("npy", "ndarray", write=write)


def encode_json(value: Any, name: str) -> Value | None:
    """What JSON gives back equal: NumPy's scalars become Python's, tuples become lists, NaN and infinity stay."""
    if not isinstance(value, (bool, int, float, str, list, tuple, dict)) and not is_a(value, "numpy", "generic"):
        return None
    try:
        text = dumps(value)
        exact = type(value) in SCALAR or same(value, json.loads(text))
        return Value("json", name, text.encode()) if exact else None
    except (TypeError, ValueError, RecursionError, OverflowError):
        return None


def dumps(value: Any) -> str:
    """JSON; the encoder that knows NumPy is made only where it is needed."""
    try:
        return json.dumps(value)
    except TypeError:
        return json.dumps(value, default=plain_scalar)


def plain_scalar(item: Any) -> Any:
    """Python's own form of one of NumPy's scalars."""
    if is_a(item, "numpy", "generic"):
        return item.item()
    raise TypeError(type(item).__name__)


def same(value: Any, back: Any) -> bool:
    """Whether `back`, read from JSON, is what `value` was; NaN is NaN, a tuple is a list."""
    if isinstance(value, dict):
        return (
            type(back) is dict
            and len(value) == len(back)
            and all(isinstance(key, str) and key in back and same(item, back[key]) for key, item in value.items())
        )
    if isinstance(value, (list, tuple)):
        return type(back) is list and len(value) == len(back) and all(map(same, value, back))
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(back) in (bool, str, type(None)) and bool(value == back)
    return bool(value == back) or (math.isnan(value) and math.isnan(back))
