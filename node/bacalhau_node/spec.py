"""What a client asks for: a `JobSpec`, its inputs, its resources and how to split it.

All of it is frozen and made once, at the edge: whoever holds a `JobSpec` may trust it.
Units: bytes for memory, disk and sizes; seconds for every time; cores for CPU.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from bacalhau_node.errors import SpecError

MAX_SHARDS = 100_000
"""Bound on the shards of one job: the plan and the live view stay a few megabytes."""

MAX_REPLICAS = 32
"""Bound on the executions of one shard (a guess: more could hardly agree any better)."""

OWNER_LABEL = "bacalhau.owner"
"""The label of a job of somebody else than the node's owner: the name of its key. Only a node sets it."""

Isolation = Literal["container", "sandbox", "none"]
ISOLATION_RANK: dict[str, int] = {"none": 0, "sandbox": 1, "container": 2}


MAX_GPU_SHARE = 64
"""Bound on the shards that share a card (a guess: each needs some hundred megabytes for its driver's context)."""


class InputSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where data comes from, and where a shard finds it.

    `source` is an absolute local path, `ipfs://CID[/path]`, a URL (`http(s)://…`), or a bucket and a prefix in it
    (`s3://…`, `gs://…`, `az://…`). `mount` is an absolute path in the container; without one a single input lies at
    `/inputs`, several at `/inputs/0`, `/inputs/1` and so on. `unpack`: an archive is a folder of what is in it.
    """

    source: str
    mount: str | None = None
    unpack: bool = False


class Sharding(msgspec.Struct, frozen=True, kw_only=True):
    """How the files become shards; `n` is a count, a number of files, or bytes."""

    by: Literal["count", "auto", "batch", "size"] = "count"
    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            option = {"count": "--shards", "auto": "--shards", "batch": "--batch-size", "size": "--shard-size"}[self.by]
            raise SpecError(f"{option} {self.n}: at least 1 is needed")
        if self.by == "count" and self.n > MAX_SHARDS:
            raise SpecError(f"--shards {self.n}: at most {MAX_SHARDS} are possible")


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What one shard may use. None: the node's own default (DESIGN section 6)."""

    cpu: float = 1.0
    memory: int | None = None
    disk: int | None = None
    gpus: int = 0
    gpu_share: int = 1


class PythonCell(msgspec.Struct, frozen=True, kw_only=True, tag="cell"):
    """A notebook cell: its source and files lie in the folder that `bundle` (a CID) names.

    The folder holds `cell.py` (the body, untouched), `vars/NAME.EXT` (values that go with it),
    `definitions.py` (functions and classes of the notebook, run before it in its namespace) and
    `modules/` (source of local modules, put on the path). `name` is the file name that
    tracebacks show and `line_offset` what to add to a line of the body to get the line of the
    cell. `imports` are the top-level modules that the cell imports, for preloading; `python`
    ("3.11") and `versions` (distribution -> version) are what the notebook runs. `requires` are
    packages to install on top of that, as `requirements.normal` writes them.
    """

    bundle: str
    name: str = "cell"
    line_offset: int = 0
    imports: tuple[str, ...] = ()
    python: str = ""
    versions: dict[str, str] = {}
    requires: tuple[str, ...] = ()


class Command(msgspec.Struct, frozen=True, kw_only=True, tag="command"):
    """A program that is not a cell: `argv` is appended to the image's entrypoint.

    With `shell` (a `--raw` body) the script runs by `sh -c` in place of the entrypoint.
    """

    argv: tuple[str, ...] = ()
    shell: str | None = None


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A whole job. Everything that decides what runs, and nothing that only decides how it is shown.

    `replicas`: executions of each shard, on different nodes where there are so many. `agree`: how many of them
    have to give equal answers (or to fail alike) for one to count; with 1 the first to end does.
    `secrets` are the names of environment variables whose values never stand in a spec (see `masking`).
    `publish` says where the result goes beyond the store of its requester ("store": nowhere else). `constraint` is an
    expression over the labels of nodes: "" for any node. `reuse`: an equal job's result will do (see `reuse`).
    """

    task: PythonCell | Command
    inputs: tuple[InputSource, ...] = ()
    shared: tuple[InputSource, ...] = ()
    globs: tuple[str, ...] = ()
    sharding: Sharding = Sharding()
    resources: Resources = Resources()
    timeout: float | None = None
    job_timeout: float | None = None
    parallel: int | None = None
    retries: int = 0
    replicas: int = 1
    agree: int = 1
    image: str | None = None
    isolation: Isolation | None = None
    container_per: Literal["job", "shard"] = "job"
    network: Literal["none", "full"] = "none"
    env: dict[str, str] = {}
    secrets: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    pin: bool = False
    publish: str = "store"
    constraint: str = ""
    reuse: bool = False

    def __post_init__(self) -> None:
        if twice := sorted(set(self.secrets) & set(self.env)):
            raise SpecError(f"--secret {twice[0]}: --env sets it too; one of them is possible")
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise SpecError(f"--replicas {self.replicas}: from 1 to {MAX_REPLICAS} are possible")
        if not 1 <= self.agree <= self.replicas:
            raise SpecError(
                f"--agree {self.agree}: from 1 to {self.replicas} are possible with --replicas {self.replicas}"
            )
