"""Kernels for tests: one that many tests share, and fresh ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.notebook.kernels import Kernel


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
