"""What is installed is read from the names of folders, and compared with what a cell needs."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from bacalhau_node.executors.fit import installed, mismatch, python_version
from bacalhau_node.spec import PythonCell


def test_what_is_installed_is_what_the_interpreter_says() -> None:
    found = installed()
    for each in importlib.metadata.distributions():
        name = each.name.lower().replace("_", "-").replace(".", "-")
        assert found[name] == importlib.metadata.version(each.name)


def test_what_comes_first_on_the_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name in (("first", "Some_Thing-2.0.dist-info"), ("second", "some.thing-1.0-py3.11.egg-info")):
        (tmp_path / folder / name).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "gone"), str(tmp_path / "first"), str(tmp_path / "second")])
    assert installed() == {"some-thing": "2.0"}


@pytest.mark.parametrize(
    ("needs", "told"),
    [
        ({}, None),
        ({"versions": {"Some.Thing": "2.0.7"}}, None),
        ({"versions": {"some-thing": "2.1.0"}}, "needs some-thing 2.1.0; this node has some-thing 2.0.1"),
        ({"versions": {"other": "1"}}, "needs other 1; this node has no other"),
        ({"python": python_version()}, None),
        ({"python": "3.1"}, f"needs Python 3.1; this node has Python {python_version()}"),
        (
            {"python": "3.1", "versions": {"some-thing": "3.0", "other": "1"}},
            (
                "needs Python 3.1, some-thing 3.0 and other 1; "
                f"this node has Python {python_version()}, some-thing 2.0.1 and no other"
            ),
        ),
        ({"requires": ("some-thing>=2", "more")}, None),
        (
            {"requires": ("some-thing>=3",)},
            (
                "the cell requires some-thing>=3, and its environment has some-thing 2.0.1, which stays as it is: "
                "packages are added to it, never changed. Change it where the notebook runs, or name an --image"
            ),
        ),
    ],
)
def test_a_cell_needs_the_same_minor_versions(needs: dict[str, object], told: str | None) -> None:
    assert mismatch(PythonCell(bundle="b", **needs), {"some-thing": "2.0.1"}) == told
