"""A file that comes part by part: written into the store and hashed as it is written, so that nothing is read again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from bacalhau_node.cid import Cid
from bacalhau_node.content.files import Files, discard
from bacalhau_node.content.intake import Hashed
from bacalhau_node.content.unixfs import Imported, Profile

Adopt = Callable[[str, Hashed], Imported]
"""Takes the finished file at a path over, see `Intake.adopt`."""


class Draft:
    """See `ports.Draft`. `small`: up to so many bytes a file is handed to `add` rather than adopted."""

    def __init__(
        self, files: Files, *, profile: Profile, adopt: Adopt, add: Callable[[bytes], str], small: int
    ) -> None:
        self._profile, self._adopt, self._add, self._small = profile, adopt, add, small
        self.folder = Path(files.session.folder)
        self._path = files.session.temporary()
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._begin()

    def write(self, data: bytes) -> None:
        """Append: what is hashed is what was written."""
        view = memoryview(data)
        while view:
            written = os.write(self._file, view)
            self._growing.add(view[:written])
            view = view[written:]

    def start_again(self) -> None:
        """Forget what was written."""
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        self._begin()

    def finish(self) -> str:
        """Make it a file of the store; returns its CID."""
        size, rest = self._growing.size, self._growing.rest
        if size <= self._small:
            return self._add(os.pread(self._file, size, 0))
        self._hashed.root = self._growing.end(os.pread(self._file, rest, size - rest))
        return str(Cid(self._adopt(self._path, self._hashed).cid))

    def close(self) -> None:
        """Remove it, unless it was finished."""
        os.close(self._file)
        discard([self._path])

    def _begin(self) -> None:
        self._hashed = Hashed(self._profile)
        self._growing = self._hashed.growing()
