"""What the node needs from the outside, as Protocols: one contract suite each, fakes included.

The engine and the node know only these. Adapters (executors, sources, content, transports,
journal) implement them and never import each other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from bacalhau_node.cid import Cid
from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.masking import NO_SECRETS, Secrets
from bacalhau_node.messages import ShardError, ValueKind
from bacalhau_node.protocol.events import LinkDown, LinkUp, Row
from bacalhau_node.sharding import Entry, Reference
from bacalhau_node.spec import InputSource, Isolation, JobSpec

Scope = Literal["block", "entity", "all"]
"""How much of a DAG is asked for (`dag-scope` of the trustless gateway specification)."""

# --- executor ---


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A card, or a slice of one (MIG). `memory` in bytes; `minor`: the number of its device file, None for a slice."""

    uuid: str
    name: str
    memory: int
    minor: int | None = None


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an executor can do here, found by running one real thing. `problem` says why it can't.

    `images`: names of images that need not be pulled, some of the newest.
    """

    executor: str
    isolation: Isolation
    slots: int
    memory_per_slot: int
    python: str
    versions: Mapping[str, str] = {}
    limits_enforced: bool = True
    gpus: tuple[Gpu, ...] = ()
    images: tuple[str, ...] = ()
    problem: str | None = None


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A Python that runs cells, as far as packages for it depend on it.

    `python` is its full version ("3.11.4"), `versions` what is installed there: normal name -> version.
    `executable` is set where it lies on this machine, so that it can be asked itself; `system` ("linux"), `machine`
    ("x86_64") and `libc` ("glibc 2.36", "" where it has none of its own) say which wheels fit.
    """

    python: str
    system: str
    machine: str
    libc: str = ""
    versions: Mapping[str, str] = {}
    executable: Path | None = None


class StagedFile(msgspec.Struct, frozen=True):
    """A file of a shard that lies on this machine now. `mount` is where the shard must find it.

    `mount` is absolute in the container ("/inputs/a/b.csv"); an executor without containers
    uses `path` itself. `shared`: it came by `--with`.
    """

    path: Path
    mount: str
    logical: str
    size: int
    shared: bool = False


class ShardTask(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an executor needs to run one execution.

    `bundle` is the unpacked folder of a `PythonCell` (None for a `Command`); `layer` is a folder of
    packages that goes in front of those of its environment (None: it needs no others). `files` come in
    plan order. `scratch` is a folder of this execution on the store's file system, which does not
    exist yet: the executor makes it when it has something to return by path, and leaves that there.
    `secrets` become environment variables of the shard; nothing else of them may be written anywhere.
    """

    execution: Execution
    spec: JobSpec
    count: int
    files: tuple[StagedFile, ...]
    scratch: Path
    bundle: Path | None = None
    layer: Path | None = None
    secrets: Secrets = NO_SECRETS


class RawValue(msgspec.Struct, frozen=True):
    """A value as the executor leaves it: bytes, or a file in the task's scratch folder."""

    kind: ValueKind = "none"
    type: str = "NoneType"
    data: bytes | Path = b""


class RawOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an execution ended, before its bytes have names.

    `outputs` is a folder in scratch, or None if nothing was written.
    """

    ok: bool
    exit_code: int = 0
    value: RawValue = RawValue()
    outputs: Path | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    cut: int = 0
    error: ShardError | None = None
    seconds: float = 0.0
    max_rss: int = 0


class ShardStarted(msgspec.Struct, frozen=True):
    """The shard's own code runs now."""


class ShardLines(msgspec.Struct, frozen=True):
    """Text that it printed, at most once and in order within a stream; whole lines where possible."""

    stream: Literal["stdout", "stderr"]
    text: str


ExecutorEvent = ShardStarted | ShardLines


class Executor(Protocol):
    """Runs executions. All calls come from one asyncio loop; at most `slots` + prefetch `run`s at once."""

    async def probe(self) -> Capabilities:
        """What works here, found by trying; never raises, says `problem` instead."""
        ...

    def check(self, spec: JobSpec) -> str | None:
        """Why this node can never run `spec` (a sentence for its user), or None. Cheap; no I/O."""
        ...

    async def target(self, spec: JobSpec) -> Target:
        """The Python that runs the cell of `spec`, for installing what it requires; raises `SpecError` if none can."""
        ...

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """Run to the end and say how it ended, failures of the shard included.

        Cancelling the asyncio task kills the shard with everything it started, within a second,
        leaves the slot usable, and re-raises. Raises only `BugError` and cancellation.
        """
        ...

    async def release(self, job: JobId) -> None:
        """No more executions of `job` will come: free what was held for it."""
        ...

    async def close(self) -> None:
        """End everything this executor started; leaves no process, container, mount or file behind."""
        ...


# --- content ---


class Draft(Protocol):
    """A file that is being written into the store, and hashed as it is written. For one thread at a time; blocks."""

    @property
    def folder(self) -> Path:
        """A folder on the disk that it is written to."""
        ...

    def write(self, data: bytes) -> None:
        """Append; raises `OSError` where the disk takes no more."""
        ...

    def start_again(self) -> None:
        """Forget what was written."""
        ...

    def finish(self) -> str:
        """Make what was written a UnixFS file of the store, and return its CID: in the index when this returns."""
        ...

    def close(self) -> None:
        """Remove it, unless it was finished."""
        ...


class ContentStore(Protocol):
    """Blocks and files by CID. Methods may block on disk: call from a thread unless they say "quick".

    What nobody pinned may be collected some time after it was last put, imported, asked for or read: an hour
    at the earliest, and never while a `hold` lasts that began before, in whatever process of the user.
    """

    def put(self, data: bytes, *, codec: Literal["raw", "dag-json"] = "raw") -> str:
        """Store one block of at most 1 MiB and return its CID. Quick."""
        ...

    def get(self, cid: str) -> bytes:
        """The verified bytes of one block; raises `ContentError` when it is missing or damaged. Quick."""
        ...

    def has(self, cid: str) -> bool:
        """Whether the block is here, and so all below it; it counts as used. Quick."""
        ...

    def block(self, cid: Cid) -> bytes:
        """`get` for those that hold the CID in bytes. Quick."""
        ...

    def holds(self, cid: Cid) -> bool:
        """`has` for those that hold the CID in bytes. Quick."""
        ...

    def keep(self, cid: Cid, block: bytes) -> None:
        """Store a block that was checked against its CID, and all of whose links are here. Mostly quick."""
        ...

    def to_send(self, cid: Cid) -> bytes:
        """`block` for those who send it on to somebody who checks it: what is surely unchanged isn't hashed. Quick."""
        ...

    def file_size(self, cid: Cid) -> int | None:
        """The size of the file with this root, if it is known without reading it. Quick."""
        ...

    def flush(self) -> None:
        """Make every `put` so far durable (group commit). Quick."""
        ...

    def add_bytes(self, data: bytes) -> str:
        """Import `data` as a UnixFS file and return its CID."""
        ...

    def add_path(self, path: Path, *, move: bool = False, link: bool = False) -> str:
        """Import a file or a folder as UnixFS. `move`: the store takes the files over, and does not copy them.

        `link`: the files stay where they are and the store reads them there. One that has changed since is a
        `ContentError` when it is read, and from then on it is missing here, as is all that contains it.
        """
        ...

    def draft(self) -> Draft:
        """A new empty file, for what comes part by part; to be closed. Raises `OSError`."""
        ...

    def list(self, cid: str) -> list[tuple[str, str, int]]:
        """All files below a UnixFS root: (logical path, CID, size), sorted by path; `("", cid, size)` for a file.

        An empty folder is listed as (its path + "/", CID, 0). Links inside the root count as what they lead to.
        """
        ...

    def read(self, cid: str) -> bytes:
        """A whole UnixFS file, verified."""
        ...

    def file(self, cid: str) -> Path | None:
        """A file on disk that holds exactly this UnixFS file's bytes, if the store has it as one piece."""
        ...

    def export(self, cid: str, target: Path) -> None:
        """Write a UnixFS file or folder to `target` (which must not exist), verified, never outside of it."""
        ...

    def pin(self, cid: str, *, owner: str = "") -> None:
        """Keep this root and all below it; counted for each owner. Quick."""
        ...

    def unpin(self, cid: str, *, owner: str = "") -> None:
        """Take one `pin` back. Quick."""
        ...

    def pins(self, cid: str) -> int:
        """How often this root is pinned now, by all owners. Quick."""
        ...

    def release(self, owner: str) -> None:
        """Take all pins of this owner back. Quick."""
        ...

    def owners(self) -> Sequence[str]:
        """Who has pinned something, sorted."""
        ...

    def hold(self) -> AbstractContextManager[None]:
        """Until it ends nothing is collected that was put, imported, asked for or read since it began. Quick.

        For what takes long and isn't pinned yet: a download, a plan. It ends with its process, however that ends.
        """
        ...

    def collect(self, *, keep: int = 0) -> int:
        """Remove what is neither pinned nor held, least recently used first, until `keep` bytes are left.

        Returns how many bytes were freed. The store does it by itself when it grows over its limit.
        """
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


# --- sources ---


class Provider(Protocol):
    """Somebody who may have blocks. What comes from it is believed by nobody: whoever asks checks every block."""

    @property
    def name(self) -> str:
        """For messages about who was asked: "https://ipfs.example.org", "node 12D3…", "kubo at 127.0.0.1:5001"."""
        ...

    def car(self, root: Cid, *, path: str = "", scope: Scope = "all") -> AsyncIterator[bytes]:
        """The bytes of a CAR (v1, depth first, each block as often as the walk meets it or once) for `root` and `path`.

        Scope "block": the block at the end of the path; "entity": the whole file, or of a folder its listing;
        "all": everything below. The blocks on the way from the root come first. Raises `ContentError` when it does
        not have the root, `NodeUnreachable` when it does not answer; may end too early.
        """
        ...

    async def block(self, cid: Cid, *, root: Cid) -> bytes:
        """One block below `root`; raises `ContentError` when it is not there, `NodeUnreachable`."""
        ...


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """For whom inputs are fetched, and who is asked first.

    `own`: for the owner of this node, whose jobs may ask any address but those of cloud metadata. `providers` are
    those that the job itself names: its requester, mostly.
    """

    own: bool = True
    providers: tuple[Provider, ...] = ()


Told = Callable[[str, int, int | None, str], None]
"""Called on the loop as bytes come: (name, done, total or None, CID or "" until all is here)."""


class Source(Protocol):
    """Lists an input and hands its files out.

    `list`, `open` and `check` block: call them from a thread, `open` and `check` also on the loop for a few files.
    """

    def claims(self, source: str) -> bool:
        """Whether this source understands the text of `--input`."""
        ...

    def list(self, source: InputSource, *, index: int) -> list[Entry]:
        """Every file, and every empty folder as an entry of size 0 that ends in "/".

        What can't be used is an `Unusable` entry, or a `Doubtful` one where a shard may have more luck. Raises
        `ContentError` and `SpecError`.
        """
        ...

    async def fetch(self, entries: Sequence[Entry], *, access: Access, told: Told) -> None:
        """Bring the bytes of these entries (all of this source) to this machine, several at once; then `open` has them.

        What is here already is not fetched again. Raises `ContentError` that names the entry, where it was looked
        for and why it did not come; `NodeUnreachable` where another node may have more luck. Cancelling leaves nothing
        half-written that anybody would take for whole.
        """
        ...

    def open(self, reference: Reference, *, scratch: Path) -> Path:
        """A path that holds the entry's bytes now; raises `ContentError` ("changed", "gone") when it no longer does."""
        ...

    def check(self, reference: Reference) -> None:
        """Raise `ContentError` if the entry has changed since it was listed (asked when a shard ends)."""
        ...


# --- publishers ---


class Publisher(Protocol):
    """Brings results to where their owner wants them. Calls on the loop."""

    def claims(self, target: str) -> bool:
        """Whether this publisher understands the text of `--publish`."""
        ...

    async def check(self, target: str) -> None:
        """Raise `SpecError` or `ContentError` if nothing could be published there; asked before a job exists."""
        ...

    async def publish(self, job: JobId, root: str, target: str) -> tuple[str, ...]:
        """Publish the sealed result `root`; returns where it can be found now. Doing it again changes nothing."""
        ...


# --- transport ---


class Packet(msgspec.Struct, frozen=True):
    """A message of `author`: the key of the connection, or (for what was published) the one that signed it."""

    author: NodeId
    data: bytes


Answering = Callable[[NodeId, bytes], AsyncIterator[bytes]]
"""Answers a question (bytes) of the node that asks, in parts of at most a MiB."""

Arrival = Packet | LinkUp | LinkDown
"""What a transport tells. Links come and go in this very order; packets have none."""


class Transport(Protocol):
    """Bytes between nodes, at most once, in no order: nothing above may assume more."""

    @property
    def node(self) -> NodeId:
        """The node that speaks through this transport."""
        ...

    def addresses(self) -> Sequence[str]:
        """Multiaddrs by which others can dial this node, its id included; none where nobody can."""
        ...

    @property
    def dropped(self) -> int:
        """How many messages were refused, or could not be passed on, since the start. Quick."""
        ...

    async def send(self, to: NodeId, data: bytes) -> None:
        """Hand `data` to the network, over a link that is opened if need be; returning does not mean that it arrived.

        Waits while the other takes nothing; raises `NodeUnreachable` when it can't be reached.
        """
        ...

    async def publish(self, data: bytes) -> None:
        """Hand `data` to every node of the network, signed by this one."""
        ...

    def received(self) -> AsyncIterator[Arrival]:
        """What comes, as it comes; ends when the transport is closed."""
        ...

    def peers(self) -> Sequence[NodeId]:
        """Nodes to which there is a link now, sorted."""
        ...

    async def dial(self, address: str) -> NodeId:
        """Open a link to a multiaddr and say who is there; raises `NodeUnreachable`, `SpecError` for no multiaddr."""
        ...

    def learn(self, node: NodeId, addresses: Sequence[str]) -> None:
        """Remember where `node` can be dialled, in place of what was known; quick."""
        ...

    async def hang_up(self, node: NodeId) -> None:
        """Close the links to `node`; nothing happens when there are none."""
        ...

    def serve(self, handler: Answering) -> None:
        """Answer the requests of others by `handler`, from now on."""
        ...

    def request(self, to: NodeId, question: bytes) -> AsyncIterator[bytes]:
        """The answer of another node's `handler`, as it comes, slowly if need be; `NodeUnreachable` when it breaks off.

        A question has at most 64 KiB. A handler that raises ends the answer like a broken connection.
        """
        ...

    async def close(self) -> None:
        """Leave the network; `received` ends."""
        ...


# --- journal ---


class Journal(Protocol):
    """What was decided, before anyone is told. Rows replace rows of the same key."""

    def commit(self, rows: Iterable[Row]) -> None:
        """Write all rows in one transaction; returns when they survive the process. Quick."""
        ...

    def forget(self, jobs: Iterable[JobId]) -> None:
        """Take away the rows of these jobs and of their shards; results that are owed stay."""
        ...

    def load(self) -> list[Row]:
        """Every row, jobs before their shards; raises `ContentError` for a damaged or newer journal."""
        ...

    def close(self) -> None:
        """Let go of the file; every commit that returned is in it."""
        ...
