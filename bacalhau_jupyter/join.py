"""Tables of shards joined into one, in Arrow, so that pandas makes its columns once.

Theory of operation. `pandas.concat` would convert every shard and copy everything again, and it
decides types by values that happen to be missing. Here the tables (mapped files, most of the time)
are put one behind the other without a copy, after four steps per column:

* what carries no information gives way: tables without rows, and columns that are all missing
  (an empty CSV column reads as float64) take the type that the other shards have;
* categories become a union, or plain values where a shard has no categories;
* integers beside floats become floats, small types grow, units of time become the finer ones;
* anything else (numbers here, text there) is the author's to decide: an error names column and shards.

Indexes: where all are pandas' default numbering, the joined frame is numbered anew; any other
index is kept. What pandas needs to know of dtypes, names and `attrs` is merged from the shards.
"""

# ruff: noqa: PLC0415 - pyarrow is imported when there is something to join

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bacalhau_node.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pyarrow as pa

_PANDAS = b"pandas"
_MASKED = re.compile(r"U?Int\d+|Float\d+|boolean")
"""pandas dtypes with a mask for what is missing: they win over the NumPy dtype of another shard."""


@dataclass(frozen=True)
class Part:
    """The table of one shard."""

    shard: int
    table: pa.Table


def join(parts: Sequence[Part]) -> pa.Table:
    """One table of all rows in the order of `parts` (at least one); raises `SpecError` for types that clash."""
    import pyarrow as pa

    filled = [part for part in parts if part.table.num_rows] or [max(parts, key=lambda part: part.table.num_columns)]
    plans = _with_indexes([_Plan.of(part) for part in filled])
    columns = list(dict.fromkeys(name for plan in plans for name in plan.columns))
    types = {name: _common_type(name, plans) for name in columns}
    tables = [plan.conformed(types) for plan in plans]
    try:
        joined = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise SpecError(f"the tables of the shards don't fit together: {error}") from error
    return joined.replace_schema_metadata(_merged_metadata(plans, joined.schema))


@dataclass(frozen=True)
class _Plan:
    """One shard's table taken apart: columns by name, and what pandas noted about them."""

    shard: int
    columns: dict[str, pa.ChunkedArray]
    notes: dict[str, dict[str, Any]]
    about: dict[str, Any]
    levels: list[tuple[str | None, str | dict[str, Any]]]
    """Levels of the index: (name, the column or the range that holds it)."""

    @classmethod
    def of(cls, part: Part) -> _Plan:
        table = part.table
        about = json.loads((table.schema.metadata or {}).get(_PANDAS, b"{}"))
        notes = {note.get("field_name") or note["name"]: note for note in about.get("columns", ())}
        levels = [_level(held, notes) for held in about.get("index_columns", ())]
        return cls(part.shard, dict(zip(table.column_names, table.columns, strict=True)), notes, about, levels)

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    @property
    def is_numbered(self) -> bool:
        """Whether the index is pandas' default numbering, or there is none."""
        return all(name is None and isinstance(held, dict) for name, held in self.levels)

    def conformed(self, types: Mapping[str, pa.DataType]) -> pa.Table:
        """The columns in types that `concat_tables` can promote to `types`."""
        import pyarrow as pa

        columns = {}
        for name in types.keys() & self.columns.keys():
            try:
                columns[name] = _conformed(self.columns[name], types[name])
            except pa.ArrowException as error:
                raise SpecError(
                    f"column {name!r} of shard {self.shard} doesn't fit into {_word(types[name])}, which the other "
                    f"shards need: {error}"
                ) from error
        return pa.table({name: columns[name] for name in types if name in columns})


def _level(
    held: str | dict[str, Any], notes: Mapping[str, Mapping[str, Any]]
) -> tuple[str | None, str | dict[str, Any]]:
    if isinstance(held, dict):
        return held["name"], held
    name = notes[held]["name"] if held in notes else held
    return name, held


# --- indexes ---


def _with_indexes(plans: Sequence[_Plan]) -> list[_Plan]:
    """The plans with equal index columns, or with none where every index is only a numbering."""
    if all(plan.is_numbered for plan in plans):
        return [_Plan(plan.shard, plan.columns, plan.notes, plan.about, []) for plan in plans]
    first = plans[0]
    for plan in plans:
        if max(1, len(plan.levels)) != max(1, len(first.levels)):
            raise SpecError(
                f"the index has {len(first.levels)} levels in shard {first.shard} and {len(plan.levels)} in shard "
                f"{plan.shard}; end the cell with .reset_index()"
            )
    names = [_common_name(plans, level) for level in range(max(1, len(first.levels)))]
    return [_with_index(plan, names, plans) for plan in plans]


def _common_name(plans: Sequence[_Plan], level: int) -> str | None:
    found = {plan.levels[level][0] if plan.levels else None for plan in plans}
    return found.pop() if len(found) == 1 else None


def _with_index(plan: _Plan, names: Sequence[str | None], plans: Sequence[_Plan]) -> _Plan:
    """`plan` with its index in columns of the same names as in every other plan."""
    levels = plan.levels or [(None, {"start": 0, "step": 1})]
    held_in = {held for _, held in levels if isinstance(held, str)}
    columns = {name: column for name, column in plan.columns.items() if name not in held_in}
    notes = {name: note for name, note in plan.notes.items() if name not in held_in}
    placed: list[tuple[str | None, str | dict[str, Any]]] = []
    for at, ((_, held), name) in enumerate(zip(levels, names, strict=True)):
        place = name if name and not _is_data(name, plans) else f"__index_level_{at}__"
        columns[place] = plan.columns[held] if isinstance(held, str) else _numbers(held, plan.rows)
        kind = plan.notes.get(held, {}) if isinstance(held, str) else {"pandas_type": "int64", "numpy_type": "int64"}
        notes[place] = {**kind, "name": name, "field_name": place, "metadata": kind.get("metadata")}
        placed.append((name, place))
    return _Plan(plan.shard, columns, notes, plan.about, placed)


def _is_data(name: str, plans: Sequence[_Plan]) -> bool:
    return any(name in plan.columns and all(held != name for _, held in plan.levels) for plan in plans)


def _numbers(held: Mapping[str, Any], rows: int) -> pa.ChunkedArray:
    import pyarrow as pa

    start, step = held["start"], held["step"]
    return pa.chunked_array([pa.array(range(start, start + rows * step, step), pa.int64())])


# --- types ---


def _common_type(name: str, plans: Iterable[_Plan]) -> pa.DataType:
    """The type that holds this column of every plan; raises `SpecError` with the two shards that clash."""
    import pyarrow as pa

    having = [(plan.shard, plan.columns[name]) for plan in plans if name in plan.columns]
    told = [(shard, column.type) for shard, column in having if column.null_count < len(column)]
    if not told:
        return having[0][1].type
    if not _share_categories([column for _, column in having if column.null_count < len(column)]):
        told = [(shard, kind.value_type if pa.types.is_dictionary(kind) else kind) for shard, kind in told]
    first, common = told[0]
    for shard, kind in told[1:]:
        if kind != common:
            try:
                common = _wider(common, kind)
            except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
                raise SpecError(
                    f"column {name!r}: {_word(common)} in shard {first}, {_word(kind)} in shard {shard}; make it one "
                    f"type in the cell, for example df[{name!r}] = df[{name!r}].astype(str)"
                ) from error
    return common


def _share_categories(columns: Sequence[pa.ChunkedArray]) -> bool:
    """Whether the columns can stay categories (or have none at all): a union of ordered ones would invent an order."""
    import pyarrow as pa

    categories = [column for column in columns if pa.types.is_dictionary(column.type)]
    if not categories:
        return True
    first = categories[0]
    ordered = any(column.type.ordered for column in categories)
    return len(categories) == len(columns) and (
        not ordered or all(column.type == first.type and _levels_of(column) == _levels_of(first) for column in columns)
    )


def _levels_of(column: pa.ChunkedArray) -> list[Any]:
    levels: list[Any] = column.chunk(0).dictionary.to_pylist()
    return levels


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    schemas = [pa.schema([("x", one)]), pa.schema([("x", other)])]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _conformed(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    import pyarrow as pa

    if column.type == wanted:
        return column
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), wanted)])
    if pa.types.is_dictionary(column.type):
        # with other categories, `concat_tables` makes the union
        return column if pa.types.is_dictionary(wanted) else column.cast(column.type.value_type).cast(wanted)
    # as pandas does it: an integer beyond 2**53 loses its last digits beside floats
    return column.cast(wanted, safe=not pa.types.is_floating(wanted))


def _word(kind: pa.DataType) -> str:
    """The type as a pandas user knows it."""
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "str"
    return {"double": "float64", "float": "float32"}.get(str(kind), str(kind))


# --- what pandas needs to know ---


def _merged_metadata(plans: Sequence[_Plan], schema: pa.Schema) -> dict[bytes, bytes] | None:
    """What pandas notes about the joined table; None where no shard had any."""
    told = [plan for plan in plans if plan.about]
    if not told:
        return None
    attributes = [plan.about.get("attributes") for plan in plans]
    labels = [plan.about.get("column_indexes", []) for plan in told]
    merged = {
        **told[0].about,
        "index_columns": [place for _, place in plans[0].levels],
        "column_indexes": labels[0] if all(each == labels[0] for each in labels) else [],
        "columns": [_merged_note(field, told) for field in schema if any(field.name in plan.notes for plan in told)],
        "attributes": attributes[0] if all(each == attributes[0] for each in attributes) else {},
    }
    return {_PANDAS: json.dumps(merged).encode()}


def _merged_note(field: pa.Field, plans: Iterable[_Plan]) -> dict[str, Any]:
    """One column's note: a masked dtype of any shard, else that of a shard whose type the column has now."""
    having = [plan for plan in plans if field.name in plan.notes]
    notes = [plan.notes[field.name] for plan in having]
    masked = [note for note in notes if _MASKED.fullmatch(note["numpy_type"])]
    name = _masked_name(field.type)
    if masked and name:
        return {**masked[0], "numpy_type": name}
    same = [plan.notes[field.name] for plan in having if plan.columns[field.name].type == field.type]
    return same[0] if same else {**notes[0], "numpy_type": "object", "metadata": None}


def _masked_name(kind: pa.DataType) -> str | None:
    import pyarrow as pa

    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind):
        return f"{'U' if pa.types.is_unsigned_integer(kind) else ''}Int{kind.bit_width}"
    return f"Float{kind.bit_width}" if pa.types.is_floating(kind) else None
