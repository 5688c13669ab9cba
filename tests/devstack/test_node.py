"""A whole node with plain processes: from a spec to kept results, and what is left when things go wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from bacalhau_node.client import LocalClient, ShardText
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.executors.gpus import Gpus
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.ids import Execution
from bacalhau_node.node import open_node
from bacalhau_node.protocol.events import JobChanged, ShardChanged
from bacalhau_node.spec import InputSource, JobSpec, PythonCell, Resources, Sharding
from bacalhau_node.testing.builders import a_job_id
from tests.simulated_gpus import simulate

SUM = "sum(int(line) for path in inputs for line in path.read_text().split())"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[LocalClient]:
    client = await _open(tmp_path / "data")
    yield client
    await client.close()


async def _open(root: Path) -> LocalClient:
    return LocalClient(await open_node(root, executors=[ProcessExecutor(root / "process", slots=2)]))


async def _spec(client: LocalClient, source: str, folder: Path | None = None, **fields: object) -> JobSpec:
    bundle = await client.put_bundle({"cell.py": source.encode()})
    inputs = (InputSource(source=str(folder)),) if folder else ()
    return JobSpec(task=PythonCell(bundle=bundle), inputs=inputs, **fields)


async def _finished(client: LocalClient, job: str) -> list[object]:
    async with asyncio.timeout(60):
        return [update async for update in client.updates(job)]


def _numbers(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"{number}\n{number * 10}\n")
    return folder


async def test_values_and_text_of_every_shard_come_back_in_one_job(client: LocalClient, tmp_path: Path) -> None:
    spec = await _spec(client, f"print('here', shard.index)\n{SUM}", _numbers(tmp_path / "in"), sharding=Sharding(n=3))
    submission = await client.submit(spec)
    updates = await _finished(client, submission.job)
    view = await client.job(submission.job)
    assert view.state == "Completed"
    assert [shard.outcome.value.blob.inline for shard in view.shards if shard.outcome] == [b"11", b"55", b"99"]
    assert [shard.inputs for shard in view.shards] == [("0.txt", "1.txt"), ("2.txt", "3.txt"), ("4.txt", "5.txt")]
    texts = sorted(update.text for update in updates if isinstance(update, ShardText))
    assert texts == ["here 0\n", "here 1\n", "here 2\n"]
    last = updates[-1]
    assert isinstance(last, JobChanged)
    assert last.cid == view.cid != ""


async def test_a_failing_shard_leaves_the_others_kept(client: LocalClient, tmp_path: Path) -> None:
    source = "assert shard.index != 2, 'not this one'\nshard.index"
    spec = await _spec(client, source, _numbers(tmp_path / "in"), sharding=Sharding(n=6))
    submission = await client.submit(spec)
    await _finished(client, submission.job)
    view = await client.job(submission.job)
    assert view.state == "Failed"
    assert [shard.state for shard in view.shards] == ["kept", "kept", "failed", "kept", "kept", "kept"]
    outcome = view.shards[2].outcome
    assert outcome is not None
    assert outcome.error is not None
    assert (outcome.error.name, outcome.error.message) == ("AssertionError", "not this one")
    assert outcome.error.frames[-1].line == 1
    assert view.cid


async def test_cancel_keeps_what_is_finished_and_stops_the_rest(client: LocalClient) -> None:
    source = "import time\nif shard.index: time.sleep(600)\n'done'"
    submission = await client.submit(await _spec(client, source, sharding=Sharding(n=4)))
    async with asyncio.timeout(60):
        async for update in client.updates(submission.job):
            if isinstance(update, ShardChanged) and update.state == "kept":
                await client.cancel(submission.job)
    view = await client.job(submission.job)
    assert view.state == "Stopped"
    assert [shard.state for shard in view.shards] == ["kept", "stopped", "stopped", "stopped"]


async def test_a_file_that_changes_while_the_job_runs_fails_its_shard(client: LocalClient, tmp_path: Path) -> None:
    folder = _numbers(tmp_path / "in", 2)
    source = "print('ready', flush=True)\nwhile not (inputs[0].parent.parent / 'go').exists(): pass\n1"
    submission = await client.submit(await _spec(client, source, folder, sharding=Sharding(n=1)))
    async with asyncio.timeout(60):
        async for update in client.updates(submission.job):
            if isinstance(update, ShardText):
                (folder / "1.txt").write_text("something else")
                (tmp_path / "go").touch()
    view = await client.job(submission.job)
    outcome = view.shards[0].outcome
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.kind == "input"
    assert "1.txt" in outcome.error.message
    assert "changed" in outcome.error.message


async def test_an_input_without_files_never_becomes_a_job(client: LocalClient, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match="no files"):
        await client.submit(await _spec(client, SUM, tmp_path / "empty"))
    with pytest.raises((SpecError, ContentError), match="nowhere"):
        await client.submit(await _spec(client, SUM, tmp_path / "nowhere"))
    assert await client.jobs() == []


async def test_content_named_by_its_cid_is_an_input(client: LocalClient, tmp_path: Path) -> None:
    folder = _numbers(tmp_path / "in")
    spec = await _spec(client, SUM, folder, sharding=Sharding(n=2), pin=True)
    submission = await client.submit(spec)
    await _finished(client, submission.job)
    view = await client.job(submission.job)
    pinned = view.spec.inputs[0].source
    assert pinned.startswith("ipfs://")
    for path in folder.iterdir():
        path.unlink()
    inputs = (InputSource(source=pinned),)
    again = await client.submit(structs.replace(await _spec(client, SUM, sharding=Sharding(n=2)), inputs=inputs))
    await _finished(client, again.job)
    assert (await client.job(again.job)).cid != ""
    assert [_answer(shard.outcome) for shard in (await client.job(again.job)).shards] == [
        _answer(shard.outcome) for shard in view.shards
    ]


def _answer(outcome: object) -> str:
    return outcome.answer  # type: ignore[attr-defined, no-any-return]


async def test_two_nodes_share_one_data_folder(tmp_path: Path) -> None:
    first, second = await _open(tmp_path / "data"), await _open(tmp_path / "data")
    try:
        jobs = [await client.submit(await _spec(client, "6 * 7")) for client in (first, second)]
        assert jobs[0].node != jobs[1].node
        for client, submission in zip((first, second), jobs, strict=True):
            await _finished(client, submission.job)
            assert (await client.job(submission.job)).state == "Completed"
    finally:
        await first.close()
        await second.close()


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from bacalhau_node.client import LocalClient, ShardChanged
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.node import open_node
from bacalhau_node.spec import JobSpec, PythonCell, Sharding

async def main():
    root = Path({root!r})
    client = LocalClient(await open_node(root, executors=[ProcessExecutor(root / "process", slots=2)]))
    source = b"import time\\nif shard.index: time.sleep(600)\\n'kept'"
    bundle = await client.put_bundle({{"cell.py": source}})
    submission = await client.submit(JobSpec(task=PythonCell(bundle=bundle), sharding=Sharding(n=3)))
    async for update in client.updates(submission.job):
        if isinstance(update, ShardChanged) and update.state == "kept":
            print(submission.job, submission.node, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_killed_node_comes_back_with_what_was_kept_and_resumes_nothing(tmp_path: Path) -> None:
    script = KILLED.format(root=str(tmp_path / "data"), tests=str(Path(__file__).parent))
    died = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    job, node = died.stdout.split()
    client = await _open(tmp_path / "data")
    try:
        assert (await client.nodes())[0].node == node
        assert client.interrupted == (job,)
        await _finished(client, job)
        view = await client.job(job)
        assert view.state == "Stopped"
        assert [shard.state for shard in view.shards] == ["kept", "stopped", "stopped"]
        assert view.shards[0].outcome is not None
        assert view.shards[0].outcome.value.blob.inline == b'"kept"'
        assert view.cid
    finally:
        await client.close()


async def test_closing_a_node_ends_every_process_it_started(tmp_path: Path) -> None:
    client = await _open(tmp_path / "data")
    submission = await client.submit(await _spec(client, "import os\nprint(os.getpid(), flush=True)\nwhile True: pass"))
    pids: list[int] = []
    async with asyncio.timeout(60):
        async for update in client.updates(submission.job):
            if isinstance(update, ShardText):
                pids.append(int(update.text))
                break
    await client.close()
    assert pids
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


async def test_a_job_is_found_by_the_start_of_its_id(client: LocalClient) -> None:
    submission = await client.submit(await _spec(client, "1"))
    assert await client.find(submission.job[:10]) == submission.job
    assert await client.find(submission.job[2:10]) == submission.job
    with pytest.raises(SpecError, match="no job"):
        await client.find("ffffffff-0")


async def test_a_job_with_more_shards_than_simulated_gpus_says_so_queues_them_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, "GPU-aaaa,GPU-bbbb")
    root = tmp_path / "data"
    client = LocalClient(await open_node(root, executors=[ProcessExecutor(root / "process", slots=4)]))
    try:
        (seen,) = await client.nodes()
        assert seen.executor is not None
        assert [card.uuid for card in seen.executor.gpus] == ["GPU-aaaa", "GPU-bbbb"]
        source = f"import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'])\n{SUM}"
        spec = await _spec(
            client, source, _numbers(tmp_path / "in"), sharding=Sharding(n=6), resources=Resources(gpus=1)
        )
        note = "2 GPUs: 2 of 6 shards at once, the others queue"
        assert note in (await client.plan(spec)).notes
        submission = await client.submit(spec)
        assert note in submission.notes
        updates = await _finished(client, submission.job)
        assert (await client.job(submission.job)).state == "Completed"
        texts = [update.text.strip() for update in updates if isinstance(update, ShardText)]
        assert len(texts) == 6
        assert set(texts) == {"GPU-aaaa", "GPU-bbbb"}
        few = structs.replace(spec, resources=Resources(gpus=3))
        refused = await client.submit(few)
        assert not any("at once" in note for note in refused.notes)
        await _finished(client, refused.job)
        assert "--gpu 3: this node has 2 GPUs: Simulated GPU" in (await client.job(refused.job)).reason
    finally:
        await client.close()


async def test_the_simulated_gpu_of_a_node_that_is_killed_is_free_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, "GPU-aaaa")
    held = "import asyncio, sys\nfrom pathlib import Path\nfrom bacalhau_node.executors.gpus import Gpus\n"
    held += "from bacalhau_node.ids import Execution\nfrom bacalhau_node.ports import Gpu\n"
    held += "from bacalhau_node.spec import Resources\nasync def main():\n"
    held += "    gpus = Gpus(Path(sys.argv[1]), find=lambda: ((Gpu(uuid='GPU-aaaa', name='', memory=1),), ''))\n"
    held += "    await gpus.look()\n    async with gpus.hold(Execution('j', 0, 1), Resources(gpus=1)):\n"
    held += "        print('held', flush=True)\n        await asyncio.sleep(600)\nasyncio.run(main())\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", held, str(tmp_path / "gpus")]
    other = await asyncio.create_subprocess_exec(*command, env=environment, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert await other.stdout.readline() == b"held\n"
    gpus = Gpus(tmp_path / "gpus")
    await gpus.look()
    waiting = asyncio.create_task(_held_once(gpus))
    done, _ = await asyncio.wait({waiting}, timeout=0.1)
    assert not done
    other.kill()
    await other.wait()
    assert await asyncio.wait_for(waiting, 60) == "GPU-aaaa"


async def _held_once(gpus: Gpus) -> str:
    async with gpus.hold(Execution(a_job_id(1), 0, 1), Resources(gpus=1)) as (card,):
        return card.uuid
