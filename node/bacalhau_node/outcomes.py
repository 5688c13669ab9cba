"""Changes to the outcome of an execution before anybody sees it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from bacalhau_node.masking import Secrets
from bacalhau_node.messages import Outcome, ShardError
from bacalhau_node.ports import RawOutcome


def masked(raw: RawOutcome, secrets: Secrets) -> RawOutcome:
    """The outcome with secrets masked in its text, its error, and a value that is a text for people.

    Other values, and files, are what the cell made them.
    """
    value = raw.value
    if value.kind in ("repr", "mime") and isinstance(value.data, bytes):
        value = msgspec.structs.replace(value, data=secrets.mask_bytes(value.data))
    return msgspec.structs.replace(
        raw,
        value=value,
        stdout=secrets.mask_bytes(raw.stdout),
        stderr=secrets.mask_bytes(raw.stderr),
        error=raw.error and _rewritten(raw.error, secrets.mask),
    )


def printable(outcome: Outcome) -> Outcome:
    """The outcome with an error that every format can carry: lone surrogates become escapes."""
    if outcome.error is None:
        return outcome
    return msgspec.structs.replace(outcome, error=_rewritten(outcome.error, _escaped))


def _rewritten(error: ShardError, change: Callable[[str], str]) -> ShardError:
    """The error with every text in it changed."""

    def changed(value: object) -> object:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        return [changed(item) for item in value] if isinstance(value, list | tuple) else value

    plain = msgspec.to_builtins(msgspec.structs.replace(error, kind="node"))
    return msgspec.structs.replace(msgspec.convert(changed(plain), ShardError), kind=error.kind)


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
