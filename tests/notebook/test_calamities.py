"""What no cell does: a kernel is killed, the Docker daemon goes away and comes back, a file may not be read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import docker_address
from tests.notebook.bad_input import EXECUTORS, NO_SANDBOX, Referee, referee
from tests.notebook.kernels import Kernel
from tests.notebook.test_bad_input import GATES
from tests.services import private_docker

SETPRIV = shutil.which("setpriv")
AS_ANYONE = "-dac_override,-dac_read_search"
"""What lets root read everything."""


@pytest.fixture(params=[pytest.param(name, marks=GATES.get(name, ())) for name in EXECUTORS])
def court(request, tmp_path) -> Iterator[Referee]:
    with referee(tmp_path, request.param, docker_address()) as one:
        yield one


def test_nothing_runs_on_after_a_kernel_that_was_killed_and_the_next_one_tidies_up(court, tmp_path):
    shown = court.kernel.send("%%bacalhau --shards 4\nimport time\nprint('on')\ntime.sleep(600)")
    court.kernel.until(lambda: "on\n" in shown.text())
    court.kernel.close(now=True)
    assert court.still_running() == ()
    after = Kernel(tmp_path, **court.environment)
    told = after.run("%load_ext bacalhau_jupyter")
    after.until(lambda: "1 unfinished job: `%bacalhau attach j-" in told.text())
    assert "shard 0: 7" in after.run("%%bacalhau\n7").value
    job = re.search(r"attach (j-\w+)", told.text())
    assert "stopped before" in after.run(f"%bacalhau attach {job[1]}").text() + after.run("%bacalhau jobs").text()
    after.close()
    assert court.left_by_the_kernel() == ()


@pytest.mark.slow
def test_one_of_a_hundred_killed_leaves_ninety_nine_and_a_thousand_are_only_more(court):
    body = "import os\nif shard.index == 50: os.kill(os.getpid(), 9)\nshard.index"
    shown = court.kernel.run(f"%%bacalhau --shards 100 -o j\n{body}")
    assert "shard 50: the process was killed by SIGKILL" in shown.error
    kept = "j.result(partial=True).values() == [n for n in range(100) if n != 50]"
    assert court.kernel.run(kept).value == "True"
    court.kernel.run("%%bacalhau --shards 1000 -o m\nshard.index")
    assert court.kernel.run("m.result().values() == list(range(1000))").value == "True"


@pytest.mark.docker
@pytest.mark.slow
def test_cells_go_on_while_the_docker_daemon_is_away_and_use_it_again(tmp_path):
    dockerd = shutil.which("dockerd") or shutil.which("dockerd", path="/usr/sbin:/sbin")
    if dockerd is None or os.geteuid() != 0:
        pytest.skip("only root may start a Docker daemon of its own")
    address = tmp_path / "d.sock"
    kernel = Kernel(tmp_path, DOCKER_HOST=f"unix://{address}", **NO_SANDBOX)
    try:
        with private_docker(dockerd) as host:
            address.symlink_to(host.removeprefix("unix://"))
            kernel.run("%load_ext bacalhau_jupyter")
            assert _ran(kernel, "(docker")
            shown = kernel.send("%%bacalhau --shards 4 -o j\nimport time\nprint('on')\ntime.sleep(600)")
            kernel.until(lambda: "on\n" in shown.text())
        kernel.until(lambda: shown.idle)
        assert f"the Docker daemon at unix://{address} does" in shown.error
        assert "Error(" not in shown.error
        assert _ran(kernel, "(process")
        with private_docker(dockerd) as host:
            address.unlink()
            address.symlink_to(host.removeprefix("unix://"))
            kernel.until(lambda: _ran(kernel, "(docker"))
            kernel.close()
    finally:
        kernel.close()


def _ran(kernel: Kernel, where: str) -> bool:
    """Whether the next job runs there."""
    kernel.run("%%bacalhau --progress none -o r\n1")
    return where in kernel.run("r").value


@pytest.mark.parametrize(
    "spoil", [lambda path: path.chmod(0), lambda path: path.parent.chmod(0o300)], ids=["file", "folder"]
)
def test_what_may_not_be_read_is_named_before_there_is_a_job(tmp_path, spoil: Callable[[Path], object]):
    if os.geteuid() == 0 and SETPRIV is None:
        pytest.skip("root may read everything, and there is no setpriv by which it may not")
    wrap = [SETPRIV, "--bounding-set", AS_ANYONE, "--inh-caps", AS_ANYONE] if os.geteuid() == 0 else []
    data = tmp_path / "flights"
    data.mkdir()
    (data / "a.csv").write_text("a")
    spoil(data / "a.csv")
    kernel = Kernel(tmp_path, wrap=wrap)
    try:
        kernel.run("%load_ext bacalhau_jupyter\nimport bacalhau_jupyter as bj")
        shown = kernel.run("%%bacalhau -i flights\n1")
        assert re.search(r"ContentError: .*flights.* can't be (read|listed): .*[Pp]ermission denied", shown.error)
        assert kernel.run("bj.jobs()").value == "[]"
    finally:
        kernel.close()
        data.chmod(0o700)
