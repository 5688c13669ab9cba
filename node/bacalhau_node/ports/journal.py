"""What was decided, on disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from bacalhau_node.ids import JobId
from bacalhau_node.protocol.events import Row


class Journal(Protocol):
    """What was decided, before anyone is told. Rows replace rows of the same key."""

    def commit(self, rows: Iterable[Row]) -> None:
        """Write all rows in one transaction; returns when they survive the process. Quick."""
        ...

    def forget(self, jobs: Iterable[JobId]) -> None:
        """Take away the rows of these jobs and of their shards; results that are owed stay."""
        ...

    def load(self) -> list[Row]:
        """Every row, jobs before their shards; raises `ContentError` for a damaged or newer journal."""
        ...

    def close(self) -> None:
        """Let go of the file; every commit that returned is in it."""
        ...
