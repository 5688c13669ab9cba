"""What a cell says about the packages it needs."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node import requirements
from bacalhau_node.errors import SpecError
from bacalhau_node.requirements import Declared


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tabulate", ("tabulate",)),
        ("Pandas >= 2 , <3, tabulate", ("pandas<3,>=2", "tabulate")),
        ("rich[jupyter, x]>=13, a==1.*", ("rich[jupyter,x]>=13", "a==1.*")),
        ("Foo_Bar.baz; python_version<'3.12'", ('foo-bar-baz; python_version < "3.12"',)),
    ],
)
def test_a_list_is_cut_between_packages_not_between_versions(text: str, expected: tuple[str, ...]) -> None:
    assert requirements.split(text) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no package is named"),
        ("pandas=>2", "'pandas=>2' is not a package"),
        ("a GPU", "'a GPU' is not a package"),
        ("-r /etc/passwd", "is not a package"),
        ("--index-url=x", "is not a package"),
        ("x @ https://host/x.whl", "names an address"),
        ("x @ file:///etc/x.whl", "names an address"),
        ("a\n--index-url=x", "is not a package"),
    ],
)
def test_what_is_no_requirement_is_named(text: str, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        requirements.split(text)


@given(st.text() | st.text("abc-._[]<>=!~,; 012@/'\"()"))
def test_any_text_is_a_list_or_refused(text: str) -> None:
    with contextlib.suppress(SpecError):
        parts = requirements.split(text)
        assert requirements.split(",".join(parts)) == parts
        assert all(requirements.name_of(part) for part in parts)


BLOCK = """\
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "Tabulate>=0.9",
#
#     "rich",
# ]
# [tool.uv]
# exclude-newer = "2026-01-01T00:00:00Z"
# ///
import tabulate
"""


def test_a_script_block_is_read() -> None:
    assert requirements.declared(BLOCK) == Declared(("tabulate>=0.9", "rich"), ">=3.11")


def test_a_short_line_is_read_anywhere() -> None:
    source = "x = 1\n# requires: pandas>=2, tabulate\n#requires: rich\n"
    assert requirements.declared(source).requires == ("pandas>=2", "tabulate", "rich")


@pytest.mark.parametrize(
    "source",
    [
        's = """\n# requires: tabulate\n"""\n',
        f's = """\n{BLOCK}"""\n',
        "if True:\n    # requires: tabulate\n    pass\n",
        "x = 1  # requires: tabulate\n",
        "# /// other\n# requires: tabulate = 1\n# ///\n".replace("requires: ", ""),
        "# nothing\n",
    ],
)
def test_what_only_looks_like_a_declaration_is_none(source: str) -> None:
    assert requirements.declared(source) == Declared()


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("# /// script\n# dependencies = []\n", "line 3: `# /// script` has no end"),
        (f"{BLOCK}\n{BLOCK}", "lines 3 and 15: a cell can have one"),
        ("# /// script\n# dependencies = [\n# ///\n", "line 4, # /// script: not TOML"),
        ("# /// script\n# dependency = []\n# ///\n", "'dependency' means nothing here"),
        ("# /// script\n# dependencies = 'a'\n# ///\n", "a list of texts"),
        ("# /// script\n# dependencies = [1]\n# ///\n", "a list of texts"),
        ("# /// script\n# dependencies = ['a b']\n# ///\n", "'a b' is not a package"),
        ("# /// script\n# requires-python = '3'\n# ///\n", "requires-python = '3'"),
        ("# /// script\n# requires-python = 3\n# ///\n", "requires-python = 3"),
        ("\n# requires: a GPU\n", "line 4, # requires: 'a GPU'"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(source: str, part: str) -> None:
    with pytest.raises(SpecError) as error:
        requirements.declared(source, first=2)
    assert part in str(error.value)


def test_text_that_is_no_python_is_refused() -> None:
    with pytest.raises(SpecError, match="comments of the cell can't be read"):
        requirements.declared("# requires: alpha\nx = (")


def test_an_empty_block_asks_for_nothing() -> None:
    assert requirements.declared("# /// script\n# ///\n") == Declared()


def test_the_line_counts_more_than_the_text() -> None:
    assert requirements.merged(("tabulate>=0.9",), ("tabulate<0.9", "rich")) == ("rich", "tabulate>=0.9")


def test_too_many_packages_are_refused() -> None:
    with pytest.raises(SpecError, match="101 packages"):
        requirements.merged((), (f"a{number}" for number in range(101)))


def test_a_required_package_is_not_the_notebooks() -> None:
    assert requirements.beyond({"Foo_bar": "1", "b": "2"}, ("foo-bar>2",)) == {"b": "2"}


def test_the_python_is_compared_before_anything_is_sent() -> None:
    requirements.check_python(">=3.11,<4", "3.12.0rc1")
    requirements.check_python("", "3.8")
    with pytest.raises(SpecError, match=r"needs Python >=3\.12.*which is 3\.11\.7"):
        requirements.check_python(">=3.12", "3.11.7")
