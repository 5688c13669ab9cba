"""The executor contract over Docker containers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import docker
import pytest

from bacalhau_node.executors.containers import Label
from bacalhau_node.executors.docker import DockerExecutor
from bacalhau_node.testing.executor_suite import ExecutorContract, ShardBench

pytestmark = pytest.mark.docker


@pytest.fixture
async def bench(tmp_path: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ShardBench]:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    executor = DockerExecutor(tmp_path / "node", node="n-contract", slots=2)
    assert (await executor.probe()).problem is None
    yield ShardBench(executor, tmp_path)
    await executor.close()
    assert [path.name for path in (tmp_path / "node").iterdir()] == ["docker-works"]
    client = docker.APIClient(base_url=docker_host)
    left = client.containers(all=True, filters={"label": f"{Label.FOLDER}={tmp_path / 'node'}"})
    client.close()
    assert left == []


class TestDockerExecutor(ExecutorContract):
    """Every rule."""
