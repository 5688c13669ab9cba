"""One job as a waiting cell sees it: states, counts, failures and text, fed from another thread.

Theory of operation. The session's loop thread feeds every `Update` of a job into its
`JobMonitor`; the thread that waits (the kernel's main thread, or a background job's painter)
reads it. One lock guards all of it and is never held while anything is printed or sent. New
text and the end wake the reader at once, so a line is in the cell within milliseconds; changes
of state wake nobody, since the live view asks for a snapshot ten times a second at most.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from threading import Condition
from typing import TYPE_CHECKING

from bacalhau_jupyter.failures import FailureGroup, Failures
from bacalhau_jupyter.lines import TAIL_LINES, LineBuffer, LineGate, Piece, Stream, Tail
from bacalhau_node.feed import ShardBytes, ShardText, Update
from bacalhau_node.protocol.events import JobChanged, JobState, ShardChanged
from bacalhau_node.transfers import Transfers

if TYPE_CHECKING:
    from collections.abc import Callable

    from bacalhau_node.client import Submission

WAITING, RUNNING, DONE, FAILED, STOPPED, RETRYING = range(6)
"""One byte for each shard, the same numbers in `static/shardgrid.js`."""
LABELS = ("waiting", "running", "done", "failed", "stopped", "retrying")

CODES = {
    "waiting": WAITING,
    "offered": WAITING,
    "taken": WAITING,
    "running": RUNNING,
    "proposed": RUNNING,
    "accepted": RUNNING,
    "kept": DONE,
    "failed": FAILED,
    "stopped": STOPPED,
}

ALL_STREAMS: frozenset[Stream] = frozenset(("stdout", "stderr"))


@dataclass(frozen=True)
class Snapshot:
    """The job at one moment. `states` has one byte for each shard.

    `elapsed` and `eta` are in seconds, None while nobody can tell.
    """

    version: int
    state: JobState
    reason: str
    states: bytes
    elapsed: float | None
    eta: float | None
    failures: tuple[FailureGroup, ...]
    fetching: str = ""
    """What is on its way to the shards for longer than a moment, in a few words."""

    @property
    def counts(self) -> tuple[int, ...]:
        """How many shards are in each state, in the order of `LABELS`."""
        return tuple(self.states.count(code) for code in range(len(LABELS)))

    @property
    def ended(self) -> int:
        """How many shards are in a final state."""
        counts = self.counts
        return counts[DONE] + counts[FAILED] + counts[STOPPED]


class JobMonitor:
    """The live state of one job. Every method may be called from any thread.

    `hint` is the command that shows all lines of a shard (`job.logs({shard})`); `streams` are
    those that go to the cell; `age` is how many seconds ago the job was submitted, None if it is
    over and nobody knows how long it took.
    """

    def __init__(
        self,
        submission: Submission,
        *,
        hint: str,
        streams: frozenset[Stream] = ALL_STREAMS,
        age: float | None = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.submission = submission
        self._clock = clock
        self._began = None if age is None else clock() - age
        self._took: float | None = None
        self._running_since: float | None = None
        self._changed = Condition()
        self._version = 0
        self._job = JobChanged(submission.job, "Pending")
        self._states = bytearray(submission.count)
        self._attempts: dict[int, int] = {}
        self._failures = Failures()
        self._transfers = Transfers()
        self._buffers: dict[tuple[int, Stream], LineBuffer] = {}
        self._tails: dict[int, Tail] = {}
        self._recent = Tail()
        self._gate = LineGate(count=submission.count, hint=hint, now=clock(), streams=streams)
        self._broken: Exception | None = None
        self._ended = False
        self._callbacks: list[Callable[[], object]] = []

    # --- the feeding side ---

    def feed(self, update: Update) -> None:
        """Take one update in; one about another attempt than the latest changes nothing."""
        with self._changed:
            match update:
                case ShardText():
                    self._text(update)
                case ShardBytes():
                    self._transfers.take(update, self._clock())
                case ShardChanged():
                    self._shard(update)
                case JobChanged():
                    self._job = update
            self._version += 1
            if self._gate.ready(self._clock()):
                self._changed.notify_all()

    def end(self, broken: Exception | None = None) -> None:
        """No more updates will come; `broken` says why they stopped before the job's end."""
        with self._changed:
            if self._ended:
                return
            for key in list(self._buffers):
                self._finish_line(key)
            self._broken = broken
            self._took = self._elapsed()
            self._ended = True
            self._changed.notify_all()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    # --- the reading side ---

    @property
    def ended(self) -> bool:
        """Whether the job has come to its end (or can't be followed any more)."""
        with self._changed:
            return self._ended

    @property
    def broken(self) -> Exception | None:
        """Why the updates stopped before the job's end, if they did."""
        with self._changed:
            return self._broken

    @property
    def state(self) -> JobState:
        """The job's state as last heard."""
        with self._changed:
            return self._job.state

    def wait(self, timeout: float) -> bool:
        """Sleep until there is text to print, the job has ended, or `timeout` seconds are over; True: it has ended."""
        with self._changed:
            if not self._ended and not self._gate.ready(self._clock()):
                self._changed.wait(timeout)
            return self._ended

    def wait_end(self, timeout: float | None = None) -> bool:
        """Sleep until the job has ended; False when `timeout` seconds were over before."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, timeout)

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call `callback` once the job has ended, from the feeding thread, or now if it has."""
        with self._changed:
            if not self._ended:
                self._callbacks.append(callback)
                return
        callback()

    def take(self) -> list[Piece]:
        """The text to write to the cell now; at the end of the job, all that is left."""
        with self._changed:
            now = self._clock()
            return self._gate.end(now) if self._ended else self._gate.take(now)

    def tail(self, shard: int) -> tuple[str, ...]:
        """The last lines that a shard printed, the unfinished one included."""
        with self._changed:
            return self._tail(shard)

    def talking(self, limit: int) -> dict[int, tuple[str, ...]]:
        """The last lines of the `limit` shards that printed latest."""
        with self._changed:
            return {shard: self._tail(shard) for shard in list(self._tails)[: -limit - 1 : -1]}

    def recent(self) -> tuple[str, ...]:
        """The last lines of the whole job, each with its shard where there are several."""
        with self._changed:
            return self._recent.lines()

    def snapshot(self) -> Snapshot:
        """The job as it stands. Equal `version`s: nothing but time has passed."""
        with self._changed:
            return Snapshot(
                self._version,
                self._job.state,
                self._job.reason,
                bytes(self._states),
                self._elapsed(),
                self._eta(),
                self._failures.groups(),
                self._transfers.now(self._clock()),
            )

    def fetched(self) -> str:
        """What was brought to the shards from elsewhere, with CIDs, in a sentence; "" for nothing."""
        with self._changed:
            return self._transfers.fetched()

    # --- all below: the lock is held ---

    def _shard(self, update: ShardChanged) -> None:
        shard = update.shard
        code, ends = CODES[update.state], {DONE, FAILED, STOPPED}
        older = update.attempt < self._attempts.get(shard, 0)
        if self._states[shard] in ends or (older and code not in ends):  # an end counts whatever attempt it is of
            return
        self._attempt(shard, update.attempt)
        if update.state != "taken":  # what a shard needs is fetched between its being taken and its start
            self._transfers.over(shard)
        self._states[shard] = RETRYING if update.attempt > 1 and code in {WAITING, RUNNING} else code
        if code == RUNNING and self._running_since is None:
            self._running_since = self._clock()
        if code == FAILED and update.error is not None:
            self._failures.add(shard, update.error)
        if code in {DONE, FAILED, STOPPED}:
            self._finish_line((shard, "stdout"))
            self._finish_line((shard, "stderr"))

    def _text(self, update: ShardText) -> None:
        shard, stream = update.shard, update.stream
        if update.attempt < self._attempts.get(shard, 0):
            return
        self._attempt(shard, update.attempt)
        now = self._clock()
        lines = self._buffers.setdefault((shard, stream), LineBuffer()).feed(update.text)
        tail = self._tails.pop(shard, None) or Tail()
        self._tails[shard] = tail  # the one that printed latest stands last
        self._add(shard, tail, lines)
        self._gate.text(shard, stream, update.text, now)
        self._gate.lines(shard, stream, lines, now)

    def _attempt(self, shard: int, attempt: int) -> None:
        """Remember the latest attempt; the lines of the one before are not mixed with its."""
        if attempt > self._attempts.get(shard, 0):
            self._attempts[shard] = attempt
            self._finish_line((shard, "stdout"))
            self._finish_line((shard, "stderr"))

    def _finish_line(self, key: tuple[int, Stream]) -> None:
        buffer = self._buffers.pop(key, None)
        if buffer is not None and (line := buffer.end()):
            shard, stream = key
            self._add(shard, self._tails.setdefault(shard, Tail()), [line])
            self._gate.lines(shard, stream, [line], self._clock())

    def _add(self, shard: int, tail: Tail, lines: list[str]) -> None:
        tail.extend(lines)
        name = f"[shard {shard}] " if len(self._states) > 1 else ""
        self._recent.extend([f"{name}{line}" for line in lines[-TAIL_LINES:]])

    def _tail(self, shard: int) -> tuple[str, ...]:
        streams: tuple[Stream, ...] = ("stdout", "stderr")
        rests = [self._buffers[shard, stream].rest() for stream in streams if (shard, stream) in self._buffers]
        return self._tails[shard].lines(*rests) if shard in self._tails else ()

    def _elapsed(self) -> float | None:
        if self._took is not None or self._began is None:
            return self._took
        return self._clock() - self._began

    def _eta(self) -> float | None:
        """What is left takes as long for each shard as what is done did; silent before a twentieth is done."""
        done = self._states.count(DONE) + self._states.count(FAILED)
        left = len(self._states) - done - self._states.count(STOPPED)
        if self._running_since is None or self._ended or not left or done < max(1, len(self._states) / 20):
            return None
        return (self._clock() - self._running_since) / done * left
