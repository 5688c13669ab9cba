"""Adapters without an outside: whole implementations of the ports, in memory."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from bacalhau_node.ids import JobId
from bacalhau_node.journal import OWED, Key, is_forgotten, row_key
from bacalhau_node.protocol.events import Row

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Row] = msgspec.msgpack.Decoder(Row)


class MemoryJournal:
    """A journal that ends with the process. After `close` it can still be read, as after a restart.

    Rows are kept as bytes: what couldn't go to disk can't come in here either.
    """

    def __init__(self) -> None:
        self._rows: dict[Key, bytes] = {}

    def commit(self, rows: Iterable[Row]) -> None:
        """Keep all rows, or none if one of them can't be encoded."""
        changes = [(row_key(row), None if is_forgotten(row) else _encoder.encode(row)) for row in rows]
        for key, data in changes:
            if data is None:
                self._rows.pop(key, None)
            else:
                self._rows[key] = data

    def forget(self, jobs: Iterable[JobId]) -> None:
        """Take away jobs and their shards."""
        gone = set(jobs)
        self._rows = {key: data for key, data in self._rows.items() if key[0] == OWED or key[1] not in gone}

    def load(self) -> list[Row]:
        """Every row: jobs, then shards, then results that are owed."""
        return [_decoder.decode(self._rows[key]) for key in sorted(self._rows)]

    def close(self) -> None:
        """Nothing to let go of."""
