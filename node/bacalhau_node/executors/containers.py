"""The Docker daemon as the executor sees it: short calls in threads, and one raw stream per container.

Theory of operation (DESIGN section 6). The `docker` package is synchronous, so its calls run in
threads: four for whatever starts things, two of their own for kill and remove, so that ending
something never queues behind starting something. Every thread has its own client. Only short
calls are made: nothing waits in a thread for a container to end; the end is seen as the end of
its stream (`attach.py`), then asked for once.

Containers are removed explicitly, never by the daemon: an automatic removal loses the exit
code. They carry labels (`Label`), by which a later node finds what an earlier one left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast
from urllib.parse import quote, urlsplit

from bacalhau_node.executors.attach import DaemonError, Stream, let_go, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

DEFAULT_HOST: Final = "unix:///var/run/docker.sock"
PING_SECONDS: Final = 0.2
"""How long a daemon may take to answer before the node goes on without it (DESIGN section 6)."""
CALL_SECONDS: Final = 30
"""Longest wait for one answer of the daemon; a pull has no limit of its own."""
REMOVALS: Final = 3
"""How often a removal is tried."""
PIDS: Final = 512
"""Processes and threads in one container: enough for any library's pools, an end for a fork bomb."""
_THREADS: Final = 4
_ENDING_THREADS: Final = 2

T = TypeVar("T")


class Label(StrEnum):
    """Labels of our containers: whose they are and what for.

    `NODE` and `FOLDER` name a node, `LIFE` one run of its process: what an earlier one left is
    abandoned. `DEADLINE` is in seconds since 1970: past it, any node may remove the container.
    """

    PROJECT = "io.bacalhau-jupyter"
    NODE = "io.bacalhau-jupyter.node"
    FOLDER = "io.bacalhau-jupyter.folder"
    LIFE = "io.bacalhau-jupyter.life"
    JOB = "io.bacalhau-jupyter.job"
    SLOT = "io.bacalhau-jupyter.slot"
    GPUS = "io.bacalhau-jupyter.gpus"
    DEADLINE = "io.bacalhau-jupyter.deadline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A folder or file of this machine at `target` in the container."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what a container is. Memory in bytes, cpu in cores; 0: no limit.

    `entrypoint` replaces the image's own (an empty tuple clears it), None keeps it. `folder` is
    where the program starts, None: where the image says. `log`:
    "none" for a container whose stream is read as it comes, "local" for one that may have to be
    read again. `devices`: device files that it may open. `gpus`: UUIDs of the cards that the daemon's NVIDIA
    runtime gives it, with the driver's libraries.
    """

    image: str
    command: tuple[str, ...]
    entrypoint: tuple[str, ...] | None
    environment: Mapping[str, str]
    mounts: tuple[Mount, ...]
    labels: Mapping[str, str]
    user: str
    folder: str | None
    memory: int
    cpu: float
    network: Literal["none", "bridge"] = "none"
    log: Literal["none", "local"] = "none"
    stdin: bool = True
    devices: tuple[Path, ...] = ()
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How a container is, or how it ended. `pid` is its first process on the daemon's machine, 0 when ended."""

    running: bool
    exit_code: int
    out_of_memory: bool
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonInfo:
    """What matters of a daemon. `limits`: memory, pids and CPU limits are enforced. `bridge`: it has a network."""

    id: str
    rootless: bool
    limits: bool
    bridge: bool


_NO_LOG: Final = {"Type": "none"}
_LOCAL_LOG: Final = {"Type": "local", "Config": {"max-size": "10m", "max-file": "1", "compress": "false"}}


_NO_GPU: Final = {"NVIDIA_VISIBLE_DEVICES": "void"}
"""Where NVIDIA's runtime is the daemon's default, an image could otherwise give itself every card by a variable."""


@dataclass(slots=True)
class Daemon:
    """One Docker daemon. All methods are called from one asyncio loop; errors are `DaemonError`."""

    host: str
    _starting: ThreadPoolExecutor = field(init=False)
    _ending: ThreadPoolExecutor = field(init=False)
    _local: threading.local = field(default_factory=threading.local, init=False)
    _clients: list[Any] = field(default_factory=list, init=False)
    _version: str = field(default="auto", init=False)

    def __post_init__(self) -> None:
        self._starting = ThreadPoolExecutor(_THREADS, "docker")
        self._ending = ThreadPoolExecutor(_ENDING_THREADS, "docker-end")

    async def ping(self) -> None:
        """Ask whether a daemon is there at all, without loading anything."""
        reader = asyncio.StreamReader()
        transport: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(PING_SECONDS):
                transport = await self._connect(asyncio.StreamReaderProtocol(reader))
                transport.write(b"GET /_ping HTTP/1.0\r\n\r\n")
                answer = await reader.read()
        except TimeoutError:
            raise DaemonError(f"no Docker daemon answers at {self.host} within {PING_SECONDS} s") from None
        except OSError as error:
            raise DaemonError(f"no Docker daemon answers at {self.host}: {error.strerror or error}") from error
        finally:
            if transport is not None:
                transport.abort()
        if not answer.startswith(b"HTTP/1.0 200"):
            raise DaemonError(f"what answers at {self.host} is no Docker daemon")

    async def info(self) -> DaemonInfo:
        """What this daemon is and whether its limits hold."""
        found, networks = await self._call(lambda api: (api.info(), api.networks(names=["bridge"])))
        enforced = all(found.get(name, False) for name in ("MemoryLimit", "PidsLimit", "CpuCfsQuota"))
        rootless = "name=rootless" in (found.get("SecurityOptions") or ())
        return DaemonInfo(id=str(found.get("ID")), rootless=rootless, limits=enforced, bridge=bool(networks))

    async def image(self, name: str) -> dict[str, Any]:
        """What the daemon knows about an image that it has."""
        return cast("dict[str, Any]", await self._call(lambda api: api.inspect_image(name)))

    async def all_images(self) -> list[dict[str, Any]]:
        """What the daemon says of each image that it has, in short."""
        return cast("list[dict[str, Any]]", await self._call(lambda api: api.images()))

    async def import_image(self, tar: bytes, tag: str) -> None:
        """Make an image of one layer from a tar."""
        name, _, version = tag.rpartition(":")
        await self._call(lambda api: api.import_image_from_data(tar, repository=name, tag=version))

    async def pull(self, name: str) -> None:
        """Fetch an image from its registry, by the daemon, without credentials. Cancelling ends the transfer.

        Not by the package: a thread could not be stopped. HTTP 1.0, so that the answer has no
        chunks: lines of JSON up to the end of the connection.
        """
        repository, tag = split_tag(name)
        query = f"fromImage={quote(repository, safe='')}&tag={quote(tag, safe='')}"
        reader = asyncio.StreamReader()
        transport: asyncio.Transport | None = None
        try:
            transport = await self._connect(asyncio.StreamReaderProtocol(reader))
            transport.write(f"POST /images/create?{query} HTTP/1.0\r\nContent-Length: 0\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            problems = [text async for line in reader if (text := _pull_problem(line))]
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError) as error:
            raise DaemonError(f"the Docker daemon at {self.host} ended the pull: {error}") from error
        finally:
            if transport is not None:
                transport.abort()
        if problems or b" 200 " not in head.split(b"\r\n")[0]:
            raise DaemonError("; ".join(problems) or "the Docker daemon refused the pull")

    async def create(self, recipe: Recipe) -> str:
        """Create a container and return its id. Cancelled or not, no container is left without an owner."""
        making = asyncio.ensure_future(self._call(lambda api: _create(api, recipe)))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            with contextlib.suppress(DaemonError):
                await self.remove(await making)
            raise

    async def attach(self, container: str, receive: Callable[[int, bytes], None]) -> Stream:
        """Open the stream of a container that has not started."""
        query = "stream=1&stdin=1&stdout=1&stderr=1"
        head = f"POST /containers/{container}/attach?{query} HTTP/1.1\r\nHost: docker\r\n"
        stream = Stream(receive)
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await self._connect(stream)
                await stream.open(f"{head}Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n".encode())
        except asyncio.CancelledError:
            stream.close()
            raise
        except OSError as error:  # includes TimeoutError
            stream.close()
            raise DaemonError(f"the Docker daemon at {self.host} does not let us attach: {reason(error)}") from error
        return stream

    async def start(self, container: str) -> None:
        """Start a created container. A failure leaves it created: remove it."""
        await self._call(lambda api: api.start(container))

    async def state(self, container: str) -> State | None:
        """How the container is; None when the daemon does not know it (any more)."""
        try:
            found = (await self._call(lambda api: api.inspect_container(container)))["State"]
        except DaemonError as error:
            if error.status == 404:
                return None
            raise
        return State(
            running=found["Running"],
            exit_code=found["ExitCode"],
            out_of_memory=found["OOMKilled"],
            pid=found["Pid"],
        )

    async def kill(self, container: str) -> None:
        """End everything in the container now. A container that has ended already is no error."""
        await self._end(lambda api: api.kill(container))

    async def remove(self, container: str) -> None:
        """End and remove the container with its anonymous volumes. One that is gone is no error.

        A daemon on a busy machine may say that it could not end a container in time: asked again, it can.
        """
        for attempt in range(REMOVALS):
            try:
                await self._end(lambda api: api.remove_container(container, v=True, force=True))
            except DaemonError as error:
                if not error.status or attempt == REMOVALS - 1:
                    raise
            else:
                return

    async def killed(self, container: str) -> bool:
        """Whether somebody asked the daemon to kill this container: what its own processes do leaves no such event."""
        until = f"{time.time():.3f}"  # the past only: the daemon ends the answer at once
        filters = {"container": container, "event": "kill"}
        return await self._call(lambda api: any(True for _ in api.events(since="1", until=until, filters=filters)))

    async def ours(self) -> list[tuple[str, dict[str, str]]]:
        """(id, labels) of every container of this project on the daemon, ended ones included."""
        found = await self._call(lambda api: api.containers(all=True, filters={"label": Label.PROJECT.value}))
        return [(entry["Id"], entry["Labels"]) for entry in found]

    async def close(self) -> None:
        """Wait for calls under way and end the threads. Streams are their owners' to close."""
        for pool in (self._starting, self._ending):
            await asyncio.to_thread(pool.shutdown)
        for client in self._clients:
            client.close()
        self._clients.clear()

    async def _end(self, call: Callable[[Any], object]) -> None:
        try:
            await self._call(call, pool=self._ending)
        except DaemonError as error:
            if error.status not in (404, 409):  # gone already; not running, or being removed
                raise

    async def _call(self, call: Callable[[Any], T], *, pool: ThreadPoolExecutor | None = None) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool or self._starting, self._in_thread, call)

    def _in_thread(self, call: Callable[[Any], T]) -> T:
        import docker.errors  # noqa: PLC0415 - an optional extra, and slow to import: only where a daemon answered
        import requests  # noqa: PLC0415 - comes with it

        try:
            if not hasattr(self._local, "api"):
                self._local.api = docker.APIClient(base_url=self.host, version=self._version, timeout=CALL_SECONDS)
                self._version = self._local.api.api_version  # asked for once
                self._clients.append(self._local.api)
            return call(self._local.api)
        except docker.errors.APIError as error:
            status = error.response.status_code if error.response is not None else 0
            raise DaemonError(str(error.explanation or error), status=status) from error
        except (docker.errors.DockerException, requests.RequestException, OSError) as error:
            let_go(error)
            raise DaemonError(f"the Docker daemon at {self.host} does not answer: {reason(error)}") from error

    async def _connect(self, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        parts = urlsplit(self.host)
        if parts.scheme == "unix":
            transport, _ = await loop.create_unix_connection(lambda: protocol, parts.path)
        elif parts.scheme == "tcp":
            transport, _ = await loop.create_connection(
                lambda: protocol, parts.hostname or "localhost", parts.port or 2375
            )
        else:
            raise OSError(f"DOCKER_HOST begins with {parts.scheme!r}, only unix:// and tcp:// are understood")
        return transport


def split_tag(image: str) -> tuple[str, str]:
    """An image's repository and its tag or digest; `latest` when it names neither."""
    name, at, digest = image.partition("@")
    if at:
        return name, digest
    head, slash, last = image.rpartition("/")
    repository, _, tag = last.partition(":")
    return f"{head}{slash}{repository}", tag or "latest"


def _pull_problem(line: bytes) -> str:
    try:
        found = json.loads(line)
    except ValueError:
        return ""
    return str(found.get("error") or found.get("message") or "") if isinstance(found, dict) else ""


def _create(api: Any, recipe: Recipe) -> str:
    """Create a container with everything that keeps a shard from the rest of the machine.

    `mounts=` and never `binds=`, which make a missing path as an empty folder of root's and
    can't name paths with colons. Memory and swap have one limit, so that there is no swap. The
    temporary folder is executable: compilers such as numba's load what they write there.
    """
    from docker import types  # noqa: PLC0415 - see `_in_thread`

    half = recipe.memory // 2
    wanted = [types.DeviceRequest(device_ids=list(recipe.gpus), capabilities=[["gpu", "compute", "utility"]])]
    config = api.create_host_config(
        mounts=[
            types.Mount(mount.target, str(mount.source), type="bind", read_only=not mount.writable)
            for mount in recipe.mounts
        ],
        network_mode=recipe.network,
        read_only=True,
        tmpfs={
            "/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={half}",  # noqa: S108 - in the container
            "/run": "rw,noexec,nosuid,nodev,mode=755,size=16m",
        },
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        mem_limit=recipe.memory,
        memswap_limit=recipe.memory,
        pids_limit=PIDS,
        nano_cpus=int(recipe.cpu * 1e9),
        shm_size=half,
        init=True,
        devices=[f"{path}:{path}:rw" for path in recipe.devices],
        device_requests=wanted if recipe.gpus else None,
        log_config=_NO_LOG if recipe.log == "none" else _LOCAL_LOG,
    )
    made = api.create_container(
        recipe.image,
        command=list(recipe.command),
        entrypoint=None if recipe.entrypoint is None else list(recipe.entrypoint),
        environment={**recipe.environment, **({} if recipe.gpus else _NO_GPU)},
        user=recipe.user,
        working_dir=recipe.folder,
        labels=dict(recipe.labels),
        stdin_open=recipe.stdin,
        host_config=config,
    )
    return str(made["Id"])
