"""The record of a job: what stays in the notebook when the live view is gone. Pure.

It must be readable in a saved notebook without a kernel, in an untrusted one, in an exported
page and in a terminal. JupyterLab's sanitiser drops style elements, inline SVG, `var(--…)` in
styles and ARIA attributes, so the record is a sentence, an image with a text of its own, a
folded table, and a plain line. Its colours are literal and chosen to stand on light and dark.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from bacalhau_jupyter.failures import FailureGroup, Failures, headline, numbers
from bacalhau_jupyter.progress import CODES, DONE, FAILED, LABELS, RETRYING, RUNNING, STOPPED, WAITING, Snapshot
from bacalhau_node.ids import short
from bacalhau_node.literals import inert
from bacalhau_node.protocol.events import FINAL_JOB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bacalhau_node.client import JobView, ShardView, Submission

MAX_ROWS = 200
MAX_TILES = 2000
TOLD_SECONDS = 0.1
"""A job that runs for less time has just begun, and does not say how long it takes."""
COLOURS = {
    WAITING: "#9e9e9e",
    RUNNING: "#1e88e5",
    DONE: "#43a047",
    FAILED: "#e53935",
    STOPPED: "#8d6e63",
    RETRYING: "#fb8c00",
}
_BY_SEVERITY = (FAILED, RETRYING, RUNNING, WAITING, STOPPED, DONE)


@dataclass(frozen=True)
class Place:
    """Where a job runs, as its first line says: `10 shards on this machine (docker, 2 slots)`."""

    name: str = ""
    executor: str = ""
    slots: int | None = None

    def __str__(self) -> str:
        slots = "" if self.slots is None else f", {self.slots} slot{'s' * (self.slots != 1)}"
        return f"{self.name} ({self.executor}{slots})" if self.executor else self.name

    @property
    def brief(self) -> str:
        """Without the slots."""
        return f"{self.name} ({self.executor})" if self.executor else self.name


@dataclass(frozen=True)
class Record:
    """What is known of a job at one moment. `seconds`: from submission to now or the end, None if nobody measured.

    `shards` is empty where only the live states are known. `notes`: sentences about its inputs and its result.
    """

    job: str
    state: str
    reason: str
    states: bytes
    failures: tuple[FailureGroup, ...]
    place: Place
    seconds: float | None = None
    shards: tuple[ShardView, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of_snapshot(cls, submission: Submission, snapshot: Snapshot, place: Place) -> Record:
        """The record of a job that is being watched."""
        return cls(
            submission.job,
            snapshot.state,
            snapshot.reason,
            snapshot.states,
            snapshot.failures,
            place,
            snapshot.elapsed,
            notes=(snapshot.fetching,) if snapshot.fetching else (),
        )

    @classmethod
    def of_view(cls, view: JobView, place: Place, seconds: float | None, notes: Sequence[str] = ()) -> Record:
        """The record of a job as its node tells it; `notes`: what else there is to say."""
        failures = Failures()
        for shard in view.shards:
            if shard.state == "failed" and shard.outcome and shard.outcome.error:
                failures.add(shard.index, shard.outcome.error)
        states = bytes(CODES[shard.state] for shard in view.shards)
        notes = (*notes, *(f"published: {where}" for where in view.published), *view.disagreements())
        return cls(view.job, view.state, view.reason, states, failures.groups(), place, seconds, view.shards, notes)

    def plain(self) -> str:
        """The text/plain form: `job j-3f2a91bc: 10/10 shards, 1 failed (7), 12.4 s on this machine (docker)`.

        Notes are lines below it.
        """
        parts = [f"{self._finished:,}/{len(self.states):,} shards", *self._failed_and_stopped()]
        if self.state not in FINAL_JOB:
            parts.append(self.state.lower())
        if self.seconds is not None and (self.state in FINAL_JOB or self.seconds >= TOLD_SECONDS):
            parts.append(duration(self.seconds))
        place = f" on {self.place.brief}" if self.place.name else ""
        reason = f" ({self._reason})" if self._reason else ""
        return "\n".join((f"job {short(self.job)}: {', '.join(parts)}{place}{reason}", *map(inert, self.notes)))

    def bundle(self) -> dict[str, str]:
        """The record as MIME type -> text."""
        return {"text/plain": self.plain(), "text/html": self.html()}

    def html(self) -> str:
        """The record as HTML that passes JupyterLab's sanitiser."""
        failures = "".join(f"<li>{escape(str(group))}</li>" for group in self.failures[:4])
        more = f"<li>{len(self.failures) - 4} more kinds of failure</li>" if len(self.failures) > 4 else ""
        return (
            '<div style="margin: 2px 0; line-height: 1.5">'
            f'<div style="margin-bottom: 4px">{self._sentence()}</div>'
            f'<img src="data:image/svg+xml;base64,{base64.b64encode(tiles(self.states).encode()).decode()}"'
            f' alt="{escape(self._alt())}" title="{escape(self._alt())}" style="max-width: 100%">'
            + (f'<ul style="margin: 4px 0; padding-left: 20px">{failures}{more}</ul>' if failures else "")
            + "".join(f"<div>{escape(inert(note))}</div>" for note in self.notes)
            + (self._table() if self.shards else "")
            + "</div>"
        )

    # --- parts ---

    @property
    def _finished(self) -> int:
        return self.states.count(DONE) + self.states.count(FAILED)

    @property
    def _reason(self) -> str:
        """Why the job is in its state, where the shards' own states don't tell: then, what is said after that."""
        return self.reason.partition("; ")[2] if FAILED in self.states else self.reason

    def _failed_and_stopped(self) -> list[str]:
        parts = []
        for code in (FAILED, STOPPED):
            indices = [index for index, state in enumerate(self.states) if state == code]
            if indices:
                parts.append(f"{len(indices):,} {LABELS[code]} ({numbers(indices)})")
        return parts

    def _sentence(self) -> str:
        colour = {"Completed": COLOURS[DONE], "Failed": COLOURS[FAILED]}.get(self.state, COLOURS[STOPPED])
        colour = colour if self.state in FINAL_JOB else COLOURS[RUNNING]
        mark = {"Completed": "✓", "Failed": "✗", "Stopped": "■"}.get(self.state, "●")
        count = len(self.states)
        done = self.states.count(DONE)
        shards = f"{count:,} shard{'s' * (count != 1)}"
        facts = [f"{shards} done" if done == count else f"{done:,} of {shards} done", *self._failed_and_stopped()]
        if self.seconds is not None:
            facts.append(duration(self.seconds))
        place = f" on {escape(self.place.brief)}" if self.place.name else ""
        reason = f": {escape(self._reason)}" if self._reason else ""
        return (
            f'<b style="color: {colour}">{mark} {escape(self.state)}</b> '
            f"{escape(', '.join(facts))}{place}{reason}. "
            f'<code style="opacity: 0.7" title="{escape(self.job)}">{escape(short(self.job))}</code>'
        )

    def _alt(self) -> str:
        counts = (f"{self.states.count(code):,} {LABELS[code]}" for code in range(len(LABELS)))
        return f"{len(self.states):,} shards: " + ", ".join(text for text in counts if not text.startswith("0 "))

    def _table(self) -> str:
        order = {FAILED: 0, STOPPED: 1}
        shards = sorted(self.shards, key=lambda shard: (order.get(CODES[shard.state], 2), shard.index))
        rows = [_row(shard) for shard in shards[:MAX_ROWS]]
        told = [column for column in range(len(_HEADS)) if _tells(_HEADS[column], [row[column] for row in rows])]
        heads = "".join(f'<th scope="col">{_HEADS[column]}</th>' for column in told)
        body = "".join(_cells([row[column] for column in told]) for row in rows)
        hidden = len(shards) - MAX_ROWS
        note = (
            f"<p>{hidden:,} more shards are not shown here: <code>job.shards</code> has all.</p>" if hidden > 0 else ""
        )
        return (
            "<details><summary>Shards</summary><table><thead>"
            f"<tr>{heads}</tr></thead><tbody>{body}</tbody></table>{note}</details>"
        )


_HEADS = ("shard", "state", "seconds", "memory", "attempts", "node", "inputs", "why")


def _row(shard: ShardView) -> tuple[str, ...]:
    """What the table says of a shard, in the order of `_HEADS`."""
    outcome = shard.outcome
    more = f" and {len(shard.inputs) - 1:,} more" if len(shard.inputs) > 1 else ""
    return (
        str(shard.index),
        LABELS[CODES[shard.state]],
        f"{outcome.seconds:.2f}" if outcome else "",
        size(outcome.max_rss) if outcome and outcome.max_rss else "",
        str(shard.attempts or ""),
        (shard.node or "")[:16],
        f"{shard.inputs[0]}{more}" if shard.inputs else "",
        headline(outcome.error) if outcome and outcome.error else "",
    )


def _tells(head: str, column: Sequence[str]) -> bool:
    """Whether a column is worth its place: the node is one for all in most jobs, and so are the attempts."""
    return len(set(column)) > 1 if head in {"node", "attempts"} else any(column)


def _cells(row: Sequence[str]) -> str:
    first, *rest = (escape(inert(cell)[:200]) for cell in row)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'


def duration(seconds: float) -> str:
    """`0.31 s`, `12.4 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """Bytes in the unit that people read: `512 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit != "GB" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


# --- the picture ---


def aggregated(states: bytes) -> bytes:
    """At most `MAX_TILES` states: each tile stands for a run of shards and shows the worst of them."""
    if len(states) <= MAX_TILES:
        return states
    run = -(-len(states) // MAX_TILES)
    return bytes(_worst(states[start : start + run]) for start in range(0, len(states), run))


def _worst(states: bytes) -> int:
    return next(code for code in _BY_SEVERITY if code in states)


def tiles(states: bytes) -> str:
    """An SVG of one tile for each shard; each state has a shape of its own, so no colour is needed to read it."""
    states = aggregated(states)
    step = 14 if len(states) <= 400 else 8
    across = max(1, min(len(states), 728 // step))
    down = -(-len(states) // across)
    paths = []
    for code in sorted(set(states)):
        places = [
            (index % across * step, index // across * step) for index in range(len(states)) if states[index] == code
        ]
        paths.append(_shapes(code, places, step - 2))
    width, height = across * step, down * step
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"{''.join(paths)}</svg>"
    )


def _shapes(code: int, places: Sequence[tuple[int, int]], side: int) -> str:
    """All tiles of one state as one path: done is full, waiting an outline, the others carry a mark."""
    colour, inset = COLOURS[code], side / 4
    box = "".join(f"M{x} {y}h{side}v{side}h-{side}z" for x, y in places)
    if code == WAITING:
        outline = "".join(f"M{x + 0.5} {y + 0.5}h{side - 1}v{side - 1}h-{side - 1}z" for x, y in places)
        return f'<path d="{outline}" fill="none" stroke="{colour}"/>'
    body = f'<path d="{box}" fill="{colour}"/>'
    span = side - 2 * inset
    marks = {
        FAILED: f"l{span} {span}m-{span} 0l{span} -{span}",
        STOPPED: f"m0 {span / 2}h{span}",
        RUNNING: f"v{span}l{span} -{span / 2}z",
        RETRYING: f"m{span / 2} 0v{span}m-{span / 2} -{span / 2}h{span}",
    }
    if code not in marks:
        return body
    mark = "".join(f"M{x + inset} {y + inset}{marks[code]}" for x, y in places)
    return f'{body}<path d="{mark}" fill="none" stroke="#fff" stroke-width="{max(1, side // 6)}"/>'
