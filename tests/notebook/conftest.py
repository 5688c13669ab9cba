"""Kernels for tests: one that many tests share, and fresh ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.notebook.bad_input import Item
from tests.notebook.kernels import Kernel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An item of bad input is tried with the executors that can meet it; the other pairs are no tests."""
    items[:] = [one for one in items if _can_be_met(getattr(one, "callspec", None))]


def _can_be_met(pair: Any) -> bool:
    item = pair.params.get("item") if pair else None
    return not isinstance(item, Item) or pair.params["court"] in item.executors


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel with the extension loaded, shared by the tests of a module."""
    one = Kernel(tmp_path_factory.mktemp("notebook"))
    try:
        assert not one.run("%load_ext bacalhau_jupyter\nimport bacalhau_jupyter as bj").error
        yield one
    finally:
        one.close()


@pytest.fixture
def fresh(tmp_path) -> Iterator[Callable[..., Kernel]]:
    """Makes kernels that are this test's own."""
    made: list[Kernel] = []

    def make(**env: str) -> Kernel:
        made.append(Kernel(tmp_path, **env))
        return made[-1]

    yield make
    for one in made:
        one.close()
