"""A cell that needs packages, through a whole node, with every executor."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau_node.client import JobView, LocalClient
from bacalhau_node.executors.docker import DockerExecutor
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.executors.sandbox import SandboxExecutor
from bacalhau_node.node import open_node
from bacalhau_node.ports import Executor
from bacalhau_node.spec import JobSpec, PythonCell, Sharding
from tests.images import python_image
from tests.wheels import wheel


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is the whole package index, told as pip is told."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    wheel(shelf, "alpha", "1.0", requires=("beta>=1",))
    wheel(shelf, "beta", "2.0")
    return shelf


BOXES = [
    pytest.param("sandbox", marks=pytest.mark.sandbox),
    pytest.param("docker", marks=pytest.mark.docker),
]


@pytest.fixture(params=["process", *BOXES])
async def client(
    request: pytest.FixtureRequest, tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[LocalClient]:
    root = tmp_path / "data"
    if request.param == "docker":
        monkeypatch.setenv("DOCKER_HOST", request.getfixturevalue("docker_host"))
        executor: Executor = DockerExecutor(root / "docker", node="n-packages", slots=2)
    elif request.param == "sandbox":
        executor = SandboxExecutor(root / "sandbox", slots=2)
    else:
        executor = ProcessExecutor(root / "process", slots=2)
    client = LocalClient(await open_node(root, executors=[executor]))
    yield client
    await client.close()


async def _ran(client: LocalClient, source: str, *requires: str, image: str | None = None, shards: int = 1) -> JobView:
    bundle = await client.put_bundle({"cell.py": source.encode()})
    spec = JobSpec(task=PythonCell(bundle=bundle, requires=requires), sharding=Sharding(n=shards), image=image)
    submission = await client.submit(spec)
    async for _ in client.updates(submission.job):
        pass
    return await client.job(submission.job)


def _value(view: JobView) -> bytes | None:
    outcome = view.shards[0].outcome
    assert outcome is not None
    assert outcome.ok, outcome.error
    return outcome.value.blob.inline


def _error(view: JobView) -> tuple[str, str]:
    outcome = view.shards[0].outcome
    assert outcome is not None
    assert outcome.error is not None
    return outcome.error.kind, outcome.error.message


async def test_every_shard_finds_what_the_cell_requires(client: LocalClient) -> None:
    view = await _ran(client, "import alpha, beta\nf'{alpha.VERSION} {beta.VERSION}'", "alpha", shards=4)
    assert view.state == "Completed"
    assert _value(view) == b'"1.0 2.0"'


async def test_the_next_job_finds_it_installed(client: LocalClient, shelf: Path) -> None:
    await _ran(client, "1", "alpha")
    shutil.rmtree(shelf)
    assert _value(await _ran(client, "import alpha\nalpha.VERSION", "alpha")) == b'"1.0"'


async def test_programs_that_a_cell_starts_find_it_too(client: LocalClient) -> None:
    source = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import alpha; print(alpha.VERSION)'], "
        "check=True, capture_output=True, text=True).stdout.strip()"
    )
    assert _value(await _ran(client, source, "alpha")) == b'"1.0"'


async def test_a_job_without_requirements_does_not_see_those_of_another(client: LocalClient) -> None:
    await _ran(client, "1", "alpha")
    view = await _ran(client, "import importlib.util\nimportlib.util.find_spec('alpha') is None")
    assert _value(view) == b"true"


async def test_what_a_layer_brings_is_not_what_was_loaded_before(client: LocalClient, shelf: Path) -> None:
    wheel(shelf, "polars", "0.0")
    source = "import polars\npolars.VERSION"
    bundle = await client.put_bundle({"cell.py": source.encode()})
    spec = JobSpec(task=PythonCell(bundle=bundle, imports=("polars",), requires=("polars",)))
    submission = await client.submit(spec)
    async for _ in client.updates(submission.job):
        pass
    assert _value(await client.job(submission.job)) == b'"0.0"'


@pytest.mark.parametrize("client", BOXES, indirect=True)
async def test_no_shard_can_change_what_others_will_import(client: LocalClient) -> None:
    source = """\
import alpha, os, pathlib
place, tried = pathlib.Path(alpha.__file__), []
for change in (lambda: place.write_text(""), place.unlink, (place.parent / "new.py").touch, lambda: place.chmod(0o777)):
    try:
        change()
    except OSError as error:
        tried.append(type(error).__name__)
len(tried)"""
    assert _value(await _ran(client, source, "alpha")) == b"4"


async def test_a_package_that_does_not_exist_fails_every_shard_alike(client: LocalClient) -> None:
    view = await _ran(client, "1", "nosuch", shards=3)
    assert view.state == "Failed"
    assert _error(view) == ("environment", "there is no package nosuch in the package index of this node")
    assert len({shard.outcome.error for shard in view.shards if shard.outcome}) == 1


async def test_what_the_environment_has_in_another_version_is_refused_before_anything_runs(
    client: LocalClient,
) -> None:
    view = await _ran(client, "1", "msgspec<0.1")
    assert view.state == "Failed"
    assert "requires msgspec<0.1, and its environment has msgspec" in view.reason


async def test_dry_runs_and_submissions_say_what_will_be_installed(client: LocalClient) -> None:
    bundle = await client.put_bundle({"cell.py": b"1"})
    spec = JobSpec(task=PythonCell(bundle=bundle, requires=("alpha",)))
    where, packages = (await client.plan(spec)).notes
    assert where.startswith("environment: ")
    assert "not here yet: alpha will be installed first" in packages
    submission = await client.submit(spec)
    assert any(note.startswith("installing alpha before the first shard") for note in submission.notes)
    async for _ in client.updates(submission.job):
        pass
    assert (await client.plan(spec)).notes[1].endswith("ready: alpha==1.0, beta==2.0")
    again = await client.submit(spec)
    assert not any(note.startswith("installing") for note in again.notes)
    async for _ in client.updates(again.job):
        pass


@pytest.mark.docker
@pytest.mark.parametrize("client", ["docker"], indirect=True)
async def test_packages_for_an_image_are_for_its_python(client: LocalClient, docker_host: str) -> None:
    image = python_image(docker_host)
    view = await _ran(client, "import alpha\nalpha.VERSION", "alpha", image=image, shards=2)
    assert view.state == "Completed"
    assert _value(view) == b'"1.0"'
    notes = (await client.plan(view.spec)).notes
    assert notes[0] == f"environment: docker, the image {image}"
    assert notes[1] == "packages: alpha, for the Python of the image"


async def test_a_package_of_the_real_index_is_installed(client: LocalClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    view = await _ran(client, "import tabulate\ntabulate.tabulate([[1, 2]], tablefmt='plain')", "tabulate>=0.9")
    outcome = view.shards[0].outcome
    if outcome and outcome.error and "can't be reached" in outcome.error.message:
        pytest.skip("the package index can't be reached")
    assert _value(view) == b'"1  2"'
