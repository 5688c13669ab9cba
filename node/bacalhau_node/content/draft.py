"""A file that comes part by part: written into the store and hashed as it is written, so that nothing is read again.

The leaves of a file are hashed each by itself, so parts that begin where leaves do may be written in several threads,
and in any order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from bacalhau_node.cid import Cid
from bacalhau_node.content.files import Files, discard
from bacalhau_node.content.heap import keep_memory
from bacalhau_node.content.intake import Hashed
from bacalhau_node.content.unixfs import Imported, Leaf, Profile, hash_leaf, write_at
from bacalhau_node.errors import BugError

Adopt = Callable[[str, Hashed], Imported]
"""Takes the finished file at a path over, see `Intake.adopt`."""


class Draft:
    """See `ports.Draft`. `small`: up to so many bytes a file is handed to `add` rather than adopted."""

    def __init__(
        self, files: Files, *, profile: Profile, adopt: Adopt, add: Callable[[bytes], str], small: int
    ) -> None:
        keep_memory()
        self._profile, self._adopt, self._add, self._small = profile, adopt, add, small
        self.folder = Path(files.session.folder)
        self._path = files.session.temporary()
        self._parts: dict[int, list[Leaf]] = {}
        os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def write(self, at: int, pieces: Sequence[bytes | memoryview]) -> None:
        """Write a part: what is hashed is what was written."""
        # Opened for each part: a thread that is late finds no file, and never somebody else's descriptor.
        handle, end = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC), at
        try:
            for piece in pieces:
                write_at(handle, memoryview(piece), end)
                end += len(piece)
        finally:
            os.close(handle)
        leaves = _cut(pieces, self._profile.chunk)
        self._parts[at] = [hash_leaf(leaf, sum(map(len, leaf)), self._profile) for leaf in leaves]

    def start_again(self) -> None:
        """Forget what was written."""
        os.truncate(self._path, 0)
        self._parts = {}

    def finish(self) -> str:
        """Make it a file of the store; returns its CID."""
        size, leaves = 0, list[Leaf]()
        for at, part in sorted(self._parts.items()):
            if at != size or size % self._profile.chunk:
                raise BugError(f"a part of a draft begins at {at}, where {size} bytes came before")
            leaves += part
            size += sum(length for _, _, length in part)
        if size <= self._small:
            return self._add(Path(self._path).read_bytes())
        hashed = Hashed(self._profile)
        hashed.join(leaves)
        return str(Cid(self._adopt(self._path, hashed).cid))

    def close(self) -> None:
        """Remove it, unless it was finished."""
        discard([self._path])


def _cut(pieces: Iterable[bytes | memoryview], size: int) -> Iterator[list[memoryview]]:
    """The same bytes in runs of `size`, the last one shorter."""
    run, room = list[memoryview](), size
    for piece in pieces:
        view = memoryview(piece)
        while view:
            run.append(view[:room])
            view = view[len(run[-1]) :]
            room -= len(run[-1])
            if not room:
                yield run
                run, room = [], size
    if run:
        yield run
