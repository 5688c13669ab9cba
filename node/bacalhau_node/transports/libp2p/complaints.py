"""Who broke which rule, told once."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

REMEMBERED = 10_000


class Complaints:
    """Tells in the log what others did wrong: once for each of them and kind of fault."""

    def __init__(self) -> None:
        self.count = 0
        self._told: dict[tuple[str, str], None] = {}

    def add(self, who: str, kind: str, what: object) -> None:
        """`who` did `what`, which is a fault of some `kind`."""
        self.count += 1
        if (who, kind) in self._told:
            return
        self._told[who, kind] = None
        if len(self._told) > REMEMBERED:
            del self._told[next(iter(self._told))]
        log.warning("%s is disconnected: %s", who, what)
