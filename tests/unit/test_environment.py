"""The host environment shows the interpreter and its packages, and nothing else of the machine."""

import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from bacalhau_node.executors.environment import HostEnvironment, Interpreter, collapse, describe


class Machine:
    """A small machine below `root`, with a system Python's folders and a home."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = self.folder("home/ada")
        for name in ("usr/bin", "usr/lib", "etc/ssl/certs", "etc/fonts"):
            self.folder(name)
        for name in ("bin", "lib", "sbin"):
            (root / name).symlink_to(f"usr/{name}")

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        return path

    def venv(self, name: str, *, base: Path) -> Path:
        prefix = self.folder(name)
        (prefix / "bin").mkdir()
        (prefix / "bin/python").symlink_to(base / "bin/python3.12")
        return prefix

    def python(self, name: str) -> Path:
        prefix = self.folder(name)
        (prefix / "bin").mkdir()
        (prefix / "bin/python3.12").write_text("")
        return prefix

    def describe(self, executable: Path, *prefixes: Path, path: tuple[str, ...] = ()) -> HostEnvironment:
        interpreter = Interpreter(executable, prefixes, path)
        return describe(interpreter, uid=1000, gid=1001, root=self.root, home=self.home)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "root")


def members(host: HostEnvironment) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(host.image)) as tar:
        return {member.name: member for member in tar}


def text(host: HostEnvironment, name: str) -> str:
    with tarfile.open(fileobj=io.BytesIO(host.image)) as tar:
        found = tar.extractfile(name)
        assert found
        return found.read().decode()


def test_binds_are_the_prefixes_and_the_system_without_nested_ones(machine: Machine) -> None:
    base = machine.python("opt/py")
    venv = machine.venv("home/ada/venv", base=base)
    site = venv / "lib/site-packages"
    site.mkdir(parents=True)
    host = machine.describe(venv / "bin/python", venv, base, path=(str(site), str(base / "lib/python312.zip")))
    assert set(host.binds) == {
        machine.root / "usr",
        machine.root / "etc/ssl/certs",
        machine.root / "etc/fonts",
        base,
        venv,
    }
    assert host.search == ()
    assert host.problem is None


def test_folders_of_an_unmerged_system_are_bound_themselves(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "root")
    (machine.root / "lib").unlink()
    machine.folder("lib")
    base = machine.python("opt/py")
    host = machine.describe(base / "bin/python3.12", base)
    assert machine.root / "lib" in host.binds
    assert "lib" not in members(host)
    assert members(host)["bin"].linkname == "usr/bin"


def test_folders_that_the_interpreter_is_reached_through_are_bound(machine: Machine) -> None:
    real = machine.python("pythons/cpython-3.12.4")
    (machine.root / "pythons/cpython-3.12").symlink_to("cpython-3.12.4")
    venv = machine.venv("work/venv", base=machine.root / "pythons/cpython-3.12")
    host = machine.describe(venv / "bin/python", venv, real)
    assert machine.root / "pythons/cpython-3.12" in host.binds
    assert real in host.binds


def test_an_endless_chain_of_links_ends(machine: Machine) -> None:
    base = machine.python("opt/py")
    loop = base / "bin/loop"
    loop.symlink_to("loop")
    assert base in machine.describe(loop, base).binds


def test_path_entries_beyond_the_prefixes_are_searched_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    base = machine.python("opt/py")
    extra, here = machine.folder("src/package"), machine.folder("home/ada/notebooks")
    monkeypatch.chdir(here)
    entries = ("", "relative", str(here), str(machine.home), str(machine.root), str(extra), str(extra / "gone"))
    host = machine.describe(base / "bin/python3.12", base, path=entries)
    assert host.search == (extra,)
    assert extra in host.binds
    assert not {here, machine.home, machine.root} & set(host.binds)
    assert host.variables({})["PYTHONPATH"] == str(extra)


@pytest.mark.parametrize("name", ["home/ada", "home", "."])
def test_a_prefix_that_would_show_the_home_or_the_machine_is_refused(machine: Machine, name: str) -> None:
    prefix = machine.root / name
    host = machine.describe(prefix / "bin/python", prefix)
    assert host.problem
    assert str(prefix) in host.problem
    assert "virtual environment" in host.problem


def test_an_interpreter_without_a_path_is_refused(machine: Machine) -> None:
    host = machine.describe(Path(), machine.python("opt/py"))
    assert host.problem
    assert "no path" in host.problem


def test_credentials_for_package_indexes_are_masked(machine: Machine) -> None:
    base = machine.python("opt/py")
    for name in ("pip.conf", ".condarc"):
        (base / name).write_text("secret")
    host = machine.describe(base / "bin/python3.12", base)
    assert set(host.masks) == {base / "pip.conf", base / ".condarc"}


def test_the_image_has_mount_points_and_two_users(machine: Machine) -> None:
    base = machine.python("opt/py")
    host = machine.describe(base / "bin/python3.12", base)
    found = members(host)
    assert {"inputs", "outputs", "shared", "slot", "tmp", "etc", "usr", "sbin"} <= set(found)
    assert found["tmp"].mode == 0o1777
    assert found["sbin"].isdir()
    assert found["sbin/ldconfig"].linkname == "../usr/sbin/ldconfig"
    assert text(host, "etc/passwd").splitlines() == ["root:x:0:0::/tmp:/bin/sh", "shard:x:1000:1001::/tmp:/bin/sh"]
    assert text(host, "etc/group").splitlines() == ["root:x:0:", "shard:x:1001:"]


def test_equal_machines_have_equal_images(tmp_path: Path) -> None:
    tags = set()
    for name in ("a", "b"):
        machine = Machine(tmp_path / name)
        base = machine.python("opt/py")
        tags.add(machine.describe(base / "bin/python3.12", base).tag)
    assert len(tags) == 1


def test_the_environment_is_an_allow_list(machine: Machine) -> None:
    base = machine.python("opt/py")
    host = machine.describe(base / "bin/python3.12", base)
    found = host.variables({"TZ": "Europe/Lisbon", "AWS_SECRET_ACCESS_KEY": "x", "PATH": "/mine", "HOME": "/home/ada"})
    assert found["TZ"] == "Europe/Lisbon"
    assert found["HOME"] == "/tmp"
    assert found["PATH"].startswith(f"{base}/bin:")
    assert "/mine" not in found["PATH"]
    assert "AWS_SECRET_ACCESS_KEY" not in found
    assert "TZ" not in host.variables({})


def test_collapse_keeps_the_outermost() -> None:
    assert collapse(map(Path, ("/a/b/c", "/a", "/ab", "/a/b"))) == (Path("/a"), Path("/ab"))


def test_this_interpreter_can_be_described() -> None:
    interpreter = Interpreter.current()
    host = describe(interpreter, uid=1000, gid=1000)
    assert host.problem is None
    assert any(interpreter.executable.is_relative_to(bind) for bind in host.binds)
    assert any(interpreter.executable.resolve().is_relative_to(bind) for bind in host.binds)


def test_installing_a_package_changes_the_stamp_and_a_file_in_the_notebooks_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, notebooks = tmp_path / "packages", tmp_path / "notebooks"
    for folder in (packages, notebooks):
        folder.mkdir()
    monkeypatch.chdir(notebooks)
    monkeypatch.setattr(sys, "path", ["", str(notebooks), str(packages)])
    host = describe(Interpreter.current(), uid=1000, gid=1000)
    before = host.stamp()
    os.utime(notebooks, (1, 1))
    assert host.stamp() == before
    os.utime(packages, (1, 1))
    assert host.stamp() != before
