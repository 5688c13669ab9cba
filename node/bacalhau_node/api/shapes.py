"""What goes over the API, known to both sides: bodies, events, errors, and their JSON.

JSON holds UTF-8, names of files needn't: a path with bytes that are not UTF-8 is a string with lone surrogates
in Python. It travels as escapes (backslash, udcXX), which msgspec neither writes nor reads: Python's own `json`
does, so it steps in where such a name comes up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Final, TypeVar

import msgspec

from bacalhau_node import errors
from bacalhau_node.errors import BacalhauError, BugError, ProtocolError
from bacalhau_node.feed import ShardBytes, ShardText, Update
from bacalhau_node.ids import JobId, NodeId
from bacalhau_node.protocol.events import JobChanged, ShardChanged
from bacalhau_node.spec import JobSpec

T = TypeVar("T")

API_VERSION: Final = 0
MAX_JSON: Final = 4 * 1024 * 1024
"""Bytes of a request's JSON."""
MAX_BUNDLE: Final = 1024 * 1024
"""Bytes of files in a `BundleRequest`; a larger folder goes as an archive."""
MAX_MISSING: Final = 10_000
MAX_CAR: Final = 256 * 1024 * 1024
"""Bytes of one archive that is sent in; more are sent one after the other."""
HEARTBEAT: Final = 10.0
"""Seconds of silence on an event stream after which the server sends an empty comment."""


class SubmitRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Start a job under an id that the client made up; `files`: the cell's folder, where it is small."""

    job: JobId
    spec: JobSpec
    files: dict[str, bytes] = {}
    secrets: dict[str, str] = {}


class PlanRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """List and split, no more."""

    spec: JobSpec


class BundleRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The files of a cell's folder, by relative path."""

    files: dict[str, bytes]


class BundleAnswer(msgspec.Struct, frozen=True):
    """The folder's CID."""

    cid: str


class MissingRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which of these are not here?"""

    cids: Annotated[list[str], msgspec.Meta(max_length=MAX_MISSING)]


class MissingAnswer(msgspec.Struct, frozen=True):
    """These, in the order that they were asked for."""

    missing: list[str]


class CarAnswer(msgspec.Struct, frozen=True):
    """How many bytes of blocks were stored."""

    bytes: int


class PinAnswer(msgspec.Struct, frozen=True):
    """Whether a root is kept from now on; else it is until the store needs its room."""

    pinned: bool


class FoundAnswer(msgspec.Struct, frozen=True):
    """The one job that was meant."""

    job: JobId


class Version(msgspec.Struct, frozen=True):
    """Who answers: `api` grows when an old client can't go on."""

    version: str
    api: int
    node: NodeId


class ErrorBody(msgspec.Struct, frozen=True):
    """An error by the name of its class in `errors.py`."""

    error: str
    message: str


# --- JSON ---


def encode(value: Any) -> bytes:
    """`value` as JSON."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode("ascii")


def decode(data: bytes, kind: type[T]) -> T:
    """The `kind` in `data`; raises `msgspec.DecodeError` (`ValidationError`) for anything else."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if b"\\ud" not in data.lower():
            raise msgspec.DecodeError(str(error)) from error
    try:
        return msgspec.convert(json.loads(data), kind)
    except msgspec.ValidationError:
        raise
    except (ValueError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


# --- events ---

EVENTS: Final[dict[str, type[Update]]] = {
    "job": JobChanged,
    "shard": ShardChanged,
    "text": ShardText,
    "bytes": ShardBytes,
}
_NAMES = {kind: name for name, kind in EVENTS.items()}


def event(epoch: str, number: int, update: Update) -> bytes:
    """One update as a server-sent event; its id is where a client goes on."""
    return b"".join((f"id: {epoch}-{number}\nevent: {_NAMES[type(update)]}\ndata: ".encode(), encode(update), b"\n\n"))


def read_event(lines: Iterable[bytes]) -> tuple[str, Update] | None:
    """(id, update) of one event's lines; None for a comment. Raises `ProtocolError`."""
    fields = dict(line.split(b": ", 1) for line in lines if b": " in line and not line.startswith(b":"))
    if not fields:
        return None
    kind = EVENTS.get(fields.get(b"event", b"").decode("ascii", "replace"))
    try:
        if kind is None:
            raise ProtocolError(f"the node sent an event of an unknown sort: {fields.get(b'event')!r:.80}")
        return fields.get(b"id", b"").decode("ascii", "replace"), decode(fields.get(b"data", b""), kind)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"the node sent an event that can't be read: {error}") from error


# --- errors ---

_CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, BacalhauError) and kind is not BacalhauError
}


def raised(body: ErrorBody) -> BacalhauError:
    """The error that the node raised."""
    kind = _CLASSES.get(body.error, BugError)
    return kind(body.message)
