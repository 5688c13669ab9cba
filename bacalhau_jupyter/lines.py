"""What shards print, made fit for one cell: whole lines, named by shard, never more than a page can take.

Theory of operation. Text comes in pieces, cut anywhere. A `LineBuffer` (one for each shard and
stream) makes lines of it and keeps of each only what a terminal would show: after a carriage
return the line starts anew. A `LineGate` lets lines through to the cell at 200 lines and 50 kB
a second, with five seconds' worth saved up at the start, because a Jupyter server throws output
above its own limits away for good and a page with 20 MB of text freezes. When the allowance is
spent the gate closes for a second, counts what it holds back, and says so in one line with the
way to all of it: nothing disappears silently.

A job of one shard prints as a plain cell does, unfinished lines and progress bars included;
with more shards, lines carry `[shard 3]` and come whole.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Literal, NamedTuple

Stream = Literal["stdout", "stderr"]

LINES_PER_SECOND = 200
CHARS_PER_SECOND = 50_000
BURST_SECONDS = 5.0
"""What an idle gate saves up: a short job of up to 1,000 lines shows all of them."""
CLOSED_SECONDS = 1.0
LINE_LIMIT = 10_000
"""Characters of one line that are shown; a line can be a gigabyte."""
TAIL_LINES = 20
TAIL_WIDTH = 500
_RESET = "\x1b[0m"
_ACTS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-ln-~]|\x1b[PX\]^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b(?!\[)|[\x07\x08\x0b\x0c\x80-\x9f]"
)
"""Control sequences but colours (`m`): they move the cursor or erase, as nested progress bars do, name the window, fill
the clipboard, or take what follows for theirs until they end."""


class Piece(NamedTuple):
    """Text to write to one stream of the cell."""

    stream: Stream
    text: str


def shortened(line: str, limit: int) -> str:
    """`line`, or its first `limit` characters and how many are missing."""
    return line if len(line) <= limit else f"{line[:limit]}… ({len(line) - limit:,} characters more)"


class LineBuffer:
    """Pieces of text in, whole lines out. Of an unfinished line, `LINE_LIMIT` characters are kept."""

    def __init__(self) -> None:
        self._rest = ""
        self._dropped = 0

    def feed(self, text: str) -> list[str]:
        """The lines that `text` completes, as a terminal shows them, without their newlines."""
        first, *more = text.split("\n")
        self._keep(first)
        lines = []
        for part in more:
            lines.append(self.end())
            self._keep(part)
        return lines

    def rest(self) -> str:
        """The unfinished line, as a terminal shows it now."""
        shown = self._rest.rstrip("\r")
        return f"{shown}… ({self._dropped:,} characters more)" if self._dropped else shown

    def end(self) -> str:
        """The unfinished line, which nothing will add to any more."""
        line = self.rest()
        self._rest, self._dropped = "", 0
        return line

    def _keep(self, text: str) -> None:
        joined = self._rest + text
        shown = joined.rstrip("\r")
        if "\r" in shown:
            self._dropped = 0
            shown = shown.rpartition("\r")[2]
        self._dropped += max(0, len(shown) - LINE_LIMIT)
        # A carriage return at the end overwrites nothing yet: more text may follow, or a newline.
        self._rest = shown[:LINE_LIMIT] + "\r" * joined.endswith("\r")


class Tail:
    """The last lines of one shard, both streams in the order in which they came."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)

    def extend(self, lines: list[str]) -> None:
        """Add whole lines, cut to `TAIL_WIDTH` characters."""
        self._lines.extend(shortened(line, TAIL_WIDTH) for line in lines[-TAIL_LINES:])

    def lines(self, *unfinished: str) -> tuple[str, ...]:
        """At most `TAIL_LINES` lines, with those that are not finished yet at the end."""
        return (*self._lines, *(shortened(line, TAIL_WIDTH) for line in unfinished if line))[-TAIL_LINES:]


class LineGate:
    """Lets the text of one job through to its cell, at a rate that the page survives.

    `hint` is the command that shows all lines of a shard, with `{shard}` for its number. `now` is
    any clock in seconds that never goes back; it comes with every call.
    """

    def __init__(self, *, count: int, hint: str, now: float, streams: frozenset[Stream]) -> None:
        self._single = count == 1
        self._hint = hint
        self._streams = streams
        self._out: list[Piece] = []
        self._at_line_start = True
        self._lines = LINES_PER_SECOND * BURST_SECONDS
        self._chars = CHARS_PER_SECOND * BURST_SECONDS
        self._filled_at = now
        self._opens_at = now
        self._held: dict[int, int] = {}

    def text(self, shard: int, stream: Stream, text: str, now: float) -> None:
        """A piece of a job of one shard: goes through as it is, but for lines overwritten within it."""
        if not self._single or stream not in self._streams:
            return
        for line in _by_newline(text.replace("\r\n", "\n")):
            self._admit(shard, stream, _overwritten(line), now)

    def lines(self, shard: int, stream: Stream, lines: list[str], now: float) -> None:
        """Whole lines of one of several shards."""
        if self._single or stream not in self._streams:
            return
        for line in lines:
            self._admit(shard, stream, f"[shard {shard}] {_contained(line)}\n", now)

    def ready(self, now: float) -> bool:
        """Whether `take` would return something."""
        return bool(self._out) or (bool(self._held) and now >= self._opens_at)

    def take(self, now: float) -> list[Piece]:
        """What is to be written now, in order; neighbours of one stream are one piece."""
        if self._held and now >= self._opens_at:
            self._say_held()
        out, self._out = self._out, []
        return _joined(out)

    def end(self, now: float) -> list[Piece]:
        """What is to be written at the end, the last notice included."""
        if self._held:
            self._say_held()
        if not self._at_line_start:
            self._out.append(Piece("stdout", "\n"))
            self._at_line_start = True
        return self.take(now)

    def _admit(self, shard: int, stream: Stream, text: str, now: float) -> None:
        if now < self._opens_at:
            self._hold(shard, text)
            return
        if self._held:
            self._say_held()
        self._refill(now)
        text = _cut(text)
        lines = text.count("\n")
        if lines > self._lines or len(text) > self._chars:
            self._opens_at = now + CLOSED_SECONDS
            self._hold(shard, text)
            return
        self._lines -= lines
        self._chars -= len(text)
        self._at_line_start = text.endswith("\n")
        self._out.append(Piece(stream, text))

    def _hold(self, shard: int, text: str) -> None:
        self._held[shard] = self._held.get(shard, 0) + max(1, text.count("\n"))

    def _refill(self, now: float) -> None:
        seconds, self._filled_at = now - self._filled_at, now
        self._lines = min(LINES_PER_SECOND * BURST_SECONDS, self._lines + seconds * LINES_PER_SECOND)
        self._chars = min(CHARS_PER_SECOND * BURST_SECONDS, self._chars + seconds * CHARS_PER_SECOND)

    def _say_held(self) -> None:
        total, shard = sum(self._held.values()), next(iter(self._held))
        shards = "" if len(self._held) == 1 else f" in {len(self._held):,} shards"
        notice = f"… {total:,} line{'s' * (total != 1)} more{shards}: {self._hint.format(shard=shard)}\n"
        self._out.append(Piece("stdout", notice if self._at_line_start else f"\n{notice}"))
        self._at_line_start = True
        self._held = {}


def _cut(text: str) -> str:
    body = text.rstrip("\n")
    return text if len(body) <= LINE_LIMIT else shortened(body, LINE_LIMIT) + text[len(body) :]


def harmless(text: str) -> str:
    """`text` without codes that act on a terminal, but colours."""
    return _ACTS.sub("", text)


def _contained(line: str) -> str:
    """`line` without escape codes that would reach into the lines of other shards: colours end with it."""
    clean = harmless(line)
    return clean.removesuffix(_RESET) + _RESET if "\x1b" in line else clean


def _by_newline(text: str) -> list[str]:
    *whole, rest = text.split("\n")
    return [f"{line}\n" for line in whole] + ([rest] if rest else [])


def _overwritten(line: str) -> str:
    """Of states that overwrite each other within a piece, the last, still overwriting what the page shows."""
    states = [state for state in line.split("\r") if state]
    if len(states) < 2 and not line.startswith("\r"):
        return line
    return "\r" + (states[-1] if states else "") + "\r" * line.endswith("\r")


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    parts: list[str] = []
    for index, piece in enumerate(pieces):
        parts.append(piece.text)
        if index + 1 == len(pieces) or pieces[index + 1].stream != piece.stream:
            joined.append(Piece(piece.stream, "".join(parts)))
            parts = []
    return joined
