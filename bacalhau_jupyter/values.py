"""Values that travel: notebook variables into a bundle, values of shards back into Python. Never pickle.

The formats are those of `messages.Value`; the agent reads and writes the same ones. An Arrow file
says in its schema's metadata, under `MARK`, what it was written from: {"library", "type", "named"}.
pandas and pyarrow are imported when the first value needs them.

Whoever ran a shard wrote its value. One that is `foreign`, of another node than the one that the notebook talks to, is
taken for anything: its lengths may lie (Arrow reads where they point, and the kernel dies), and its HTML may hold
scripts, which a page would run with all that its user may do.
"""

# ruff: noqa: PLC0415 - pandas, numpy and pyarrow are imported when the first value needs them

from __future__ import annotations

import base64
import html
import importlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bacalhau_node.errors import ContentError, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    import pyarrow as pa

    from bacalhau_node.messages import ValueKind

MARK = b"bacalhau"
_FRAME = "width: 100%; height: 24em; border: 0"
LIMIT = 1_000_000_000
"""Bytes of one variable: the bundle is built in memory, and a larger one belongs into a file and `--with`."""


class Repr(str):
    """The `repr` of a value that could not travel: what the shard would have shown, and only that."""

    __slots__ = ("type",)
    type: str

    def __new__(cls, text: str, type_name: str) -> Self:
        """`text` is the repr, `type_name` the type of the value that stayed in the shard."""
        self = super().__new__(cls, text)
        self.type = type_name
        return self

    @property
    def remark(self) -> str:
        """What is to be known of it."""
        return f"repr of a {self.type}; the object itself stayed in the shard"

    def __repr__(self) -> str:
        return f"{self!s}  # {self.remark}"


@dataclass(frozen=True)
class Drawing:
    """A figure or another object that a shard showed: MIME type -> text, or bytes for pictures."""

    type: str
    data: dict[str, str | bytes]

    def contained(self) -> Drawing:
        """The same without what could act: pictures, text, and HTML in a frame that runs no scripts."""
        text, plain = self.as_html(), self.data.get("text/plain")
        if text and self._picture() is None:
            text = f'<iframe sandbox srcdoc="{html.escape(text)}" style="{_FRAME}"></iframe>'
        shown = {"text/html": text} if text else {}
        return Drawing(self.type, {**shown, "text/plain": plain if isinstance(plain, str) else repr(self)})

    def _repr_mimebundle_(self, **_options: object) -> dict[str, Any]:
        return {
            kind: base64.b64encode(part).decode() if isinstance(part, bytes) else part
            for kind, part in self.data.items()
        }

    def as_html(self) -> str:
        """HTML that shows it: a picture as data, else its own HTML; empty if it has neither."""
        if (picture := self._picture()) is not None:
            kind, part = picture
            raw = part if isinstance(part, bytes) else part.encode()
            return f'<img alt="{html.escape(self.type)}" src="data:{kind};base64,{base64.b64encode(raw).decode()}">'
        own = self.data.get("text/html", "")
        return own if isinstance(own, str) else ""

    def _picture(self) -> tuple[str, str | bytes] | None:
        kinds = ("image/png", "image/jpeg", "image/svg+xml")
        return next(((kind, self.data[kind]) for kind in kinds if kind in self.data), None)

    def __repr__(self) -> str:
        text = self.data.get("text/plain")
        return text if isinstance(text, str) else f"<{self.type}: {', '.join(self.data)}>"


# --- notebook to job ---


def encode(name: str, value: object) -> tuple[str, bytes]:
    """(extension, bytes) of the notebook's variable `name`; raises `SpecError` for what can't go along."""
    if isinstance(value, bytes | bytearray | memoryview):
        encoded = "bytes", bytes(value)
    elif _is_a(value, "numpy", "ndarray"):
        encoded = "npy", _array(name, value)
    elif _is_table(value):
        encoded = "arrow", _file(_table(name, value))
    else:
        encoded = "json", _json(name, value)
    if len(encoded[1]) > LIMIT:
        raise SpecError(
            f"--vars {name}: {len(encoded[1]):,} bytes; at most {LIMIT:,} can go along. "
            "Write a file and give it by --with"
        )
    return encoded


def _is_a(value: object, module: str, *names: str) -> bool:
    """Whether `value` is of a class of a module that may not even be loaded."""
    loaded = sys.modules.get(module)
    return isinstance(value, tuple(getattr(loaded, name) for name in names if hasattr(loaded, name)))


def _is_table(value: object) -> bool:
    return _is_a(value, "pandas", "DataFrame", "Series", "Index") or hasattr(type(value), "__arrow_c_stream__")


def _array(name: str, value: Any) -> bytes:
    import numpy as np

    if value.dtype.hasobject:
        raise SpecError(f"--vars {name}: an array of Python objects can't go along; give it a dtype, or send .tolist()")
    sink = io.BytesIO()
    np.save(sink, value, allow_pickle=False)
    return sink.getvalue()


def _json(name: str, value: object) -> bytes:
    try:
        _check_plain(value)
        return json.dumps(value, default=lambda item: item.item()).encode()
    except RecursionError as error:
        raise SpecError(f"--vars {name}: it holds itself, or is nested too deep") from error
    except _NotPlainError as error:
        raise SpecError(
            f"--vars {name}: {error} can't go along; send text, numbers, lists, dicts with text as keys, bytes, "
            "an array or a DataFrame, or write a file and give it by --with"
        ) from error


class _NotPlainError(Exception):
    """JSON would not give this back; the text names it."""


def _check_plain(value: object) -> None:
    """Raise unless JSON gives `value` back equal (a tuple as a list, a NumPy number as a number)."""
    if type(value) is dict:
        for key, item in value.items():
            if not isinstance(key, str):
                raise _NotPlainError(f"a dict with {_article(key)} as key ({key!r})")
            _check_plain(item)
    elif type(value) is list or type(value) is tuple:
        for item in value:
            _check_plain(item)
    elif not (value is None or isinstance(value, bool | int | float | str) or _is_a(value, "numpy", *_NUMBERS)):
        raise _NotPlainError(_article(value))


_NUMBERS = ("bool_", "integer", "floating")


def _article(value: object) -> str:
    name = type(value).__name__
    return f"an {name}" if name[:1].lower() in "aeio" else f"a {name}"


def _table(name: str, value: Any) -> pa.Table:
    """`value` as a table, marked with what it was."""
    import pyarrow as pa

    library, kind, named = type(value).__module__.partition(".")[0], type(value).__name__, True
    if _is_a(value, "pandas", "Series", "Index"):
        kind, named = ("Series" if _is_a(value, "pandas", "Series") else "Index"), value.name is not None
        value = value.to_frame() if kind == "Series" else value.to_frame(index=False)
    elif hasattr(value, "to_frame"):
        value = value.to_frame()  # a Series of polars
    try:
        table = pa.Table.from_pandas(value) if _is_a(value, "pandas", "DataFrame") else pa.table(value)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError) as error:
        raise SpecError(f"--vars {name}: this {kind} can't go along as a table: {error}") from error
    mark = json.dumps({"library": library, "type": kind, "named": named}).encode()
    return table.replace_schema_metadata({**(table.schema.metadata or {}), MARK: mark})


def _file(table: pa.Table) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


# --- shard to notebook ---


def decode(kind: ValueKind, type_name: str, data: bytes | Path, *, foreign: bool = False) -> Any:
    """The value that a shard sent; a `Path` is mapped where the format allows it. Raises `ContentError` for damage."""
    try:
        if kind == "arrow":
            return from_table(read_table(data, foreign=foreign), type_name)
        value = _READERS[kind](type_name, data)
        return value.contained() if foreign and isinstance(value, Drawing) else value
    except _DAMAGE as error:
        raise ContentError(f"the value of a shard ({kind}, {type_name}) can't be read: {error}") from error


_DAMAGE = (
    AttributeError,
    ContentError,
    EOFError,
    KeyError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
"""All that damage leads to."""


def _bytes(data: bytes | Path) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data


def _part(kind: str, part: str) -> str | bytes:
    binary = kind.startswith(("image/", "application/pdf", "audio/", "video/")) and not kind.endswith("+xml")
    return base64.b64decode(part) if binary else part


def _read_array(data: bytes | Path) -> Any:
    import numpy as np

    source = data if isinstance(data, Path) else io.BytesIO(data)
    return np.load(source, allow_pickle=False)


def read_table(data: bytes | Path, *, foreign: bool = False) -> pa.Table:
    """The table of an Arrow file, mapped when it lies on disk; raises `ContentError` for one that can't be meant.

    Of a `foreign` one every offset is looked at, which takes as long again as making a frame of text.
    """
    import pyarrow as pa

    source = pa.memory_map(str(data)) if isinstance(data, Path) else pa.BufferReader(data)
    try:
        table = pa.ipc.open_file(source).read_all()
        table.validate(full=foreign)
    except pa.ArrowException as error:
        raise ContentError(f"it can't be read as a table: {error}") from error
    return table


def mark(table: pa.Table) -> dict[str, Any]:
    """What the table was written from; empty for one that came another way."""
    return dict(json.loads((table.schema.metadata or {}).get(MARK, b"{}")))


def from_table(table: pa.Table, type_name: str = "") -> Any:
    """The frame, Series, Index or table that `table` was written from; `type_name` is what the shard called it."""
    made_from = mark(table)
    if made_from.get("library") == "polars":
        frame = importlib.import_module("polars").from_arrow(table)
        return frame.to_series() if "Series" in (type_name, made_from.get("type")) else frame
    if made_from.get("library") != "pandas":
        return table
    frame = table.to_pandas()
    if made_from["type"] == "DataFrame":
        return frame
    column = frame.iloc[:, 0].rename(None) if not made_from["named"] else frame.iloc[:, 0]
    if made_from["type"] == "Series":
        return column
    import pandas as pd

    return pd.MultiIndex.from_frame(frame) if frame.shape[1] > 1 else pd.Index(column, name=column.name)


def _read_drawing(type_name: str, data: bytes | Path) -> Drawing:
    parts = json.loads(_bytes(data))
    return Drawing(type_name, {kind: _part(kind, part) for kind, part in parts.items()})


_READERS: dict[str, Callable[[str, bytes | Path], Any]] = {
    "none": lambda _type, _data: None,
    "json": lambda _type, data: json.loads(_bytes(data)),
    "bytes": lambda _type, data: _bytes(data),
    "repr": lambda type_name, data: Repr(_bytes(data).decode("utf-8", "replace"), type_name),
    "mime": _read_drawing,
    "npy": lambda _type, data: _read_array(data),
}
