"""Cells that this machine's Python can't serve run in the base image, where there is one."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from bacalhau_node.client import JobView, LocalClient
from bacalhau_node.executors.docker import DockerExecutor
from bacalhau_node.node import open_node
from bacalhau_node.spec import Command, JobSpec, PythonCell
from tests.images import base_image
from tests.wheels import wheel

pytestmark = pytest.mark.docker

Open = Callable[[], Awaitable[LocalClient]]


@pytest.fixture
async def opened(tmp_path: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    """Opens a node, once the test has set its environment."""
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    monkeypatch.setenv("BACALHAU_IMAGE", base_image(docker_host))
    clients = []

    async def open_client() -> LocalClient:
        executor = DockerExecutor(tmp_path / "data" / "docker", node="n-base", slots=1)
        clients.append(LocalClient(await open_node(tmp_path / "data", executors=[executor])))
        return clients[-1]

    yield open_client
    for client in clients:
        await client.close()


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's Python can't be shown to containers: it would show the user's home."""
    monkeypatch.setenv("HOME", f"{sys.prefix}/home")


async def _ran(client: LocalClient, source: str, **cell: object) -> JobView:
    bundle = await client.put_bundle({"cell.py": source.encode()})
    return await _done(client, JobSpec(task=PythonCell(bundle=bundle, **cell)))


async def _done(client: LocalClient, spec: JobSpec) -> JobView:
    submission = await client.submit(spec)
    async for _ in client.updates(submission.job):
        pass
    return await client.job(submission.job)


def _value(view: JobView) -> bytes | None:
    outcome = view.shards[0].outcome
    assert outcome is not None, view.reason
    assert outcome.ok, outcome.error
    return outcome.value.blob.inline


SEES = "import importlib.util\n[importlib.util.find_spec(name) is not None for name in ('onlyhere', 'msgspec')]"


async def test_a_cell_that_needs_other_versions_runs_in_the_base_image(opened: Open) -> None:
    client = await opened()
    assert _value(await _ran(client, SEES, versions={"onlyhere": "1.0.9"})) == b"[true, false]"


async def test_any_other_cell_runs_with_this_machines_python(opened: Open) -> None:
    client = await opened()
    assert _value(await _ran(client, SEES)) == b"[false, true]"


async def test_what_neither_has_is_refused_with_what_each_has(opened: Open) -> None:
    client = await opened()
    view = await _ran(client, SEES, versions={"onlyhere": "2.0", "msgspec": "0.1"})
    assert view.state == "Failed"
    assert "needs msgspec 0.1 and onlyhere 2.0" in view.reason or "needs onlyhere 2.0 and msgspec 0.1" in view.reason
    assert "this node has no onlyhere and msgspec" in view.reason
    assert "base:" in view.reason
    assert "has onlyhere 1.0 and no msgspec" in view.reason


@pytest.mark.usefixtures("hidden")
async def test_everything_runs_in_the_base_image_where_this_python_must_not_be_shown(opened: Open) -> None:
    client = await opened()
    assert _value(await _ran(client, SEES)) == b"[true, false]"
    nodes = await client.nodes()
    assert nodes[0].executor is not None
    assert nodes[0].executor.versions == {"onlyhere": "1.0"}
    view = await _done(client, JobSpec(task=Command(shell="test -x /usr/local/bin/python3")))
    assert view.state == "Completed"


@pytest.mark.usefixtures("hidden")
async def test_packages_are_installed_for_the_python_of_the_image(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    wheel(tmp_path, "alpha", "1.0", requires=("onlyhere>=1",))
    wheel(tmp_path, "onlyhere", "1.0")
    wheel(tmp_path, "onlyhere", "2.0")
    client = await opened()
    assert _value(await _ran(client, "import alpha\nalpha.VERSION", requires=("alpha",))) == b'"1.0"'
    notes = (await client.plan(JobSpec(task=PythonCell(bundle="b", requires=("alpha",))))).notes
    assert notes[0].startswith("environment: docker, the base image's Python 3.")
    assert notes[1].endswith("ready: alpha==1.0")


@pytest.mark.usefixtures("hidden")
async def test_without_one_the_way_to_have_one_is_told(
    tmp_path: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    monkeypatch.delenv("BACALHAU_IMAGE", raising=False)
    executor = DockerExecutor(tmp_path / "docker", node="n-base", slots=1)
    problem = (await executor.probe()).problem
    await executor.close()
    assert problem is not None
    assert "use a virtual environment" in problem
    assert "docker build -t bacalhau-jupyter/base:3." in problem


@pytest.mark.slow
@pytest.mark.usefixtures("hidden")
async def test_the_image_of_the_dockerfile_runs_cells_on_frames(
    debian_base: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built from a Debian root; the notebook's own Python can't be shown, so everything runs in it."""
    monkeypatch.setenv("BACALHAU_IMAGE", debian_base)
    client = await opened()
    source = (
        "import pandas as pd, sys\npd.DataFrame({'python': [sys.executable], 'home': [sys.prefix]}).to_dict('list')"
    )
    view = await _ran(client, source, imports=("pandas",), python="3.11")
    assert _value(view) == b'{"python": ["/usr/bin/python3"], "home": ["/usr"]}'
    frame = await _ran(client, "import pandas as pd\npd.DataFrame({'x': [1, 2]})", imports=("pandas",), python="3.11")
    assert frame.shards[0].outcome is not None
    assert frame.shards[0].outcome.value.kind == "arrow"
    other = await _ran(client, "1", python="3.12")
    assert "needs Python 3.12" in other.reason
