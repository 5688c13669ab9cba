"""The Docker executor: the contract of every executor, and what only containers promise."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
import venv
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import msgspec
import pytest

from bacalhau_node.executors.containers import Label
from bacalhau_node.executors.docker import DockerExecutor
from bacalhau_node.executors.images import MOST_NAMES
from bacalhau_node.ids import Execution
from bacalhau_node.masking import Secrets
from bacalhau_node.ports import ExecutorEvent, RawOutcome, ShardLines, ShardStarted, ShardTask, StagedFile
from bacalhau_node.spec import Command, InputSource, JobSpec, PythonCell, Resources
from bacalhau_node.testing.builders import a_job_id
from tests.images import python_image, shell_image
from tests.services import private_docker

pytestmark = pytest.mark.docker

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide files from a daemon or from a user")
NODE = "n-docker-tests"
MB = 1024 * 1024
PATIENCE = 20.0


@dataclass
class Bench:
    """An executor with a folder, and what a test needs to give it work."""

    executor: DockerExecutor
    folder: Path
    count: int = 0
    events: list[ExecutorEvent] = field(default_factory=list)

    def task(
        self, source: str | None = None, *, job: int = 1, files: tuple[StagedFile, ...] = (), **spec: Any
    ) -> ShardTask:
        """A shard of job number `job`: a cell of this source, or whatever `task=` says."""
        self.count += 1
        scratch = self.folder / "scratch" / str(self.count)
        scratch.mkdir(parents=True)
        bundle = None
        if source is not None:
            bundle = self.folder / "bundles" / str(job)
            bundle.mkdir(parents=True, exist_ok=True)
            (bundle / "cell.py").write_text(source)
            spec["task"] = PythonCell(bundle="bafy")
        execution = Execution(a_job_id(job), self.count, 1)
        return ShardTask(
            execution=execution, spec=JobSpec(**spec), count=1000, files=files, scratch=scratch, bundle=bundle
        )

    async def cell(self, source: str, **spec: Any) -> RawOutcome:
        """Run a cell in a job of its own."""
        task = self.task(source, job=100 + self.count, **spec)
        outcome = await self.executor.run(task, self.events.append)
        await self.executor.release(task.execution.job)
        return outcome

    async def value(self, source: str, **spec: Any) -> Any:
        """The JSON value of a cell that must succeed."""
        outcome = await self.cell(source, **spec)
        assert outcome.ok, outcome.error
        assert isinstance(outcome.value.data, bytes)
        return json.loads(outcome.value.data)

    async def command(self, *argv: str, shell: str | None = None, **spec: Any) -> RawOutcome:
        """Run a command or, with `shell`, a script."""
        return await self.executor.run(self.task(task=Command(argv=argv, shell=shell), **spec), self.events.append)

    @property
    def text(self) -> str:
        """All lines so far."""
        return "".join(event.text for event in self.events if isinstance(event, ShardLines))


@pytest.fixture
def api(docker_host: str) -> Iterator[docker.APIClient]:
    client = docker.APIClient(base_url=docker_host)
    yield client
    client.close()


@pytest.fixture
async def bench(tmp_path: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    folder = tmp_path / "nodes" / NODE
    folder.mkdir(parents=True)
    executor = DockerExecutor(folder, node=NODE, slots=2)
    told = await executor.probe()
    assert told.problem is None
    yield Bench(executor, tmp_path)
    await executor.close()


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        found = condition()
        if (await found) if isinstance(found, Awaitable) else found:
            return
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def ours(api: docker.APIClient, folder: Path) -> list[str]:
    """Containers of the node whose folder lies below `folder`."""
    found = api.containers(all=True, filters={"label": Label.PROJECT.value})
    return [one["Id"] for one in found if one["Labels"].get(Label.FOLDER, "").startswith(str(folder))]


def mounts() -> str:
    """What this machine has mounted."""
    return Path("/proc/self/mounts").read_text()


def staged(path: Path, mount: str, *, shared: bool = False) -> StagedFile:
    return StagedFile(path, mount, mount.removeprefix("/inputs/"), path.stat().st_size, shared)


# --- what a probe says ---


async def test_probe_says_what_works(bench: Bench) -> None:
    told = await bench.executor.probe()
    assert (told.executor, told.isolation, told.slots, told.problem) == ("docker", "container", 2, None)
    assert told.limits_enforced
    assert told.versions["pytest"]
    assert "<none>:<none>" not in told.images
    assert 0 < len(told.images) <= MOST_NAMES


async def test_without_a_daemon_probe_says_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    executor = DockerExecutor(tmp_path, node=NODE)
    told = await executor.probe()
    assert told.problem
    assert "none.sock: No such file" in told.problem
    refusal = executor.check(JobSpec(task=Command(argv=("true",))))
    assert refusal
    assert "none.sock" in refusal
    await executor.close()


async def test_what_answers_but_is_no_daemon_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 404 Not Found\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(refuse, tmp_path / "d.sock")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/d.sock")
    executor = DockerExecutor(tmp_path, node=NODE)
    told = await executor.probe()
    assert told.problem
    assert "is no Docker daemon" in told.problem
    await executor.close()
    server.close()
    await server.wait_closed()


async def test_a_silent_daemon_costs_a_fifth_of_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        gone.set()

    server = await asyncio.start_unix_server(silent, tmp_path / "d.sock")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/d.sock")
    executor = DockerExecutor(tmp_path, node=NODE)
    told = await executor.probe()
    assert told.problem
    assert "within 0.2 s" in told.problem
    await executor.close()
    await gone.wait()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"resources": Resources(memory=10 * 10**12)}, "--memory 10 TB: this node can give a shard at most"),
        ({"resources": Resources(cpu=64)}, "--cpu 64: this node can give a shard at most 2 cores"),
        ({"resources": Resources(gpus=1)}, "--gpu: this node has no GPU"),
        ({"task": PythonCell(bundle="b", python="3.7")}, "needs Python 3.7; this node has Python"),
        ({"task": PythonCell(bundle="b", versions={"No_Such": "1.0"})}, "needs No_Such 1.0; this node has no No_Such"),
    ],
)
async def test_what_can_never_run_is_refused_in_a_sentence(bench: Bench, spec: dict[str, Any], words: str) -> None:
    refusal = bench.executor.check(JobSpec(**{"task": Command(argv=("true",)), **spec}))
    assert refusal
    assert words in refusal


async def test_a_network_is_promised_only_where_there_is_one(bench: Bench, api: docker.APIClient) -> None:
    refusal = bench.executor.check(JobSpec(task=Command(argv=("true",)), network="full"))
    assert (refusal is None) == bool(api.networks(names=["bridge"]))
    assert refusal is None or "no bridge network" in refusal


# --- what a cell finds ---


async def test_a_cell_is_confined(bench: Bench) -> None:
    found = await bench.value(
        """
import os
def status(name):
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))
def problem(work):
    try:
        work()
    except OSError as error:
        return type(error).__name__ + str(error.errno)
{
    "uid": os.getuid(), "caps": status("CapEff"), "bounding": status("CapBnd"), "no_new": status("NoNewPrivs"),
    "seccomp": status("Seccomp:"),
    "root": problem(lambda: open("/x", "w")), "usr": problem(lambda: open("/usr/x", "w")),
    "inputs": problem(lambda: open("/inputs/x", "w")), "cell": problem(lambda: open("/slot/bundle/cell/cell.py", "w")),
    "interfaces": sorted(os.listdir("/sys/class/net")),
    "docker": [path for path in ("/run/docker.sock", "/var/run/docker.sock") if os.path.exists(path)],
    "sockets": "docker.sock" in open("/proc/self/mounts").read(),
    "home": os.environ["HOME"], "user": os.environ["USER"], "shm": os.statvfs("/dev/shm").f_blocks > 0,
    "secrets": [name for name in os.environ if "DOCKER" in name or "SSH" in name],
}
"""
    )
    assert found["uid"] == (1000 if os.geteuid() == 0 else os.geteuid())
    assert found["caps"] == found["bounding"] == "0000000000000000"
    assert (found["no_new"], found["seccomp"]) == ("1", "2")
    assert all(found[name] == "OSError30" for name in ("root", "usr", "inputs", "cell"))  # read-only file system
    assert found["interfaces"] == ["lo"]
    assert (found["docker"], found["sockets"]) == ([], False)
    assert (found["home"], found["user"], found["shm"], found["secrets"]) == ("/tmp", "shard", True, [])


async def test_ordinary_things_work_in_a_confined_cell(bench: Bench) -> None:
    found = await bench.value(
        """
import ctypes.util, getpass, multiprocessing, pathlib, subprocess, tempfile, time
script = pathlib.Path("/tmp/x.sh")
script.write_text("#!/bin/sh\\necho executed")
script.chmod(0o755)
with tempfile.NamedTemporaryFile() as file:
    file.write(b"x")
pathlib.Path("here").write_text("x")
with multiprocessing.get_context("fork").Pool(2) as pool:
    squares = pool.map(abs, [-1, -2])
[subprocess.run([str(script)], capture_output=True, text=True).stdout, squares, getpass.getuser(),
 ctypes.util.find_library("z") is not None, len(time.tzname)]
"""
    )
    assert found == ["executed\n", [1, 2], "shard", True, 2]


async def test_names_arrive_as_they_are(bench: Bench, tmp_path: Path) -> None:
    names = ["a b.csv", "a:b.csv", "line\nbreak.csv", "quote'\".csv", "grüße.csv", os.fsdecode(b"\xff\xfe.csv")]
    data = tmp_path / "data: with\nall"
    data.mkdir()
    for name in names:
        (data / name).write_text("x")
    task = bench.task(
        "[[ascii(str(p)), p.read_text()] for p in inputs]",
        files=tuple(staged(data / name, f"/inputs/{name}") for name in names),
        inputs=(InputSource(source=str(data)),),
    )
    outcome = await bench.executor.run(task, bench.events.append)
    assert outcome.ok, outcome.error
    assert isinstance(outcome.value.data, bytes)
    assert json.loads(outcome.value.data) == [[ascii(f"/inputs/{name}"), "x"] for name in names]


async def test_a_shard_sees_its_own_files_only(bench: Bench, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    source = "import os\n[sorted(os.listdir('/inputs')), sorted(os.listdir('/shared'))]"
    lookup = staged(tmp_path / "c", "/shared/c", shared=True)
    spec = {"inputs": (InputSource(source=str(tmp_path)),), "shared": (InputSource(source=str(tmp_path / "c")),)}
    tasks = [bench.task(source, files=(staged(tmp_path / name, f"/inputs/{name}"), lookup), **spec) for name in "ab"]
    for task, name in zip(tasks, "ab", strict=True):
        outcome = await bench.executor.run(task, bench.events.append)
        assert outcome.value.data == json.dumps([[name], ["c"]]).encode()


async def test_inputs_lie_where_they_were_mounted(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x").write_text("x")
    (tmp_path / "one").write_text("one")
    task = bench.task(
        "[[str(p), p.read_text()] for p in inputs]",
        files=(staged(tmp_path / "data/x", "/data/here/x"), staged(tmp_path / "one", "/opt/one.txt")),
        inputs=(
            InputSource(source=str(tmp_path / "data"), mount="/data/here"),
            InputSource(source=str(tmp_path / "one"), mount="/opt/one.txt"),
        ),
    )
    outcome = await bench.executor.run(task, bench.events.append)
    assert outcome.ok, outcome.error
    assert outcome.value.data == b'[["/data/here/x", "x"], ["/opt/one.txt", "one"]]'


async def test_files_too_large_to_copy_are_shown_through_their_root(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bacalhau_node.executors.staging.COPY_LIMIT", 1)
    monkeypatch.setattr("bacalhau_node.executors.staging._link", lambda *_: False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x").write_text("large")
    (tmp_path / "data").chmod(0o755)
    task = bench.task(
        "[inputs[0].read_text(), str(inputs[0].resolve())]",
        files=(staged(tmp_path / "data/x", "/inputs/x"),),
        inputs=(InputSource(source=str(tmp_path / "data")),),
    )
    outcome = await bench.executor.run(task, bench.events.append)
    assert outcome.ok, outcome.error
    assert outcome.value.data == b'["large", "/roots/0/x"]'


async def test_credentials_of_the_environment_are_masked(bench: Bench) -> None:
    plant = bench.executor._workshop
    assert plant
    prefix = next(bind for bind in plant.site.host.binds if plant.site.host.executable.is_relative_to(bind))
    masked = prefix / "pip.conf"
    if masked.exists():
        pytest.fail(f"{masked} exists: this test makes and removes it")
    await bench.executor.close()
    masked.write_text("password")
    try:
        await bench.executor.probe()
        assert await bench.value(f"open({str(masked)!r}).read()") == ""
    finally:
        masked.unlink()


async def test_a_container_never_serves_two_jobs(bench: Bench) -> None:
    source = "import socket\nopen('/tmp/mark', 'w').close()\n[socket.gethostname(), __import__('os').listdir('/tmp')]"
    first, second = [await bench.value(source), await bench.value(source)]
    assert first[0] != second[0]


async def test_a_container_of_its_own_for_each_shard(bench: Bench) -> None:
    tasks = [bench.task("__import__('socket').gethostname()", container_per="shard") for _ in range(3)]
    values = [(await bench.executor.run(task, bench.events.append)).value.data for task in tasks]
    assert len(set(values)) == 3


async def test_shards_of_a_job_share_its_containers(bench: Bench) -> None:
    tasks = [bench.task("__import__('socket').gethostname()") for _ in range(8)]
    outcomes = await asyncio.gather(*(bench.executor.run(task, bench.events.append) for task in tasks))
    assert all(outcome.ok for outcome in outcomes)
    assert len({outcome.value.data for outcome in outcomes}) <= 2


async def test_each_shard_leaves_its_own_outputs(bench: Bench) -> None:
    source = "(outputs / f'{shard.index}.txt').write_text('x')\nimport os\nsorted(os.listdir('/outputs'))"
    tasks = [bench.task(source) for _ in range(20)]
    outcomes = await asyncio.gather(*(bench.executor.run(task, bench.events.append) for task in tasks))
    for task, outcome in zip(tasks, outcomes, strict=True):
        name = f"{task.execution.shard}.txt"
        assert outcome.value.data == json.dumps([name]).encode()
        assert outcome.outputs == task.scratch / "outputs"
        assert [path.name for path in outcome.outputs.iterdir()] == [name]


# --- limits, and cells that mean harm ---


async def test_memory_that_a_program_of_the_shard_takes_counts_too(bench: Bench) -> None:
    source = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "bytearray(400 * 1024 * 1024)"]).returncode
"""
    assert await bench.value(source, resources=Resources(memory=128 * MB)) == -9


async def test_a_shard_that_kills_its_worker_is_told_so(bench: Bench) -> None:
    outcome = await bench.cell("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time\ntime.sleep(60)")
    assert outcome.error
    assert outcome.error.kind == "signal"
    assert await bench.value("1") == 1


async def test_runs_queued_behind_a_shard_that_kills_its_worker_still_run(bench: Bench) -> None:
    source = """
import os, signal, time
if shard.index == 9:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
1
"""
    learned = [bench.task(source) for _ in range(8)]  # such short shards are queued ahead from now on
    await asyncio.gather(*(bench.executor.run(task, bench.events.append) for task in learned))
    tasks = [bench.task(source) for _ in range(12)]
    outcomes = await asyncio.gather(*(bench.executor.run(task, bench.events.append) for task in tasks))
    failed = [outcome.error for outcome in outcomes if not outcome.ok]
    assert [error.kind for error in failed if error] == ["signal"]
    assert outcomes[0].error in failed


async def test_runs_queued_behind_a_long_shard_move_to_a_container_that_runs_dry(bench: Bench) -> None:
    source = """
import time
if shard.index == 9:
    time.sleep(60)
1
"""
    learned = [bench.task(source) for _ in range(8)]  # such short shards are queued ahead from now on
    await asyncio.gather(*(bench.executor.run(task, bench.events.append) for task in learned))
    long, *others = [
        asyncio.create_task(bench.executor.run(bench.task(source), bench.events.append)) for _ in range(12)
    ]
    outcomes = await asyncio.wait_for(asyncio.gather(*others), PATIENCE)
    assert all(outcome.ok for outcome in outcomes)
    long.cancel()
    await asyncio.wait({long})


async def test_a_stopped_worker_does_not_hold_the_slot_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bacalhau_node.executors.agents.OVERTIME", 0.3)
    source = "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(60)"
    outcome = await bench.cell(source, timeout=0.3)
    assert outcome.error
    assert outcome.error.kind == "timeout"


async def test_cancelling_a_shard_whose_worker_is_stopped_ends_its_container(bench: Bench) -> None:
    source = """
import os, signal, time
print("up", flush=True)
time.sleep(0.3)
os.kill(os.getppid(), signal.SIGSTOP)
(outputs / "stopped").touch()
time.sleep(60)
"""
    running = asyncio.create_task(bench.executor.run(bench.task(source), bench.events.append))
    await until(lambda: any(bench.folder.glob("nodes/*/slots/*/outputs/stopped")))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await bench.value("1") == 1


async def test_a_fork_bomb_stays_in_its_container(bench: Bench) -> None:
    source = """
import os, time
forked = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        forked += 1
except BlockingIOError:
    pass
forked < 512
"""
    assert await bench.value(source) is True
    assert await bench.value("1") == 1


async def test_a_link_out_of_the_outputs_is_refused(bench: Bench) -> None:
    outcome = await bench.cell("import os\nos.symlink('/etc/passwd', '/outputs/x')\n1")
    assert outcome.error
    assert (outcome.error.kind, outcome.outputs) == ("output", None)
    assert "/etc/passwd" in outcome.error.message


async def test_cancelling_at_any_moment_leaves_a_container_that_serves_its_job(bench: Bench, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    source = "(outputs / 'x').write_text('x')\n[path.name for path in inputs], len(list(outputs.iterdir()))"
    spec = {"inputs": (InputSource(source=str(tmp_path)),)}
    assert (await bench.executor.run(bench.task(source), bench.events.append)).ok
    for step in range(40):
        task = bench.task(source, files=(staged(tmp_path / "a", "/inputs/a"),), **spec)
        running = asyncio.create_task(bench.executor.run(task, bench.events.append))
        await asyncio.sleep(step / 2000)
        running.cancel()
        await asyncio.wait({running})
        task = bench.task(source, files=(staged(tmp_path / "b", "/inputs/b"),), **spec)
        outcome = await asyncio.wait_for(bench.executor.run(task, bench.events.append), PATIENCE)
        assert outcome.value.data == b'[["b"], 1]', outcome


async def test_a_value_that_is_no_file_is_refused(bench: Bench) -> None:
    source = """
import os, pathlib, threading, time
def swap():
    found = []
    while not found:
        found = list(pathlib.Path("/slot/work").glob("*.value/*"))
    for path in found:
        path.unlink()
        path.symlink_to("/etc/passwd")
threading.Thread(target=swap).start()
b"x" * 1_000_000
"""
    outcome = await bench.cell(source)
    assert outcome.error
    assert (outcome.error.kind, outcome.value.kind) == ("output", "none")
    assert await bench.value("1") == 1


# --- ends from outside ---


async def test_a_container_that_is_killed_from_outside_is_the_nodes_fault(bench: Bench, api: docker.APIClient) -> None:
    task = bench.task("import time\nprint('running')\ntime.sleep(60)")
    running = asyncio.create_task(bench.executor.run(task, bench.events.append))
    await until(lambda: "running" in bench.text)
    for container in ours(api, bench.folder):
        await asyncio.to_thread(api.kill, container)
    outcome = await running
    assert outcome.error
    assert outcome.error.kind == "node"
    assert outcome.stdout == b"running\n"
    assert await bench.value("1") == 1


async def test_spares_that_were_removed_are_replaced(bench: Bench, api: docker.APIClient) -> None:
    assert await bench.value("1") == 1
    for container in ours(api, bench.folder):
        await asyncio.to_thread(api.remove_container, container, force=True)
    assert await bench.value("2") == 2


async def test_spares_go_when_nobody_needs_them_and_come_back(
    tmp_path: Path, docker_host: str, api: docker.APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    monkeypatch.setattr("bacalhau_node.executors.spares.IDLE_SECONDS", 0.5)
    bench = Bench(DockerExecutor(tmp_path / "node", node=NODE, slots=1), tmp_path)
    try:
        await bench.executor.probe()
        assert len(ours(api, tmp_path)) == 1
        await until(lambda: not ours(api, tmp_path))
        await bench.executor.probe()
        assert await bench.value("1") == 1
    finally:
        await bench.executor.close()


async def test_a_daemon_that_stops_fails_its_shards_and_the_next_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dockerd = shutil.which("dockerd", path="/usr/sbin:/usr/bin:/sbin")
    if dockerd is None or os.geteuid() != 0:
        pytest.skip("only root with dockerd can start a daemon that may be stopped")
    with private_docker(dockerd) as host:
        monkeypatch.setenv("DOCKER_HOST", host)
        bench = Bench(DockerExecutor(tmp_path / "node", node=NODE, slots=1), tmp_path)
        assert (await bench.executor.probe()).problem is None
        task = bench.task("import time\nprint('running')\ntime.sleep(600)")
        running = asyncio.create_task(bench.executor.run(task, bench.events.append))
        await until(lambda: "running" in bench.text)
    outcome = await running
    assert outcome.error
    assert (outcome.error.kind, outcome.stdout) == ("node", b"running\n")
    told = await bench.executor.probe()
    assert told.problem
    assert host in told.problem
    await bench.executor.close()


async def test_nothing_is_left_after_close(
    tmp_path: Path, docker_host: str, api: docker.APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    folder = tmp_path / "nodes" / NODE
    bench = Bench(DockerExecutor(folder, node=NODE, slots=2), tmp_path)
    await bench.executor.probe()
    await bench.value("(outputs / 'x').write_text('x')")
    running = asyncio.create_task(bench.executor.run(bench.task("import time\ntime.sleep(60)"), bench.events.append))
    await until(lambda: ShardStarted() in bench.events)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await bench.executor.close()
    assert ours(api, tmp_path) == []
    assert [path.name for path in folder.iterdir()] == ["docker-works"]
    assert str(tmp_path) not in mounts()


async def test_containers_of_dead_nodes_are_removed_and_no_others(
    tmp_path: Path, docker_host: str, api: docker.APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    image = shell_image(docker_host)
    nodes = tmp_path / "nodes"

    def left_behind(node: str, folder: Path, **labels: str) -> str:
        own = {Label.PROJECT: "1", Label.NODE: node, Label.FOLDER: str(folder), Label.LIFE: "earlier"}
        every = {str(name): value for name, value in own.items()} | labels
        return str(api.create_container(image, ["sleep", "600"], labels=every)["Id"])

    gone = [
        left_behind(NODE, nodes / NODE),
        left_behind("n-dead", nodes / "n-dead"),
        left_behind("n-alive", nodes / "n-alive", **{str(Label.DEADLINE): "1000"}),
    ]
    kept = [left_behind("n-alive", nodes / "n-alive"), left_behind("n-dead", tmp_path / "elsewhere" / "n-dead")]
    (nodes / NODE).mkdir(parents=True)
    executor = DockerExecutor(nodes / NODE, node=NODE, slots=1, is_alive=lambda node: node == "n-alive")
    try:
        assert (await executor.probe()).problem is None
        await until(lambda: not set(gone) & set(ours(api, tmp_path)))
        assert set(kept) <= set(ours(api, tmp_path))
    finally:
        await executor.close()
        for container in kept:
            api.remove_container(container, force=True)


async def probed_by(python: Path | str, folder: Path, *, inside: tuple[str, ...] = ()) -> str:
    """What another process that runs `python` says after its probe."""
    script = _NODE_SCRIPT.replace("await asyncio.Event().wait()", "await executor.close()")
    node = await asyncio.create_subprocess_exec(
        *inside, python, "-c", script, folder, NODE, stdout=asyncio.subprocess.PIPE, env=search_path()
    )
    told, _ = await node.communicate()
    return told.decode()


def search_path() -> dict[str, str]:
    """Our environment, with all that we can import on the path."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@root_only
async def test_a_daemon_that_does_not_see_our_files_is_told(
    tmp_path: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    hide = 'mount -t tmpfs none "$0" && exec "$@"'
    own_mounts = ("unshare", "-m", "sh", "-c", hide, str(tmp_path))
    told = await probed_by(sys.executable, tmp_path / "node", inside=own_mounts)
    assert "does not see this machine's files" in told
    assert docker_host in told


@root_only
async def test_a_python_that_shards_may_not_read_is_told(
    tmp_path: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    await asyncio.to_thread(venv.create, tmp_path / "venv", symlinks=True)
    (tmp_path / "venv/bin").chmod(0o700)
    told = await probed_by(tmp_path / "venv/bin/python", tmp_path / "node")
    assert "user 1000, as whom shards run, may not read the notebook's Python" in told
    assert f"chmod -R a+rX {tmp_path}/venv" in told


_NODE_SCRIPT = """
import asyncio, sys
from pathlib import Path
from bacalhau_node.executors.docker import DockerExecutor

async def main() -> None:
    executor = DockerExecutor(Path(sys.argv[1]), node=sys.argv[2], slots=1)
    print((await executor.probe()).problem, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_containers_end_with_their_node_and_its_next_life_removes_them(
    tmp_path: Path, docker_host: str, api: docker.APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    folder = tmp_path / "nodes" / NODE
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _NODE_SCRIPT, folder, NODE, stdout=asyncio.subprocess.PIPE, env=search_path()
    )
    assert node.stdout
    assert await node.stdout.readline() == b"None\n"
    left = ours(api, tmp_path)
    assert left
    node.kill()
    await node.wait()
    await until(lambda: not api.inspect_container(left[0])["State"]["Running"])
    executor = DockerExecutor(folder, node=NODE, slots=1)
    try:
        assert (await executor.probe()).problem is None
        await until(lambda: not set(left) & set(ours(api, tmp_path)))
    finally:
        await executor.close()


async def test_closing_while_containers_start_leaves_none(
    tmp_path: Path, docker_host: str, api: docker.APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    for pause in (0.0, 0.05, 0.2):
        executor = DockerExecutor(tmp_path / "node", node=NODE, slots=2)
        assert (await executor.probe()).problem is None  # from the second time on it does not wait for a container
        await asyncio.sleep(pause)
        await executor.close()
        assert ours(api, tmp_path) == []


# --- images ---


async def test_a_cell_runs_in_an_image_with_python(bench: Bench, docker_host: str) -> None:
    found = await bench.value(
        "import os\nopen('here', 'w').close()\n[os.environ['GREETING'], os.path.exists('/work'), 1]",
        image=python_image(docker_host),
    )
    assert found == ["hello", True, 1]


async def test_an_image_without_python_is_told(bench: Bench, docker_host: str) -> None:
    image = shell_image(docker_host)
    outcome = await bench.cell("1", image=image)
    assert outcome.error
    assert outcome.error.kind == "environment"
    assert f"no Python in the image {image}" in outcome.error.message


async def test_an_image_that_is_nowhere_is_told(bench: Bench) -> None:
    outcome = await bench.cell("1", image="localhost:1/no/such:image")
    assert outcome.error
    assert outcome.error.kind == "environment"
    assert "the image localhost:1/no/such:image is not here and could not be pulled (" in outcome.error.message


# --- commands ---


async def test_a_program_in_a_container_has_its_secrets(bench: Bench) -> None:
    task = bench.task(task=Command(shell='test "$API_KEY" = hunter2-correct-horse'))
    task = msgspec.structs.replace(task, secrets=Secrets({"API_KEY": "hunter2-correct-horse"}))
    outcome = await bench.executor.run(task, bench.events.append)
    assert outcome.ok, outcome.error


async def test_a_command_is_appended_to_the_image(bench: Bench, docker_host: str) -> None:
    outcome = await bench.command("sh", "-c", "echo $GREETING; pwd; cd; echo no >&2", image=shell_image(docker_host))
    assert outcome.ok, outcome.error
    assert (outcome.stdout, outcome.stderr) == (b"hello\n/work\n", b"no\n")


async def test_a_script_runs_in_the_host_environment(bench: Bench) -> None:
    outcome = await bench.command(
        shell="echo $BACALHAU_PARTITION_INDEX; echo kept > /outputs/x; echo temporary > here; echo $WORD",
        env={"WORD": "w"},
    )
    assert outcome.ok, outcome.error
    assert outcome.stdout == b"1\nw\n"
    assert outcome.outputs
    assert (outcome.outputs / "x").read_text() == "kept\n"


async def test_a_command_finds_its_files(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a b").write_text("text")
    outcome = await bench.command(
        shell="cat '/inputs/a b'",
        files=(staged(tmp_path / "a b", "/inputs/a b"),),
        inputs=(InputSource(source=str(tmp_path)),),
    )
    assert outcome.stdout == b"text"


async def test_lines_of_a_command_come_while_it_runs(bench: Bench) -> None:
    running = asyncio.create_task(bench.command(shell="echo first; read line; sleep 60"))
    await until(lambda: "first\n" in bench.text)
    assert bench.events[0] == ShardStarted()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize(
    ("script", "kind", "code", "words"),
    [
        ("exit 3", "exit", 3, "exit code 3"),
        ("kill -SEGV $$", "signal", 139, "SIGSEGV"),
        ("exec no-such-program", "exit", 127, "exit code 127"),
    ],
)
async def test_a_script_that_fails_says_how(bench: Bench, script: str, kind: str, code: int, words: str) -> None:
    outcome = await bench.command(shell=script)
    assert outcome.error
    assert (outcome.error.kind, outcome.exit_code) == (kind, code)
    assert words in outcome.error.message


async def test_a_program_that_is_not_in_the_image_is_told(bench: Bench, docker_host: str) -> None:
    outcome = await bench.command("no-such-program", image=shell_image(docker_host))
    assert outcome.error
    assert outcome.error.kind == "environment"
    assert "no-such-program" in outcome.error.message


async def test_a_command_is_ended_by_its_time_memory_and_disk(bench: Bench) -> None:
    late = await bench.command(shell="sleep 60", timeout=0.5)
    assert late.error
    assert (late.error.kind, "0.5 s" in late.error.message) == ("timeout", True)
    large = await bench.command(shell="python3 -c 'bytearray(400000000)'; exit $?", resources=Resources(memory=64 * MB))
    assert large.error
    assert large.error.kind == "memory"
    wide = await bench.command(
        shell="while true; do cat /usr/bin/env >> /outputs/x; done", resources=Resources(disk=10 * 10**6)
    )
    assert wide.error
    assert (wide.error.kind, "10 MB" in wide.error.message) == ("disk", True)


async def test_text_beyond_the_cap_is_cut_in_the_middle(bench: Bench) -> None:
    outcome = await bench.command(shell="echo first; head -c 40000000 /dev/zero | tr '\\0' x; echo last")
    assert outcome.ok, outcome.error
    assert outcome.stdout.startswith(b"first\n")
    assert outcome.stdout.endswith(b"last\n")
    assert outcome.cut > 20 * MB
    assert len(outcome.stdout) < 12 * MB
    assert f"{outcome.cut} bytes left out".encode() in outcome.stdout


async def test_nothing_of_a_command_is_left(bench: Bench, api: docker.APIClient, docker_host: str) -> None:
    image = shell_image(docker_host)
    await asyncio.gather(bench.command("no-such-program", image=image), bench.command("true", image=image))
    running = asyncio.create_task(bench.command("sleep", "60", image=image))
    await until(lambda: bench.events.count(ShardStarted()) == 3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    labels = [one["Labels"] for one in api.containers(all=True) if one["Id"] in ours(api, bench.folder)]
    assert not [label for label in labels if Label.JOB in label]
