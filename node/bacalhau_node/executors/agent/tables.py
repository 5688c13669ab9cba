"""Tables as Arrow: frames, Series and indexes of pandas, frames of polars, tables of pyarrow; there and back."""

from __future__ import annotations

import json

from .travel import INLINE, CannotTravel, Value, is_a
from .words import shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .frames import Header

MARK = b"bacalhau"
"""Schema metadata of an Arrow file: {"library", "type", "named"} of the value that it was written from."""


def encode_table(value: Any, name: str) -> Value | None:
    """Frames, Series and indexes of pandas, frames of polars, Arrow tables, and what exports itself as one."""
    pandas = is_a(value, "pandas", "DataFrame", "Series", "Index")
    known = pandas or is_a(value, "pyarrow", "Table", "RecordBatch") or is_a(value, "polars", "DataFrame", "Series")
    if not known and (isinstance(value, type) or not hasattr(value, "__arrow_c_stream__")):
        return None
    try:
        import pyarrow as pa
    except ImportError:
        raise CannotTravel(
            "a %s travels as an Arrow table, and pyarrow is not installed where the shard ran: add --require pyarrow, "
            "or end the cell with plain values (.to_dict())" % name
        ) from None
    table = pandas_table(pa, value) if pandas else arrow_table(pa, value)
    kind = next((one for one in ("Series", "Index") if is_a(value, "pandas", one)), name)
    if table.nbytes <= INLINE:
        sink = pa.BufferOutputStream()
        write_ipc(pa, table, sink)
        return Value("arrow", kind, sink.getvalue().to_pybytes())
    return Value("arrow", kind, write=lambda path: write_ipc(pa, table, path))


def write_ipc(pa: Any, table: Any, sink: Any) -> None:
    """An Arrow IPC file, uncompressed so that it can be mapped."""
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def arrow_table(pa: Any, value: Any) -> Any:
    """Anything that knows Arrow, as a table marked with its library."""
    if is_a(value, "polars", "Series"):
        value = value.to_frame()
    library = type(value).__module__.split(".")[0]
    table = value.to_arrow() if library == "polars" else pa.table(value)
    return marked(table, {"library": library, "type": type(value).__name__})


def pandas_table(pa: Any, value: Any) -> Any:
    """A frame, Series or Index of pandas as a table with its metadata; raises `CannotTravel` with the column's name."""
    frame = value
    mark: Header = {"library": "pandas", "type": "DataFrame"}
    if is_a(value, "pandas", "Series"):
        frame, mark = value.to_frame(), {"library": "pandas", "type": "Series", "named": value.name is not None}
    elif is_a(value, "pandas", "MultiIndex"):  # a level without a name gets the one that pandas gives it as a column
        levels = ["level_%d" % at if level is None else level for at, level in enumerate(value.names)]
        frame, mark = value.to_frame(index=False, name=levels), {"library": "pandas", "type": "Index", "named": True}
    elif is_a(value, "pandas", "Index"):
        frame = value.to_frame(index=False)
        mark = {"library": "pandas", "type": "Index", "named": value.name is not None}
    try:
        return marked(pa.Table.from_pandas(frame), mark)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError) as error:
        raise CannotTravel(table_problem(pa, frame, error)) from None


def marked(table: Any, mark: Header) -> Any:
    """The table with our line in its schema's metadata."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), MARK: json.dumps(mark).encode()})


def table_problem(pa: Any, frame: Any, error: BaseException) -> str:
    """Which column of a frame stopped it, and what to do."""
    if frame.columns.has_duplicates:
        twice = frame.columns[frame.columns.duplicated()][0]
        return "two columns are called %r: rename one, a table's columns need names of their own" % (twice,)
    for position, label in enumerate(frame.columns):
        column = frame.iloc[:, position]
        try:
            pa.Array.from_pandas(column)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError) as reason:
            kinds = sorted({type(item).__name__ for item in column.iloc[:1000]})
            return (
                "column %r holds values that a table can't hold together (%s): %s. Convert it first, for example "
                "df[%r] = df[%r].astype(str)" % (label, ", ".join(kinds[:5]), shorten(str(reason), 300), label, label)
            )
    return "the frame can't travel as a table: %s. Convert its index with reset_index()" % shorten(str(error), 300)


def read_arrow(path: str) -> Any:
    """A table, as what it was written from: a frame, a Series or an Index of pandas, a frame of polars."""
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    metadata = table.schema.metadata or {}
    mark = json.loads(metadata.get(MARK, b"{}"))
    if mark.get("library") == "polars":
        import polars as pl  # type: ignore[import-not-found]  # only where the environment has it

        return pl.from_arrow(table)
    if b"pandas" not in metadata:
        return table
    frame = table.to_pandas()
    if mark.get("type") not in ("Series", "Index"):
        return frame
    column = frame.iloc[:, 0]
    column.name = column.name if mark.get("named") else None
    if mark["type"] == "Series":
        return column
    import pandas as pd

    return pd.Index(column, name=column.name) if frame.shape[1] == 1 else pd.MultiIndex.from_frame(frame)
