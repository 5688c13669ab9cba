"""GPUs of the Docker executor, simulated: what the daemon is asked for, and who gets which card.

A simulated driver lists the cards; where the NVIDIA Container Toolkit is needed, a private daemon has
a hook in its place that notes what it was called for. No CUDA program runs here; see `tests/gpu/run.sh`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import docker
import msgspec
import pytest

from bacalhau_node.executors.containers import Label
from bacalhau_node.executors.docker import DockerExecutor
from bacalhau_node.ids import Execution
from bacalhau_node.ports import ExecutorEvent, RawOutcome
from bacalhau_node.spec import Command, JobSpec, Resources
from bacalhau_node.testing.executor_suite import ShardBench, failure, job_number, text_of, until, value
from tests.images import python_image, shell_image
from tests.services import private_docker
from tests.simulated_gpus import device_files as device_files
from tests.simulated_gpus import simulate

pytestmark = pytest.mark.docker

ONE = Resources(gpus=1)
NODE = "n-docker-gpus"

_HOOK = """#!/bin/sh
PATH=/usr/local/bin:/usr/bin:/bin
state=$(cat)
bundle=$(printf %s "$state" | sed 's/.*"bundle":"\\([^"]*\\)".*/\\1/')
cp "$bundle/config.json" "{folder}/$(basename "$bundle").json"
"""
"""What docker calls before a container starts, with its state; the bundle has all that it was asked for."""


class Bench(ShardBench):
    """A bench that runs commands too."""

    async def command(self, shell: str, number: int, events: list[ExecutorEvent], **spec: Any) -> RawOutcome:
        task = self.task("", job=1, **spec)
        task = msgspec.structs.replace(
            task,
            execution=Execution(job_number(1), number, 1),
            spec=msgspec.structs.replace(task.spec, task=Command(shell=shell)),
            bundle=None,
        )
        return await self.executor.run(task, events.append)


@contextlib.asynccontextmanager
async def opened(folder: Path, host: str, monkeypatch: pytest.MonkeyPatch, cards: str) -> AsyncIterator[Bench]:
    simulate(monkeypatch, cards)
    monkeypatch.setenv("DOCKER_HOST", host)
    (folder / "nodes" / NODE).mkdir(parents=True)
    executor = DockerExecutor(folder / "nodes" / NODE, node=NODE, slots=4)
    told = await executor.probe()
    assert told.problem is None
    assert [card.uuid for card in told.gpus] == cards.split(",")
    try:
        yield Bench(executor, folder)
        assert executor._gpus.table == {}
    finally:
        await executor.close()


# --- a daemon without the toolkit ---


async def test_an_image_gets_no_simulated_card_from_a_daemon_that_has_no_runtime_for_it(
    tmp_path: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, docker_host, monkeypatch, "GPU-aaaa") as bench:
        image = shell_image(docker_host)
        refusal = bench.executor.check(JobSpec(task=Command(shell="true"), image=image, resources=ONE))
        assert "install the NVIDIA Container Toolkit" in str(refusal)
        kind, message = failure(await bench.command("true", 0, [], image=image, resources=ONE))
        assert (kind, message) == ("environment", refusal)


async def test_the_notebooks_own_python_gets_its_simulated_card_without_a_runtime_and_an_interpreter_for_each_shard(
    tmp_path: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch, device_files: list[str]
) -> None:
    cards = {"GPU-aaaa": device_files[0], "GPU-bbbb": device_files[1]}
    async with opened(tmp_path, docker_host, monkeypatch, ",".join(cards)) as bench:
        files = "[name for name in os.listdir('/dev') if name.startswith('nvidia')]"
        source = f"import os, socket\n[os.environ['CUDA_VISIBLE_DEVICES'], socket.gethostname(), {files}]"
        assert bench.executor.check(bench.task(source, resources=ONE).spec) is None
        runs = [bench.run(source, shard=number, resources=ONE) for number in range(3)]
        seen = [value(outcome) for outcome in await asyncio.gather(*runs)]
        assert {uuid for uuid, _, _ in seen} == cards.keys()
        assert len({box for _, box, _ in seen}) == 3
        assert all(files == [cards[uuid]] for uuid, _, files in seen)
        both = await bench.run(source, shard=3, resources=Resources(gpus=2))
        assert value(both)[0] == "GPU-aaaa,GPU-bbbb"


async def test_what_a_dead_node_left_is_removed_before_a_node_gives_a_simulated_card_away(
    tmp_path: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have a card."""
    folder = tmp_path / "nodes" / NODE
    own = {
        Label.PROJECT: "1",
        Label.NODE: NODE,
        Label.FOLDER: str(folder),
        Label.LIFE: "earlier",
        Label.GPUS: "GPU-aaaa",
    }
    labels = {label.value: text for label, text in own.items()}
    api = docker.APIClient(base_url=docker_host)
    try:

        def leave() -> str:
            left = api.create_container(shell_image(docker_host), command=["sleep", "600"], labels=labels)["Id"]
            api.start(left)
            return str(left)

        left = leave()
        async with opened(tmp_path, docker_host, monkeypatch, "GPU-aaaa") as bench:
            assert left not in [each["Id"] for each in api.containers(all=True)]
            left = leave()
            assert value(await bench.run("1", resources=ONE)) == 1
            assert left not in [each["Id"] for each in api.containers(all=True)]
    finally:
        api.close()


# --- a daemon with a simulated toolkit ---


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a private daemon with a simulated hook, and the folder of its notes."""
    dockerd = shutil.which("dockerd") or shutil.which("dockerd", path="/usr/sbin:/sbin")
    if dockerd is None or os.geteuid() != 0:
        pytest.skip("only root with dockerd can start a daemon with a hook of its own")
    folder = tmp_path_factory.mktemp("hook")
    hook = folder / "programs" / "nvidia-container-runtime-hook"
    hook.parent.mkdir()
    (folder / "notes").mkdir()
    hook.write_text(_HOOK.format(folder=folder / "notes"))
    hook.chmod(0o755)
    with private_docker(dockerd, programs=hook.parent) as host:
        yield host, folder / "notes"


def asked(notes: Path, since: float) -> list[tuple[str, str]]:
    """(cards, abilities) that the hook was called for since then, in their order."""
    found = sorted(
        (note for note in notes.iterdir() if note.stat().st_mtime >= since), key=lambda note: note.stat().st_mtime_ns
    )
    texts = [json.loads(note.read_text())["process"]["env"] for note in found]
    variables = [dict(word.partition("=")[::2] for word in words) for words in texts]
    return [(each["NVIDIA_VISIBLE_DEVICES"], each["NVIDIA_DRIVER_CAPABILITIES"]) for each in variables]


async def test_shards_in_images_that_run_at_once_are_given_different_simulated_cards_by_uuid(
    tmp_path: Path, hooked: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, notes = hooked
    async with opened(tmp_path, host, monkeypatch, "GPU-aaaa,GPU-bbbb") as bench:
        image = shell_image(host)
        assert bench.executor.check(JobSpec(task=Command(shell="true"), image=image, resources=ONE)) is None
        since = time.time()
        events: list[list[ExecutorEvent]] = [[], [], []]
        script = "echo $CUDA_VISIBLE_DEVICES; exec sleep 600"
        runs = [
            asyncio.create_task(bench.command(script, number, events[number], image=image, resources=ONE))
            for number in range(3)
        ]
        await until(lambda: sum(bool(text_of(each)) for each in events) == 2)
        at_work = [number for number in range(3) if text_of(events[number])]
        (waits,) = {0, 1, 2} - set(at_work)
        assert not events[waits]
        assert {text_of(events[number]).strip() for number in at_work} == {"GPU-aaaa", "GPU-bbbb"}
        runs[at_work[0]].cancel()
        await until(lambda: text_of(events[waits]))
        freed = text_of(events[at_work[0]]).strip()
        assert text_of(events[waits]).strip() == freed
        words = asked(notes, since)
        assert sorted(words[:2]) == [("GPU-aaaa", "compute,utility"), ("GPU-bbbb", "compute,utility")]
        assert words[2:] == [(freed, "compute,utility")]
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


async def test_a_cell_in_an_image_is_given_its_simulated_cards_by_uuid_and_one_without_any_is_given_none(
    tmp_path: Path, hooked: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, notes = hooked
    async with opened(tmp_path, host, monkeypatch, "GPU-aaaa,GPU-bbbb") as bench:
        image = python_image(host)
        since = time.time()
        source = "import os\nos.environ.get('NVIDIA_VISIBLE_DEVICES')"
        outcome = await bench.run(source, image=image, resources=Resources(gpus=2))
        assert value(outcome) == "GPU-aaaa,GPU-bbbb"
        assert asked(notes, since) == [("GPU-aaaa,GPU-bbbb", "compute,utility")]
        assert value(await bench.run(source, image=image, job=2)) == "void"
        assert len(asked(notes, since)) == 1
