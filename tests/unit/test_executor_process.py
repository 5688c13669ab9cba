"""What is particular to plain processes: what they refuse, commands, spares, agents that die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.ids import Execution
from bacalhau_node.ports import ExecutorEvent, RawOutcome, ShardStarted, ShardTask, StagedFile
from bacalhau_node.spec import Command, JobSpec, PythonCell, Resources
from bacalhau_node.testing.executor_suite import ShardBench, failure, job_number, processes_with, text_of, until, value


@pytest.fixture
async def executor(tmp_path: Path) -> AsyncIterator[ProcessExecutor]:
    executor = ProcessExecutor(tmp_path / "executor", slots=2)
    yield executor
    await executor.close()


@pytest.fixture
def bench(executor: ProcessExecutor, tmp_path: Path) -> ShardBench:
    return ShardBench(executor, tmp_path)


CELL = PythonCell(bundle="cid")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (JobSpec(task=CELL, resources=Resources(gpus=1)), "--gpu: this node "),
        (JobSpec(task=CELL, image="python:3.12"), "--image python:3.12"),
        (JobSpec(task=CELL, isolation="container"), "--isolation container"),
        (JobSpec(task=CELL, container_per="shard"), "--container-per shard"),
        (
            JobSpec(task=CELL, resources=Resources(memory=2**60)),
            "--memory 1.15 EB: this node can give a shard at most ",
        ),
        (JobSpec(task=CELL, resources=Resources(cpu=10_000)), "--cpu 10000: this node can give a shard at most "),
        (JobSpec(task=PythonCell(bundle="cid", python="2.7")), "needs Python 2.7; this node has Python 3."),
    ],
)
def test_what_plain_processes_cannot_do_is_refused_with_a_reason(
    executor: ProcessExecutor, spec: JobSpec, words: str
) -> None:
    assert words in (executor.check(spec) or "")


async def test_versions_are_compared_once_they_are_known(executor: ProcessExecutor) -> None:
    capabilities = await executor.probe()
    assert (capabilities.executor, capabilities.isolation, capabilities.slots) == ("process", "none", 2)
    assert capabilities.problem is None
    have = capabilities.versions["msgspec"]
    assert executor.check(JobSpec(task=PythonCell(bundle="cid", versions={"MsgSpec": have}))) is None
    old = executor.check(JobSpec(task=PythonCell(bundle="cid", versions={"msgspec": "0.1"})))
    assert old == f"needs msgspec 0.1; this node has msgspec {have}"
    missing = executor.check(JobSpec(task=PythonCell(bundle="cid", versions={"no-such-thing": "1"})))
    assert missing == "needs no-such-thing 1; this node has no no-such-thing"


def command(tmp_path: Path, task: Command, **spec: object) -> ShardTask:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    data = tmp_path / "data.csv"
    data.write_text("one\n")
    return ShardTask(
        execution=Execution(job_number(1), 0, 1),
        spec=msgspec.structs.replace(JobSpec(task=task), **spec),
        count=1,
        files=(StagedFile(data, "/inputs/a/data.csv", "a/data.csv", 4),),
        scratch=scratch,
    )


async def run(executor: ProcessExecutor, task: ShardTask) -> RawOutcome:
    async with asyncio.timeout(60):
        return await executor.run(task, lambda _: None)


async def test_a_shell_script_finds_its_inputs_and_leaves_outputs(executor: ProcessExecutor, tmp_path: Path) -> None:
    script = 'cat "$BACALHAU_INPUTS"/a/data.csv; echo $BACALHAU_PARTITION_COUNT $X >&2; touch "$BACALHAU_OUTPUTS/made"'
    outcome = await run(executor, command(tmp_path, Command(shell=script), env={"X": "y"}))
    assert (outcome.ok, outcome.stdout, outcome.stderr) == (True, b"one\n", b"1 y\n")
    assert outcome.outputs is not None
    assert [path.name for path in outcome.outputs.iterdir()] == ["made"]


async def test_a_command_fails_with_its_exit_code(executor: ProcessExecutor, tmp_path: Path) -> None:
    outcome = await run(executor, command(tmp_path, Command(argv=("sh", "-c", "exit 7"))))
    assert (outcome.ok, outcome.exit_code, failure(outcome)[0]) == (False, 7, "exit")


async def test_a_program_that_is_not_there_is_named(executor: ProcessExecutor, tmp_path: Path) -> None:
    outcome = await run(executor, command(tmp_path, Command(argv=("no-such-program",))))
    assert failure(outcome) == ("environment", "no-such-program can't be started: No such file or directory")
    assert outcome.exit_code == 127


async def test_an_agent_killed_from_outside_fails_its_shard_and_restarts_the_others(
    bench: ShardBench, tmp_path: Path
) -> None:
    marker = f"86400.{os.getpid()}1"
    source = f"""
        import os, subprocess, sys
        first = shard.index == 0 and not os.path.exists('{tmp_path}/again')
        if first:
            subprocess.Popen(['sleep', '{marker}'], start_new_session=True)
            print(os.getpid())
        while first: pass
        shard.index
    """
    events: list[ExecutorEvent] = []
    running = asyncio.ensure_future(bench.run(source, on_event=events.append))
    await until(lambda: processes_with(marker) and text_of(events).endswith("\n"))
    template = _parent(int(text_of(events)))
    os.kill(_parent(template), signal.SIGKILL)
    others = [bench.run(source, shard=index) for index in range(1, 6)]
    kind, message = failure(await running)
    assert (kind, "SIGKILL" in message) == ("signal", True)
    assert [value(outcome) for outcome in await asyncio.gather(*others)] == [1, 2, 3, 4, 5]
    assert processes_with(marker) == []


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_spares_are_ready_before_a_job_and_after_one(executor: ProcessExecutor, bench: ShardBench) -> None:
    folder = bench.folder / "executor"
    await executor.warm(("numpy",))
    assert len(list(folder.iterdir())) == 2
    assert value(await bench.run("import sys\n'numpy' in sys.modules", imports=("numpy",), job=1)) is True
    await executor.release(job_number(1))
    await until(lambda: len(list(folder.iterdir())) == 2)


async def test_closing_ends_what_runs(executor: ProcessExecutor, bench: ShardBench) -> None:
    marker = f"86400.{os.getpid()}2"
    source = f"import subprocess\nsubprocess.run(['sleep', '{marker}'])"
    events: list[ExecutorEvent] = []
    running = asyncio.ensure_future(bench.run(source, on_event=events.append))
    await until(lambda: processes_with(marker) and events)
    assert isinstance(events[0], ShardStarted)
    await executor.close()
    assert failure(await running)[0] in ("signal", "node")
    assert processes_with(marker) == []
    assert list((bench.folder / "executor").iterdir()) == []


async def test_links_out_of_outputs_are_an_error_that_names_them(bench: ShardBench) -> None:
    outcome = await bench.run("(outputs / 'own').write_text('x')\n(outputs / 'link').symlink_to('/etc/passwd')")
    kind, message = failure(outcome)
    assert (kind, outcome.outputs) == ("output", None)
    assert "outputs/link is a link to /etc/passwd" in message
    inside = await bench.run("(outputs / 'own').write_text('x')\n(outputs / 'link').symlink_to('own')\nNone")
    assert inside.ok


async def test_a_run_after_closing_fails_and_starts_nothing(executor: ProcessExecutor, bench: ShardBench) -> None:
    await executor.close()
    assert failure(await bench.run("1")) == (
        "node",
        "no process could be kept to run the shard: the node is closing",
    )


async def test_cancelling_a_shard_that_stopped_its_agent_ends_the_agent(bench: ShardBench) -> None:
    marker = f"86400.{os.getpid()}3"
    source = f"""
        import os, signal, subprocess
        if shard.index == 0:
            subprocess.Popen(['sleep', '{marker}'])
            parent = open(f'/proc/{{os.getppid()}}/stat').read().rpartition(')')[2].split()[1]
            os.kill(int(parent), signal.SIGSTOP)
            while True: pass
        'next'
    """
    running = asyncio.ensure_future(bench.run(source))
    await until(lambda: processes_with(marker))
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    assert value(await bench.run(source, shard=1)) == "next"
    assert processes_with(marker) == []


async def test_runs_taken_ahead_move_to_a_slot_that_runs_dry(bench: ShardBench, tmp_path: Path) -> None:
    source = f"""
        import os, time
        if shard.index == 100:
            while len(os.listdir('{tmp_path}/ended')) < 30: time.sleep(0.01)
        if shard.index > 100:
            open(f'{tmp_path}/ended/{{shard.index}}', 'w').close()
        shard.index
    """
    (tmp_path / "ended").mkdir()
    await asyncio.gather(*(bench.run(source, shard=index) for index in range(100)))  # short ones: slots take many ahead
    outcomes = await asyncio.gather(*(bench.run(source, shard=index) for index in range(100, 131)))
    assert [value(outcome) for outcome in outcomes] == list(range(100, 131))


async def test_asking_again_whether_processes_work_starts_no_further_one(tmp_path: Path) -> None:
    folder = tmp_path / "executor"
    executor = ProcessExecutor(folder, slots=2)
    first = await executor.probe()
    assert await executor.probe() == first
    assert first.problem is None
    assert len(list(folder.iterdir())) == 1  # an agent's log
    await executor.close()


async def test_a_folder_that_cannot_be_made_is_the_fault_of_the_node(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    executor = ProcessExecutor(tmp_path / "file" / "executor", slots=1)
    assert "no process could be started" in ((await executor.probe()).problem or "")
    kind, message = failure(await ShardBench(executor, tmp_path).run("1"))
    assert (kind, "Not a directory" in message) == ("node", True)
    await executor.close()


async def test_a_job_with_little_memory_can_use_pandas(bench: ShardBench) -> None:
    outcome = await bench.run(
        "import pandas as pd\nint(pd.Series([1, 2]).sum())", imports=("pandas",), resources=Resources(memory=64 * 2**20)
    )
    assert value(outcome) == 3
