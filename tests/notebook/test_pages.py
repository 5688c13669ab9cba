"""What reaches a page: how often, how much, and what stays in the notebook."""

from __future__ import annotations

import json
import re

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from papermill.exceptions import PapermillExecutionError

from tests.notebook.kernels import environment

WIDGET = "application/vnd.jupyter.widget-view+json"
LONG = "import time; time.sleep(0.8)\nshard.index"


def updates_of(shown, first):
    """What replaced a display; the records of earlier cells are sent again among it."""
    same = first["transient"]["display_id"]
    return [each for each in shown.of("update_display_data") if each["transient"]["display_id"] == same]


def test_a_short_job_shows_no_view(kernel):
    shown = kernel.run("%%bacalhau\n1")
    again = kernel.run("%%bacalhau\n1")  # the first one may have waited for the node
    assert shown.value
    assert again.of("display_data") == []


def test_the_view_is_replaced_by_a_record_that_needs_no_kernel(kernel):
    shown = kernel.run(f"%%bacalhau --shards 2\n{LONG}")
    (first,) = shown.of("display_data")
    *_, last = updates_of(shown, first)
    assert WIDGET in first["data"]
    assert re.match(r"job (j-\w+): 2 shards on .*; %bacalhau attach \1$", first["data"]["text/plain"])
    assert WIDGET not in last["data"]
    assert last["data"]["text/plain"].startswith("job j-")
    assert "2/2 shards" in last["data"]["text/plain"]


def test_many_shards_send_few_messages_and_the_last_state_is_sent(kernel):
    shown = kernel.run("%%bacalhau --shards 150\nimport time; time.sleep(0.02)")
    updates = [content for content in shown.of("comm_msg") if content["data"].get("method") == "update"]
    states = [content["data"]["state"]["summary"] for content in updates if "summary" in content["data"]["state"]]
    seconds = states[-1]["elapsed"]
    assert states[-1]["state"] == "Completed"
    assert len(shown.messages) <= 12 * seconds + 15


def test_more_text_than_a_page_takes_is_cut_and_told(kernel):
    shown = kernel.run("%%bacalhau -o loud\nfor n in range(200_000): print('x' * 100)")
    assert len(shown.text()) < 2_000_000
    assert "lines more: loud.logs(0)" in shown.text()
    assert not shown.error


def test_progress_bars_overwrite_their_line(kernel):
    shown = kernel.run("%%bacalhau\nfor n in range(3): print(f'\\r{n}', end='', flush=True)")
    assert shown.text().split("\r")[-1] == "2\n"


@pytest.mark.parametrize("how", ["html", "text"])
def test_other_ways_to_show_a_job_end_in_the_same_record(kernel, how):
    shown = kernel.run(f"%%bacalhau --shards 2 --progress {how}\n{LONG}")
    *_, first = shown.of("display_data")
    *_, last = first, *updates_of(shown, first)
    assert "2/2 shards" in last["data"]["text/plain"]
    assert not any(WIDGET in content["data"] for content in shown.of("display_data"))


def test_none_shows_nothing_but_lines(kernel):
    shown = kernel.run(f"%%bacalhau --shards 2 --progress none --df t\nprint('x')\n{LONG}")
    assert shown.of("display_data") == []
    assert "[shard 1] x" in shown.text()


def notebook(*cells):
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=spec)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The environment of kernels that tools start on their own."""
    for name, value in environment(tmp_path / "data").items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_a_headless_notebook_keeps_lines_and_records_and_no_widget(data):
    book = notebook("%load_ext bacalhau_jupyter", f"%%bacalhau --shards 4 --df t\n{LONG}", "t")
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(data)}}).execute()
    outputs = book.cells[1].outputs
    assert WIDGET not in json.dumps(book)
    assert "widgets" not in book.metadata
    assert "4 shards on this machine (" in outputs[0]["text"]
    records = [output for output in outputs if output["output_type"] == "display_data"]
    assert records[-1]["data"]["text/plain"].startswith("job j-")
    assert "<table>" in records[-1]["data"]["text/html"]
    assert "value" in book.cells[2].outputs[0]["data"]["text/plain"]


def test_papermill_runs_to_the_end_and_fails_with_a_failed_job(data):
    path, done = data / "in.ipynb", data / "out.ipynb"
    nbformat.write(notebook("%load_ext bacalhau_jupyter", "%%bacalhau --shards 2\n{}['x']"), path)
    with pytest.raises(PapermillExecutionError, match="KeyError: 'x' in 2 shards"):
        papermill.execute_notebook(path, done, cwd=str(data), progress_bar=False)
    assert WIDGET not in done.read_text()
