"""Results of one cell as the input of the next, downloaded, and taken again."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WRITES = "import json\n(outputs / 'part.json').write_text(json.dumps(shard.index))\nshard.index"
READS = "{path.name: path.read_text() for path in inputs}"


def test_a_job_is_the_input_of_the_next_by_its_name_and_by_its_id(kernel):
    kernel.run(f"%%bacalhau --shards 2 -o first\n{WRITES}")
    both = {"part.json": "0", "part.shard-1.json": "1"}
    assert str(both) in kernel.run(f"%%bacalhau --input {{first}}\n{READS}").value
    name = kernel.run("first.id").value.strip("'")
    assert str(both) in kernel.run(f"%%bacalhau --input {{{name[:10]}}}/outputs --glob '*.json'\n{READS}").value
    assert str({"0.json": "0", "1.json": "1"}) in kernel.run(f"%%bacalhau -i {{first}}/values\n{READS}").value


def test_results_are_downloaded_where_the_line_says(kernel, tmp_path):
    shown = kernel.run(f"%%bacalhau --shards 2 --publish local:{tmp_path}/out -o kept\n{WRITES}")
    assert not shown.error
    name = kernel.run("kept.id").value.strip("'")
    target = tmp_path / "out" / name
    assert f"downloaded to {target}" in kernel.run("kept").value
    assert sorted(path.name for path in (target / "combined" / "outputs").iterdir()) == [
        "part.json",
        "part.shard-1.json",
    ]
    assert json.loads((target / "shards" / "1" / "value.json").read_text()) == 1


def test_a_folder_that_cant_be_written_loses_nothing(kernel, tmp_path):
    (tmp_path / "file").touch()
    code = f"import bacalhau_jupyter as bj\njob = bj.submit('1', publish='local:{tmp_path}/file')"
    assert not kernel.run(code).error
    assert kernel.run("job.wait(60), job.state, job.result().values()").value == "(True, 'Completed', [1])"
    assert f"not downloaded: {tmp_path}/file/" in kernel.run("job").value


def test_an_equal_jobs_result_is_taken_and_the_record_says_so(kernel, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("first")
    line = f"%%bacalhau --input {tmp_path}/data --reuse -o again\nimport time\n(inputs[0].read_text(), time.time_ns())"
    first = kernel.run(line).value
    assert "first" in first
    taken = kernel.run(line)
    assert taken.value == first
    assert "--reuse: the result of job" in kernel.run("again").value
    (tmp_path / "data" / "a.txt").write_text("another text")
    assert "another text" in kernel.run(line).value


def test_a_place_that_no_result_can_go_to_is_told_before_anything_runs(kernel):
    shown = kernel.run("%%bacalhau --publish nowhere\n1")
    assert re.search(r"--publish nowhere: results don't go there", shown.text("stderr"))


@contextmanager
def _slow(go: threading.Event) -> Iterator[str]:
    """The URL of a file that comes when it is told to."""
    data = b"n\n" + b"1\n" * 500_000

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"1"')
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(data[:1000])
            self.wfile.flush()
            go.wait(60)
            self.wfile.write(data[1000:])

        def log_message(self, *_args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/x.csv"
        finally:
            server.shutdown()


def test_what_is_fetched_is_shown_while_it_comes_and_named_by_its_cid_at_the_end(kernel):
    go = threading.Event()
    with _slow(go) as url:
        shown = kernel.send(f"%%bacalhau --input {url} --progress text -o far\nlen(inputs[0].read_text())")
        try:
            kernel.until(lambda: "fetching x.csv" in shown.text() or shown.idle)
            assert re.search(r"fetching x.csv \d+ \w+ of 1 MB", shown.text()), shown.error
        finally:
            go.set()
        kernel.until(lambda: shown.idle)
    assert "1000002" in shown.value
    assert re.search(r"fetched 1 file, 1 MB: \w{46,}", kernel.run("far").value)
