"""The live view of a job: one anywidget whose traits follow a `JobMonitor`.

Imported when the first view is shown: it brings anywidget and ipywidgets. A view sends at most
ten messages a second, since a Jupyter server throws away what comes faster and nothing sends
it again, and sends its last state a second time when the server's three-second window is over.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from bacalhau_node.ids import short

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bacalhau_jupyter.progress import JobMonitor, Snapshot
    from bacalhau_jupyter.record import Place

PERIOD = 0.1
"""Seconds between two messages at least."""
TICK = 1.0
"""Seconds after which the clock is sent although nothing else has changed."""
RESEND_AFTER = 3.5
FAILURES_SHOWN = 4
FAILED_TAILS = 12
TALKING_TAILS = 8
TAIL_CHARS = 2000

_STATIC = Path(__file__).parent / "static"


class ShardGrid(anywidget.AnyWidget):
    """What the page knows of a job. `static/shardgrid.js` says what is in `summary`."""

    _esm = _STATIC / "shardgrid.js"
    _css = _STATIC / "shardgrid.css"
    states = traitlets.Bytes().tag(sync=True)
    summary = traitlets.Dict().tag(sync=True)
    inputs = traitlets.List(traitlets.Unicode()).tag(sync=True)

    def __repr__(self) -> str:
        """What a page without widgets, or without the kernel, shows in its place."""
        job = short(self.summary["job"])
        return f"job {job}: {self.summary['title']}; %bacalhau attach {job}"


class LiveView:
    """Keeps a `ShardGrid` at the state of one job. One thread paints; `cancel` gives the view a button.

    The button belongs to background jobs: a kernel that waits in a cell hears no clicks.
    """

    def __init__(self, monitor: JobMonitor, place: Place, *, cancel: Callable[[], None] | None = None) -> None:
        self._monitor = monitor
        self._place = place
        self._cancel = cancel
        self._version = -1
        self._sent_at = float("-inf")
        self.widget = ShardGrid()
        if cancel is not None:
            self.widget.on_msg(self._message)
        self._send(monitor.snapshot())

    def name_inputs(self, inputs: Sequence[tuple[str, ...]]) -> None:
        """Tell the view what each shard works on."""
        self.widget.inputs = [_named(paths) for paths in inputs]

    def paint(self) -> None:
        """Send what has changed, if it is time."""
        now = time.monotonic()
        if now - self._sent_at < PERIOD:
            return
        snapshot = self._monitor.snapshot()
        if snapshot.version != self._version or now - self._sent_at >= TICK:
            self._send(snapshot)

    def follow(self) -> None:
        """Paint until the job has ended; for a thread that does nothing else."""
        while not self._monitor.wait_end(PERIOD):
            self.paint()
        self.finish()

    def finish(self) -> None:
        """Send the last state now, and again when a page that was flooded listens once more."""
        self._send(self._monitor.snapshot())
        timer = threading.Timer(RESEND_AFTER, self.widget.send_state, (("states", "summary"),))
        timer.daemon = True
        timer.start()

    def _send(self, snapshot: Snapshot) -> None:
        self._version, self._sent_at = snapshot.version, time.monotonic()
        with self.widget.hold_sync():
            self.widget.states = snapshot.states
            self.widget.summary = self._summary(snapshot)

    def _summary(self, snapshot: Snapshot) -> dict[str, Any]:
        submission = self._monitor.submission
        count = submission.count
        return {
            "job": submission.job,
            "state": snapshot.state,
            "title": f"{count:,} shard{'s' * (count != 1)} on {self._place}",
            "reason": snapshot.reason,
            "elapsed": None if snapshot.elapsed is None else round(snapshot.elapsed, 1),
            "eta": None if snapshot.eta is None else round(snapshot.eta, 1),
            "fetching": snapshot.fetching,
            "failures": [(str(group), group.shards[0]) for group in snapshot.failures[:FAILURES_SHOWN]],
            "tails": self._tails(snapshot),
            "cancel": self._cancel is not None,
        }

    def _tails(self, snapshot: Snapshot) -> dict[str, list[str]]:
        """The last lines of the first failed shards and of those that printed latest, a few kilobytes in all."""
        per_group = FAILED_TAILS // FAILURES_SHOWN
        failed = [shard for group in snapshot.failures[:FAILURES_SHOWN] for shard in group.shards[:per_group]]
        tails = self._monitor.talking(TALKING_TAILS)
        tails.update({shard: self._monitor.tail(shard) for shard in failed})
        return {str(shard): _fitting(lines) for shard, lines in tails.items() if lines}

    def _message(self, _widget: ShardGrid, content: dict[str, Any], _buffers: Sequence[memoryview]) -> None:
        if content.get("type") == "cancel" and self._cancel is not None:
            self._cancel()


def _named(paths: tuple[str, ...]) -> str:
    if not paths:
        return ""
    first = paths[0].encode("utf-8", "backslashreplace").decode()
    return first if len(paths) == 1 else f"{first} and {len(paths) - 1:,} more"


def _fitting(lines: Sequence[str]) -> list[str]:
    """The last of `lines` that fit `TAIL_CHARS` characters; always the very last."""
    kept: list[str] = []
    room = TAIL_CHARS
    for line in reversed(lines):
        room -= len(line)
        if kept and room < 0:
            break
        kept.append(line)
    return kept[::-1]
