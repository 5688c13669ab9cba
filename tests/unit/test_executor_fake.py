"""The simulated executor keeps the parts of the contract that need no process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bacalhau_node.executors.fake import FakeExecutor
from bacalhau_node.messages import ShardError
from bacalhau_node.ports import RawOutcome, ShardLines, ShardStarted
from bacalhau_node.spec import JobSpec, PythonCell
from bacalhau_node.testing.executor_suite import ShardBench, failure, job_number, value


def bench_of(executor: FakeExecutor, folder: Path) -> ShardBench:
    return ShardBench(executor, folder)


async def test_what_behave_returns_is_the_value(tmp_path: Path) -> None:
    bench = bench_of(FakeExecutor(lambda task, _: {"shard": task.execution.shard}), tmp_path)
    events = []
    assert value(await bench.run("", shard=3, on_event=events.append)) == {"shard": 3}
    assert events == [ShardStarted()]
    assert value(await bench_of(FakeExecutor(), tmp_path / "..").run("")) is None


async def test_what_behave_raises_is_the_error_of_the_shard(tmp_path: Path) -> None:
    outcome = await bench_of(FakeExecutor(lambda *_: 1 / 0), tmp_path).run("")
    assert failure(outcome) == ("exception", "division by zero")


async def test_a_whole_outcome_and_lines_can_be_simulated(tmp_path: Path) -> None:
    canned = RawOutcome(ok=False, exit_code=137, error=ShardError("memory", message="too much"))
    line = ShardLines("stdout", "hello\n")

    def behave(_: object, emit) -> RawOutcome:
        emit(line)
        return canned

    events = []
    assert await bench_of(FakeExecutor(behave), tmp_path).run("", on_event=events.append) is canned
    assert events == [ShardStarted(), line]


async def test_no_more_run_at_once_than_there_are_slots(tmp_path: Path) -> None:
    gate = asyncio.Event()
    executor = FakeExecutor(lambda *_: gate.wait(), slots=3)
    bench = bench_of(executor, tmp_path)
    running = [asyncio.ensure_future(bench.run("", shard=index)) for index in range(10)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*running)
    assert (executor.most, len(executor.done)) == (3, 10)


async def test_cancelling_frees_the_slot_and_closing_ends_the_rest(tmp_path: Path) -> None:
    executor = FakeExecutor(lambda *_: asyncio.Event().wait(), slots=1)
    bench = bench_of(executor, tmp_path)
    first, second = (asyncio.ensure_future(bench.run("", shard=index)) for index in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await executor.release(job_number(1))
    await executor.close()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert executor.released == [job_number(1)]


async def test_a_refusal_is_told(tmp_path: Path) -> None:
    executor = FakeExecutor(refusal="has no time")
    assert executor.check(JobSpec(task=PythonCell(bundle="cid"))) == "has no time"
    assert (await executor.probe()).executor == "fake"
