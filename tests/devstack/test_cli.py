"""`bacalhau-node` as it is typed: real processes, exit codes, and what is printed where."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bacalhau_node.content.car import CarReader
from bacalhau_node.testing.executor_suite import processes_with
from tests.wheels import wheel

MAIN = "import sys; sys.argv[0] = 'bacalhau-node'; from bacalhau_node.cli import main; main()"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "BACALHAU_DIR": str(tmp_path / "data"), "DOCKER_HOST": f"unix://{tmp_path}/no-daemon"}


def _run(environment: dict[str, str], folder: Path, *words: str, main: str = MAIN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", main, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextlib.contextmanager
def served(environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A server, and what it says when it is ready."""
    command = [sys.executable, "-c", MAIN, "serve", "--json", "--api", "127.0.0.1:0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def _fetch(url: str, *, method: str = "GET", **headers: str) -> Answer:
    """The answer to a request of somebody without a key."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=60) as found:
            return Answer(found.status, found.headers, found.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


def _script(folder: Path, source: str, name: str = "job.py") -> str:
    (folder / name).write_text(source)
    return name


def test_a_script_runs_with_the_module_beside_it_and_its_values_are_json(environment, tmp_path):
    (tmp_path / "beside.py").write_text("def doubled(n): return 2 * n")
    script = _script(tmp_path, "import beside\nprint('shard', shard.index)\nbeside.doubled(shard.index)")
    done = _run(environment, tmp_path, "run", script, "--shards", "3", "--json")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert sorted(lines) == [f"[shard {n}] shard {n}" for n in range(3)]
    summary = json.loads(last)
    assert summary["state"] == "Completed"
    assert [shard["value"] for shard in summary["shards"]] == [0, 2, 4]
    assert summary["cid"].startswith("b")


def test_packages_come_from_the_line_and_from_the_script(environment, tmp_path):
    wheel(tmp_path, "alpha", "1.0")
    wheel(tmp_path, "beta", "2.0")
    environment |= {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    script = _script(tmp_path, "# requires: alpha\nimport alpha, beta\nalpha.VERSION + beta.VERSION")
    done = _run(environment, tmp_path, "run", script, "--require", "beta>=2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shards"][0]["value"] == "1.02.0"


def test_a_failing_shard_is_named_and_the_exit_code_is_1(environment, tmp_path):
    done = _run(environment, tmp_path, "run", _script(tmp_path, "1 / shard.index"), "--shards", "2")
    assert done.returncode == 1
    assert "shard 0 failed: ZeroDivisionError: division by zero (job.py, line 1)" in done.stderr
    assert "1/2 shards, failed: 0" in done.stderr


def test_results_are_downloaded_and_equal_names_never_overwrite_each_other(environment, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    script = _script(tmp_path, "(outputs / 'copy.txt').write_text(inputs[0].read_text())\nprint(inputs[0].name)")
    words = ("run", script, "-i", "a.txt", "-i", "b.txt", "--shards", "2", "--download", "out")
    done = _run(environment, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert [(out / "shards" / n / "outputs" / "copy.txt").read_text() for n in "01"] == ["a.txt", "b.txt"]
    assert sorted(path.name for path in (out / "combined" / "outputs").iterdir()) == ["copy.shard-1.txt", "copy.txt"]
    assert (out / "combined" / "stdout").read_text() == "a.txt\nb.txt\n"
    assert (out / "shards" / "0" / "exit_code").read_text() == "0\n"
    again = _run(environment, tmp_path, *words)
    assert again.returncode == 1
    assert "is there already" in again.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("run",), "nothing to run"),
        (("run", "no.py"), "no.py can't be read"),
        (("run", "job.py", "--shards", "0"), "at least 1"),
        (("run", "job.py", "--shard", "2"), "No such option: --shard; did you mean --shards?"),
        (("run", "job.py", "--concurrency", "2"), "No such option: --concurrency; it is called --replicas here"),
        (("job", "list"), "No such command 'job list'. It is called here: bacalhau-node list"),
        (("docker", "run", "debian", "true"), "bacalhau-node run --image NAME -- COMMAND…"),
        (("run", "job.py", "--memory", "much"), "not a size"),
        (("run", "job.py", "-i", "nowhere"), "no such file or folder"),
        (("run", "bad.py"), "not a Python program"),
        (("run", "job.py", "--shards", "2", "--batch-size", "2"), "one of"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(environment, tmp_path, words, text):
    _script(tmp_path, "1")
    _script(tmp_path, "def", "bad.py")
    done = _run(environment, tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("serve",), ("devstack",), ("list", "--node", "127.0.0.1:1")])
def test_what_needs_aiohttp_says_how_to_install_it(environment, tmp_path, words):
    done = _run(environment, tmp_path, *words, main=f"import sys; sys.modules['aiohttp'] = None; {MAIN}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "pip install 'bacalhau-jupyter[http]'" in done.stderr


def test_packages_are_for_python_files(environment, tmp_path):
    done = _run(environment, tmp_path, "run", _script(tmp_path, "true", "job.sh"), "--raw", "--require", "alpha")
    assert done.returncode == 2
    assert "--require: packages are for a FILE.py" in done.stderr


def test_a_shell_script_fails_with_its_own_exit_code_named(environment, tmp_path):
    done = _run(environment, tmp_path, "run", "--raw", _script(tmp_path, "echo out; exit 3", "job.sh"), "--json")
    assert done.returncode == 1
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["shards"][0]["exit_code"] == 3
    assert done.stdout.startswith("out\n")


def test_what_no_node_can_run_says_what_each_lacks(environment, tmp_path):
    script = _script(tmp_path, "1")
    for words, text in ((("--gpu", "1"), "no NVIDIA driver"), (("--memory", "10TB"), "--memory 10 TB")):
        done = _run(environment, tmp_path, "run", script, *words)
        assert done.returncode == 1
        assert text in done.stderr


def test_an_interrupt_ends_the_job_and_its_processes(environment, tmp_path):
    mark = f"86400.{time.monotonic_ns()}"
    source = f"import subprocess\nprint('here', flush=True)\nwhile True: subprocess.run(['sleep', '{mark}'])"
    script = _script(tmp_path, source)
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "run", script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert ": stopped; bacalhau-node get j-" in process.stderr.read()
    assert processes_with(mark) == []


def test_doctor_says_what_works_and_what_to_do(environment, tmp_path):
    done = _run(environment, tmp_path, "doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0
    assert findings["executor process"]["state"] == "ok"
    assert findings["executor docker"]["state"] == "warning"
    assert "no-daemon" in findings["executor docker"]["detail"]


def test_the_version_is_that_of_the_package(environment, tmp_path):
    assert json.loads(_run(environment, tmp_path, "version", "--json").stdout) == {"version": "0.1.0"}


def test_content_goes_into_the_store_and_comes_back(environment, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("first line\n")
    put = _run(environment, tmp_path, "put", "mine", "--json")
    assert put.returncode == 0, put.stderr
    stored = json.loads(put.stdout)
    assert (stored["files"], stored["bytes"], stored["profile"]) == (1, 11, "unixfs-v0-2015")
    assert _run(environment, tmp_path, "put", "mine").stdout.strip() == stored["cid"]
    assert _run(environment, tmp_path, "cat", f"{stored['cid']}/a.txt").stdout == "first line\n"
    assert (
        json.loads(_run(environment, tmp_path, "cat", f"ipfs://{stored['cid']}/a.txt", "--json").stdout)["bytes"] == 11
    )
    got = _run(environment, tmp_path, "get", stored["cid"], "--output", "back")
    assert got.returncode == 0, got.stderr
    assert (tmp_path / "back" / "a.txt").read_text() == "first line\n"
    for words, code, says in (
        (("cat", stored["cid"]), 1, "folder"),
        (("cat", f"{stored['cid']}/b.txt"), 1, "b.txt"),
        (("cat", "hello"), 2, "hello"),
        (
            ("get", "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"),
            1,
            "nobody is known who has it: name an IPFS daemon (BACALHAU_IPFS_CONNECT=",
        ),
        (("put", "nothing"), 2, "does not exist"),
    ):
        done = _run(environment, tmp_path, *words)
        assert (done.returncode, says in done.stderr) == (code, True), done.stderr


def test_a_jobs_result_is_found_by_its_cid_and_downloaded_where_the_line_says(environment, tmp_path):
    script = _script(tmp_path, "(outputs / 'r.csv').write_text(str(shard.index))")
    done = _run(environment, tmp_path, "run", script, "--shards", "2", "--publish", "local:out", "--json")
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout.splitlines()[-1])
    assert job["published"] == []
    combined = tmp_path / "out" / job["id"] / "combined" / "outputs"
    assert {path.name: path.read_text() for path in combined.iterdir()} == {"r.csv": "0", "r.shard-1.csv": "1"}
    got = _run(environment, tmp_path, "get", job["cid"], "--raw", "--output", "back", "--json")
    assert json.loads(got.stdout) == {"id": job["id"], "output": "back", "shards": 2}
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["shards"]
    assert _run(environment, tmp_path, "cat", f"{job['cid']}/r.shard-1.csv").stdout == "1"


def test_a_piece_is_given_out_to_whoever_has_its_cid(environment, tmp_path):
    script = _script(tmp_path, "(outputs / 'r.csv').write_text('result')")
    with served(environment) as ready:
        done = _run(environment, tmp_path, "run", script, "--publish", "filecoin", "--json")
        assert done.returncode == 0, done.stderr
        piece, manifest = json.loads(done.stdout.splitlines()[-1])["published"]
        told = json.loads(Path(manifest).read_text())
        url = f"{ready['api']}{told['url']}"
        whole = _fetch(url)
        assert whole.status == 200
        car = whole.body
        assert (len(car), piece) == (told["piece"]["payload"], f"piece {told['piece']['cid']}")
        reader = CarReader()
        blocks = reader.feed(car)  # each is checked against its CID
        reader.end()
        assert [str(root) for root in reader.roots or ()] == [told["root"]]
        assert any(b"result" in block for _, block in blocks)
        part = _fetch(url, Range="bytes=10-19")
        assert (part.status, part.body, part.headers["Content-Range"]) == (206, car[10:20], f"bytes 10-19/{len(car)}")
        assert _fetch(url, Range="bytes=-5").body == car[-5:]
        assert _fetch(url, Range=f"bytes={len(car)}-").status == 416
        head = _fetch(url, method="HEAD")
        assert (head.status, head.headers["Content-Length"], head.body) == (200, str(len(car)), b"")
        assert _fetch(f"{ready['api']}/piece/{told['piece']['cid_v1']}").status == 404
        assert _fetch(f"{ready['api']}/piece/..%2Findex").status == 404
