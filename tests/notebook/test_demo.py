"""The first notebook, run by a real kernel as `make demo` runs it."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import nbformat
import pytest
from nbconvert import HTMLExporter

from tests import demo

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def outputs() -> dict[str, list[dict[str, Any]]]:
    """The outputs of each code cell, by the cell's id."""
    return {cell["id"]: cell["outputs"] for cell in _executed().cells if cell["cell_type"] == "code"}


@cache
def _executed() -> nbformat.NotebookNode:
    return demo.execute(demo.NOTEBOOK)


def _text(outputs: list[dict[str, Any]]) -> str:
    return "\n".join(map(demo.text_of, outputs))


def test_ten_shards_and_plain_pandas_agree(outputs):
    assert not demo.failed(_executed())
    assert "336,776 flights in 365 files" in _text(outputs["data"])
    assert "agree on every number" in _text(outputs["check"])


def test_partial_sums_name_an_airline_once_a_shard(outputs):
    shown = re.search(r"(\d+) rows from 10 shards, for 16 airlines", _text(outputs["parts"]))
    assert shown
    assert 10 < int(shown[1]) <= 160


def test_the_record_tells_shards_seconds_and_executor(outputs):
    assert re.search(r"10/10 shards, [\d.]+ m?s on .*\((docker|sandbox|process)\)", _text(outputs["job"]))


def test_every_line_of_every_shard_is_in_the_cell(outputs):
    flights = re.findall(r"2013-\d\d-\d\d to 2013-\d\d-\d\d: ([\d,]+) flights", _text(outputs["job"]))
    assert len(flights) == 10
    assert sum(int(count.replace(",", "")) for count in flights) == 336_776


def test_every_output_is_readable_without_a_kernel(outputs):
    displayed = [one["data"] for cell in outputs.values() for one in cell if "data" in one]
    assert displayed
    assert [data for data in displayed if WIDGET in data or not data.get("text/plain")] == []


def test_the_exported_page_shows_the_record_and_the_table():
    page, _ = HTMLExporter().from_notebook_node(_executed())
    assert "10 shards done" in page
    assert "ExpressJet Airlines Inc." in page
