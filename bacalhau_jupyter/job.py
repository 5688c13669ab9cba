"""A job as an object: its state, its shards, what they printed and returned.

A `Job` is the truth about a job in a notebook: outputs and widgets are pictures of it and may
get lost with a page; the job itself stays with its node and can be had again by `attach`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bacalhau_jupyter.failures import CellText, FailedShard, brief, explain
from bacalhau_jupyter.progress import CODES, DONE, FAILED, STOPPED, JobMonitor
from bacalhau_jupyter.record import Place, Record
from bacalhau_jupyter.result import Reader, Result, ShardResult
from bacalhau_jupyter.session import Session
from bacalhau_node.errors import JobFailed, NodeUnreachable, SpecError
from bacalhau_node.ids import JobId, NodeId, short
from bacalhau_node.messages import ShardError
from bacalhau_node.protocol.events import FINAL_JOB

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from concurrent.futures import Future

    from bacalhau_jupyter.view import ShardGrid
    from bacalhau_node.client import Client, JobView, ShardView
    from bacalhau_node.messages import Blob, Outcome
    from bacalhau_node.protocol.events import JobState

ANSWER_SECONDS = 10.0
"""How long a node may take for an answer that it only has to look up."""
TAIL = 20


@dataclass(frozen=True)
class ShardRecord:
    """One shard as it stands. `exit_code` and `error` once it has ended; `inputs` are logical paths.

    `disagreed`: nodes that gave another answer than the one that counts (`--agree`).
    """

    index: int
    state: str
    node: str | None
    attempts: int
    exit_code: int | None
    inputs: tuple[str, ...]
    error: ShardError | None
    disagreed: tuple[str, ...] = ()


class Text(str):
    """Text that a notebook shows as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:  # noqa: FBT001  IPython's protocol
        printer.text(str(self))


class Job:
    """One job of a node. Made by `asking.submit`, `asking.attach` and the magic."""

    def __init__(self, asked: Session, monitor: JobMonitor, place: Place, cell: CellText) -> None:
        self._session = asked
        self.monitor = monitor
        """The live state, for whoever shows it."""
        self.place = place
        self._cell = cell
        self.name = ""
        """What the notebook calls it (`--out`); empty if nothing does."""
        self._final: JobView | None = None
        self._saved: Future[Path] | None = None
        self.follower: threading.Thread | None = None
        """Shows the job in the background and binds what its line asked for when it has ended."""
        asked.watch(monitor)

    @property
    def id(self) -> JobId:
        """`j-` and a UUID; the first characters are enough for `attach`."""
        return self.monitor.submission.job

    @property
    def handle(self) -> str:
        """What to type to have it: its name, or the call that finds it."""
        return self.name or f"bacalhau_jupyter.attach({short(self.id)!r})"

    @property
    def state(self) -> JobState:
        """Pending, Queued, Running, Completed, Failed or Stopped."""
        return self.monitor.state

    @property
    def shards(self) -> list[ShardRecord]:
        """One record for each shard."""
        return [_shard_record(shard) for shard in self.view().shards]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job has ended; False if `timeout` seconds were over before. Stop interrupts the wait only.

        A frame that a background cell was asked to bind (`--df`) is bound by then, and files that were asked for
        (`--publish local:DIR`) are there.
        """
        began = time.monotonic()
        ended = self.monitor.wait_end(timeout)
        if ended and self._saved is not None:
            left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
            ended = bool(wait_for((self._saved,), left).done)
        if ended and self.follower not in {None, threading.current_thread()}:
            self.follower.join()
        return ended

    def save(self, folder: Path) -> None:
        """Write what the job leaves to `folder`/ID once it has ended, in the background (`--publish local:DIR`)."""

        async def work(client: Client) -> Path:
            from bacalhau_node.download import download  # noqa: PLC0415  loaded with the client

            ended = asyncio.Event()
            self.monitor.when_ended(bound(asyncio.get_running_loop().call_soon_threadsafe, ended.set))
            await ended.wait()
            await download(client, await client.job(self.id), folder / self.id)
            return folder / self.id

        self._saved = self._session.begin(work)

    def cancel(self) -> None:
        """Ask for the end and return; what is finished is kept."""
        self._session.call(lambda client: client.cancel(self.id), timeout=ANSWER_SECONDS)

    def cancel_soon(self) -> None:
        """The same without waiting for the node to have heard it."""
        self._session.begin(lambda client: client.cancel(self.id))

    def logs(self, shard: int | None = None) -> str:
        """What a shard printed, stdout before stderr; of all shards, one after the other, each line named.

        Of a shard that has not ended yet: its last 20 lines.
        """
        shards = self.view().shards
        if shard is not None and not 0 <= shard < len(shards):
            raise SpecError(f"shard {shard}: job {short(self.id)} has shards 0 to {len(shards) - 1}")
        wanted = shards if shard is None else shards[shard : shard + 1]

        async def texts(client: Client) -> list[str]:
            return [await self._text(client, each) for each in wanted]

        found = self._session.call(texts)
        if len(found) == 1:
            return Text(found[0])
        named = (f"[shard {index}] {line}\n" for index, text in enumerate(found) for line in text.splitlines())
        return Text("".join(named))

    def result(self, *, partial: bool = False) -> Result:
        """What the job returned, once it has ended; with `partial`, also when shards failed or were stopped.

        Raises `JobFailed` with the failures, or because no shard has finished.
        """
        self.wait()
        view = self.view()
        done = sum(CODES[shard.state] == DONE for shard in view.shards)
        if view.state != "Completed" and not (partial and done):
            raise self.failure() or JobFailed(f"job {short(self.id)} has not ended: {self.monitor.broken}")
        asked = self.monitor.submission.node
        return Result([_shard_result(shard, asked) for shard in view.shards], self._reader(), cid=view.cid)

    @property
    def widget(self) -> ShardGrid:
        """The live view, to be shown anywhere; it follows the job on its own."""
        from bacalhau_jupyter.view import LiveView  # noqa: PLC0415  brings ipywidgets

        live = LiveView(self.monitor, self.place, cancel=self.cancel_soon)
        live.name_inputs([shard.inputs for shard in self.view().shards])
        threading.Thread(target=live.follow, name=f"view of {short(self.id)}", daemon=True).start()
        return live.widget

    def __await__(self) -> Generator[Any, None, Result]:
        """`await job` gives the `Result` and lets the loop of the caller go on meanwhile."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        self.monitor.when_ended(bound(loop.call_soon_threadsafe, _settle, ended))
        yield from ended.__await__()
        return self.result()

    # --- for those that show it ---

    def asks(self, asked: Session) -> bool:
        """Whether this is a job of that session: one that was closed answers nothing any more."""
        return self._session is asked

    def view(self) -> JobView:
        """The job as its node tells it; the end is asked for once."""
        if self._final is not None:
            return self._final
        view = self._session.call(lambda client: client.job(self.id), timeout=ANSWER_SECONDS)
        if view.state in FINAL_JOB:
            self._final = view
        return view

    def record(self) -> Record:
        """What stays in the notebook; without the shards' details when the node doesn't answer."""
        snapshot = self.monitor.snapshot()
        try:
            view = self.view()
            return Record.of_view(view, self.place, snapshot.elapsed, self._notes())
        except NodeUnreachable:
            return Record.of_snapshot(self.monitor.submission, snapshot, self.place)

    def _notes(self) -> list[str]:
        """What the record says of where the data came from, and where the result went."""
        notes = [self.monitor.fetched()]
        if self.monitor.submission.reused:
            notes += self.monitor.submission.notes
        if self._saved is not None and self._saved.done():
            error = self._saved.exception()
            notes.append(f"not downloaded: {error}" if error else f"downloaded to {self._saved.result()}")
        return [note for note in notes if note]

    def failure(self, *, printed: bool = False) -> JobFailed | None:
        """Why there is no whole result, to be raised; None if there is one, or the job goes on.

        `printed`: what the shards printed stands in the cell already.
        """
        broken, view = self.monitor.broken, self.view()
        if view.state == "Completed":
            return None
        if view.state not in FINAL_JOB:
            return None if broken is None else JobFailed(f"job {short(self.id)} can't be followed: {broken}")
        record = Record.of_view(view, self.place, None)
        failed = {shard.index: self._failed_shard(shard) for shard in view.shards if shard.state == "failed"}
        lines = explain(record.failures, failed, self._cell, printed=printed)
        return brief(JobFailed(_why(record, self.handle)), lines)

    def returned(self) -> bool:
        """Whether any shard has left a value or files, once the job has ended."""
        outcomes = (shard.outcome for shard in self.view().shards if shard.outcome)
        return any(outcome.value.kind != "none" or outcome.outputs for outcome in outcomes)

    def inputs(self) -> Future[Sequence[tuple[str, ...]]]:
        """A future of each shard's logical paths, for the live view."""

        async def ask(client: Client) -> Sequence[tuple[str, ...]]:
            return [shard.inputs for shard in (await client.job(self.id)).shards]

        return self._session.begin(ask)

    def _repr_mimebundle_(self, **_options: object) -> dict[str, str]:
        record = self.record()
        # An output does not change: a picture of a job that goes on would soon be wrong.
        return record.bundle() if record.state in FINAL_JOB else {"text/plain": record.plain()}

    def __repr__(self) -> str:
        return self.record().plain()

    # --- parts ---

    async def _text(self, client: Client, shard: ShardView) -> str:
        if shard.outcome is None:
            return "".join(f"{line}\n" for line in self.monitor.tail(shard.index))
        parts = [await _read(client, blob) for blob in (shard.outcome.stdout, shard.outcome.stderr)]
        text = "".join(part.decode("utf-8", "replace") for part in parts)
        cut = shard.outcome.cut
        return f"{text}\n… {cut:,} bytes more than the node keeps of one shard\n" if cut else text

    def _failed_shard(self, shard: ShardView) -> FailedShard:
        lines = self.monitor.tail(shard.index) or _last_lines(shard.outcome)
        node = self.place.name if shard.node == self.monitor.submission.node else shard.node or ""
        outcome = shard.outcome
        error = outcome.error if outcome else None
        # Any other failure says more than the exit code that it comes with.
        code = outcome.exit_code if outcome and error and error.kind in {"signal", "memory"} else 0
        return FailedShard(shard.index, node, shard.inputs, code, shard.attempts, lines)

    def _reader(self) -> Reader:
        asked = self._session

        async def blob(client: Client, blob: Blob) -> bytes | Path:
            path = None if blob.cid is None else await client.file(blob.cid)
            return path if path is not None else await _read(client, blob)

        def folder(cid: str) -> Path:
            target = asked.folder() / cid
            if not target.exists():
                asked.fetch(lambda client: client.download(cid, target))
            return target

        return Reader(blob=lambda each: asked.fetch(lambda client: blob(client, each)), folder=folder)


# --- small parts ---


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _read(client: Client, blob: Blob) -> bytes:
    if blob.inline is not None:
        return blob.inline
    assert blob.cid is not None  # a blob has one of the two
    return await client.read(blob.cid)


def _last_lines(outcome: Outcome | None) -> tuple[str, ...]:
    if outcome is None:
        return ()
    text = (outcome.stdout.inline or b"") + (outcome.stderr.inline or b"")
    return tuple(text.decode("utf-8", "replace").splitlines()[-TAIL:])


def _shard_record(shard: ShardView) -> ShardRecord:
    outcome = shard.outcome
    return ShardRecord(
        shard.index,
        shard.state,
        shard.node,
        shard.attempts,
        outcome.exit_code if outcome else None,
        shard.inputs,
        outcome.error if outcome else None,
        shard.disagreed,
    )


def _shard_result(shard: ShardView, asked: NodeId) -> ShardResult:
    outcome = shard.outcome
    if CODES[shard.state] == DONE and outcome is not None:
        return ShardResult(
            index=shard.index,
            value=outcome.value,
            outputs=outcome.outputs,
            inputs=shard.inputs,
            foreign=shard.node != asked,
        )
    error = outcome.error if outcome and outcome.error else ShardError("node", "Stopped", "stopped before it finished")
    return ShardResult(index=shard.index, inputs=shard.inputs, error=error)


def _why(record: Record, handle: str) -> str:
    """The one sentence of a job that did not complete; `handle` is what to type to have the job."""
    count, failed, done = len(record.states), record.states.count(FAILED), record.states.count(DONE)
    job = f"job {short(record.job)}"
    if failed:
        what = f"{failed:,} of {count:,} shard{'s' * (count != 1)} of {job} failed"
    elif STOPPED in record.states and record.state == "Stopped":
        what = f"{job} was stopped after {done:,} of {count:,} shards"
    else:
        what = f"{job}: {record.reason or record.state.lower()}"
    return f"{what}; {done:,} finished: {handle}.result(partial=True)" if done else what
