"""The agent's files: what to start, and a copy of them that any user may read."""

from __future__ import annotations

import compileall
import shutil
from pathlib import Path
from typing import Final

AGENT: Final = Path(__file__).with_name("agent")
"""The agent's folder: standard library only, so it runs wherever there is a Python."""
AGENT_FILE: Final = AGENT / "__main__.py"
"""What to start."""


def copy_agent(folder: Path) -> Path:
    """Copy the agent's folder into `folder`; returns the copy, to be bound into a container.

    It is compiled here, because a shard's user can't write there: each agent would compile itself
    again, which takes longer than all the rest of its start.
    """
    compileall.compile_dir(AGENT, quiet=2)  # once for all nodes to come, where we may write
    copy = folder / AGENT.name
    shutil.copytree(AGENT, copy, ignore=shutil.ignore_patterns("*.pyc.*"))  # those are still being written
    compileall.compile_dir(copy, quiet=2)  # takes what is there already by the times of the files, which were copied
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy
