"""What the documents claim about the code."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from bacalhau_jupyter.option_table import OPTIONS
from bacalhau_node.cli import familiar, main
from bacalhau_node.literals import ELSEWHERE
from tests import architecture

ROOT = architecture.DOCUMENT.parent
DOCUMENTS = sorted(ROOT.glob("*.md"))


def test_architecture_shows_the_tables_of_the_code() -> None:
    document = architecture.DOCUMENT.read_text()
    assert document == architecture.rendered(document), "run: python -m tests.architecture"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("document", ["README.md", "REFERENCE.md"])
def test_every_option_that_is_told_of_works(document: str) -> None:
    named = set(re.findall(r"`(--[a-z-]+)", (ROOT / document).read_text()))
    assert named
    assert {name for name in named if name not in OPTIONS} == set()


def test_every_option_that_works_is_in_the_reference() -> None:
    reference = (ROOT / "REFERENCE.md").read_text()
    assert [name for name in OPTIONS if f"`{name}" not in reference] == []


def test_words_that_people_bring_along_are_answered_with_words_that_exist() -> None:
    assert {answer.partition(" ")[0].strip(",") for answer in familiar.COMMANDS.values()} <= set(main.commands)
    assert not set(familiar.COMMANDS) & set(main.commands)
    assert set(ELSEWHERE.values()) <= set(OPTIONS)
    assert not set(ELSEWHERE) & set(OPTIONS)


def test_every_command_of_the_shell_that_a_document_names_exists_with_its_options() -> None:
    text = "".join(document.read_text() for document in DOCUMENTS)
    lines = re.findall(r"bacalhau-node ([a-z]+)([^`\n]*)", text)
    assert len(lines) > 10
    for command, rest in lines:
        known = {name for param in main.commands[command].params for name in param.opts} | {"--help"}
        assert {*re.findall(r"--[a-z-]+", rest.partition(" -- ")[0])} <= known, f"bacalhau-node {command}{rest}"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_valid_and_show_what_one_whole_run_of_them_gave(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it: see CONTRIBUTING.md"
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert [output for output in outputs if "widget" in str(output.get("data", {}).keys())] == []
