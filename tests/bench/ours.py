"""Jobs of this project, as a program submits them."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import bacalhau_jupyter as bj
from bacalhau_node.node import open_node

WARM_SECONDS = 2.0
"""Spares are started after the first job; by then they are up, also on a slow machine."""


def executor_name() -> str:
    """What runs shards in this environment: "docker", or what there is without a daemon."""

    async def ask() -> str:
        with tempfile.TemporaryDirectory() as folder:
            node = await open_node(Path(folder))
            try:
                return node.facilities.capabilities.executor
            finally:
                await node.close()

    return asyncio.run(ask())


def run_job(source: str, **options: Any) -> Any:
    """Submit, wait for the end, and return the job; raises what the job raises."""
    job = bj.submit(source, **options)
    job.wait()
    return job


def warm(source: str = "1 + 1") -> None:
    """Start the node and let it get its spares ready, as it is after a user's first cell."""
    run_job(source)
    time.sleep(WARM_SECONDS)
