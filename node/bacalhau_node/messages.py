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

from typing import Annotated, Literal

import msgspec

from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.spec import MAX_SHARDS, Isolation, JobSpec

INLINE_LIMIT = 64 * 1024
"""Values and texts up to this size travel inside the message (DESIGN section 3)."""

MAX_ROUND = 16
"""Rounds in which one job is announced, as far as a node follows them: each takes twice as long as the one before."""

Room = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Short = Annotated[str, msgspec.Meta(max_length=512)]
"""A text that others keep in memory, or in a journal."""

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

    shard: Annotated[int, msgspec.Meta(ge=0, lt=MAX_SHARDS)]
    attempt: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    block: Short


class Grant(msgspec.Struct, frozen=True, gc=False):
    """A bearer capability of one job for one node: opens the job's content at its requester, and back.

    `gateways`: base URLs where it is good besides streams to the requester.
    """

    token: Short
    gateways: Annotated[tuple[Short, ...], msgspec.Meta(max_length=4)] = ()


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """Run these shards of this job, if you can start them now."""

    job: JobId
    spec: JobSpec
    shards: tuple[ShardOffer, ...]
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARDS)]
    """How many shards the job has in all."""
    grant: Grant | None = None
    """How to fetch what the shards need; None within one node."""
    secrets: dict[str, str] = {}
    """Values for `spec.secrets`: held in memory only, and only in an offer to another node."""


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
    room: Room


class Refuse(msgspec.Struct, frozen=True, tag="refuse"):
    """Not these. busy: ask again later; never: this node can't run this job at all, and why."""

    executions: tuple[Execution, ...]
    kind: Literal["busy", "never"]
    reason: str
    room: Room = 0


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """I hold these executions and am at work; `running` are those that have started."""

    executions: tuple[Execution, ...]
    running: tuple[Execution, ...]
    room: Room


class Started(msgspec.Struct, frozen=True, tag="started", gc=False):
    """This execution's code runs now."""

    execution: Execution


class Propose(msgspec.Struct, frozen=True, tag="propose"):
    """This execution ended like this. Sent again until it is answered."""

    execution: Execution
    outcome: Outcome
    room: Room


class Lines(msgspec.Struct, frozen=True, tag="lines", gc=False):
    """Whole lines that a shard printed (the last may be unfinished when it is flushed or ends)."""

    execution: Execution
    stream: Literal["stdout", "stderr"]
    text: str


class Transfer(msgspec.Struct, frozen=True, tag="transfer", gc=False):
    """Bytes on their way to a shard, for people: `done` of `total` (None: unknown); `cid` once it is all here."""

    execution: Execution
    name: str
    done: int
    total: int | None = None
    cid: str = ""


# --- messages among all nodes: finding shards a place ---


class Announce(msgspec.Struct, frozen=True, tag="announce"):
    """To everybody: this job's requester knows too few nodes for it. Names requirements, never data.

    `spec` carries what decides whether a node can run the job: whether it has inputs, but nothing that names them, or
    its code.
    `wanted`: so many executions are looked for. `round` grows with each announcement of the job.
    """

    job: JobId
    requester: NodeId
    addresses: Annotated[tuple[Short, ...], msgspec.Meta(max_length=64)]
    spec: JobSpec
    wanted: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    round: Annotated[int, msgspec.Meta(ge=0, le=MAX_ROUND)]


class Bid(msgspec.Struct, frozen=True, tag="bid", gc=False):
    """To a requester that announced: I can run this job and have so much room."""

    job: JobId
    room: Room


# --- messages among neighbours: who is there ---


class Engine(msgspec.Struct, frozen=True, gc=False):
    """An executor of a node. `memory`: bytes for one shard; `gpus`: the memory of each card, in bytes."""

    name: str
    isolation: Isolation
    python: str
    memory: int
    gpus: tuple[int, ...] = ()


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a node says about itself; only its own signature makes it true.

    `version` grows with every record of a node, restarts included (nanoseconds of its clock when it was made, or one
    more than the last). `addresses`: multiaddrs; none for a node that can't be dialled. `room`: executions that it
    would take when this was made, of `slots`. `gateway`: base URL of its trustless gateway, "" for none.
    `neighbours`: to whom it holds links. `leaving`: its last record.
    """

    node: NodeId
    version: int
    addresses: tuple[str, ...] = ()
    agent: str = ""
    slots: int = 0
    room: int = 0
    engines: tuple[Engine, ...] = ()
    images: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    gateway: str = ""
    neighbours: tuple[NodeId, ...] = ()
    jobs: int = 0
    age: float = 0.0
    """Median seconds that a message took, waits in queues included: half the time from a question to a neighbour to its
    answer, by the asker's clock (those of two machines differ by more than that). 0: none was answered yet."""
    dropped: int = 0
    """Messages that it refused, or could not send, since it started."""
    leaving: bool = False


class Signed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A `NodeRecord` as MessagePack, and its node's signature over just these bytes."""

    record: bytes
    signature: bytes


class Copy(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A record on its way. `age`: whole seconds since its node made it, by the clocks of those who had it; no less."""

    signed: Signed
    age: Annotated[int, msgspec.Meta(ge=0)]


class Digest(msgspec.Struct, frozen=True, tag="digest", gc=False):
    """What I know: for each node 8 bytes of its id's hash and 8 of its version. The answer is `Records`.

    `complete`: nothing was left out. `room`: how many records of nodes that are not named here I would take.
    """

    known: bytes
    complete: bool = True
    room: Annotated[int, msgspec.Meta(ge=0)] = 0


class Records(msgspec.Struct, frozen=True, tag="records"):
    """Records that the other lacks; `wanted`: hashes (8 bytes each) of the nodes whose newer ones are wanted in return.

    `parting`: I have neighbours enough; take these and try others.
    """

    records: tuple[Copy, ...]
    wanted: bytes = b""
    parting: bool = False


class PeersWanted(msgspec.Struct, frozen=True, tag="peers-wanted", gc=False):
    """Peer exchange: give me records of up to so many nodes that can be dialled, at random."""

    count: Annotated[int, msgspec.Meta(ge=0)]


MembershipMessage = Digest | Records | PeersWanted

JobMessage = (
    Offer
    | Accept
    | Reject
    | Kept
    | Cancel
    | Recall
    | Take
    | Refuse
    | Heartbeat
    | Started
    | Propose
    | Lines
    | Transfer
    | Announce
    | Bid
)

Message = JobMessage | MembershipMessage
