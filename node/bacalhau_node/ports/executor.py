"""What runs executions: containers, sandboxes, processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from bacalhau_node.ids import Execution, JobId
from bacalhau_node.masking import NO_SECRETS, Secrets
from bacalhau_node.messages import ShardError, ValueKind
from bacalhau_node.spec import Isolation, JobSpec


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
