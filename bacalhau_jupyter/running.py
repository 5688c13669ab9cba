"""One cell from its line to its value: start the job, show it, and give back what the line asked for.

Here it is decided what a notebook sees: names are unbound first and bound as results come, the
main thread waits and paints, Stop cancels and keeps what is finished, and a background job
paints from a thread of its own under the cell that started it.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bacalhau_jupyter import asking, painters, sending
from bacalhau_jupyter.cell import Around
from bacalhau_jupyter.failures import CellText, JobInterrupted, report
from bacalhau_jupyter.progress import ALL_STREAMS, DONE
from bacalhau_jupyter.record import size
from bacalhau_jupyter.result import reduce
from bacalhau_jupyter.session import session
from bacalhau_node.errors import BacalhauError, SpecError
from bacalhau_node.ids import JobId, short

if TYPE_CHECKING:
    from collections.abc import Callable

    from bacalhau_jupyter.job import Job
    from bacalhau_jupyter.lines import Stream
    from bacalhau_jupyter.options import CellRequest

STOP_SECONDS = 2.0
"""How long a stopped cell waits for its job to put itself away."""

STREAMS: dict[str, frozenset[Stream]] = {"all": ALL_STREAMS, "errors": frozenset(("stderr",))}
"""`--logs`: which streams of the shards go to the cell as they come."""


@dataclass(frozen=True)
class Running:
    """A job, what its line asked for, and the shell of the cell."""

    job: Job
    request: CellRequest
    way: painters.Way
    shell: Any

    def wait(self) -> object:
        """Show the job until it ends, and return the cell's value; raises `JobFailed` and `JobInterrupted` (Stop)."""
        painter = self._painter(cancel=False)
        try:
            painters.follow(self.job.monitor, painter)
            self.job.wait()
        except KeyboardInterrupt:
            raise self._interrupted(painter) from None
        return self._conclude(painter)

    def go_on(self) -> Job:
        """Show the job from a thread of its own, under the present cell, and return it at once."""
        self.job.follower = self._aside(self._behind)
        return self.job

    def _aside(self, work: Callable[[], None]) -> threading.Thread:
        """Do `work` in a thread whose output stands under the present cell."""
        parent = self.shell.get_parent() if hasattr(self.shell, "kernel") else None

        def begin() -> None:
            if parent is not None:
                # Without it, what a thread prints goes to whichever cell runs at that moment.
                getattr(self.shell, "set_thread_parent", self.shell.set_parent)(parent)
            work()

        thread = threading.Thread(target=begin, name=f"cell of {short(self.job.id)}", daemon=True)
        thread.start()
        return thread

    def _behind(self) -> None:
        painter = self._painter(cancel=True)
        painters.follow(self.job.monitor, painter)
        self.job.wait()
        try:
            self._conclude(painter)
        except BacalhauError as error:
            print(report(error), file=sys.stderr, flush=True)  # noqa: T201  a cell's output

    def _painter(self, *, cancel: bool) -> painters.Painter:
        return painters.painter_for(
            self.way,
            self.job.monitor,
            self.job.place,
            inputs=self.job.inputs,
            cancel=self.job.cancel_soon if cancel else None,
        )

    def _conclude(self, painter: painters.Painter) -> object:
        """Leave the record, raise the failure or bind the frame, and return the value of the cell."""
        record = self.job.record()
        if self.request.logs == "tail":
            print("\n".join(self.job.monitor.recent()))  # noqa: T201  a cell's output
        painter.finish(record)
        failure = self.job.failure(printed=self.request.logs == "all")
        if failure is not None and not (self.request.partial and DONE in record.states):
            raise failure
        if failure is not None:
            print(report(failure), file=sys.stderr)  # noqa: T201  a cell's output
        result = self.job.result(partial=True)
        if self.request.df is None:
            return result if self.job.returned() else None
        handle = f"{self.job.handle}.result({'partial=True' * (failure is not None)})"
        try:
            frame = result.df()
            if self.request.reduce is not None:
                frame = reduce(self.request.reduce, frame, self.shell.user_ns)
        except SpecError as error:
            raise SpecError(f"{error} (result = {handle})") from error
        self.shell.user_ns[self.request.df] = frame
        return frame

    def _interrupted(self, painter: painters.Painter) -> JobInterrupted:
        """Cancel, wait a moment, and say what is left; a second interrupt leaves at once, and the view follows."""
        job, name = self.job, short(self.job.id)
        if self.request.on_interrupt == "detach":
            painter.finish(job.record())
            return JobInterrupted(f"detached; the job goes on: %bacalhau attach {name}", job=job.id)
        ended = False
        with suppress(KeyboardInterrupt):
            job.cancel_soon()
            if painters.follow(job.monitor, painter, seconds=STOP_SECONDS):
                painter.finish(job.record())
                ended = True
        if not ended:
            self._aside(lambda: self._put_away(painter))
        what = "stopped" if ended else "is stopping"
        states = job.monitor.snapshot().states
        done, count = states.count(DONE), len(states)
        kept = f"; {done:,} of {count:,} shards finished: {job.handle}.result(partial=True)" if done else ""
        return JobInterrupted(f"job {name} {what}{kept}", job=job.id)

    def _put_away(self, painter: painters.Painter) -> None:
        """Replace the view of a job that was left by its record, once there is one."""
        self.job.cancel_soon()  # the second interrupt may have come before the first had done it
        if self.way in {"widget", "html"}:
            painters.follow(self.job.monitor, painter)
            painter.finish(self.job.record())


def run(shell: Any, request: CellRequest, body: str) -> object:
    """Run the cell that `request` and `body` make and return its value; raises `BacalhauError`, `JobInterrupted`."""
    namespace = dict(shell.user_ns)  # as it was: `--vars a --df a` is possible
    for name in filter(None, (request.df, request.out)):
        shell.user_ns.pop(name, None)  # a stale frame is the worst outcome
    way = painters.resolved(request.progress, shell=shell)
    cell, first = _cell_text(shell, body)
    around = Around(namespace=namespace, history=namespace.get("In", []), folder=Path.cwd())
    prepared = sending.prepare(request, body, name=cell.name, first=first, around=around)
    if request.dry_run:
        plan = session(request.node).call(lambda client: client.plan(prepared.spec))
        print(sending.described(prepared, plan))  # noqa: T201  a cell's output
        return None
    try:
        job, notes = asking.start(
            prepared,
            cell=cell,
            hint=_hint(request),
            streams=STREAMS.get(request.logs, frozenset()),
            sending_told=_sending,
        )
    except KeyboardInterrupt:
        raise JobInterrupted("stopped before the job had started") from None
    if request.out:
        shell.user_ns[request.out] = job
        job.name = request.out
    for note in notes:
        print(note)  # noqa: T201  a cell's output
    running = Running(job, request, way, shell)
    return running.go_on() if request.background else running.wait()


def _sending(sent: int, total: int) -> None:
    print(f"\rsending inputs: {size(sent)} of {size(total)}", end="\n" if sent == total else "", flush=True)  # noqa: T201


def _hint(request: CellRequest) -> Any:
    """How to see all lines of a shard: by the name of `--out`, else by the magic."""
    return lambda job: _all_lines(request.out, job)


def _all_lines(out: str | None, job: JobId) -> str:
    return f"{out}.logs({{shard}})" if out else f"%bacalhau logs {short(job)} {{shard}}"


def _cell_text(shell: Any, body: str) -> tuple[CellText, int]:
    """The whole cell as it was typed, and how many lines stand before its body.

    Other magics may stand above this one, so the body is looked for at the end of the last input.
    """
    history = shell.history_manager.input_hist_raw
    raw = history[-1] if history else ""
    if raw.rstrip("\n").endswith(body.rstrip("\n")) and body.strip():
        first = raw.rstrip("\n")[: -len(body.rstrip("\n"))].count("\n")
        return CellText(len(history) - 1, tuple(raw.split("\n"))), first
    return CellText(None, ("%%bacalhau", *body.split("\n"))), 1
