"""What nodes say to each other, and what a shard's end looks like.

Theory of operation (DESIGN section 5). A requester **offers** shards to a node; the node
**takes** or **refuses** each; it sends **heartbeats** while it works, **lines** as shards
print, and **proposes** each result; the requester **accepts** or **rejects** it, stores what
it accepted and says **kept**, upon which the node may forget the result. **Recall** asks for
unstarted shards back, **cancel** ends them all. Every message that names work names the
execution (job, shard, attempt): one that the receiver does not know changes nothing.

The author of a message is the key of the connection it came by, never a field in it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from bacalhau_node.ids import Execution, JobId
from bacalhau_node.spec import JobSpec

INLINE_LIMIT = 64 * 1024
"""Values and texts up to this size travel inside the message (DESIGN section 3)."""

ErrorKind = Literal[
    "exception",  # the cell raised: `name`, `message` and `frames` say what and where
    "exit",  # it ended with an exit code of its own
    "signal",  # something killed it: `message` names the signal
    "memory",  # it was killed for memory: `message` says the limit
    "timeout",  # it ran over --timeout
    "disk",  # it wrote more than --disk
    "output",  # its value could not travel
    "input",  # an input was missing, unreadable, or changed while it ran
    "environment",  # what it needs is not there: image, interpreter, package
    "node",  # the node's own fault: lost, daemon gone; a retry elsewhere may work
]

ValueKind = Literal["none", "json", "arrow", "npy", "bytes", "mime", "repr"]


class Frame(msgspec.Struct, frozen=True, gc=False):
    """One line of a remote traceback. `line` counts from 1 in `file`; in the cell: of the cell, magic line included."""

    file: str
    line: int
    function: str
    text: str = ""
    in_cell: bool = False


class ShardError(msgspec.Struct, frozen=True):
    """Why a shard failed: equal (kind, name, message, frames) are shown once, grouped."""

    kind: ErrorKind
    name: str = ""
    message: str = ""
    frames: tuple[Frame, ...] = ()
    notes: tuple[str, ...] = ()


class Blob(msgspec.Struct, frozen=True, gc=False):
    """Bytes that ride along (`inline`) or lie in the content store (`cid`); exactly one of the two."""

    size: int = 0
    inline: bytes | None = b""
    cid: str | None = None


class Value(msgspec.Struct, frozen=True):
    """The value of a shard's last expression. `type` is the Python type's name, for messages.

    json: UTF-8 JSON. arrow: an Arrow IPC file with pandas metadata where it was a frame or Series
    (`type` tells which). npy: NumPy's format without pickle. bytes: as they are. mime: a JSON
    object of MIME type -> text, binary ones in base64. repr: UTF-8 text.
    """

    kind: ValueKind = "none"
    type: str = "NoneType"
    blob: Blob = Blob()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one execution ended, with everything it left behind.

    `stdout` and `stderr` are whole up to the node's cap, `cut` counts the bytes beyond it.
    `outputs` is the CID of the folder that the shard wrote, None when it wrote nothing.
    `answer` names value and outputs, `record` names all of it (DESIGN section 5).
    """

    ok: bool
    exit_code: int = 0
    value: Value = Value()
    outputs: str | None = None
    stdout: Blob = Blob()
    stderr: Blob = Blob()
    cut: int = 0
    error: ShardError | None = None
    seconds: float = 0.0
    max_rss: int = 0
    executor: str = ""
    answer: str = ""
    record: str = ""


# --- messages, requester to node ---


class ShardOffer(msgspec.Struct, frozen=True, gc=False):
    """One shard of an offer; `block` is the CID of its entry list (its part of the plan)."""

    shard: int
    attempt: int
    block: str


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """Run these shards of this job, if you can start them now."""

    job: JobId
    spec: JobSpec
    shards: tuple[ShardOffer, ...]
    count: int
    """How many shards the job has in all."""


class Accept(msgspec.Struct, frozen=True, tag="accept", gc=False):
    """This result is the one that counts; keep it until `Kept`."""

    execution: Execution


class Reject(msgspec.Struct, frozen=True, tag="reject", gc=False):
    """This result is not wanted (any more): forget it."""

    execution: Execution
    reason: str


class Kept(msgspec.Struct, frozen=True, tag="kept", gc=False):
    """The accepted result is stored elsewhere now: you may forget it."""

    execution: Execution


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop these executions and forget them."""

    executions: tuple[Execution, ...]


class Recall(msgspec.Struct, frozen=True, tag="recall"):
    """Give back those of these executions that have not started; the node answers `Refuse(busy)` for each."""

    executions: tuple[Execution, ...]


# --- messages, node to requester ---


class Take(msgspec.Struct, frozen=True, tag="take"):
    """These executions start now. `room`: how many more this node would take at this moment."""

    executions: tuple[Execution, ...]
    room: int


class Refuse(msgspec.Struct, frozen=True, tag="refuse"):
    """Not these. busy: ask again later; never: this node can't run this job at all, and why."""

    executions: tuple[Execution, ...]
    kind: Literal["busy", "never"]
    reason: str
    room: int = 0


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """I hold these executions and am at work; `running` are those that have started."""

    executions: tuple[Execution, ...]
    running: tuple[Execution, ...]
    room: int


class Started(msgspec.Struct, frozen=True, tag="started", gc=False):
    """This execution's code runs now."""

    execution: Execution


class Propose(msgspec.Struct, frozen=True, tag="propose"):
    """This execution ended like this. Sent again until it is answered."""

    execution: Execution
    outcome: Outcome
    room: int


class Lines(msgspec.Struct, frozen=True, tag="lines", gc=False):
    """Whole lines that a shard printed (the last may be unfinished when it is flushed or ends)."""

    execution: Execution
    stream: Literal["stdout", "stderr"]
    text: str


Message = Offer | Accept | Reject | Kept | Cancel | Recall | Take | Refuse | Heartbeat | Started | Propose | Lines
