"""What names a layer, what needs none, and how uv's words and pip's settings are read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bacalhau_node import requirements
from bacalhau_node.errors import SpecError
from bacalhau_node.layers import installer
from bacalhau_node.layers.indexes import pip_files, settings
from bacalhau_node.layers.store import Layers, key
from bacalhau_node.ports import Target

TARGET = Target(
    python="3.11.4",
    system="linux",
    machine="x86_64",
    libc="glibc 2.36",
    versions={"pandas": "3.1.0", "torch": "2.4.0+cpu", "odd": "not a version"},
)


# --- names ---


def test_equal_needs_have_one_name_in_any_order() -> None:
    turned = msgspec.structs.replace(TARGET, versions=dict(reversed(TARGET.versions.items())), python="3.11.9")
    assert key(("a", "b"), TARGET) == key(("b", "a"), turned)


@pytest.mark.parametrize(
    "other",
    [
        {"python": "3.12.0"},
        {"machine": "aarch64"},
        {"libc": "musl"},
        {"versions": {"pandas": "3.2.0"}},
    ],
)
def test_another_environment_has_another_layer(other: dict[str, object]) -> None:
    assert key(("a",), TARGET) != key(("a",), msgspec.structs.replace(TARGET, **other))


def test_other_requirements_have_another_layer() -> None:
    assert key(("a>=1",), TARGET) != key(("a>=2",), TARGET)


# --- what is there already ---


@pytest.mark.parametrize(
    ("requires", "there"),
    [
        (("pandas>=2",), True),
        (("torch==2.4.0",), True),
        (('tabulate; python_version < "3.11"',), True),
        (('tabulate; python_version >= "3.11"',), False),
        (("pandas[excel]",), False),
        (("pandas", "tabulate"), False),
    ],
)
def test_what_the_environment_has_needs_no_layer(requires: tuple[str, ...], there: bool) -> None:
    unmet = requirements.unmet(requires, python=TARGET.python, versions=TARGET.versions)
    assert (unmet == []) is there


async def test_without_a_need_nothing_is_made(tmp_path: Path) -> None:
    layer = await Layers(tmp_path / "layers").open(("pandas>=3",), TARGET)
    assert layer.path is None
    assert not (tmp_path / "layers").exists()


async def test_an_environment_is_never_changed(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"requires pandas<2, and its environment has pandas 3\.1\.0"):
        await Layers(tmp_path / "layers").open(("pandas<2",), TARGET)


# --- uv ---


@pytest.mark.parametrize(
    ("machine", "libc", "name"),
    [
        ("x86_64", "glibc 2.36", "x86_64-manylinux_2_36"),
        ("aarch64", "glibc 2.29", "aarch64-manylinux_2_28"),
        ("x86_64", "glibc 2.99", "x86_64-manylinux_2_40"),
        ("x86_64", "", "x86_64-unknown-linux-musl"),
    ],
)
def test_machines_are_named_as_uv_names_them(machine: str, libc: str, name: str) -> None:
    assert installer.platform(msgspec.structs.replace(TARGET, machine=machine, libc=libc)) == name


def test_a_libc_without_wheels_is_told() -> None:
    with pytest.raises(SpecError, match=r"glibc 2\.12: 2\.17 is the oldest"):
        installer.platform(msgspec.structs.replace(TARGET, libc="glibc 2.12"))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            (
                "error: No solution found when resolving\n  cause: Because nosuch-pkg was not found in the "
                "package registry and you require nosuch-pkg, we can conclude that your "
                "requirements are unsatisfiable.\n"
            ),
            "there is no package nosuch-pkg in the package index of this node",
        ),
        (
            (
                "error: No solution found when resolving\n  cause: Because only tabulate<=0.10.0 is available "
                "and you require tabulate>99, we can conclude that your requirements are unsatisfiable.\n"
            ),
            (
                "the packages can't be installed for Python 3.11: Because only tabulate<=0.10.0 is available and you "
                "require tabulate>99."
            ),
        ),
        (
            (
                "error: No solution found when resolving\n  cause: Because all versions of docopt have no "
                "usable wheels and you require docopt, we can conclude that your requirements are unsatisfiable.\n\n"
                "hint: Wheels are required for `docopt` because building from source is disabled for all packages\n"
            ),
            (
                "there is no wheel of docopt for Python 3.11 on linux x86_64, and this node builds nothing from "
                "source: Because all versions of docopt have no usable wheels and you require docopt."
            ),
        ),
        (
            (
                "error: Request failed after 3 retries in 5.7s\n"
                "  cause: Failed to fetch: https://me:secret@nowhere.invalid/simple/tabulate/\n  cause: dns error\n"
                "  cause: failed to lookup address information: Name or service not known\n"
            ),
            (
                "the package index can't be reached: https://…@nowhere.invalid/simple/tabulate/: "
                "failed to lookup address information: Name or service not known"
            ),
        ),
        ("error: something new\n", "the packages can't be installed for Python 3.11: something new"),
    ],
)
def test_uvs_refusals_are_said_to_a_person(said: str, shown: str) -> None:
    assert installer.readable(said, TARGET) == shown


# --- pip's settings ---


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_pips_index_is_uvs(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    file = written(
        tmp_path / "pip.conf",
        f"[global]\nindex_url = https://index/simple\nextra-index-url =\n  https://a\n  https://b\n[install]\n"
        f"find-links = {tmp_path}/wheels {tmp_path}/gone\ntrusted-host = index\nno-index = yes\n",
    )
    environment, options = settings({"PATH": "/bin", "PIP_CERT": "/ca.pem"}, [tmp_path / "none", file])
    assert environment == {
        "PATH": "/bin",
        "PIP_CERT": "/ca.pem",
        "UV_DEFAULT_INDEX": "https://index/simple",
        "UV_INDEX": "https://a https://b",
        "UV_FIND_LINKS": f"{tmp_path}/wheels",
        "UV_INSECURE_HOST": "index",
        "SSL_CERT_FILE": "/ca.pem",
    }
    assert options == ("--no-index",)


def test_later_files_and_the_environment_count_more(tmp_path: Path) -> None:
    first = written(tmp_path / "a", "[global]\nindex-url = https://a\n")
    second = written(tmp_path / "b", "[global]\nindex-url = https://b\n")
    assert settings({}, [first, second])[0] == {"UV_DEFAULT_INDEX": "https://b"}
    assert settings({"PIP_INDEX_URL": "https://c"}, [first])[0]["UV_DEFAULT_INDEX"] == "https://c"


@pytest.mark.parametrize("name", ["UV_DEFAULT_INDEX", "UV_INDEX_URL"])
def test_what_uv_was_told_itself_counts(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / "pip.conf", "[global]\nindex-url = https://pip\n")
    assert settings({name: "https://uv"}, [file]) == ({name: "https://uv"}, ())


def test_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    assert settings({}, [written(tmp_path / "pip.conf", "no section\n")]) == ({}, ())


def test_pips_own_places_are_read(tmp_path: Path) -> None:
    files = pip_files({"PIP_CONFIG_FILE": "/named"}, home=tmp_path, prefix=Path("/venv"))
    assert files[-3:] == [tmp_path / ".config/pip/pip.conf", Path("/venv/pip.conf"), Path("/named")]
    assert pip_files({"PIP_CONFIG_FILE": "/dev/null"}, home=tmp_path) == []
