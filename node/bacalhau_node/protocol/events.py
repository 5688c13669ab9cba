"""What the machines are told (events) and what they ask for (effects). Frozen; no behaviour.

Events are named for what happened, effects for what to do. Time comes in as `now` (seconds of
a monotonic clock, never stored on disk); a timer comes back as the very value that was asked for.

Longer than 400 lines because all that goes in and out of the machines is in one place.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import Grant, Message, NodeRecord, Outcome, ShardError
from bacalhau_node.spec import JobSpec

JobState = Literal["Pending", "Queued", "Running", "Completed", "Failed", "Stopped"]
ShardState = Literal["waiting", "offered", "taken", "running", "proposed", "accepted", "kept", "failed", "stopped"]
FINAL_JOB: frozenset[str] = frozenset(("Completed", "Failed", "Stopped"))
FINAL_SHARD: frozenset[str] = frozenset(("kept", "failed", "stopped"))


# --- journal rows: state, not a log ---


class JobRow(msgspec.Struct, frozen=True, tag="job"):
    """One job as the requester knows it. `plan` is the CID of the plan's root block."""

    job: JobId
    state: JobState
    spec: JobSpec
    plan: str
    count: int
    created: float
    """Wall clock (seconds since 1970), for people only; set by whoever submits."""
    reason: str = ""
    cid: str = ""
    """The CID of the whole result, once the job has ended with at least one kept shard."""
    published: tuple[str, ...] = ()
    """Where the result lies besides the store (`--publish`)."""


class Tried(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An attempt whose result would still count, and the node that it was offered to.

    `live`: its lease runs, or it has ended and waits for others that agree.
    """

    attempt: int
    node: NodeId
    live: bool


class ShardRow(msgspec.Struct, frozen=True, tag="shard"):
    """One shard of it: enough to go on after a restart. `attempts` is how many offers were made.

    `attempt` is the one whose outcome was accepted (a late result may be of an earlier offer), else 0.
    `tried`: while there is no outcome. `disagreed`: nodes that were outvoted when it was accepted.
    """

    job: JobId
    shard: int
    state: ShardState
    attempts: int = 0
    attempt: int = 0
    node: NodeId | None = None
    outcome: Outcome | None = None
    tried: tuple[Tried, ...] = ()
    lost: int = 0
    killed: int = 0
    failed: int = 0
    disagreed: tuple[NodeId, ...] = ()


class ComputeRow(msgspec.Struct, frozen=True, tag="compute"):
    """A result that this node owes a requester, until it is kept or refused (`outcome` None: forget it).

    `grant`: with it the requester fetches the result's bytes.
    """

    execution: Execution
    requester: NodeId
    outcome: Outcome | None
    grant: Grant | None = None


Row = JobRow | ShardRow | ComputeRow


# --- events ---


class Submitted(msgspec.Struct, frozen=True):
    """A client handed in a job; its plan is made: `blocks` holds the CID of each shard's entry list."""

    job: JobId
    spec: JobSpec
    plan: str
    blocks: tuple[str, ...]
    created: float


class CancelRequested(msgspec.Struct, frozen=True):
    """A client wants the job to stop; what is finished is kept."""

    job: JobId


class Received(msgspec.Struct, frozen=True):
    """A message came from `sender` (the key of its connection)."""

    sender: NodeId
    message: Message


class NodeSeen(msgspec.Struct, frozen=True):
    """A node is known, with `room` for so many executions now. `record`: what it says about itself; None for this one.

    `unreached`: this node has dialled it in vain. For a requester; membership asks for it to be told.
    """

    node: NodeId
    room: int
    record: NodeRecord | None = None
    unreached: bool = False


class NodeGone(msgspec.Struct, frozen=True):
    """A node is known to be dead: its executions are lost at once. For a requester, like `NodeSeen`."""

    node: NodeId


class LinkUp(msgspec.Struct, frozen=True):
    """A link to this node is open now. `inbound`: it dialled us."""

    node: NodeId
    inbound: bool


class LinkDown(msgspec.Struct, frozen=True):
    """The last link to this node is closed."""

    node: NodeId


class Dialled(msgspec.Struct, frozen=True):
    """A `Dial` led to this node: there is a link to it, which may be older. `LinkUp` does not say why there is one."""

    address: str
    node: NodeId


class DialFailed(msgspec.Struct, frozen=True):
    """A `Dial` led nowhere; `node` where it was known. With "" for the address: nothing could be sent to `node`."""

    address: str
    node: NodeId | None
    reason: str


class Join(msgspec.Struct, frozen=True):
    """Be part of a network: the first event of membership. All are multiaddrs.

    `addresses`: of nodes to be linked with, tried until they were met. `remembered`: of neighbours in an earlier life.
    """

    addresses: tuple[str, ...] = ()
    remembered: tuple[str, ...] = ()


class Leave(msgspec.Struct, frozen=True):
    """This node is about to end: its neighbours should know. Nothing else happens in membership from then on."""


class LoadChanged(msgspec.Struct, frozen=True):
    """What this node says about itself is different now: its next record says so.

    `record.version` is the wall clock now (nanoseconds since 1970; 0: not looked at), which a machine that has slept
    must set again. `record.neighbours` is not looked at.
    """

    record: NodeRecord


class OfferPacked(msgspec.Struct, frozen=True):
    """What these executions need can be fetched now, and their offer to another node is on its way."""

    executions: tuple[Execution, ...]


class OfferFailed(msgspec.Struct, frozen=True):
    """This execution can't be offered to another node: its input can't be read, or its secrets are gone."""

    execution: Execution
    error: ShardError


class OfferUnsent(msgspec.Struct, frozen=True):
    """The node that these executions are for could not be reached."""

    executions: tuple[Execution, ...]
    reason: str


class ResultComing(msgspec.Struct, frozen=True):
    """`node` has proposed a result, whose bytes are fetched before the requester is given the proposal."""

    execution: Execution
    node: NodeId


class ResultMissing(msgspec.Struct, frozen=True):
    """The bytes of a result that `node` proposed did not come; `lied`: or were not what it had said."""

    execution: Execution
    node: NodeId
    reason: str
    lied: bool = False


class ResultKept(msgspec.Struct, frozen=True):
    """The blocks of an accepted result are stored (the answer to `Keep`)."""

    execution: Execution


class JobSealed(msgspec.Struct, frozen=True):
    """The job's root over all kept shards is stored, and published or not (the answer to `Seal`).

    `published`: where it can be found besides the store. `problem`: why it can't, a sentence for its user.
    """

    job: JobId
    cid: str
    published: tuple[str, ...] = ()
    problem: str = ""


class ExecutionStarted(msgspec.Struct, frozen=True):
    """The executor has started the code of this execution."""

    execution: Execution


class ExecutionEnded(msgspec.Struct, frozen=True):
    """The executor is done and the outcome's bytes are in the content store."""

    execution: Execution
    outcome: Outcome


class TimerFired(msgspec.Struct, frozen=True):
    """The time asked for by `SetTimer` has come."""

    timer: Timer


# --- timers ---


class LeaseTimer(msgspec.Struct, frozen=True):
    """Requester: look whether executions of this job have been silent for too long."""

    job: JobId


class JobDeadline(msgspec.Struct, frozen=True):
    """Requester: `--job-timeout` is over."""

    job: JobId


class RetryTimer(msgspec.Struct, frozen=True):
    """Requester: nodes that were busy may have room now."""

    job: JobId


class WatchTimer(msgspec.Struct, frozen=True):
    """Requester: all shards of this job are on nodes: look for slow ones, and for queues beside idle nodes."""

    job: JobId


class HeartbeatTimer(msgspec.Struct, frozen=True):
    """Compute: tell this requester that its executions are alive, and propose again what it has not answered."""

    requester: NodeId


class ExchangeTimer(msgspec.Struct, frozen=True):
    """Membership: compare with a neighbour, look after links, let silent nodes go."""


class BidTimer(msgspec.Struct, frozen=True):
    """Compute: this node's turn to bid for an announced job has come."""

    job: JobId


class AnnounceTimer(msgspec.Struct, frozen=True):
    """Requester: the announcement of this job has not brought enough: make another."""

    job: JobId


Timer = LeaseTimer | JobDeadline | RetryTimer | WatchTimer | AnnounceTimer | HeartbeatTimer | BidTimer | ExchangeTimer


# --- effects ---


class Send(msgspec.Struct, frozen=True):
    """Send `message` to a node (perhaps this one).

    An offer to another node is packed first: what its shards need is made fetchable, `OfferPacked` says so, or
    `OfferFailed`.
    """

    to: NodeId
    message: Message


class Publish(msgspec.Struct, frozen=True):
    """Send `message` to every node of the network."""

    message: Message


class Dial(msgspec.Struct, frozen=True):
    """Open a link to `address`, a multiaddr (to `node`, where it is known); `Dialled` or `DialFailed` is the answer."""

    address: str
    node: NodeId | None = None


class HangUp(msgspec.Struct, frozen=True):
    """Close the links to `node`. `reason`: what it did wrong, to be told once in the log, "" for nothing new."""

    node: NodeId
    reason: str = ""


class Complain(msgspec.Struct, frozen=True):
    """Tell once in the log what is wrong with `node`, which may be this one."""

    node: NodeId
    reason: str


class Learn(msgspec.Struct, frozen=True):
    """Remember where `node` can be dialled when something is to be sent to it."""

    node: NodeId
    addresses: tuple[str, ...]


class SetTimer(msgspec.Struct, frozen=True):
    """Give `TimerFired(timer)` back at `at` on the clock of `now`. Setting an equal timer again moves it."""

    timer: Timer
    at: float


class Write(msgspec.Struct, frozen=True):
    """Journal this row before any effect of the same turn is carried out."""

    row: Row


class Keep(msgspec.Struct, frozen=True):
    """Requester: pin (or publish) this accepted result, then report `ResultKept`.

    A shard's final failure is kept in the same way: its output may lie in the store.
    """

    execution: Execution
    node: NodeId
    outcome: Outcome


class Seal(msgspec.Struct, frozen=True):
    """Requester: store the root over the records of all kept shards, publish it, then report `JobSealed`."""

    job: JobId
    records: tuple[tuple[int, str], ...]
    """(shard, record CID), by shard."""
    publish: str = "store"
    """Where to; "store": nowhere else."""


class ShardChanged(msgspec.Struct, frozen=True):
    """Requester, for clients: a shard's state is now this."""

    job: JobId
    shard: int
    state: ShardState
    node: NodeId | None
    attempt: int
    error: ShardError | None = None


class JobChanged(msgspec.Struct, frozen=True):
    """Requester, for clients: the job's state is now this."""

    job: JobId
    state: JobState
    reason: str = ""
    cid: str = ""
    published: tuple[str, ...] = ()


class Notify(msgspec.Struct, frozen=True):
    """Tell the clients that watch the job."""

    update: ShardChanged | JobChanged


class Run(msgspec.Struct, frozen=True):
    """Compute: stage and run this execution; report `ExecutionStarted` and `ExecutionEnded`."""

    execution: Execution
    spec: JobSpec
    block: str
    count: int
    requester: NodeId
    grant: Grant | None = None
    secrets: dict[str, str] = {}


class Stop(msgspec.Struct, frozen=True):
    """Compute: kill this execution if it runs, forget its result; no event follows."""

    execution: Execution


class Forget(msgspec.Struct, frozen=True):
    """Compute: this result is kept elsewhere or unwanted: unpin it."""

    execution: Execution
    outcome: Outcome


class ReleaseJob(msgspec.Struct, frozen=True):
    """Compute: no execution of this job is held any more: its slots are free for others."""

    job: JobId


Event = (
    Submitted
    | CancelRequested
    | Received
    | NodeSeen
    | NodeGone
    | LinkUp
    | LinkDown
    | Dialled
    | DialFailed
    | Join
    | Leave
    | LoadChanged
    | OfferPacked
    | OfferFailed
    | OfferUnsent
    | ResultComing
    | ResultMissing
    | ResultKept
    | JobSealed
    | ExecutionStarted
    | ExecutionEnded
    | TimerFired
)
Effect = (
    Send
    | Publish
    | Dial
    | HangUp
    | Complain
    | Learn
    | NodeSeen
    | NodeGone
    | SetTimer
    | Write
    | Keep
    | Seal
    | Notify
    | Run
    | Stop
    | Forget
    | ReleaseJob
)
