"""A notebook and a node elsewhere: the same cells, with inputs that travel and results that come back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.notebook.kernels import Kernel, environment

MAIN = "import sys; sys.argv[0] = 'bacalhau-node'; from bacalhau_node.cli import main; main()"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The URL of a node that another user serves, and its key."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", "--api", "127.0.0.1:0", "--json"],
        env=environment(tmp_path_factory.mktemp("server")),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield ready["api"], Path(ready["token"]).read_text()
        process.kill()


@pytest.fixture(scope="module")
def remote(url: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel whose jobs go there."""
    kernel = Kernel(tmp_path_factory.mktemp("notebook"), BACALHAU_JUPYTER_NODE=url[0], BACALHAU_API_KEY=url[1])
    kernel.run("%load_ext bacalhau_jupyter\nimport bacalhau_jupyter as bj")
    yield kernel
    kernel.close()


def test_a_cell_runs_there_with_the_inputs_of_here(remote, url, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.csv").write_text(f"n\n{number}\n")
    line = f"%%bacalhau -i {tmp_path} --glob '*.csv' --shards 2 --df t -o job"
    shown = remote.run(f"{line}\nimport pandas as pd\nprint(inputs[0].name)\npd.concat(map(pd.read_csv, inputs))")
    assert not shown.error, shown.error
    assert "4 local files" in shown.text()
    assert "[shard 1] 2.csv" in shown.text()
    assert remote.run("t.n.tolist()").value == "[0, 1, 2, 3]"
    assert url[0] in remote.run("print(job)").text()
    assert remote.run("[s.inputs for s in job.shards]").value == "[('0.csv', '1.csv'), ('2.csv', '3.csv')]"


def test_large_results_come_back_whole(remote):
    source = "import pandas as pd\npd.DataFrame({'n': range(200_000), 's': 'text'})"
    shown = remote.run(f"%%bacalhau --df big\n{source}")
    assert not shown.error, shown.error
    assert remote.run("len(big), int(big.n.sum()), big.s[199_999]").value == "(200000, 19999900000, 'text')"


def test_files_that_shards_wrote_are_fetched(remote):
    remote.run("%%bacalhau -o job --shards 2\n(outputs / f'{shard.index}.txt').write_text('x' * 100_000)\nNone")
    files = "sorted((path.name, path.stat().st_size) for path in job.result().files())"
    assert remote.run(files).value == "[('0.txt', 100000), ('1.txt', 100000)]"


def test_failures_and_logs_are_those_of_there(remote):
    shown = remote.run("%%bacalhau --shards 2 -o job\nprint('before')\n1 / shard.index")
    assert "ZeroDivisionError" in shown.error
    assert remote.run("print(job.logs(0))").text() == "before\n\n"


def test_stop_stops_the_job_there(remote):
    shown = remote.send("%%bacalhau -o job\nprint('on', flush=True)\nwhile True: pass")
    remote.until(lambda: "on" in shown.text())
    remote.manager.interrupt_kernel()
    remote.until(lambda: shown.idle)
    assert "stopped" in shown.error
    assert remote.run("job.wait(); job.state").value == "'Stopped'"


def test_a_line_may_name_another_node_and_its_jobs_are_found_again(remote, url):
    remote.run("%%bacalhau --node local -o here\n'here'")
    assert remote.run("here.result()[0]").value == "'here'"
    assert "this machine" in remote.run("print(here)").text()
    assert remote.run("here.id in {line.job for line in bj.jobs()}").value == "False"
    assert remote.run("bj.attach(here.id[:12]) is here").value == "True"
    assert "node" in remote.run("%bacalhau nodes").text()
    assert url[0] in remote.run("%bacalhau config").text()


def test_connect_says_where_jobs_go_and_changes_nothing_when_nobody_answers(remote, url):
    assert "the node in this kernel now" in remote.run("%bacalhau connect local").text()
    failed = remote.run("%bacalhau connect http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in failed.error
    assert "the node in this kernel" in remote.run("%bacalhau config").text()
    for wrong in ("http://example.org", "nonsense://x", "http://"):
        assert "UsageError" in remote.run(f"%bacalhau connect {wrong}").text("stderr")
    assert f"jobs go to {url[0]} now" in remote.run(f"%bacalhau connect {url[0]}").text()
    assert "takes the URL of a node" in remote.run("%bacalhau connect").text("stderr")


def test_a_dry_run_sends_nothing(remote, tmp_path):
    (tmp_path / "a.csv").write_text("x")
    before = remote.run("len(bj.jobs())").value
    assert "a.csv" in remote.run(f"%%bacalhau --dry-run -i {tmp_path}\n1").text()
    assert remote.run("len(bj.jobs())").value == before
