"""What a container of this node is and what it sees: its shape, its folder, its environment.

Everything that a shard gets or leaves goes through one folder of the node, `slots/N/`, whose
parts are bound into the container:

    slots/N/inputs    /inputs        read-only    files of the shard that runs
    slots/N/shared    /shared        read-only    what `--with` brought
    slots/N/bundle    /slot/bundle   read-only    the cell
    slots/N/mounts/K  its target     read-only    inputs that asked for a place of their own
    slots/N/outputs   /outputs                    what a shard leaves
    slots/N/work      /slot/work                  working folders and large values

So a container can be made before its job is known (a spare), and serves the shards of one job
after each other. What no slot folder can show has to be bound when the container is made: it is
part of the container's `Shape`, and only containers of equal shape can stand for each other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from bacalhau_node.errors import SpecError
from bacalhau_node.executors import gpus, staging
from bacalhau_node.executors.containers import Label, Mount
from bacalhau_node.executors.environment import HostEnvironment, collapse, user_variables
from bacalhau_node.executors.runtime import Runtime
from bacalhau_node.literals import size_text as size_text
from bacalhau_node.sharding import mounts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bacalhau_node.ids import NodeId
    from bacalhau_node.ports import ShardTask, StagedFile

_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_MAX_THREADS")
_USUAL_PLACES: Final = ("/inputs", "/shared")
LAYER: Final = "/slot/layer"
"""Where the packages are that a job requires."""


class NoEnvironment(SpecError):
    """What the job needs to run is not there: its image, or a Python in it."""


class NoProgram(NoEnvironment):
    """The program that was to start is not in the container."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is here. `id` names its exact content, so that all shards of a job use the same."""

    id: str
    folder: str
    """Its own working folder; empty when it names none."""
    name: str
    """What it was asked for by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a container is, apart from its slot folder. `image` None: the host environment.

    `targets` are mounts outside of `/inputs` and `/shared`; `files` are single files that lie at a
    place of their own: (target, path); `roots` are folders bound whole, for files too large to
    copy that can't be linked; `layer` holds packages that count before those of the environment.
    `gpus` are the UUIDs of its cards, `devices` the device files to open them by.
    """

    image: str | None = None
    called: str = ""
    """The image as the job named it; `image` is its id."""
    folder: str = ""
    """The image's own working folder; empty when it names none."""
    memory: int
    cpu: float
    network: Literal["none", "bridge"] = "none"
    targets: tuple[str, ...] = ()
    files: tuple[tuple[str, Path], ...] = ()
    roots: tuple[Path, ...] = ()
    layer: Path | None = None
    gpus: tuple[str, ...] = ()
    devices: tuple[Path, ...] = ()

    def root_places(self) -> dict[Path, str]:
        """Where the roots lie in the container."""
        return {root: f"/roots/{index}" for index, root in enumerate(self.roots)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What all boxes of one node share. `user`: who runs in them, as this machine sees it."""

    daemon: Runtime
    folder: Path
    host: HostEnvironment
    user: staging.Reader
    inside: str
    """`user` as the container sees it: "1000:1000", or "0:0" under a rootless daemon."""
    agent: Path
    """A copy of the agent's folder that `user` may read."""
    node: NodeId = ""
    life: str = ""
    """A random name of this run of the node's process; both are for labels, which only containers have."""
    watched: bool = False
    """Agents hold their shards to the limits themselves: nothing else does."""

    def labels(self, **more: str) -> dict[str, str]:
        """Labels of a new container: `job="j-…"` and the like beside whose it is."""
        own = {Label.PROJECT: "1", Label.NODE: self.node, Label.FOLDER: str(self.folder), Label.LIFE: self.life}
        return {label.value: value for label, value in own.items()} | {
            Label[name.upper()].value: value for name, value in more.items()
        }

    def image(self, shape: Shape) -> str:
        """The image of a container of this shape."""
        return shape.image or self.host.tag

    def variables(self, shape: Shape) -> dict[str, str]:
        """The environment of a container: the image's own stays below it."""
        known = self.host.variables(os.environ) if shape.image is None else user_variables(os.environ)
        threads = str(max(1, round(shape.cpu)))
        known |= gpus.variables(shape.gpus) if shape.gpus else {}
        return known | dict.fromkeys(_THREAD_VARIABLES, threads)

    def cards(self, shape: Shape) -> tuple[tuple[Path, ...], tuple[str, ...]]:
        """(device files, UUIDs to ask the runtime for) of a box of this shape.

        The host environment has the driver's libraries of this machine: the device files are all that it lacks.
        """
        return (shape.devices, ()) if shape.image is None else ((), shape.gpus)


class SlotFolder:
    """The folder of one container on this machine: `slots/N/`, made by `create`, gone after `destroy`."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path = path
        self.inputs, self.shared, self.bundle = path / "inputs", path / "shared", path / "bundle"
        self.outputs, self.work = path / "outputs", path / "work"
        self.custom = {target: path / "mounts" / str(index) for index, target in enumerate(shape.targets)}
        self.shape = shape

    @property
    def places(self) -> dict[str, Path]:
        """Where staged files go: target in the container -> folder here."""
        return {"/inputs": self.inputs, "/shared": self.shared, **self.custom}

    def create(self, owner: staging.Reader) -> None:
        """Make all folders; those that a shard writes to belong to its user."""
        self.path.mkdir(parents=True)
        for folder in (self.inputs, self.shared, self.bundle, self.outputs, self.work, *self.custom.values()):
            folder.mkdir(parents=True)
            folder.chmod(0o755)
        if os.geteuid() == 0:
            for folder in (self.outputs, self.work):
                os.chown(folder, owner.uid, owner.gid)

    def mounts(self, site: Site) -> tuple[Mount, ...]:
        """Everything that is bound into the container."""
        read_only = {**self.places, "/slot/bundle": self.bundle, "/slot/agent": site.agent}
        read_only |= {inside: root for root, inside in self.shape.root_places().items()}
        read_only |= dict(self.shape.files)
        read_only |= {LAYER: self.shape.layer} if self.shape.layer is not None else {}
        if self.shape.image is None:
            read_only |= {str(path): path for path in site.host.binds}
            read_only |= {str(path): Path("/dev/null") for path in site.host.masks}
        return (
            *(Mount(source=path, target=target) for target, path in read_only.items()),
            Mount(source=self.outputs, target="/outputs", writable=True),
            Mount(source=self.work, target="/slot/work", writable=True),
        )

    def stage(self, files: Iterable[StagedFile], reader: staging.Reader) -> None:
        """Put a shard's files in place of those of the shard before it. Blocks on the disk."""
        for folder in self.places.values():
            staging.clear(folder)
        own = [file for file in files if file.mount not in dict(self.shape.files)]
        staging.stage(own, self.places, reader, roots=self.shape.root_places())


def gpu_label(shape: Shape) -> dict[str, str]:
    """What a container's labels say of its cards."""
    return {"gpus": ",".join(shape.gpus)} if shape.gpus else {}


def memory_text(limit: int) -> str:
    """What to say of a shard that was killed for memory."""
    return (
        f"the shard used more than its memory limit of {size_text(limit)}: "
        "give it more with --memory, or use smaller shards"
    )


def shape_of(task: ShardTask, *, image: Image | None, memory: int) -> Shape:
    """The shape of the containers for `task`: equal for all shards of a job wherever that is possible."""
    inputs, shared = mounts(task.spec)
    custom = {
        target: source.source
        for target, source in zip((*inputs, *shared), (*task.spec.inputs, *task.spec.shared), strict=True)
        if not any(Path(target).is_relative_to(place) for place in _USUAL_PLACES)
    }
    files = {target: Path(source) for target, source in custom.items() if Path(source).is_file()}
    files |= {file.mount: file.path for file in task.files if file.mount in custom}
    return Shape(
        image=image.id if image else None,
        called=image.name if image else "",
        folder=image.folder if image else "",
        memory=memory,
        cpu=task.spec.resources.cpu,
        network="bridge" if task.spec.network == "full" else "none",
        targets=tuple(sorted(custom.keys() - files.keys())),
        files=tuple(sorted(files.items())),
        layer=task.layer,
    )


def roots_of(task: ShardTask, file: Path) -> tuple[Path, ...]:
    """The folders to bind so that `file` can be shown: the job's own local inputs, else where it lies."""
    local = [Path(source.source) for source in (*task.spec.inputs, *task.spec.shared) if source.source.startswith("/")]
    folders = [path if path.is_dir() else path.parent for path in local]
    if not any(file.is_relative_to(folder) for folder in folders):
        folders.append(file.parent)
    return collapse(folders)
