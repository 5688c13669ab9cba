"""Where inputs come from, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from bacalhau_node.ids import JobId
from bacalhau_node.ports.content import Provider
from bacalhau_node.sharding import Entry, Reference
from bacalhau_node.spec import InputSource


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """For whom inputs are fetched, and who is asked first.

    `own`: for the owner of this node, whose jobs may ask any address but those of cloud metadata. `providers` are
    those that the job itself names: its requester, mostly. `whose`: for whom among the others, "" if that is not known.
    """

    own: bool = True
    whose: str = ""
    providers: tuple[Provider, ...] = ()


Told = Callable[[str, int, int | None, str], None]
"""Called on the loop as bytes come: (name, done, total or None, CID or "" until all is here)."""


class Source(Protocol):
    """Lists an input and hands its files out.

    `list`, `open` and `check` block: call them from a thread, `open` and `check` also on the loop for a few files.
    """

    def claims(self, source: str) -> bool:
        """Whether this source understands the text of `--input`."""
        ...

    def list(self, source: InputSource, *, index: int) -> list[Entry]:
        """Every file, and every empty folder as an entry of size 0 that ends in "/".

        What can't be used is an `Unusable` entry, or a `Doubtful` one where a shard may have more luck. Raises
        `ContentError` and `SpecError`.
        """
        ...

    async def fetch(self, entries: Sequence[Entry], *, access: Access, told: Told) -> None:
        """Bring the bytes of these entries (all of this source) to this machine, several at once; then `open` has them.

        What is here already is not fetched again. Raises `ContentError` that names the entry, where it was looked
        for and why it did not come; `NodeUnreachable` where another node may have more luck. Cancelling leaves nothing
        half-written that anybody would take for whole.
        """
        ...

    def open(self, reference: Reference, *, scratch: Path) -> Path:
        """A path that holds the entry's bytes now; raises `ContentError` ("changed", "gone") when it no longer does."""
        ...

    def check(self, reference: Reference) -> None:
        """Raise `ContentError` if the entry has changed since it was listed (asked when a shard ends)."""
        ...


class Publisher(Protocol):
    """Brings results to where their owner wants them. Calls on the loop."""

    def claims(self, target: str) -> bool:
        """Whether this publisher understands the text of `--publish`."""
        ...

    async def check(self, target: str) -> None:
        """Raise `SpecError` or `ContentError` if nothing could be published there; asked before a job exists."""
        ...

    async def publish(self, job: JobId, root: str, target: str) -> tuple[str, ...]:
        """Publish the sealed result `root`; returns where it can be found now. Doing it again changes nothing."""
        ...
