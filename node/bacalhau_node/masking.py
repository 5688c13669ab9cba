r"""Secrets of a job, and how they are kept out of everything that a shard leaves behind.

Theory of operation (DESIGN section 8). A job's spec holds the names of its secrets. Their values go beside
it, from memory to memory, and reach a shard as environment variables. Whatever text comes back (lines, output,
errors) passes here before anyone sees or stores it, on the node that ran the shard: each **form** of a
secret becomes `***`. Forms are the value, each long line of one that has several, and the way it stands in `repr`
and in JSON. Text comes in pieces, so a stream holds back an end that may be the beginning of a form
until it knows better; and where an executor left out the middle of a long text, what is
left of a form on either side is masked too.

It guards against accidents, not against the cell: who writes a secret backwards, or returns it, has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from bacalhau_node.errors import SpecError

MASK: Final = "***"

SHORTEST: Final = 4
"""Characters of a secret: a shorter one would be masked all over the place, and be guessed from that (a guess)."""
LONGEST: Final = 16 * 1024
"""Characters of a secret, well under what one environment variable holds on Linux (128 KiB)."""
_LONG_LINE: Final = 8
"""Characters from which on a line of a secret with several lines is masked by itself (a guess)."""

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_GAP: Final = re.compile(r"\n\[\.\.\. \d+ bytes left out \.\.\.\]\n")
"""What the executors write in place of the middle of a long text."""


class Secrets:
    """Name -> value, which no `repr` shows and nothing can encode. Raises `SpecError` for what can't be a secret."""

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self.values = dict(values or {})
        for name, value in self.values.items():
            _check(name, value)
        forms = {form for value in self.values.values() for form in _forms(value)}
        self._forms = tuple(sorted(forms, key=len, reverse=True))
        self._any = re.compile("|".join(map(re.escape, self._forms)) or r"(?!)")

    def __bool__(self) -> bool:
        return bool(self.values)

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self.values)})"

    def mask(self, text: str) -> str:
        """`text` without a form of any secret."""
        if not self.values:
            return text
        return self._beside_gaps(self._any.sub(MASK, text))

    def mask_bytes(self, data: bytes) -> bytes:
        """The same for UTF-8 in which anything else is left alone."""
        if not self.values:
            return data
        return self.mask(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

    def split(self, text: str) -> tuple[str, str]:
        """(what can be masked now, what must wait for more text), of a stream's text."""
        *_, last = (None, *self._any.finditer(text))
        after = last.end() if last else 0
        if last and after == len(text) and any(form != last[0] and form.startswith(last[0]) for form in self._forms):
            cut = last.start()
        else:
            cut = len(text) - self._pending(text[after:])
        return text[:cut], text[cut:]

    def _pending(self, text: str) -> int:
        """How many characters at the end of `text` may go on to be a form, or to stand beside a gap."""
        gap = next((match for match in _GAP.finditer(text) if match.end() == len(text)), None)
        if gap is not None:
            return len(text) - gap.start() + _head(text[: gap.start()], self._forms)
        return _head(text, self._forms)

    def _beside_gaps(self, text: str) -> str:
        """`text` with the pieces of forms masked that the gaps in it have cut."""
        pieces: list[str] = []
        at = 0
        for gap in _GAP.finditer(text):
            before = text[at : gap.start()]
            cut = _head(before, self._forms)
            pieces += [before[: len(before) - cut], MASK if cut else "", gap.group()]
            at = gap.end() + (skipped := _tail(text[gap.end() : gap.end() + LONGEST], self._forms))
            pieces += [MASK] if skipped else []
        return "".join([*pieces, text[at:]])


NO_SECRETS: Final = Secrets()


class MaskedStream:
    """One stream of text, masked while it comes in pieces."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._rest = ""

    def feed(self, text: str) -> str:
        """What of the text so far can be shown now."""
        if not self._secrets:
            return text
        now, self._rest = self._secrets.split(self._rest + text)
        return self._secrets.mask(now)

    def end(self) -> str:
        """The rest."""
        rest, self._rest = self._secrets.mask(self._rest), ""
        return rest


def gathered(
    names: Iterable[str], environment: Mapping[str, str], variables: Mapping[str, object] = MappingProxyType({})
) -> dict[str, str]:
    """The values of a user's secrets: from the environment, else from a notebook's variables; raises `SpecError`."""
    values: dict[str, str] = {}
    for name in names:
        value = environment.get(name, variables.get(name))
        if value is None:
            where = " nor a variable of the notebook" if variables else ""
            raise SpecError(
                f"--secret {name}: no environment variable{where} is called so; set it, then run this again"
            )
        if not isinstance(value, str):
            raise SpecError(f"--secret {name}: the variable is of type {type(value).__name__}; a str is needed")
        values[name] = value
    return Secrets(values).values


def _check(name: str, value: str) -> None:
    if not _NAME.fullmatch(name):
        raise SpecError(f"--secret {name}: a name is of letters, digits and '_', as that of an environment variable")
    if not SHORTEST <= len(value) <= LONGEST:
        raise SpecError(
            f"--secret {name}: its value has {len(value)} characters, from {SHORTEST} to {LONGEST} are possible"
        )
    try:
        whole = "\0" not in value and bool(value.encode())
    except UnicodeEncodeError:
        whole = False
    if not whole:
        raise SpecError(f"--secret {name}: its value holds what no environment variable can: use text without nulls")


def _forms(value: str) -> set[str]:
    lines = {line.strip() for line in value.splitlines()}
    texts = {value, value.strip()} | {line for line in lines if len(line) >= _LONG_LINE}
    written = {form for text in texts for form in (repr(text)[1:-1], json.dumps(text)[1:-1])}
    return {form for form in texts | written if len(form) >= SHORTEST}


def _head(text: str, forms: tuple[str, ...]) -> int:
    """The length of the longest end of `text` that begins a form without being all of it."""
    longest = 0
    for form in forms:
        at = text.find(form[0], max(0, len(text) - len(form) + 1))
        while at >= 0 and len(text) - at > longest:
            if form.startswith(text[at:]):
                longest = len(text) - at
                break
            at = text.find(form[0], at + 1)
    return longest


def _tail(text: str, forms: tuple[str, ...]) -> int:
    """The length of the longest beginning of `text` that ends a form without being all of it."""
    longest = 0
    for form in forms:
        for size in range(min(len(form) - 1, len(text)), longest, -1):
            if text[size - 1] == form[-1] and form.endswith(text[:size]):
                longest = size
                break
    return longest
