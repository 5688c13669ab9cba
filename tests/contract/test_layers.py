"""Layers made by the real uv from wheels of this test, and once from the package index."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bacalhau_node.errors import SpecError
from bacalhau_node.executors.fit import own_target
from bacalhau_node.layers.store import Layer, Layers, key
from bacalhau_node.ports import Target
from tests.wheels import wheel


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is the whole package index."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    wheel(shelf, "alpha", "1.0", requires=("beta>=1",))
    wheel(shelf, "beta", "1.0")
    wheel(shelf, "beta", "2.0")
    return shelf


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path / "layers")


TARGET = own_target({})


def installed(layer: Layer, statement: str) -> str:
    """What a new Python prints that has the layer on its path."""
    environment = {**os.environ, "PYTHONPATH": str(layer.path)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", statement], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.usefixtures("shelf")
async def test_packages_come_with_what_they_need(layers: Layers) -> None:
    layer = await layers.open(("alpha",), TARGET)
    assert layer.packages == ("alpha==1.0", "beta==2.0")
    assert installed(layer, "import alpha, beta; print(alpha.VERSION, beta.VERSION)") == "1.0 2.0"
    layer.close()


@pytest.mark.usefixtures("shelf")
async def test_what_the_environment_has_is_neither_changed_nor_installed_again(layers: Layers) -> None:
    layer = await layers.open(("alpha",), own_target({"beta": "1.0"}))
    assert layer.packages == ("alpha==1.0",)
    layer.close()


async def test_a_second_time_nothing_is_installed(layers: Layers, shelf: Path) -> None:
    first = await layers.open(("alpha",), TARGET)
    shutil.rmtree(shelf)
    second = await layers.open(("alpha",), TARGET)
    assert (second.path, second.packages) == (first.path, first.packages)
    first.close()
    second.close()


@pytest.mark.usefixtures("shelf")
async def test_any_user_may_read_a_layer(layers: Layers) -> None:
    mask = os.umask(0o077)
    try:
        layer = await layers.open(("beta",), TARGET)
    finally:
        os.umask(mask)
    assert layer.path is not None
    for path in (layer.path, *layer.path.rglob("*")):
        assert path.stat().st_mode & 0o004, path
    layer.close()


async def test_a_failed_one_leaves_nothing_and_can_be_made_later(layers: Layers, shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no package gamma"):
        await layers.open(("gamma",), TARGET)
    assert list((tmp_path / "layers").iterdir()) == []
    wheel(shelf, "gamma", "1.0")
    layer = await layers.open(("gamma",), TARGET)
    assert layer.packages == ("gamma==1.0",)
    layer.close()


@pytest.mark.usefixtures("shelf")
async def test_a_clash_deep_down_names_both_sides(layers: Layers) -> None:
    with pytest.raises(SpecError, match=r"alpha.*beta"):
        await layers.open(("alpha",), own_target({"beta": "0.5"}))


async def test_packages_are_never_built(layers: Layers, shelf: Path) -> None:
    (shelf / "delta-1.0.tar.gz").write_bytes(b"whatever")
    with pytest.raises(SpecError, match=r"no wheel of delta for Python 3\.\d+ on linux"):
        await layers.open(("delta",), TARGET)


async def test_wheels_are_for_the_python_that_runs_them(layers: Layers, shelf: Path) -> None:
    wheel(shelf, "native", "1.0", tag="cp312-cp312-manylinux_2_17_x86_64")
    wheel(shelf, "native", "2.0", tag="cp313-cp313-manylinux_2_17_x86_64")
    image = Target(python="3.12.1", system="linux", machine="x86_64", libc="glibc 2.31")
    layer = await layers.open(("native",), image)
    assert layer.packages == ("native==1.0",)
    layer.close()


@pytest.mark.usefixtures("shelf")
async def test_a_layer_left_half_made_is_made_anew(layers: Layers, tmp_path: Path) -> None:
    folder = tmp_path / "layers" / key(("beta",), TARGET)
    (folder / "site").mkdir(parents=True)
    (folder / "new-1234").mkdir()
    layer = await layers.open(("beta",), TARGET)
    assert installed(layer, "import beta; print(beta.VERSION)") == "2.0"
    assert sorted(path.name for path in folder.iterdir()) == ["layer.json", "lock", "site"]
    layer.close()


@pytest.mark.usefixtures("shelf")
async def test_giving_up_ends_the_build_and_frees_the_layer(layers: Layers, tmp_path: Path) -> None:
    building = asyncio.create_task(layers.open(("alpha",), TARGET))
    async with asyncio.timeout(20):
        while not list((tmp_path / "layers").glob("*/new-*")):  # noqa: ASYNC110 - nobody tells of a folder
            await asyncio.sleep(0.001)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    layer = await layers.open(("alpha",), TARGET)
    assert layer.packages == ("alpha==1.0", "beta==2.0")
    layer.close()


@pytest.mark.usefixtures("shelf")
async def test_the_longest_unused_goes_first_and_never_one_in_use(tmp_path: Path) -> None:
    layers = Layers(tmp_path / "layers", most=1)
    used = await layers.open(("alpha",), TARGET)
    (await layers.open(("beta==1.0",), TARGET)).close()
    newest = await layers.open(("beta==2.0",), TARGET)
    assert used.path is not None
    assert newest.path is not None
    assert {path.name for path in (tmp_path / "layers").iterdir()} == {used.path.parent.name, newest.path.parent.name}
    newest.close()
    used.close()


@pytest.mark.usefixtures("shelf")
async def test_what_was_half_removed_goes_with_the_next_build(layers: Layers, tmp_path: Path) -> None:
    (tmp_path / "layers" / ".gone-1234" / "site").mkdir(parents=True)
    layer = await layers.open(("beta",), TARGET)
    assert not (tmp_path / "layers" / ".gone-1234").exists()
    layer.close()


@pytest.mark.usefixtures("shelf")
async def test_too_many_bytes_are_too_many_layers(tmp_path: Path) -> None:
    layers = Layers(tmp_path / "layers", most_bytes=1)
    (await layers.open(("alpha",), TARGET)).close()
    newest = await layers.open(("beta",), TARGET)
    assert newest.path is not None
    assert list((tmp_path / "layers").iterdir()) == [newest.path.parent]
    newest.close()


def _open(folder: str) -> tuple[str, ...]:
    async def opened() -> tuple[str, ...]:
        layer = await Layers(Path(folder)).open(("alpha",), TARGET)
        layer.close()
        return layer.packages

    return asyncio.run(opened())


@pytest.mark.usefixtures("shelf")
def test_two_processes_make_a_layer_once(tmp_path: Path) -> None:
    folder = str(tmp_path / "layers")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_open, [folder, folder]) == [("alpha==1.0", "beta==2.0")] * 2
    (made,) = Path(folder).iterdir()
    assert sorted(path.name for path in made.iterdir()) == ["layer.json", "lock", "site"]


@pytest.mark.usefixtures("shelf")
async def test_what_would_be_done_is_said_before(layers: Layers) -> None:
    name = key(("beta",), TARGET)
    assert layers.missing(("beta",), TARGET)
    assert layers.describe(("beta",), TARGET) == (f"packages: layer {name}, not here yet: beta will be installed first")
    (await layers.open(("beta",), TARGET)).close()
    assert not layers.missing(("beta",), TARGET)
    assert layers.describe(("beta",), TARGET) == f"packages: layer {name}, ready: beta==2.0"


async def test_an_index_that_does_not_answer_is_named(
    layers: Layers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(SpecError, match=r"can't be reached: http://127\.0\.0\.1:9/simple/alpha/"):
        await layers.open(("alpha",), TARGET)
