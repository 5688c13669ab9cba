"""What a shard writes: its pipes, and the lines that go out."""

from __future__ import annotations

import os
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

HEAD = 8 * 1024 * 1024
"""Text of a shard that is sent as it comes, both streams together."""
TAIL = 1024 * 1024
"""Text of a stream that is kept beyond that: its end. 10 MB in all (DESIGN section 6)."""
UNFINISHED = 0.05
"""Seconds after which an unfinished line is sent."""
PACE = 0.005
"""Seconds between two frames of one stream while it prints without a pause."""


class Pipes:
    """The pipes that all shards inherit: read ends for the parent, write ends for the shards."""

    def __init__(self) -> None:
        self.read_ends: dict[str, int] = {}
        self.write_ends: dict[str, int] = {}
        for name in ("stdout", "stderr", "crash", "result"):
            self.read_ends[name], self.write_ends[name] = os.pipe()
            os.set_blocking(self.read_ends[name], False)

    def read(self, name: str) -> bytes:
        """What was written; nothing when there is nothing now."""
        try:
            return os.read(self.read_ends[name], 65536)
        except BlockingIOError:
            return b""


class Text:
    """One stream of a shard: whole lines go out, an unfinished one after a while; the cap keeps both ends."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self.send = send
        self.pending = bytearray()
        self.due = 0.0
        self.sent = 0.0
        self.tail: deque[bytes] = deque()
        self.kept = 0
        self.cut = 0

    def feed(self, data: bytes, room: int, now: float) -> int:
        """Take what was printed; `room` is what may still be sent. Returns how much of it was used."""
        used = min(room, len(data))
        if used:
            self.pending += data[:used]
            if not self.due:
                self.due = max(now, self.sent + PACE) if b"\n" in data[:used] else now + UNFINISHED
            elif b"\n" in data[:used]:
                self.due = min(self.due, max(now, self.sent + PACE))
        if used < len(data):
            self.tail.append(data[used:])
            self.kept += len(data) - used
            while self.kept - len(self.tail[0]) >= TAIL:
                self.cut += len(self.tail[0])
                self.kept -= len(self.tail.popleft())
        return used

    def flush(self, now: float, *, everything: bool = False) -> None:
        """Send the whole lines; everything when asked, or when the unfinished line has waited for long enough."""
        end = len(self.pending) if everything else self.pending.rfind(b"\n") + 1
        end = end or len(self.pending)
        if end:
            self.send(bytes(self.pending[:end]))
            del self.pending[:end]
        self.sent = now
        self.due = now + UNFINISHED if self.pending else 0.0

    def finish(self, now: float) -> int:
        """The shard has ended: send the rest and the kept tail; returns how many bytes were cut out."""
        self.flush(now, everything=True)
        if self.cut:
            self.send(b"\n[... %d bytes left out ...]\n" % self.cut)
        if self.kept:
            self.send(b"".join(self.tail))
        return self.cut
