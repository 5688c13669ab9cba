"""What a sandbox is given, by its command line; and what people are told where there can be none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bacalhau_node.errors import BacalhauError
from bacalhau_node.executors import bubblewrap
from bacalhau_node.executors.bubblewrap import Bubblewrap, Rights, Root, explained, find, options
from bacalhau_node.executors.containers import Mount, Recipe
from bacalhau_node.executors.environment import Interpreter, describe

NAMESPACES = ("--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-net")


def recipe(*mounts: Mount, network: bool = False) -> Recipe:
    return Recipe(
        image="",
        command=("python",),
        entrypoint=(),
        environment={"NAME": "a value"},
        mounts=mounts,
        labels={},
        user="1000:1000",
        folder="/slot/work",
        memory=1 << 30,
        cpu=1.0,
        network="bridge" if network else "none",
    )


@pytest.fixture
def root(tmp_path: Path) -> Root:
    image = describe(Interpreter.current(), uid=1000, gid=1000, home=Path("/home/nobody")).image
    return Root.unpack(image, tmp_path / "root")


def wrapped(rights: Rights = "user") -> Bubblewrap:
    return Bubblewrap(program="/usr/bin/bwrap", rights=rights, user="1000:1000", no_nesting=rights == "user")


@pytest.mark.parametrize("rights", ["user", "root", "setuid"])
def test_everything_is_its_own_and_no_right_is_kept(rights: Rights, root: Root) -> None:
    words = options(wrapped(rights), root, recipe(), None)
    for each in (*NAMESPACES, "--clearenv", "--die-with-parent", "--new-session"):
        assert each in words
    assert words[words.index("--cap-drop") + 1] == "ALL"
    kept = [words[at + 1] for at, word in enumerate(words) if word == "--cap-add"]
    assert kept == (["CAP_SETUID", "CAP_SETGID"] if rights == "root" else [])
    assert ("--unshare-user" in words, "--disable-userns" in words) == (rights == "user", rights == "user")


def test_root_becomes_the_shards_user_before_the_program_starts() -> None:
    words = wrapped("root").become_user()
    assert {"--reuid=1000", "--regid=1000", "--clear-groups"} <= set(words)
    assert wrapped().become_user() == []


def test_the_network_is_shared_only_on_demand(root: Root) -> None:
    words = options(wrapped(), root, recipe(network=True), None)
    assert "--unshare-net" not in words
    assert "/etc/resolv.conf" in words
    assert "/etc/resolv.conf" not in options(wrapped(), root, recipe(), None)


def test_folders_are_bound_before_what_lies_in_them(root: Root) -> None:
    """And the way to each can be walked by the shard's user, whatever it is on this machine."""
    deep, wide = Mount(source=Path("/a"), target="/x/y/z"), Mount(source=Path("/b"), target="/x/y", writable=True)
    words = options(wrapped(), root, recipe(deep, wide), None)
    assert words.index("/x/y/z") > words.index("/x/y")
    at = words.index("/x")
    assert words[at - 3 : at + 1] == ["--perms", "0755", "--dir", "/x"]
    assert words[words.index("/b") - 1] == "--bind"
    assert words[words.index("/a") - 1] == "--ro-bind"
    assert words.index("--remount-ro") > words.index("/x/y/z")


def test_secrets_are_covered_by_an_empty_file(root: Root) -> None:
    """Not by a device, which could not be read in a sandbox."""
    words = options(wrapped(), root, recipe(Mount(source=Path("/dev/null"), target="/venv/pip.conf")), None)
    assert words[words.index("/venv/pip.conf") - 1] == str(root.empty)
    assert root.empty.read_bytes() == b""


def test_the_root_is_that_of_a_container(root: Root) -> None:
    assert "shard:x:1000:1000" in (root.folder / "etc-passwd").read_text()
    assert {"/inputs", "/outputs", "/slot", "/etc/passwd", "/etc/group"} <= set(root.options)
    assert not {"/proc", "/dev", "/tmp"} & set(root.options)


# --- where it does not work ---


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns=0"),
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "user.max_user_namespaces=10000"),
    ],
)
def test_the_setting_that_forbids_it_is_named(tmp_path: Path, setting: str, value: str, remedy: str) -> None:
    (tmp_path / setting).parent.mkdir()
    (tmp_path / setting).write_text(value + "\n")
    text = explained("bwrap", "bwrap: setting up uid map: Permission denied\n", system=tmp_path)
    assert "setting up uid map: Permission denied" in text
    assert remedy in text


def test_what_surrounds_us_is_blamed_when_no_setting_is(tmp_path: Path) -> None:
    text = explained("bwrap", "bwrap: Creating new namespace failed: Operation not permitted", system=tmp_path)
    assert "container" in text
    assert "container" not in explained("bwrap", "bwrap: Can't find source path /x", system=tmp_path)


def test_without_bubblewrap_one_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bubblewrap.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BacalhauError, match="apt-get install bubblewrap"):
        find("1000:1000")


def test_an_old_or_a_broken_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that knows too few options, and one that says it can't."""
    program = tmp_path / "bwrap"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for script, told in (
        ("echo --ro-bind", "too old"),
        ('case "$1" in --help) echo --size --perms --seccomp;; *) echo "bwrap: no luck" >&2; exit 1;; esac', "no luck"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        with pytest.raises(BacalhauError, match=told):
            find("1000:1000")
