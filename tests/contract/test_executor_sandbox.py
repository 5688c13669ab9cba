"""The executor contract over bubblewrap sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from bacalhau_node.executors.bubblewrap import Bubblewrap, Root
from bacalhau_node.executors.containers import Recipe
from bacalhau_node.executors.sandbox import SandboxExecutor
from bacalhau_node.executors.sandboxes import Sandboxes
from bacalhau_node.ports import ExecutorEvent, StagedFile
from bacalhau_node.spec import Command, InputSource, Resources
from bacalhau_node.testing.executor_suite import (
    ExecutorContract,
    ShardBench,
    failure,
    processes_with,
    text_of,
    until,
    value,
)
from tests.simulated_gpus import device_files as device_files
from tests.simulated_gpus import simulate

pytestmark = pytest.mark.sandbox


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[ShardBench]:
    executor = SandboxExecutor(tmp_path / "node", slots=2)
    assert (await executor.probe()).problem is None
    yield ShardBench(executor, tmp_path)
    await executor.close()
    assert list((tmp_path / "node").iterdir()) == []
    assert _sandboxes() == []


def _children(pid: int) -> list[int]:
    """Of every thread; one may end between being named and being asked."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children += map(int, (task / "children").read_text().split())
    return children


def _sandboxes() -> list[int]:
    """The sandboxes of this process; others may have theirs."""
    ours = _children(os.getpid())
    return [pid for pid in processes_with("--args") if pid in ours]


async def test_an_executor_that_is_closed_while_sandboxes_start_is_closed_and_leaves_none(tmp_path: Path) -> None:
    for turns in range(0, 27, 3):
        executor = SandboxExecutor(tmp_path / "node", slots=2)
        assert (await executor.probe()).problem is None
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await executor.close()
        assert _sandboxes() == []


async def test_what_bubblewrap_has_begun_ends_with_it_before_it_has_told_of_it(tmp_path: Path) -> None:
    marker = f"86400.{os.getpid()}7"
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\nsleep {marker} & wait\n")
    program.chmod(0o755)
    bubblewrap = Bubblewrap(program=str(program), rights="user", user="1000:1000", no_nesting=False)
    sandboxes = Sandboxes(bubblewrap, Root(tmp_path, ()), grouped=False)
    recipe = Recipe(
        image="",
        command=("never reached",),
        entrypoint=(),
        environment={},
        mounts=(),
        labels={},
        user="1000:1000",
        folder="/",
        memory=2**20,
        cpu=1.0,
    )
    box = await sandboxes.create(recipe)
    streams = await sandboxes.attach(box, lambda *_: None)
    await sandboxes.start(box)
    await until(lambda: processes_with(marker))
    await sandboxes.remove(box)
    assert streams.ended.is_set()
    assert processes_with(marker) == []


class TestSandboxExecutor(ExecutorContract):
    """Every rule."""


async def test_what_only_containers_can_do_is_refused_in_the_words_of_the_options(bench: ShardBench) -> None:
    check = bench.executor.check
    assert check(bench.task("1", isolation="sandbox").spec) is None
    assert check(bench.task("1", isolation="none").spec) is None
    assert "--isolation container" in str(check(bench.task("1", isolation="container").spec))
    assert "--image a:b" in str(check(bench.task("1", image="a:b").spec))
    assert "--gpu" in str(check(bench.task("1", resources=Resources(gpus=1)).spec))
    assert "--memory" in str(check(bench.task("1", resources=Resources(memory=1 << 50)).spec))


async def test_a_sandbox_that_is_killed_from_outside_is_the_nodes_fault(bench: ShardBench) -> None:
    """And the next shard runs in another one."""
    events: list[ExecutorEvent] = []
    source = "import time\nprint('here', flush=True)\nwhile shard.index == 0: time.sleep(0.01)\n1"
    running = asyncio.ensure_future(bench.run(source, on_event=events.append))
    await until(lambda: text_of(events) == "here\n")
    for pid in _sandboxes():
        os.kill(pid, signal.SIGKILL)
    assert failure(await running)[0] == "node"
    assert value(await bench.run(source, shard=1)) == 1


async def test_a_sandbox_that_is_killed_while_it_starts_is_the_nodes_fault(bench: ShardBench) -> None:
    """So the shard is tried again: nothing is wrong with the Python that it was to run with."""
    spares = set(_sandboxes())
    running = asyncio.ensure_future(bench.run("1", resources=Resources(memory=123 << 20)))  # no spare is like that
    while not running.done():
        for pid in set(_sandboxes()) - spares:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0)
    kind, text = failure(await running)[:2]
    assert (kind, "from outside" in text) == ("node", True)


async def test_a_command_runs_like_a_cell(bench: ShardBench, tmp_path: Path) -> None:
    """With its inputs and outputs where containers have them."""
    script = "cat /inputs/a.csv > /outputs/copy; echo $BACALHAU_PARTITION_INDEX; echo wrong >&2; exit 3"
    cell = bench.task("1", files={"a.csv": "data"}, shard=4)
    spec = msgspec.structs.replace(cell.spec, task=Command(shell=script))
    outcome = await bench.executor.run(msgspec.structs.replace(cell, spec=spec, bundle=None), lambda _: None)
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (3, b"4\n", b"wrong\n")
    assert failure(outcome)[0] == "exit"
    assert outcome.outputs is not None
    assert (outcome.outputs / "copy").read_text() == "data"


async def test_inputs_may_lie_anywhere_but_over_the_system(bench: ShardBench, tmp_path: Path) -> None:
    """A folder at a place of its own, also for the shard after it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "a").write_text("one")
    source = InputSource(source=str(folder), mount="/data/deep")
    for shard in (0, 1):
        cell = bench.task("[open('/data/deep/a').read(), inputs[0].as_posix()]", shard=shard)
        files = (StagedFile(folder / "a", "/data/deep/a", "a", 3),)
        spec = msgspec.structs.replace(cell.spec, inputs=(source,))
        outcome = await bench.executor.run(msgspec.structs.replace(cell, spec=spec, files=files), lambda _: None)
        assert value(outcome) == ["one", "/data/deep/a"]


async def test_the_network_is_there_on_demand_only(bench: ShardBench) -> None:
    source = "import socket\nsorted(name for _, name in socket.if_nameindex())"
    assert value(await bench.run(source)) == ["lo"]
    ours = sorted(name for _, name in socket.if_nameindex())
    assert value(await bench.run(source, network="full", job=7)) == ours


async def test_a_node_that_is_killed_leaves_no_sandbox(tmp_path: Path) -> None:
    """The kernel ends them with their parent."""
    script = f"""
        import asyncio, pathlib
        from bacalhau_node.executors.sandbox import SandboxExecutor
        async def main():
            await SandboxExecutor(pathlib.Path({str(tmp_path / "node")!r}), slots=1).probe()
            print("ready", flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(script), stdout=asyncio.subprocess.PIPE
    )
    assert node.stdout is not None
    assert await node.stdout.readline() == b"ready\n"
    children = _children(node.pid)
    assert children
    node.kill()
    await node.wait()
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


async def test_shards_that_run_at_once_see_the_device_file_of_their_own_simulated_card_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_files: list[str]
) -> None:
    """No CUDA program runs here: the card and its file are simulated."""
    cards = {"GPU-aaaa": device_files[0], "GPU-bbbb": device_files[1]}
    simulate(monkeypatch, ",".join(cards))
    executor = SandboxExecutor(tmp_path / "node", slots=4)
    assert (await executor.probe()).problem is None
    bench = ShardBench(executor, tmp_path)
    try:
        files = "[name for name in os.listdir('/dev') if name.startswith('nvidia')]"
        source = f"""
            import os
            files = {files}
            for name in files:
                open('/dev/' + name, 'wb').write(b'x')
            [os.environ.get('CUDA_VISIBLE_DEVICES'), files]
        """
        runs = [bench.run(source, shard=number, resources=Resources(gpus=1)) for number in range(3)]
        seen = [value(outcome) for outcome in await asyncio.gather(*runs)]
        assert {uuid for uuid, _ in seen} == cards.keys()
        assert all(names == [cards[uuid]] for uuid, names in seen)
        assert value(await bench.run(source)) == [None, []]
        assert executor._gpus.table == {}
    finally:
        await executor.close()
