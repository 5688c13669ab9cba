"""Plain values of shards as the rows of one DataFrame: scalars, dicts, lists, arrays, Series."""

# ruff: noqa: PLC0415 - pandas is imported when there is something to show in it

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bacalhau_node.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    import pandas as pd

WIDEST = 10_000
"""Columns that one Series may become; a longer one was meant as rows."""
VALUE = "value"
"""The column of values that have no name."""

Row = dict[Any, Any]


def rows_of(value: Any, kind: str, shard: int) -> list[Row]:
    """The rows of one shard's value: `kind` is "row", "rows", "series", "array" or "scalar" (see `result`)."""
    match kind:
        case "row":
            return [value]
        case "rows":
            return [item if isinstance(item, dict) else {VALUE: item} for item in value]
        case "series":
            return [_series_row(value, shard)] if hasattr(value, "index") else [{VALUE: item} for item in value]
        case "array":
            return list(_array_rows(value))
        case _:
            return [{VALUE: value}]


def frame(rows: Sequence[tuple[int, Row]]) -> pd.DataFrame:
    """The rows, each with its shard, as a frame numbered anew; raises `SpecError` for columns whose types clash."""
    import pandas as pd

    _check_kinds(rows)
    return pd.DataFrame([row for _, row in rows])


def _series_row(series: pd.Series, shard: int) -> Row:
    if len(series) > WIDEST:
        raise SpecError(
            f"shard {shard} returned a Series of {len(series):,} values, and a Series becomes one row; for many rows "
            "end the cell with .reset_index() or .to_frame()"
        )
    if not series.index.is_unique:
        label = series.index[series.index.duplicated()][0]
        raise SpecError(
            f"shard {shard} returned a Series with the label {label!r} twice, and a Series becomes one row; end the "
            "cell with .reset_index() for many rows"
        )
    return dict(zip(series.index.tolist(), series.tolist(), strict=True))


def _array_rows(array: Any) -> Iterator[Row]:
    if array.ndim == 0:
        yield {VALUE: array.item()}
    elif getattr(array.dtype, "names", None):
        yield from (dict(zip(array.dtype.names, item, strict=True)) for item in array.tolist())
    elif array.ndim == 1:
        yield from ({VALUE: item} for item in array)
    else:
        yield from (dict(enumerate(item)) for item in array)


def _check_kinds(rows: Sequence[tuple[int, Row]]) -> None:
    """Refuse a column that holds, say, numbers in one shard and text in another; within one shard it may."""
    seen: dict[Hashable, tuple[str, int]] = {}
    for shard, row in rows:
        for name, item in row.items():
            kind = _kind(item)
            first, where = seen.setdefault(name, (kind, shard)) if kind else ("", shard)
            if first != kind and where != shard:
                raise SpecError(f"column {name!r}: {first} in shard {where}, {kind} in shard {shard}; make it one type")


def _kind(item: Any) -> str:
    """What a value counts as; empty for a missing one."""
    name = type(item).__name__
    if name in ("NoneType", "NAType", "NaTType") or (isinstance(item, float) and math.isnan(item)):
        return ""
    return "a number" if name.startswith(("int", "float", "uint")) else {"bool_": "bool"}.get(name, name)
