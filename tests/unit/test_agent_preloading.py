"""What a cell imports is imported once a slot, not once a shard."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bacalhau_node.executors.plain import SocketPipe
from bacalhau_node.executors.slot import AgentJob, AgentSetup, AgentSlot
from tests.unit.test_agent_process import outcome_of, started


@pytest.mark.parametrize("module", ["numpy", "pandas", "pyarrow"])
async def test_a_shard_finds_the_cells_modules_loaded(module: str, tmp_path: Path) -> None:
    """Also where a library starts a thread of its own, as pyarrow's allocator does: that would forbid the fork."""
    (tmp_path / "cell.py").write_text(f"import sys\nfound = {module!r} in sys.modules\nimport {module}\nfound")
    with started(sys.executable, "-s", "-u") as (_, ours):
        slot = AgentSlot(await SocketPipe.over(ours), AgentSetup(oom=()))
        slot.bind(AgentJob(bundle=str(tmp_path), imports=(module,)))
        outcome = await outcome_of(slot, tmp_path, "0#1", [])
        await slot.close()
    assert outcome.ok, outcome
    assert isinstance(outcome.value.data, bytes)
    assert json.loads(outcome.value.data) is True
