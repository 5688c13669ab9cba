"""GPUs, simulated: what is detected, and who gets which. No CUDA program runs here; see `tests/gpu/run.sh`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bacalhau_node.executors.gpus import (
    NO_DRIVER,
    Gpus,
    NoGpu,
    at_once,
    detect,
    devices,
    variables,
    visible,
)
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.ids import Execution
from bacalhau_node.ports import ExecutorEvent, Gpu, ShardStarted
from bacalhau_node.spec import Command, Resources
from bacalhau_node.testing.executor_suite import ShardBench, failure, job_number, text_of, until, value
from tests.simulated_gpus import VARIABLE, simulate, simulated_driver

GB = 10**9
ONE = Resources(gpus=1)


def card(name: str, minor: int | None = 0) -> Gpu:
    return Gpu(uuid=f"GPU-{name}", name="Simulated GPU", memory=16 * GB, minor=minor)


def execution(shard: int, *, job: int = 1) -> Execution:
    return Execution(job_number(job), shard, 1)


async def some(folder: Path, *cards: Gpu, problem: str = NO_DRIVER) -> Gpus:
    found = list(cards)
    gpus = Gpus(folder, find=lambda: (tuple(found), problem))
    await gpus.look()
    return gpus


# --- detection ---


def test_the_simulated_driver_is_found_as_a_real_one_is_by_the_loader_and_answers_through_the_real_package() -> None:
    """In a process of its own, whose loader finds the library on `LD_LIBRARY_PATH`."""
    program = (
        "import msgspec; from bacalhau_node.executors.gpus import detect; print(msgspec.json.encode(detect()).decode())"
    )
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(simulated_driver()),
        VARIABLE: "GPU-aaaa,GPU-bbbb+MIG-1+MIG-2,GPU-cccc+",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True)
    cards, problem = msgspec.json.decode(done.stdout, type=tuple[tuple[Gpu, ...], str])
    assert problem == ""
    assert [(each.uuid, each.minor) for each in cards] == [("GPU-aaaa", 200), ("MIG-1", None), ("MIG-2", None)]
    assert {(each.name, each.memory) for each in cards} == {("Simulated GPU", 16 * GB)}


def test_simulated_drivers_that_have_nothing_to_give_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "")
    assert detect() == ((), "its NVIDIA driver knows no card")
    monkeypatch.delenv(VARIABLE)
    assert detect() == ((), NO_DRIVER)
    monkeypatch.setenv(VARIABLE, "GPU-aaaa")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect() == ((), "CUDA_VISIBLE_DEVICES of the node's process names none")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert detect() == ((), "there is an NVIDIA driver; to use it: pip install 'bacalhau-jupyter[gpu]'")


@pytest.mark.parametrize(
    ("given_", "left"),
    [
        (None, "abc"),
        ("", ""),
        ("1", "b"),
        ("2,0", "ca"),
        ("GPU-b", "b"),
        ("0,9,1", "a"),
        ("-1", ""),
        ("0,0,1", "a"),
        ("GPU-", ""),
    ],
)
def test_cards_that_are_hidden_from_the_node_are_not_used(given_: str | None, left: str) -> None:
    cards = [card("a"), card("b"), card("c")]
    assert [each.uuid for each in visible(cards, given_)] == [f"GPU-{name}" for name in left]


def test_a_shard_is_told_its_cards_by_uuid() -> None:
    assert variables(("GPU-a", "GPU-b")) == dict.fromkeys(
        ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"), "GPU-a,GPU-b"
    )
    assert variables(()) == {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void"}
    assert all(path.exists() for path in devices([card("a")]))


# --- refusals ---


async def test_refusals_say_what_the_node_has(tmp_path: Path) -> None:
    none = await some(tmp_path)
    assert none.lack(Resources()) is None
    assert none.lack(ONE) == "--gpu: this node has no GPU (no NVIDIA driver found)"
    two = await some(tmp_path, card("a"), card("b"))
    assert two.lack(Resources(gpus=2)) is None
    assert two.lack(Resources(gpus=3)) == "--gpu 3: this node has 2 GPUs: Simulated GPU (16 GB), Simulated GPU (16 GB)"
    slices = await some(tmp_path, card("1", None), card("2", None))
    assert slices.lack(ONE) is None
    assert "one slice of a card" in str(slices.lack(Resources(gpus=2)))
    assert "only in an image" in str(slices.lack(ONE, whole=True))


def test_how_many_shards_run_at_once() -> None:
    cards = [card("a"), card("b"), card("c"), card("m", None)]
    assert at_once(cards, ONE) == 4
    assert at_once(cards, Resources(gpus=2)) == 1
    assert at_once(cards, Resources(gpus=1, gpu_share=3)) == 12


# --- who gets which ---


class Shards:
    """Shards that hold their cards until they are let go."""

    def __init__(self, gpus: Gpus) -> None:
        self.gpus = gpus
        self.has: dict[Execution, tuple[str, ...]] = {}
        self.tasks: dict[Execution, asyncio.Task[None]] = {}
        self._ends: dict[Execution, asyncio.Event] = {}

    async def start(self, execution: Execution, resources: Resources = ONE) -> None:
        self._ends[execution] = asyncio.Event()
        self.tasks[execution] = asyncio.create_task(self._live(execution, resources))
        await self.settle()

    async def _live(self, execution: Execution, resources: Resources) -> None:
        async with self.gpus.hold(execution, resources) as cards:
            self.has[execution] = tuple(each.uuid for each in cards)
            try:
                await self._ends[execution].wait()
            finally:
                del self.has[execution]

    async def end(self, execution: Execution) -> None:
        self._ends[execution].set()
        await self.settle()

    async def cancel(self, execution: Execution) -> None:
        self.tasks[execution].cancel()
        await self.settle()

    @staticmethod
    async def settle() -> None:
        for _ in range(8):  # turns of the loop: nothing here waits for anything else
            await asyncio.sleep(0)

    async def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def test_shards_beyond_the_cards_wait_and_are_served_in_order(tmp_path: Path) -> None:
    shards = Shards(await some(tmp_path, card("a"), card("b")))
    for number in range(4):
        await shards.start(execution(number))
    assert shards.has == {execution(0): ("GPU-a",), execution(1): ("GPU-b",)}
    await shards.cancel(execution(2))
    await shards.end(execution(1))
    assert shards.has == {execution(0): ("GPU-a",), execution(3): ("GPU-b",)}
    await shards.close()
    assert shards.gpus.table == {}


async def test_a_shared_card_has_only_shards_of_one_job(tmp_path: Path) -> None:
    share = Resources(gpus=1, gpu_share=2)
    shards = Shards(await some(tmp_path, card("a"), card("b")))
    for number in range(3):
        await shards.start(execution(number), share)
    await shards.start(execution(0, job=2), share)
    assert Counter(uuid for each in shards.has.values() for uuid in each) == {"GPU-a": 2, "GPU-b": 1}
    assert execution(0, job=2) not in shards.has
    await shards.end(execution(1))
    assert shards.has[execution(0, job=2)] == ("GPU-b",)
    await shards.close()


async def test_two_nodes_of_one_user_keep_off_each_others_cards(tmp_path: Path) -> None:
    one, other = Shards(await some(tmp_path, card("a"))), Shards(await some(tmp_path, card("a")))
    await one.start(execution(1))
    await other.start(execution(2))
    assert other.has == {}
    await one.end(execution(1))
    await until(lambda: other.has == {execution(2): ("GPU-a",)})
    await other.close()


async def test_who_waits_behind_one_that_is_called_off_gets_its_turn_at_once(tmp_path: Path) -> None:
    shards = Shards(await some(tmp_path, card("a"), card("b")))
    await shards.start(execution(0))
    await shards.start(execution(1), Resources(gpus=2))
    await shards.start(execution(2))
    assert shards.has == {execution(0): ("GPU-a",)}
    await shards.cancel(execution(1))
    assert shards.has == {execution(0): ("GPU-a",), execution(2): ("GPU-b",)}
    await shards.close()


async def test_cards_are_looked_for_once_a_minute_and_where_there_are_none_each_time(tmp_path: Path) -> None:
    looks: list[tuple[Gpu, ...]] = [(), (card("a"),), (card("b"),)]
    gpus = Gpus(tmp_path, find=lambda: (looks.pop(0), NO_DRIVER))
    await gpus.look()
    await asyncio.gather(gpus.look(), gpus.look())
    assert gpus.cards == (card("a"),)


async def test_cards_that_go_away_fail_those_who_wait_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bacalhau_node.executors.gpus.LOOK_SECONDS", 0.0)
    found = [card("a")]
    gpus = Gpus(tmp_path, find=lambda: (tuple(found), "the driver went away"))
    await gpus.look()
    shards = Shards(gpus)
    await shards.start(execution(1))
    await shards.start(execution(2))
    found.clear()
    await gpus.look()
    with pytest.raises(NoGpu, match="the driver went away"):
        await shards.tasks[execution(2)]
    await shards.end(execution(1))
    assert gpus.table == {}
    with pytest.raises(NoGpu):
        async with gpus.hold(execution(3), ONE):
            pass


async def test_a_card_that_cannot_be_locked_fails_the_shard_that_wants_it_and_nobody_else(tmp_path: Path) -> None:
    shards = Shards(await some(tmp_path / "locks", card("a"), card("b")))
    await shards.start(execution(1))
    (tmp_path / "locks" / "GPU-b").mkdir()
    with pytest.raises(NoGpu, match="GPU-b"):
        await shards.gpus._take(execution(2), Resources(gpus=1), whole=False)
    assert shards.gpus.table == {"GPU-a": (execution(1),)}
    await shards.end(execution(1))
    assert shards.gpus.table == {}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("start", "end", "cancel")),
        st.integers(0, 11),
        st.integers(1, 3),
        st.sampled_from((1, 1, 2, 3)),
        st.integers(1, 2),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_happens_no_card_has_more_shards_than_it_may_and_all_come_back(
    tmp_path: Path, steps: list[tuple[str, int, int, int, int]]
) -> None:
    asyncio.run(_adversary(tmp_path, steps))


async def _adversary(folder: Path, steps: list[tuple[str, int, int, int, int]]) -> None:
    shards = Shards(await some(folder, card("a"), card("b"), card("c")))
    wants: dict[Execution, Resources] = {}
    for what, shard, count, share, job in steps:
        each = execution(shard, job=job)
        if what == "start" and each not in wants:
            wants[each] = Resources(gpus=count, gpu_share=share)
            await shards.start(each, wants[each])
        elif what == "end" and each in shards.has:
            await shards.end(each)
        elif what == "cancel" and each in wants:
            await shards.cancel(each)
        _check(shards, wants)
    while shards.has:  # everybody who waits gets a turn
        for each in list(shards.has):
            await shards.end(each)
        _check(shards, wants)
    assert all(task.done() for task in shards.tasks.values())
    assert shards.gpus.table == {}


def _check(shards: Shards, wants: dict[Execution, Resources]) -> None:
    users: dict[str, list[Execution]] = {}
    for each, uuids in shards.has.items():
        assert len(set(uuids)) == wants[each].gpus
        for uuid in uuids:
            users.setdefault(uuid, []).append(each)
    for by in users.values():
        assert len({(each.job, wants[each].gpu_share) for each in by}) == 1
        assert len(by) <= wants[by[0]].gpu_share
    assert {uuid: set(by) for uuid, by in shards.gpus.table.items()} == {uuid: set(by) for uuid, by in users.items()}


# --- plain processes, with simulated cards ---

SEEN = "import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'], os.getppid(), flush=True)\n"
WAITS = SEEN + "import pathlib, time\nwhile not pathlib.Path(END).exists(): time.sleep(0.01)\n"


async def test_simulated_cards_go_to_plain_processes_by_uuid_and_the_third_shard_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, "GPU-aaaa,GPU-bbbb")
    bench = ShardBench(ProcessExecutor(tmp_path / "executor", slots=4), tmp_path)
    try:
        assert [each.uuid for each in (await bench.executor.probe()).gpus] == ["GPU-aaaa", "GPU-bbbb"]
        source = WAITS.replace("END", f"'{tmp_path}/end' + str(shard.index)")
        events: list[list[ExecutorEvent]] = [[], [], []]
        runs = [
            asyncio.create_task(bench.run(source, shard=number, resources=ONE, on_event=events[number].append))
            for number in range(3)
        ]
        await until(lambda: text_of(events[0]) and text_of(events[1]))
        assert ShardStarted() not in events[2]
        (tmp_path / "end1").touch()
        await until(lambda: text_of(events[2]))
        (tmp_path / "end0").touch()
        (tmp_path / "end2").touch()
        assert all(outcome.ok for outcome in await asyncio.gather(*runs))
        uuids, agents = zip(*(text_of(each).split() for each in events), strict=True)
        assert uuids == ("GPU-aaaa", "GPU-bbbb", "GPU-bbbb")
        assert len(set(agents)) == 3  # an interpreter for each
        assert value(await bench.run("import os\nos.environ['CUDA_VISIBLE_DEVICES']")) == ""
    finally:
        await bench.executor.close()


async def test_a_simulated_card_comes_back_from_a_shard_that_dies_is_cancelled_or_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, "GPU-aaaa")
    executor = ProcessExecutor(tmp_path / "executor", slots=2)
    bench = ShardBench(executor, tmp_path)
    try:
        await executor.probe()
        dead = await bench.run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", resources=ONE)
        assert failure(dead)[0] == "signal"
        agent_killed = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time\ntime.sleep(60)"
        assert failure(await bench.run(agent_killed, resources=ONE))[0]
        late = await bench.run("import time\ntime.sleep(60)", resources=ONE, timeout=0.2)
        assert failure(late)[0] == "timeout"
        events: list[ExecutorEvent] = []
        sleeps = "import time\nprint('here', flush=True)\ntime.sleep(60)"
        running = asyncio.create_task(bench.run(sleeps, resources=ONE, on_event=events.append))
        await until(lambda: text_of(events))
        waiting = asyncio.create_task(bench.run(SEEN, resources=ONE))
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (await waiting).ok
        assert executor._gpus.table == {}
    finally:
        await executor.close()


async def test_a_simulated_card_is_given_to_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "GPU-aaaa")
    executor = ProcessExecutor(tmp_path / "executor", slots=1)
    bench = ShardBench(executor, tmp_path)
    try:
        await executor.probe()
        task = bench.task("", resources=ONE, env={"CUDA_VISIBLE_DEVICES": "all"})
        spec = msgspec.structs.replace(task.spec, task=Command(shell="echo $CUDA_VISIBLE_DEVICES"))
        outcome = await executor.run(msgspec.structs.replace(task, spec=spec, bundle=None), lambda _: None)
        assert outcome.stdout == b"GPU-aaaa\n"
    finally:
        await executor.close()
