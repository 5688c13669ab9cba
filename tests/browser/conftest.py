"""One JupyterLab and one browser for all tests of this suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import lab as labs


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Iterator[labs.Lab]:
    """A server and a browser."""
    with labs.running(tmp_path_factory.mktemp("lab"), chromium) as one:
        yield one
