"""The executor contract over plain processes."""

from __future__ import annotations

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
    assert _children() & set(processes_with("executors/agent/")) == set()


def _children() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


class TestProcessExecutor(ExecutorContract):
    """Every rule."""
