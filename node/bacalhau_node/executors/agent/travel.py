"""A value on its way: what all its forms have in common."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

INLINE = 64 * 1024
"""A value up to this size rides in its frame (DESIGN section 3)."""


class Muted:
    """The value of a cell that has none."""


class CannotTravel(Exception):
    """A value that should travel as data and can't; the text says why and what to do."""


class Value:
    """A value on its way: `kind` and `type` of messages.Value, and the bytes or what writes them to a file."""

    def __init__(self, kind: str, name: str, data: bytes = b"", write: Callable[[str], None] | None = None) -> None:
        self.kind = kind
        self.type = name
        self.data = data
        self.write = write


def is_a(value: Any, module: str, *names: str) -> bool:
    """Whether `value` is an instance of a class of a module, if that module is loaded at all."""
    loaded = sys.modules.get(module)
    classes = tuple(getattr(loaded, name) for name in names if hasattr(loaded, name))
    return isinstance(value, classes)
