"""What is told to the allocator of this process, and what that costs."""

from __future__ import annotations

import tracemalloc

from bacalhau_node.content.heap import keep_memory


def test_the_allocator_is_told_once_for_a_process() -> None:
    """Every further time would leave 16 MiB behind with the thread that does it."""
    keep_memory()
    tracemalloc.start()
    try:
        keep_memory()
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()
