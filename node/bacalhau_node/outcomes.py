"""What comes out of an execution, made fit to be seen: no secrets in it, and nothing that no format can carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from bacalhau_node.ids import Execution
from bacalhau_node.masking import MaskedStream, Secrets
from bacalhau_node.messages import Lines, Outcome, ShardError, Transfer
from bacalhau_node.ports import ExecutorEvent, RawOutcome, ShardLines
from bacalhau_node.protocol.events import Event, ExecutionStarted

Stream = Literal["stdout", "stderr"]


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


class Telling:
    """What an executor emits, told to the engine, without secrets."""

    def __init__(
        self, execution: Execution, progress: Callable[[Event | Lines | Transfer], None], secrets: Secrets
    ) -> None:
        self._execution, self._progress = execution, progress
        self._started = False
        self._streams: dict[Stream, MaskedStream] = {name: MaskedStream(secrets) for name in ("stdout", "stderr")}

    def __call__(self, event: ExecutorEvent) -> None:
        """It started, or printed something."""
        if isinstance(event, ShardLines):
            self._tell(event.stream, self._streams[event.stream].feed(event.text))
        elif not self._started:  # in the same box as the cell there is an agent that says so, maybe once more
            self._started = True
            self._progress(ExecutionStarted(self._execution))

    def end(self) -> None:
        """Nothing more comes: tell what was held back."""
        for name, stream in self._streams.items():
            self._tell(name, stream.end())

    def _tell(self, stream: Stream, text: str) -> None:
        if text:
            self._progress(Lines(self._execution, stream, text))
