"""Publishing on a whole node: what a restart does to it, and what a target that fails does to the job."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from bacalhau_node import publishers, retention
from bacalhau_node.client import JobView, LocalClient
from bacalhau_node.errors import ContentError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.node import open_node
from bacalhau_node.protocol.events import JobChanged
from bacalhau_node.publishers.filecoin import FilecoinPublisher
from bacalhau_node.spec import JobSpec, PythonCell


async def _open(root: Path) -> LocalClient:
    executor = ProcessExecutor(root / "process", slots=1)
    return LocalClient(await open_node(root, executors=[executor], serving="127.0.0.1:1"))


async def _submitted(client: LocalClient) -> str:
    bundle = await client.put_bundle({"cell.py": b"(outputs / 'a').write_text('kept')\n1"})
    return (await client.submit(JobSpec(task=PythonCell(bundle=bundle), publish="filecoin"))).job


async def _ended(client: LocalClient, job: str) -> JobView:
    async with asyncio.timeout(60):
        async for _ in client.updates(job):
            pass
    return await client.job(job)


def _pieces(root: Path) -> list[Path]:
    return sorted((root / "store/pieces").iterdir(), key=lambda path: path.suffix)


async def test_a_node_that_stops_while_it_publishes_publishes_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_args: object) -> tuple[str, ...]:
        await asyncio.Event().wait()
        return ()

    client = await _open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(FilecoinPublisher, "publish", never)
        job = await _submitted(client)
        async with asyncio.timeout(60):
            async for update in client.updates(job):
                if isinstance(update, JobChanged) and update.reason == "publishing to filecoin":
                    break
        await client.close()
    again = await _open(tmp_path)
    view = await _ended(again, job)
    assert (view.state, view.reason) == ("Completed", "")
    assert view.published[0].startswith("piece bafkzcib")
    await again.close()
    third = await _open(tmp_path)
    assert (await third.job(job)).published == view.published
    piece, manifest = _pieces(tmp_path)
    assert {view.published[0].removeprefix("piece "), Path(view.published[1]).stem} == {piece.stem, manifest.stem}
    later = time.time() + retention.KEPT_SECONDS + 60
    await third.node.tidy_pieces(later)
    assert _pieces(tmp_path) == [piece, manifest]  # the job is remembered
    await third.node.forget_old_jobs(later)
    assert _pieces(tmp_path) == []
    await third.close()


async def test_a_target_that_fails_costs_the_job_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_args: object) -> tuple[str, ...]:
        raise ContentError("no room for the piece")

    monkeypatch.setattr(publishers, "PAUSES", (0.0,))
    monkeypatch.setattr(FilecoinPublisher, "publish", fails)
    client = await _open(tmp_path)
    view = await _ended(client, await _submitted(client))
    assert (view.state, view.published) == ("Completed", ())
    assert view.reason == "kept in the store, but not published to filecoin: no room for the piece"
    assert b"".join([part async for part in client.cat(view.cid, "a")]) == b"kept"
    await client.close()
