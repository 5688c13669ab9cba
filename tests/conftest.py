"""What every suite shares: an own data folder, gates for what a machine may lack, and an account of what was left out.

A suite is a folder below `tests/`. A test marked `docker`, `sandbox` or `browser` is left out where there is no
daemon, no bubblewrap that may make namespaces, or no Chromium, and the last lines of a run name each
suite that lost tests, and why. With `BACALHAU_REQUIRE_ALL=1` leaving a test out is a failure: that is
how CI runs.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import hypothesis
import pytest

from bacalhau_node.errors import BacalhauError
from bacalhau_node.executors.bubblewrap import find
from bacalhau_node.executors.workshop import shard_user
from tests.object_store import Bucket, ObjectStore, new_bucket, object_store
from tests.services import DEFAULT_HOST, find_docker

TESTS = Path(__file__).parent
REQUIRE_ALL = os.environ.get("BACALHAU_REQUIRE_ALL") == "1"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None, print_blob=True)
hypothesis.settings.register_profile("long", deadline=None, print_blob=True, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@cache
def docker_address() -> str | None:
    """The Docker daemon of this run, asked once."""
    return find_docker()


@cache
def sandbox_problem() -> str | None:
    """Why this machine makes no sandboxes, found by making one; asked once."""
    user = shard_user()
    try:
        find(f"{user.uid}:{user.gid}")
    except BacalhauError as error:
        return str(error)
    return None


@cache
def chromium_path() -> str | None:
    """The Chromium of this machine, under any of its names."""
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def _no_docker() -> str:
    asked = os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    return f"no Docker daemon answers at {asked} (as root, `make test` starts one)"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what this machine can't run."""
    if item.get_closest_marker("docker") and docker_address() is None:
        pytest.skip(_no_docker())
    if item.get_closest_marker("sandbox") and (problem := sandbox_problem()):
        pytest.skip(problem)
    if item.get_closest_marker("browser") and chromium_path() is None:
        pytest.skip("no Chromium on the path (as root, `make test` installs it)")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Browser tests come last, after any shuffle: Playwright's loop stays in this thread and lets no other start."""
    items.sort(key=lambda item: _suite(item.path) == "browser")


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests never touch the data, profile or settings of whoever runs them."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BACALHAU_DIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            folder = home / name.lower()
            folder.mkdir()
            patch.setenv(name, str(folder))
        for name in ("BACALHAU_JUPYTER_NODE", "BACALHAU_IPFS_CONNECT", "BACALHAU_IPFS_GATEWAYS"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def docker_host() -> str:
    """The address of a Docker daemon that answers; a test that asks for it is left out where there is none."""
    host = docker_address()
    if host is None:
        pytest.skip(_no_docker())
    return host


@pytest.fixture(scope="session")
def debian_base(docker_host: str) -> str:
    """The name of the real base image; a test that asks for it is left out where it can't be made."""
    from tests import debian_image  # noqa: PLC0415 - it needs the docker package

    if problem := debian_image.problem():
        pytest.skip(problem)
    return debian_image.debian_image(docker_host)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Chromium; a test that asks for it is left out where there is none."""
    path = chromium_path()
    if path is None:
        pytest.skip("no Chromium on the path (as root, `make test` installs it)")
    return path


@pytest.fixture(scope="session")
def s3_server() -> Iterator[ObjectStore]:
    """An S3 server, started when the first test asks for it."""
    with object_store() as store:
        yield store


@pytest.fixture
def bucket(s3_server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket of the S3 server, which the environment names and opens."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return new_bucket(s3_server)


# --- what was left out ---


def _suite(path: Path) -> str:
    below = path.relative_to(TESTS).parts if path.is_relative_to(TESTS) else path.parts
    return below[0] if len(below) > 1 else "tests"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure where everything has to run."""
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.longrepr = f"left out, and BACALHAU_REQUIRE_ALL=1 asks for every test: {_reason(report)}"
        report.outcome = "failed"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Watch the outcome of tests."""
    report = yield
    _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Watch whole modules that leave themselves out."""
    report = yield
    _refuse(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name each suite that was left out, how much of it, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    counts = Counter((_suite(terminalreporter.config.rootpath / one.fspath), _reason(one)) for one in skipped)
    if counts:
        terminalreporter.section("left out")
    for (suite, reason), count in sorted(counts.items()):
        terminalreporter.line(f"{suite}: {count} left out: {reason}")
