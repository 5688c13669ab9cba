"""The host, as the parent sees it: frames come, frames go, and neither is ever waited for."""

from __future__ import annotations

import os
import selectors

from .frames import pack, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterator, NoReturn

    from .frames import Header

BACKLOG = 16 * 1024 * 1024
"""Bytes of frames that wait for a slow host, before the shard has to wait too."""


class Host:
    """The two byte streams of the host. `gone` is called when they end."""

    def __init__(
        self, streams: tuple[int, int], selector: selectors.BaseSelector, gone: Callable[[], NoReturn]
    ) -> None:
        self.streams = streams
        self.selector = selector
        self.gone = gone
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.writing = False
        for fd in streams:
            os.set_blocking(fd, False)

    def frames(self) -> Iterator[Header]:
        """The headers of the frames that have come: no frame of the host has a body."""
        try:
            data = os.read(self.streams[0], 1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.gone()
        self.incoming += data
        while True:
            try:
                frame = unpack(self.incoming)
            except ValueError as error:
                self.send({"t": "error", "message": "not a frame: %s" % error})
                return
            if frame is None:
                return
            yield frame[0]

    def send(self, header: Header, body: bytes = b"") -> None:
        """Queue a frame."""
        self.outgoing += pack(header, body)

    def write(self) -> None:
        """Write what the host takes now; ask to be woken for the rest."""
        if self.outgoing:
            try:
                sent = os.write(self.streams[1], memoryview(self.outgoing)[: 1 << 20])
            except BlockingIOError:
                sent = 0
            except OSError:
                self.gone()
            del self.outgoing[:sent]
        if bool(self.outgoing) != self.writing:
            self.writing = not self.writing
            if self.writing:
                self.selector.register(self.streams[1], selectors.EVENT_WRITE, lambda: None)
            else:
                self.selector.unregister(self.streams[1])

    @property
    def keeps_up(self) -> bool:
        """Whether it reads fast enough for more text."""
        return len(self.outgoing) < BACKLOG
