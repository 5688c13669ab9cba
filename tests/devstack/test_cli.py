"""`bacalhau-node` as it is typed: real processes, exit codes, and what is printed where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bacalhau_node.testing.executor_suite import processes_with
from tests.wheels import wheel

MAIN = "import sys; sys.argv[0] = 'bacalhau-node'; from bacalhau_node.cli import main; main()"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "BACALHAU_DIR": str(tmp_path / "data"), "DOCKER_HOST": f"unix://{tmp_path}/no-daemon"}


def _run(environment: dict[str, str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


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
    assert "shard 0 failed: ZeroDivisionError: division by zero" in done.stderr
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
        (("run", "job.py", "--shard", "2"), "No such option"),
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
        [sys.executable, "-c", MAIN, "run", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
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
