"""The agent under other Pythons, spoken to in frames: it imports nothing of ours."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bacalhau_node.executors.plain import SocketPipe
from bacalhau_node.executors.program import AGENT, AGENT_FILE, copy_agent
from bacalhau_node.executors.slot import AgentJob, AgentLost, AgentSetup, AgentSlot, ShardRun
from bacalhau_node.ports import ExecutorEvent, RawOutcome, ShardLines
from bacalhau_node.testing.executor_suite import until

VERSIONS = ("3.8", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14")


def interpreters() -> list[str]:
    """One interpreter of each version that this machine has, the running one included."""
    found = {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}
    managed = sorted(Path.home().glob(".pyenv/versions/*/bin/python"))
    for version in VERSIONS:
        paths = [str(path) for path in managed if path.parts[-3].startswith(f"{version}.")]
        path = shutil.which(f"python{version}") if not paths else paths[-1]
        if path is not None and _answers(path):
            found.setdefault(version, path)
    return [found[version] for version in VERSIONS if version in found]


def _answers(path: str) -> bool:
    return subprocess.run([path, "-c", "import ctypes"], capture_output=True, check=False).returncode == 0


@contextmanager
def started(python: str, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [python, *options, str(AGENT_FILE)],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
        )
    try:
        yield process, ours
    finally:
        ours.close()
        process.wait(10)


def run_of(folder: Path, key: str, **more: Any) -> ShardRun:
    places = {name: str(folder / key / name) for name in ("outputs", "work", "scratch")}
    return ShardRun(key=key, shard=0, count=1, seed=1, **places, **more)


async def outcome_of(slot: AgentSlot, folder: Path, key: str, events: list[ExecutorEvent], **more: Any) -> RawOutcome:
    run = run_of(folder, key, **more)
    async with asyncio.timeout(60):
        return await slot.run(
            run, host_scratch=folder / key / "scratch", host_outputs=folder / key / "outputs", emit=events.append
        )


CELL = """
import sys
print("line", shard)
def fail():
    raise ValueError("no")
{"python": sys.version_info[:2], "inputs": [path.name for path in inputs]}
"""


@pytest.mark.parametrize("python", interpreters())
@pytest.mark.parametrize("options", [("-s", "-u"), ("-I", "-u")])
async def test_a_cell_runs_under_every_python(python: str, options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text(CELL)
    events: list[ExecutorEvent] = []
    with started(python, *options) as (process, ours):
        slot = AgentSlot(await SocketPipe.over(ours), AgentSetup(oom=()))
        slot.bind(AgentJob(bundle=str(tmp_path), name="<cell>"))
        outcome = await outcome_of(slot, tmp_path, "0#1", events, inputs=("/x/a.csv",), logical=("a.csv",))
        assert (outcome.ok, outcome.value.kind, outcome.value.type) == (True, "json", "dict"), outcome
        assert ShardLines("stdout", "line shard 0 of 1: a.csv\n") in events
        assert slot.ready.result().startswith("3.")
        await slot.close()
        assert process.wait(10) == 0


@pytest.mark.parametrize("python", interpreters())
async def test_errors_are_described_under_every_python(python: str, tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text("def f():\n    raise ValueError('no')\ntry:\n    f()\nfinally:\n    [\n1 / 0]\n")
    with started(python, "-s", "-u") as (_, ours):
        slot = AgentSlot(await SocketPipe.over(ours), AgentSetup(oom=()))
        slot.bind(AgentJob(bundle=str(tmp_path), name="<cell>", line_offset=10))
        outcome = await outcome_of(slot, tmp_path, "0#1", [])
        await slot.close()
    assert outcome.error is not None
    assert (outcome.error.name, outcome.error.message) == ("ZeroDivisionError", "division by zero")
    assert [(frame.line, frame.in_cell) for frame in outcome.error.frames] == [(17, True)]
    assert outcome.error.notes == ("while handling ValueError: no (line 12)",)


@pytest.mark.parametrize("options", [("-s", "-u"), ("-I", "-u")])
async def test_a_cell_finds_its_own_modules_where_the_agent_has_some_of_the_same_name(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    names = sorted(file.stem for file in AGENT.glob("*.py") if not file.stem.startswith("_"))
    (tmp_path / "modules").mkdir()
    for name in names:
        (tmp_path / "modules" / f"{name}.py").write_text("mine = True")
    (tmp_path / "cell.py").write_text(
        f"import importlib, os, sys\n"
        f"mine = all(importlib.import_module(name).mine for name in {names})\n"
        f"mine, [path for path in sys.path if os.path.exists(os.path.join(path, '__main__.py'))]"
    )
    with started(sys.executable, *options) as (_, ours):
        slot = AgentSlot(await SocketPipe.over(ours), AgentSetup(oom=()))
        slot.bind(AgentJob(bundle=str(tmp_path)))
        outcome = await outcome_of(slot, tmp_path, "0#1", [])
        await slot.close()
    assert outcome.value.data == b"[true, []]", outcome


@pytest.mark.parametrize("python", interpreters())
def test_an_agent_that_was_copied_runs_without_anything_else_of_ours(python: str, tmp_path: Path) -> None:
    copy = copy_agent(tmp_path)
    compiled = {file.name for file in copy.glob("__pycache__/*")}
    assert {f"{file.stem}.{sys.implementation.cache_tag}.pyc" for file in copy.glob("*.py")} <= compiled
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in copy.rglob("*"))
    command = [python, "-I", "-u", "-X", "importtime", str(copy / "__main__.py")]
    ended = subprocess.run(command, input=b"", capture_output=True, check=False, timeout=60)
    assert ended.returncode == 0
    loaded = [
        line.rpartition(b"|")[2].strip() for line in ended.stderr.splitlines() if line.startswith(b"import time:")
    ]
    assert b"_bacalhau_agent.supervise" in loaded
    assert [name for name in loaded if name.startswith(b"bacalhau_node")] == []


async def test_a_fault_of_the_host_is_answered_and_ends_the_slot(tmp_path: Path) -> None:
    with started(sys.executable, "-s", "-u") as (_, ours):
        pipe = await SocketPipe.over(ours)
        slot = AgentSlot(pipe, AgentSetup(oom=()))
        header = b'{"t": "dance"}'
        pipe.write(struct.pack(">II", len(header), 0) + header)
        assert "unknown frame 'dance'" in await asyncio.wait_for(slot.dead, 10)
        with pytest.raises(AgentLost):
            await outcome_of(slot, tmp_path, "0#1", [])


async def test_an_agent_ends_with_all_that_it_started_when_its_host_is_gone(tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text("import subprocess\nsubprocess.Popen(['sleep', '1e6'])\nwhile True: pass")
    events: list[ExecutorEvent] = []
    with started(sys.executable, "-s", "-u") as (process, ours):
        slot = AgentSlot(await SocketPipe.over(ours), AgentSetup(oom=()))
        slot.bind(AgentJob(bundle=str(tmp_path)))
        running = asyncio.ensure_future(outcome_of(slot, tmp_path, "0#1", events))
        await until(lambda: len(_below(process.pid)) == 3)
        children = _below(process.pid)
        await slot.close()
        with pytest.raises(AgentLost):
            await running
        assert process.wait(10) == 0
        await until(lambda: all(map(_gone, children)))


def _below(pid: int) -> list[int]:
    found: list[int] = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_below(int(child))]
    return found


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_outputs_hold_the_next_shard_until_they_are_collected(tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text("(outputs / 'f').write_text('x')")
    events: list[ExecutorEvent] = []
    with started(sys.executable, "-s", "-u") as (_, ours):
        slot = AgentSlot(await SocketPipe.over(ours), AgentSetup(oom=()))
        slot.bind(AgentJob(bundle=str(tmp_path)))
        first = await outcome_of(slot, tmp_path, "0#1", [], hold=True)
        assert first.outputs is not None
        assert slot.holding == "0#1"
        second = asyncio.ensure_future(outcome_of(slot, tmp_path, "1#1", events, hold=True))
        third = asyncio.ensure_future(outcome_of(slot, tmp_path, "2#1", [], hold=True))
        third.cancel()
        await asyncio.wait({third})  # answered by an agent that has seen the second run, too
        assert events == []
        slot.collected(run_of(tmp_path, "0#1"))
        assert (await second).ok
        await slot.close()


async def test_an_agent_without_a_control_group_watches_memory_and_processes_itself(tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text(
        "import os, time\n"
        "if inputs: data = b'x' * 300_000_000\n"
        "while os.fork(): time.sleep(0.001)\n"
        "while True: time.sleep(1)\n"
    )
    with started(sys.executable, "-s", "-u") as (process, ours):
        slot = AgentSlot(await SocketPipe.over(ours), AgentSetup(oom=(), watch=True))
        slot.bind(AgentJob(bundle=str(tmp_path)))
        hungry = await outcome_of(slot, tmp_path, "0#1", [], memory=200_000_000, inputs=("x",))
        assert hungry.error is not None
        assert (hungry.error.kind, "200 MB" in hungry.error.message) == ("memory", True)
        many = await outcome_of(slot, tmp_path, "0#2", [])
        assert many.error is not None
        assert "at most 512 are allowed" in many.error.message
        assert len(_below(process.pid)) == 1
        await slot.close()


async def test_a_host_that_does_not_read_never_stops_a_shard(tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text("for n in range(70_000): print('x' * 99)\n(outputs / 'f').write_text('done')")
    with started(sys.executable, "-s", "-u") as (_, ours):
        pipe = _Deaf(await SocketPipe.over(ours))
        slot = AgentSlot(pipe, AgentSetup(oom=()))
        slot.bind(AgentJob(bundle=str(tmp_path)))
        running = asyncio.ensure_future(outcome_of(slot, tmp_path, "0#1", []))
        await until((tmp_path / "0#1" / "outputs" / "f").exists)
        pipe.hearing.set()
        outcome = await running
        assert (outcome.ok, len(outcome.stdout)) == (True, 7_000_000)
        await slot.close()


class _Deaf:
    """A pipe whose host does something else until `hearing` is set."""

    def __init__(self, pipe: SocketPipe) -> None:
        self._pipe = pipe
        self.hearing = asyncio.Event()
        self.write, self.drain, self.close = pipe.write, pipe.drain, pipe.close

    async def read(self) -> bytes:
        await self.hearing.wait()
        return await self._pipe.read()


async def test_an_agent_whose_template_always_dies_gives_up(tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text("1")
    with started(sys.executable, "-s", "-u") as (process, ours):
        slot = AgentSlot(await SocketPipe.over(ours), AgentSetup(oom=()))
        killed: set[int] = set()
        while not slot.dead.done():
            await until(lambda: slot.dead.done() or set(_below(process.pid)) - killed)
            for pid in set(_below(process.pid)) - killed if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        assert process.wait(10) == 1
        assert len(killed) == 4
        await slot.close()


async def test_a_thread_that_never_ends_is_ended_after_a_while_and_the_value_kept(tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait).start()\n'value'"
    )
    with started(sys.executable, "-s", "-u") as (_, ours):
        slot = AgentSlot(await SocketPipe.over(ours), AgentSetup(oom=()))
        slot.bind(AgentJob(bundle=str(tmp_path)))
        outcome = await outcome_of(slot, tmp_path, "0#1", [])
        assert (outcome.ok, outcome.exit_code, outcome.value.data) == (True, 0, b'"value"')
        assert b"was ended 10 s after the cell" in outcome.stderr
        await slot.close()
