"""Cells in a real kernel: what they return, print and refuse."""

from __future__ import annotations

import re

import pytest


def test_a_cell_returns_the_value_of_its_last_expression(kernel):
    shown = kernel.run("%%bacalhau\n1 + 1")
    assert "shard 0: 2" in shown.value
    assert not shown.error


def test_a_cell_without_a_value_shows_only_what_it_printed(kernel):
    shown = kernel.run("%%bacalhau\nprint('hello')")
    assert shown.text() == "hello\n" or shown.text().endswith("\nhello\n")
    assert shown.value == ""


def test_a_line_is_in_the_cell_while_its_shard_runs(kernel):
    signal = kernel.signals / "line"
    body = (
        f"import os, time\nprint('waiting')\nwhile not os.path.exists({str(signal)!r}): time.sleep(0.01)\nprint('went')"
    )
    shown = kernel.send(f"%%bacalhau\n{body}")
    kernel.until(lambda: "waiting\n" in shown.text())
    assert not shown.idle
    signal.touch()
    kernel.until(lambda: shown.idle)
    assert shown.text().endswith("went\n")


def test_lines_of_several_shards_carry_their_numbers(kernel):
    shown = kernel.run("%%bacalhau --shards 2\nprint('here')")
    assert sorted(shown.text().splitlines()) == ["[shard 0] here", "[shard 1] here"]


def test_the_frame_is_bound_and_is_the_value_of_the_cell(kernel):
    shown = kernel.run("%%bacalhau --shards 3 --df t --reduce 'df.sum()'\n{'n': shard.index + 1}")
    assert shown.value.startswith("n    6")
    assert kernel.run("int(t['n'])").value == "6"


def test_a_stale_frame_is_unbound_when_the_job_fails(kernel):
    kernel.run("u = 'of an earlier run'")
    assert kernel.run("%%bacalhau --df u\n1 / 0").error
    assert "NameError" in kernel.run("u").error


def test_partial_binds_what_the_finished_shards_returned(kernel):
    shown = kernel.run(
        "%%bacalhau --shards 3 --df p --partial\nif shard.index == 1: raise ValueError('no')\n{'i': shard.index}"
    )
    assert not shown.error
    assert "1 of 3 shards" in shown.text("stderr")
    assert kernel.run("list(p['i'])").value == "[0, 2]"


def test_out_binds_the_job(kernel):
    kernel.run("%%bacalhau --shards 2 -o j\nprint('kept')\nshard.index")
    assert kernel.run("j.state, j.result().values(), len(j.shards)").value == "('Completed', [0, 1], 2)"
    assert kernel.run("j.logs(1)").value == "kept\n"
    assert "2/2 shards" in kernel.run("j").value


def test_other_magics_stand_above_and_lines_keep_their_numbers(kernel):
    shown = kernel.run("%%time\n%%bacalhau --shards 2 --df none\ndef f(x):\n    return {}[x]\n\nf('a')")
    assert "Wall time" in shown.text()
    assert "KeyError: 'a' in 2 shards (0, 1)" in shown.error
    assert "line 4, in f" in shown.error
    assert "----> 4     return {}[x]" in shown.error
    assert "bacalhau_jupyter" not in shown.error


def test_a_shard_that_ends_itself_is_named_with_its_exit_code_and_last_lines(kernel):
    shown = kernel.run("%%bacalhau --logs errors\nimport os\nprint('last words', flush=True)\nos._exit(3)")
    assert "exit code 3" in shown.error
    assert "    last words" in shown.error
    assert "last words" not in shown.text()


def test_a_syntax_error_and_a_missing_name_make_no_job(kernel):
    before = kernel.run("len(bj.jobs())").value
    syntax = kernel.run("%%bacalhau\nx = 1\ny = (2 +\n")
    assert "line 3" in syntax.text("stderr")
    assert "SyntaxError" in syntax.text("stderr")
    kernel.run("theirs = 3")
    assert "add --vars theirs" in kernel.run("%%bacalhau\ntheirs + 1").text("stderr")
    assert kernel.run("len(bj.jobs())").value == before


def test_wrong_usage_is_one_line_and_an_error(kernel):
    shown = kernel.run("%%bacalhau --shard 3\n1")
    assert shown.text("stderr").startswith("UsageError: unknown option --shard")
    assert shown.text("stderr").count("\n") == 1
    reply = kernel.client.get_shell_msg(timeout=10)
    while reply["parent_header"]["msg_id"] != next(reversed(kernel.cells)):
        reply = kernel.client.get_shell_msg(timeout=10)
    assert reply["content"]["status"] == "error"


def test_a_dry_run_shows_plan_and_bundle_and_runs_nothing(kernel, tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("x")
    before = kernel.run("len(bj.jobs())").value
    shown = kernel.run(f"%%bacalhau --dry-run -i {tmp_path} --glob '*.csv' --shards 2\n1 / 0")
    assert "2 shards:" in shown.text()
    assert "b.csv" in shown.text()
    assert "cell.py" in shown.text()
    assert kernel.run("len(bj.jobs())").value == before


def test_a_secret_of_the_notebook_is_masked_in_the_cell(kernel):
    kernel.run("API_KEY = 'hunter2-correct-horse'")
    cell = "%%bacalhau --secret API_KEY\nimport os\nprint('key', os.environ['API_KEY'])\n"
    assert "key ***" in kernel.run(f"{cell}len(os.environ['API_KEY'])").text()
    failed = kernel.run(f"{cell}raise ValueError('no entry with ' + os.environ['API_KEY'])")
    assert "no entry with ***" in failed.error
    assert "hunter2" not in repr(failed.messages[1:])
    missing = kernel.run("%%bacalhau --secret NOT_SET_ANYWHERE\n1")
    assert (
        "--secret NOT_SET_ANYWHERE: no environment variable nor a variable of the notebook"
        in missing.text("stderr") + missing.error
    )


def test_commands_about_jobs(kernel):
    kernel.run("%%bacalhau -o k\nprint('words')\n1")
    name = kernel.run("k.id[:10]").value.strip("'")
    assert name in kernel.run("%bacalhau jobs").text()
    assert kernel.run(f"%bacalhau logs {name}").text() == "words\n"
    assert re.search(r": (sandbox|process), \d+ slots?,", kernel.run("%bacalhau nodes").text())
    assert "0 not ended" in kernel.run("%bacalhau status").text()
    assert "--shards" in kernel.run("%bacalhau --help").text()
    assert "no job with an id" in kernel.run("%bacalhau logs j-ffffffff").text("stderr")
    assert "takes a job's id" in kernel.run("%bacalhau cancel").text("stderr")
    assert "has ended already: Completed" in kernel.run(f"%bacalhau cancel {name}").text()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("%bacalhau list", "no such command; here it is jobs"),
        ("%bacalhau job describe j-1", "here it is jobs, attach ID, logs ID or cancel ID"),
        ("%bacalhau jbos", "did you mean jobs?"),
        ("%bacalhau --shards=3", "options belong to a cell: %%bacalhau --shards=3 above its code"),
        ("%bacalhau what", "it knows status, jobs, logs"),
    ],
)
def test_a_word_that_is_no_command_is_answered_with_one(kernel, line, told):
    assert told in kernel.run(line).text("stderr")


def test_a_job_from_python_can_be_awaited(kernel):
    shown = kernel.run("one = bj.submit('shard.index', shards=3)\n(await one).values(), one.wait(0)")
    assert shown.value == "([0, 1, 2], True)"
    refused = kernel.run("bj.submit('1', df='x')")
    assert "job.result().df() has the frame" in refused.error
    assert "source: the text of a cell is needed, not a function" in kernel.run("bj.submit(lambda: 1)").error


def test_options_are_completed_and_names_in_the_body_still_are(kernel):
    assert {"--shards", "--shard-size"} <= set(kernel.complete("%%bacalhau --sh"))
    assert "container" in kernel.complete("%%bacalhau --isolation ")
    assert kernel.complete("%bacalhau ne") == ["network"]
    assert "path" in str(kernel.complete("%%bacalhau --shards 2\nimport os\nos.pat"))


def test_loading_twice_changes_nothing_and_unloading_takes_everything_back(fresh):
    kernel = fresh()
    count = "len(get_ipython().Completer.custom_matchers)"
    kernel.run("%load_ext bacalhau_jupyter")
    once = kernel.run(count).value
    kernel.run("%reload_ext bacalhau_jupyter")
    assert kernel.run(count).value == once
    assert "shard 0: 1" in kernel.run("%%bacalhau\n1").value
    kernel.run("%unload_ext bacalhau_jupyter")
    assert int(kernel.run(count).value) == int(once) - 1
    assert "not found" in kernel.run("%%bacalhau\n1").text("stderr")
    kernel.run("%load_ext bacalhau_jupyter")
    assert "shard 0: 1" in kernel.run("%%bacalhau\n1").value


def test_loading_imports_nothing_heavy(fresh):
    kernel = fresh()
    kernel.run("import sys, bacalhau_jupyter.magics")
    heavy = "{'pandas', 'pyarrow', 'numpy', 'ipywidgets', 'anywidget', 'docker', 'bacalhau_node.node'}"
    assert kernel.run(f"{heavy} & set(sys.modules)").value == "set()"


def test_a_plain_local_job_imports_no_optional_package(fresh):
    kernel = fresh()
    kernel.run("%load_ext bacalhau_jupyter")
    kernel.run("%%bacalhau\n1")
    optional = "{'libp2p', 'trio', 'aiohttp', 'obstore', 'aioipfs', 'boto3', 'ipywidgets', 'pandas'}"
    assert kernel.run(f"import sys\n{optional} & set(sys.modules)").value == "set()"
