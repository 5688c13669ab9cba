"""Jobs of this project, as a program submits them."""

from __future__ import annotations

import time
from typing import Any

import bacalhau_jupyter as bj

WARM_SECONDS = 2.0
"""Spares are started after the first job; by then they are up, also on a slow machine."""


def run_job(source: str, **options: Any) -> Any:
    """Submit, wait for the end, and return the job; raises what the job raises."""
    job = bj.submit(source, **options)
    job.wait()
    return job


def warm(source: str = "1 + 1") -> None:
    """Start the node and let it get its spares ready, as it is after a user's first cell."""
    run_job(source)
    time.sleep(WARM_SECONDS)
