"""How a job is shown while a thread waits for it: a widget, HTML, lines, or one line of a terminal.

Each way is a `Painter`; `painter_for` picks one from `--progress` and from who is watching. The
thread that waits calls `follow`: it writes the shards' lines as soon as they come and lets the
painter draw, so all output of a job comes from one thread, under one cell. A job that is over
within half a second shows no picture at all where somebody is watching.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, Protocol
from uuid import uuid4

from IPython.display import display

from bacalhau_jupyter.failures import headline
from bacalhau_jupyter.record import Record, duration
from bacalhau_node.errors import SpecError
from bacalhau_node.ids import short

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from bacalhau_jupyter.lines import Piece
    from bacalhau_jupyter.progress import JobMonitor
    from bacalhau_jupyter.record import Place
    from bacalhau_jupyter.view import LiveView

QUIET_SECONDS = 0.5
"""A job that ends before shows no live view."""
WAKE = 0.1
HTML_PERIOD = 1.0
TERMINAL_PERIOD = 0.25
BYTES_PERIOD = 10.0
"""Seconds between two lines about one transfer or another, where each line stays."""
RESEND_AFTER = 3.5
FAILURES_TOLD = 4
VIEW = "bacalhau_jupyter.view"

Progress = Literal["auto", "widget", "html", "text", "none"]
Way = Literal["widget", "html", "text", "terminal", "none"]


def put(content: object, *, display_id: str, update: bool = False) -> None:
    """Display a MIME bundle or an object under an id, or replace what is shown under it."""
    display(content, raw=isinstance(content, dict), display_id=display_id, update=update)  # type: ignore[no-untyped-call]


class Painter(Protocol):
    """Draws one job. All calls come from the thread that waits for it."""

    def paint(self) -> None:
        """Draw what has changed; called ten times a second or more, sends much less."""
        ...

    def clear(self) -> None:
        """Make room: a shard's lines are about to be written."""
        ...

    def finish(self, record: Record) -> None:
        """Draw the end, which stays."""
        ...


class Silent:
    """Shows nothing."""

    def paint(self) -> None:
        """Nothing."""

    def clear(self) -> None:
        """Nothing."""

    def finish(self, record: Record) -> None:
        """Nothing."""


class Shown(ABC):
    """A display under an id of its own that the record replaces at the end. Base of widget and HTML."""

    period = WAKE

    def __init__(self, monitor: JobMonitor, place: Place) -> None:
        self.monitor, self.place = monitor, place
        self.display_id = uuid4().hex
        self._placed = self._shown = False
        self._due = time.monotonic() + QUIET_SECONDS

    def paint(self) -> None:
        """Show the view once the job has lasted half a second; after that, keep it at the job's state."""
        if not self._shown and (self.monitor.ended or not self.ready()):
            return
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self.period
        self.put(self.redraw() if self._shown else self.show())
        self._shown = True

    def clear(self) -> None:
        """Keep a place for the view above the first line, with nothing in it until the job has lasted long enough."""
        if not self._placed:
            self.put({"text/plain": "", "text/html": ""})

    def finish(self, record: Record) -> None:
        """Replace the view by the record, twice: a page that was flooded may have missed the first.

        A job that was too quick for a view leaves a record only if that says more than its value does.
        """
        if not self._shown and not record.notes:
            return
        bundle = record.bundle()
        self.put(bundle)
        timer = threading.Timer(RESEND_AFTER, self.put, (bundle,))
        timer.daemon = True
        timer.start()

    def put(self, content: object | None) -> None:
        """Show `content` (a MIME bundle or an object) in the place of the view; None: what is there is right."""
        if content is not None:
            put(content, display_id=self.display_id, update=self._placed)
            self._placed = True

    def ready(self) -> bool:
        """Whether `show` would answer at once."""
        return True

    @abstractmethod
    def show(self) -> object:
        """What to show first."""

    @abstractmethod
    def redraw(self) -> object | None:
        """What to show in its place, None if the view draws itself."""


class Widget(Shown):
    """The live view in a page with widgets. `inputs` answers, once it can, what each shard works on."""

    def __init__(
        self,
        monitor: JobMonitor,
        place: Place,
        *,
        inputs: Callable[[], Future[Sequence[tuple[str, ...]]]],
        cancel: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(monitor, place)
        self._ask_inputs, self._cancel = inputs, cancel
        self._view: LiveView | None = None
        self._loading: threading.Thread | None = None
        self._inputs: Future[Sequence[tuple[str, ...]]] | None = None

    def ready(self) -> bool:
        """Loading ipywidgets takes a good part of a second, in which lines must not wait and short jobs end."""
        if self._loading is None:
            self._loading = threading.Thread(target=importlib.import_module, args=(VIEW,), daemon=True)
            self._loading.start()
        return not self._loading.is_alive()

    def show(self) -> object:
        """The widget."""
        from bacalhau_jupyter.view import LiveView  # noqa: PLC0415  see `ready`

        self._inputs = self._ask_inputs()
        self._view = LiveView(self.monitor, self.place, cancel=self._cancel)
        return self._view.widget

    def redraw(self) -> None:
        """Let the view send what has changed."""
        assert self._view is not None  # `show` comes first
        if self._inputs is not None and self._inputs.done():
            if self._inputs.exception() is None:
                self._view.name_inputs(self._inputs.result())
            self._inputs = None
        self._view.paint()

    def finish(self, record: Record) -> None:
        """Leave the widget at its last state for pages that lost the display, then replace it."""
        if self._view is not None:
            self._view.finish()
        super().finish(record)


class Html(Shown):
    """A picture that is sent anew each second, for pages without widgets."""

    period = HTML_PERIOD

    def show(self) -> object:
        """The picture and its text."""
        return self.redraw()

    def redraw(self) -> object:
        """All of it anew."""
        return Record.of_snapshot(self.monitor.submission, self.monitor.snapshot(), self.place).bundle()


class Lines:
    """A few lines, for logs and notebooks that nobody watches: start, quarters, first failures, record."""

    def __init__(self, monitor: JobMonitor, place: Place) -> None:
        self._monitor, self._place = monitor, place
        self._quarter = 0
        self._told = 0
        self._bytes_due = 0.0
        submission = monitor.submission
        self._name, self._count = f"job {short(submission.job)}", submission.count
        print(f"{self._name}: {self._count:,} shard{'s' * (self._count != 1)} on {place}", flush=True)  # noqa: T201

    def paint(self) -> None:
        """Tell of a quarter that is done and of a failure that is new."""
        snapshot = self._monitor.snapshot()
        for group in snapshot.failures[self._told : FAILURES_TOLD]:
            print(f"{self._name}: shard {group.shards[0]} failed: {headline(group.error)}", flush=True)  # noqa: T201
        self._told = max(self._told, len(snapshot.failures))
        ended = snapshot.ended
        quarter = 4 * ended // self._count
        if self._quarter < quarter < 4:
            took = "" if snapshot.elapsed is None else f", {duration(snapshot.elapsed)}"
            shards = f"{ended:,} shard{'s' * (ended != 1)}"
            print(f"{self._name}: {25 * quarter} % done, {shards}{took}", flush=True)  # noqa: T201
        self._quarter = max(self._quarter, quarter)
        if snapshot.fetching and (now := time.monotonic()) >= self._bytes_due:
            self._bytes_due = now + BYTES_PERIOD
            print(f"{self._name}: {snapshot.fetching}", flush=True)  # noqa: T201

    def clear(self) -> None:
        """Nothing: these are lines too."""

    def finish(self, record: Record) -> None:
        """The record, readable in the saved notebook."""
        put(record.bundle(), display_id=uuid4().hex)


class Terminal:
    """One line at the bottom of a terminal that overwrites itself."""

    def __init__(self, monitor: JobMonitor, place: Place) -> None:
        self._monitor, self._place = monitor, place
        self._due = time.monotonic() + QUIET_SECONDS
        self._drawn = False

    def paint(self) -> None:
        """Overwrite the line, four times a second."""
        now = time.monotonic()
        if now < self._due or self._monitor.ended:
            return
        self._due = now + TERMINAL_PERIOD
        record = Record.of_snapshot(self._monitor.submission, self._monitor.snapshot(), self._place)
        width = shutil.get_terminal_size().columns - 1
        line = record.plain().replace("\n", " · ")
        sys.stdout.write(f"\r\x1b[K{line[:width]}")
        sys.stdout.flush()
        self._drawn = True

    def clear(self) -> None:
        """Take the line away; the next `paint` draws it below what was written."""
        if self._drawn:
            sys.stdout.write("\r\x1b[K")
            self._drawn = False

    def finish(self, record: Record) -> None:
        """The record's line, if the job was long enough to show one, or there is more to say."""
        shown = self._drawn or record.notes
        self.clear()
        if shown:
            sys.stdout.write(f"{record.plain()}\n")
        sys.stdout.flush()


# --- which, and the loop ---


def resolved(progress: Progress, *, shell: Any) -> Way:
    """What `auto` means here: who watches is told by whether the page can answer a question.

    Raises `SpecError` for a widget where there is none.
    """
    if progress == "widget" and not importlib.util.find_spec("anywidget"):
        raise SpecError("--progress widget needs anywidget; pip install anywidget, or use --progress html")
    if progress != "auto":
        return progress
    if not hasattr(shell, "kernel"):
        return "terminal" if sys.stdout.isatty() else "text"
    content = shell.get_parent().get("content", {})
    if not content.get("allow_stdin"):
        return "text"
    return "widget" if importlib.util.find_spec("anywidget") else "html"


def write(pieces: Sequence[Piece], painter: Painter) -> None:
    """Write what shards printed to the streams of the cell, at once."""
    if not pieces:
        return
    painter.clear()
    for piece in pieces:
        stream = sys.stdout if piece.stream == "stdout" else sys.stderr
        stream.write(piece.text)
        stream.flush()


def follow(monitor: JobMonitor, painter: Painter, *, seconds: float | None = None) -> bool:
    """Show the job until it ends, or for so many seconds; True: it has ended, and all of its text is written."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended = monitor.wait(WAKE)
        write(monitor.take(), painter)
        painter.paint()
        if ended or (deadline is not None and time.monotonic() >= deadline):
            return ended


def painter_for(
    way: Way,
    monitor: JobMonitor,
    place: Place,
    *,
    inputs: Callable[[], Future[Sequence[tuple[str, ...]]]],
    cancel: Callable[[], None] | None = None,
) -> Painter:
    """The painter for one way of showing a job; `cancel` is what a button in the view does."""
    match way:
        case "widget":
            return Widget(monitor, place, inputs=inputs, cancel=cancel)
        case "html":
            return Html(monitor, place)
        case "terminal":
            return Terminal(monitor, place)
        case "none":
            return Silent()
        case _:
            return Lines(monitor, place)
