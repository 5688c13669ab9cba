"""What a job returned: one value for each shard, and all of them as one DataFrame.

Nothing is read before somebody asks for it; tables on this machine are mapped, never copied.
`df()` joins in the order of the shards. Tables (of pandas, polars, Arrow) are joined as `join`
says; a dict becomes a row, a list one row for each item, an array one row for each item of its
first axis, a Series one row by its index, anything simpler a row of the column `value`. Shards
that returned None are left out. What they returned has to be of one kind.
"""

# ruff: noqa: PLC0415 - pyarrow is imported when there is something to join

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bacalhau_jupyter import join, rows, values
from bacalhau_node.errors import ContentError, JobFailed, SpecError
from bacalhau_node.messages import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    import pyarrow as pa

    from bacalhau_node.messages import Blob, ShardError

SHARD_COLUMN = "_shard"
"""Where `df(shard=True)` says which shard a row came from."""
WIDE = 50
"""Columns up to which a joined frame keeps them apart, which spares a copy; beyond, pandas would warn of it."""
_SHOWN = 5
"""Shards whose values a Result shows."""
_LINE = 100
"""Characters of a value that a line shows."""
_COUNTED = 64_000_000
"""Bytes of tables up to which a Result opens all of them to show the number of rows."""


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What one shard left: its value and the CID of its folder of outputs, or its error. `inputs` are logical paths.

    `foreign`: it ran on another node than the one that was asked, whose value is taken for anything (see `values`).
    """

    index: int
    value: Value = field(default_factory=Value)
    outputs: str | None = None
    inputs: tuple[str, ...] = ()
    error: ShardError | None = None
    foreign: bool = False


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How to get at what is stored: `blob` as bytes or as a file to map; `folder` as a local copy of a CID."""

    blob: Callable[[Blob], bytes | Path]
    folder: Callable[[str], Path]


class Result:
    """The values of a job. `len`, `[i]` and iteration go by shard; `[i]` of a failed shard raises `JobFailed`."""

    def __init__(self, shards: Sequence[ShardResult], reader: Reader, *, cid: str = "") -> None:
        self._shards = sorted(shards, key=lambda shard: shard.index)
        self._reader = reader
        self.cid = cid
        """The CID of the whole result."""

    # --- by shard ---

    @property
    def failed(self) -> tuple[int, ...]:
        """The shards that have no value because they failed."""
        return tuple(shard.index for shard in self._shards if shard.error)

    @property
    def partial(self) -> bool:
        """Whether shards are missing."""
        return bool(self.failed)

    def values(self) -> list[Any]:
        """The value of every shard that did not fail, in order."""
        return list(self)

    def files(self) -> list[Path]:
        """Every file that the shards wrote to `outputs`, fetched to this machine, by shard and path."""
        folders = [self._reader.folder(shard.outputs) for shard in self._shards if shard.outputs and not shard.error]
        return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[Any]:
        return (self._value(shard) for shard in self._finished())

    def __getitem__(self, index: int) -> Any:
        shard = self._shards[index]
        if shard.error:
            raise JobFailed(f"shard {shard.index} failed: {shard.error.name}: {shard.error.message}")
        return self._value(shard)

    def _finished(self) -> list[ShardResult]:
        return [shard for shard in self._shards if not shard.error]

    def _data(self, shard: ShardResult) -> bytes | Path:
        inline = shard.value.blob.inline
        return self._reader.blob(shard.value.blob) if inline is None else inline

    def _value(self, shard: ShardResult) -> Any:
        return values.decode(shard.value.kind, shard.value.type, self._data(shard), foreign=shard.foreign)

    def _table(self, shard: ShardResult) -> pa.Table:
        try:
            return values.read_table(self._data(shard), foreign=shard.foreign)
        except ContentError as error:
            raise ContentError(f"the value of shard {shard.index}: {error}") from error

    # --- as one ---

    def df(self, *, shard: bool = False) -> pd.DataFrame:
        """All values as one DataFrame; with `shard`, the column `_shard` says where a row came from.

        Raises `SpecError` when the values are not of one kind, or a column's types clash.
        """
        import numpy as np

        kind, having = self._kind()
        if kind == "table":
            parts = self._parts(having)
            frame = _to_pandas(join.join(parts))
            counts = [(part.shard, part.table.num_rows) for part in parts]
        else:
            made = [(one.index, row) for one in having for row in rows.rows_of(self._value(one), kind, one.index)]
            frame = rows.frame(made)
            counts = [(index, 1) for index, _ in made]
        if shard:
            frame.insert(0, SHARD_COLUMN, np.repeat(*np.array(counts, dtype="int64").reshape(-1, 2).T))
        return frame

    def arrow(self) -> pa.Table:
        """All values as one Arrow table, joined like `df()`."""
        import pyarrow as pa

        kind, having = self._kind()
        if kind == "table":
            return join.join(self._parts(having))
        return pa.Table.from_pandas(self.df(), preserve_index=False)

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The joined table for any library that speaks Arrow."""
        return self.arrow().__arrow_c_stream__(requested_schema)

    def _kind(self) -> tuple[str, list[ShardResult]]:
        """(the one kind of all values, the shards that have one); raises `SpecError` naming two that differ."""
        having = [shard for shard in self._finished() if shard.value.kind != "none"]
        if not having:
            raise SpecError(
                "no shard returned a value: end the cell with an expression, such as the name of a frame, and no ';'"
            )
        kinds = [self._kind_of(shard) for shard in having]
        for kind, shard in zip(kinds, having, strict=True):
            if kind == "other":
                raise SpecError(
                    f"shard {shard.index} returned {_named(shard.value.type)}, which has no rows; "
                    "result.values() has the values as they are"
                )
            if kind != kinds[0]:
                raise SpecError(
                    f"shard {having[0].index} returned {_named(having[0].value.type)}, shard {shard.index} "
                    f"{_named(shard.value.type)}; for one DataFrame all must return the same kind (or None). "
                    "result.values() has them as they are"
                )
        return kinds[0], having

    def _kind_of(self, shard: ShardResult) -> str:
        match shard.value.kind:
            case "arrow":
                return {"Series": "series", "Index": "array"}.get(shard.value.type, "table")
            case "npy":
                return "array"
            case "json":
                return _JSON_KINDS.get(self._first_byte(shard), "number")
            case _:
                return "other"

    def _first_byte(self, shard: ShardResult) -> bytes:
        data = self._data(shard)
        if isinstance(data, bytes):
            return data[:1]
        with data.open("rb") as file:
            return file.read(1)

    def _parts(self, having: Sequence[ShardResult]) -> list[join.Part]:
        return [join.Part(shard.index, self._table(shard)) for shard in having]

    # --- shown ---

    def __repr__(self) -> str:
        shown = [f"  shard {shard.index}: {self._short(shard)}" for shard in self._finished()[:_SHOWN]]
        return "\n".join([self._sentence(), *shown, *(f"  {line}" for line in self._hidden())])

    def _repr_html_(self) -> str:
        parts = [f"<div>{html.escape(self._sentence())}</div>"]
        for shard in self._finished()[:_SHOWN]:
            more = f" and {len(shard.inputs) - 2} more" if len(shard.inputs) > 2 else ""
            title = f"shard {shard.index}{': ' if shard.inputs else ''}{', '.join(shard.inputs[:2])}{more}"
            parts.append(f"<div><b>{html.escape(title)}</b> {self._html(shard)}</div>")
        return "\n".join([*parts, *(f"<div>{html.escape(line)}</div>" for line in self._hidden())])

    def _sentence(self) -> str:
        done = self._finished()
        kinds = sorted({shard.value.type for shard in done if shard.value.kind != "none"})
        silent = sum(shard.value.kind == "none" for shard in done)
        tables = [shard for shard in done if shard.value.kind == "arrow" and self._kind_of(shard) == "table"]
        facts = [f"{len(self)} shard{'s' * (len(self) != 1)}", ", ".join(kinds)]
        if tables and sum(shard.value.blob.size for shard in tables) <= _COUNTED:
            facts.append(f"{sum(part.table.num_rows for part in self._parts(tables)):,} rows")
        facts += [f"{silent} without a value"] if silent else []
        facts += [f"{len(self.failed)} failed"] if self.failed else []
        return f"Result: {' · '.join(fact for fact in facts if fact)}"

    def _hidden(self) -> list[str]:
        """What is not shown, and how to see it."""
        more = len(self._finished()) - _SHOWN
        lines = [f"… {more} more: result.df() joins them, result.values() lists them"] if more > 0 else []
        if self.failed:
            some = ", ".join(map(str, self.failed[:_SHOWN]))
            lines.append(f"failed: {some}{', …' if len(self.failed) > _SHOWN else ''}")
        return lines

    def _short(self, shard: ShardResult) -> str:
        """One line about a value; a large one is named, not read."""
        if shard.value.kind == "arrow":
            table = self._table(shard)
            names = table.column_names
            shown = ", ".join(names[:8]) + ("…" if len(names) > 8 else "")
            return f"{shard.value.type}, {table.num_rows:,} rows × {table.num_columns} columns ({shown})"
        if shard.value.kind in ("npy", "bytes") or shard.value.blob.size > _LINE * 100:
            return f"{shard.value.type}, {shard.value.blob.size:,} bytes"
        value = self._value(shard)
        remark = f"  # {value.remark}" if isinstance(value, values.Repr) else ""
        text = " ".join((str(value) if remark else repr(value)).split())
        return (text if len(text) <= _LINE else f"{text[:_LINE]}…") + remark

    def _html(self, shard: ShardResult) -> str:
        """A drawing as itself, the beginning of a table, anything else as its line."""
        if shard.value.kind == "mime":
            drawn = self._value(shard).as_html()
            if drawn:
                return f"<div>{drawn}</div>"
        if shard.value.kind == "arrow" and self._kind_of(shard) == "table":
            table = self._table(shard)
            head = table.slice(0, _SHOWN).to_pandas().to_html(max_cols=12, border=0)
            return f"{head}<div>{table.num_rows:,} rows × {table.num_columns} columns</div>"
        return f"<code>{html.escape(self._short(shard))}</code>"


def reduce(expression: str, frame: pd.DataFrame, namespace: Mapping[str, object]) -> Any:
    """The value of `--reduce`: `expression` over the joined `frame`, called `df`, among the notebook's names.

    Raises `SpecError` that shows the expression, what it raised, and the columns there were.
    """
    import numpy as np
    import pandas as pd

    try:
        return eval(expression, {"pd": pd, "np": np, **namespace, "df": frame})  # noqa: S307  the user's own expression
    except Exception as error:  # the user's expression may raise anything
        columns = ", ".join(map(str, frame.columns))
        raise SpecError(
            f"--reduce {expression}: {type(error).__name__}: {error}; df has the columns {columns}"
        ) from error


_JSON_KINDS = {b"{": "row", b"[": "rows", b'"': "str", b"t": "bool", b"f": "bool"}


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    """One copy of every column. Kept apart only where that copy is made: a lone chunk would come out read-only."""
    chunks = min((column.num_chunks for column in table.columns), default=0)
    frame: pd.DataFrame = table.to_pandas(split_blocks=chunks > 1 and table.num_columns <= WIDE)
    return frame


def _named(name: str) -> str:
    return f"an {name}" if name[:1].lower() in "aeio" else f"a {name}"
