"""The executor contract over plain processes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.testing.executor_suite import ExecutorContract, ShardBench, processes_with


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[ShardBench]:
    executor = ProcessExecutor(tmp_path / "executor", slots=2)
    yield ShardBench(executor, tmp_path)
    await executor.close()
    assert list((tmp_path / "executor").iterdir()) == []
    assert [pid for pid in processes_with("executors/agent.py") if _parent(pid) == os.getpid()] == []


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class TestProcessExecutor(ExecutorContract):
    """Every rule."""
