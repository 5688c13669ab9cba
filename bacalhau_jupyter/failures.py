"""Failed shards as people read them: equal failures once, each with its place in the cell.

A remote exception never travels as an exception. Its frames come as data, with the line
numbers of the cell, and are drawn here beside the cell's own lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from bacalhau_jupyter.lines import harmless
from bacalhau_node.errors import BacalhauError
from bacalhau_node.messages import Frame, ShardError

E = TypeVar("E", bound=BacalhauError)

MAX_GROUPS = 4
"""Kinds of failure that are shown in full; the rest is counted."""
MAX_NAMED = 8
"""Shards that a line names by number."""
MAX_FRAMES = 16
CONTEXT = 2
"""Lines of the cell above and below the one that raised."""

RED, GREEN, DIM, RESET = "\x1b[31m", "\x1b[32m", "\x1b[2m", "\x1b[0m"

HEADLINES = {
    "exit": "ended with an exit code of its own",
    "signal": "killed by a signal",
    "memory": "killed for memory",
    "timeout": "ran over --timeout",
    "disk": "wrote more than --disk allows",
    "output": "its value could not travel",
    "input": "an input was missing or changed",
    "environment": "what it needs is not there",
    "node": "its node failed",
}


@dataclass(frozen=True)
class FailureGroup:
    """Shards that failed in the same way, in order; `error` is that of the first."""

    error: ShardError
    shards: tuple[int, ...]

    def __str__(self) -> str:
        return told(self.error, self.shards)


@dataclass(frozen=True)
class FailedShard:
    """What is told about one failed shard: where it ran, on what, how it ended, what it printed last."""

    index: int
    node: str = ""
    inputs: tuple[str, ...] = ()
    exit_code: int = 0
    attempts: int = 1
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f" and {len(self.inputs) - 1:,} more" if len(self.inputs) > 1 else ""
        facts = (
            f"on {self.node}" if self.node else "",
            f"input {_printable(self.inputs[0])}{more}" if self.inputs else "",
            f"exit code {self.exit_code}" if self.exit_code else "",
            f"{self.attempts} attempts" if self.attempts > 1 else "",
        )
        return ", ".join(filter(None, facts))


@dataclass(frozen=True)
class CellText:
    """The cell that was sent: its number in the notebook and its lines, the magic's line included."""

    number: int | None = None
    lines: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As IPython names it in its own tracebacks."""
        return "Cell" if self.number is None else f"Cell In[{self.number}]"


@dataclass
class Failures:
    """Collects failures one by one and keeps equal ones together, in the order of their first shards."""

    _groups: dict[tuple[object, ...], tuple[ShardError, list[int]]] = field(default_factory=dict)

    def add(self, shard: int, error: ShardError) -> None:
        """`shard` failed with `error`; notes don't make a difference."""
        key = (error.kind, error.name, error.message, error.frames)
        self._groups.setdefault(key, (error, []))[1].append(shard)

    def groups(self) -> tuple[FailureGroup, ...]:
        """The kinds of failure so far."""
        groups = (FailureGroup(error, tuple(sorted(shards))) for error, shards in self._groups.values())
        return tuple(sorted(groups, key=lambda group: group.shards[0]))


def headline(error: ShardError) -> str:
    """One line that says why: `KeyError: 'x'`, `killed for memory: over its limit of 512 MB`."""
    if error.kind == "exception":
        text = f"{error.name}: {error.message}" if error.message else error.name
    else:
        text = error.message or HEADLINES[error.kind]
    return harmless(text.partition("\n")[0])


def told(error: ShardError, shards: Sequence[int]) -> str:
    """The same with the shards: `KeyError: 'x' in shard 3`, `shard 3: killed for memory: give it more`."""
    if error.kind == "exception":
        return f"{headline(error)} in {named(shards)}"
    return f"{named(shards)}: {headline(error)}"


def named(shards: Sequence[int]) -> str:
    """`shard 7`, or how many and which: `37 shards (3, 7, 12, …)`."""
    if len(shards) == 1:
        return f"shard {shards[0]}"
    return f"{len(shards):,} shards ({numbers(shards)})"


def _printable(path: str) -> str:
    return path if path.isprintable() else repr(path)


def numbers(shards: Sequence[int]) -> str:
    """The first few numbers, and a sign when there are more."""
    return ", ".join((*map(str, shards[:MAX_NAMED]), *("…",) * (len(shards) > MAX_NAMED)))


def explain(
    groups: Sequence[FailureGroup], shards: Mapping[int, FailedShard], cell: CellText, *, printed: bool
) -> list[str]:
    """Lines of a traceback: each kind of failure with its place in the cell and its first shard.

    `printed`: the shards' lines are in the cell already, so only what they did is shown.
    """
    lines: list[str] = []
    for group in groups[:MAX_GROUPS]:
        shard = shards.get(group.shards[0], FailedShard(group.shards[0]))
        which = f"shard {shard.index}: " if len(group.shards) > 1 else ""
        lines += [
            str(group).replace(headline(group.error), f"{RED}{headline(group.error)}{RESET}", 1),
            f"  {which}{shard}",
        ]
        lines += group.error.message.split("\n")[1:]
        lines += [line for frame in _worth_showing(group.error.frames) for line in _drawn(frame, cell)]
        lines += group.error.notes
        if shard.lines and not printed:
            lines += [f"last lines of shard {shard.index}:", *(f"    {line}" for line in shard.lines)]
        lines.append("")
    if len(groups) > MAX_GROUPS:
        rest = groups[MAX_GROUPS:]
        count = sum(len(group.shards) for group in rest)
        lines += [f"{len(rest)} more kinds of failure in {count:,} shards", ""]
    return list(map(harmless, lines))


def _worth_showing(frames: Sequence[Frame]) -> Iterable[Frame]:
    """All frames, or the outermost and innermost of a deep stack."""
    if len(frames) <= MAX_FRAMES:
        return frames
    half = MAX_FRAMES // 2
    return (*frames[:half], *frames[-half:])


def _drawn(frame: Frame, cell: CellText) -> list[str]:
    where = f", in {GREEN}{frame.function}{RESET}" if frame.function not in {"", "<module>"} else ""
    if not frame.in_cell:
        return [f"File {frame.file}:{frame.line}{where}", *([f"    {frame.text.strip()}"] if frame.text else [])]
    return [f"{GREEN}{cell.name}{RESET}, line {frame.line}{where}", *_source(frame, cell)]


def _source(frame: Frame, cell: CellText) -> list[str]:
    """The line that raised, with an arrow, between its neighbours."""
    if not 1 <= frame.line <= len(cell.lines):
        return [f"----> {frame.line} {frame.text.strip()}"] if frame.text else []
    first, last = max(1, frame.line - CONTEXT), min(len(cell.lines), frame.line + CONTEXT)
    width = len(str(last))
    return [
        f"{RED}----> {number:>{width}}{RESET} {text}" if number == frame.line else f"      {number:>{width}} {text}"
        for number, text in enumerate(cell.lines[first - 1 : last], first)
    ]


def brief(error: E, lines: Sequence[str] = ()) -> E:
    """`error`, shown by IPython as `lines` and its text: the frames of this package help nobody.

    Anywhere else, `lines` stand below Python's own traceback.
    """
    if not hasattr(error, "_render_traceback_"):
        text = [*lines, f"{RED}{type(error).__name__}{RESET}: {error}"]
        error._render_traceback_ = lambda: text  # type: ignore[attr-defined]
        if lines:
            error.add_note(_colourless(lines).rstrip())
    return error


def _colourless(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    for code in (RED, GREEN, DIM, RESET):
        text = text.replace(code, "")
    return text


def report(error: BacalhauError) -> str:
    """The same as plain text, for a place that shows no traceback."""
    return _colourless(brief(error)._render_traceback_())  # type: ignore[attr-defined]  # set by `brief`


class JobInterrupted(KeyboardInterrupt):
    """Stop was pressed while a cell waited for its job. `job` is its id, None when there was no job yet."""

    def __init__(self, message: str, *, job: str | None = None) -> None:
        super().__init__(message)
        self.job = job

    def _render_traceback_(self) -> list[str]:
        return [f"{RED}JobInterrupted{RESET}: {self}"]
