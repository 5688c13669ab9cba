"""Run a command with the services that the tests need: a Docker daemon that answers.

    python tests/services.py COMMAND [ARGUMENT]...

A daemon that answers is used as it is. Where none does, root with `dockerd` gets a private one for as
long as the command runs: its own data, its own socket, no bridge, no firewall rules, so nothing
of the machine changes. Where neither is possible the command runs all the same, and the tests
that need a daemon say that they were left out and why.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DEFAULT_HOST = "unix:///var/run/docker.sock"
START_SECONDS = 60
STOP_SECONDS = 20


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("docker", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket's path in place of a host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def answers(host: str, *, timeout: float = 2.0) -> bool:
    """Whether a Docker daemon answers a ping at `host` ("unix:///path"; others are asked by the docker package)."""
    if not host.startswith("unix://"):
        return _answers_remotely(host)
    connection = UnixConnection(host.removeprefix("unix://"), timeout)
    try:
        connection.request("GET", "/_ping")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _answers_remotely(host: str) -> bool:
    import docker  # noqa: PLC0415  only a remote daemon needs it

    try:
        client = docker.DockerClient(base_url=host, timeout=5)
    except docker.errors.DockerException:
        return False
    with client:
        return bool(client.ping())


def find_docker() -> str | None:
    """The address of a daemon that answers: DOCKER_HOST, else the machine's own."""
    host = os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    return host if answers(host) else None


@contextmanager
def private_docker(dockerd: str, *, programs: Path | None = None) -> Iterator[str]:
    """Run a daemon of our own and yield its address; stop it and remove all of its files afterwards.

    `programs`: a folder in which it looks for helper programs before anywhere else.
    """
    found = os.pathsep.join([*([str(programs)] if programs else []), os.environ.get("PATH", os.defpath)])
    folder = Path(tempfile.mkdtemp(prefix="dockerd-"))
    host = f"unix://{folder}/d.sock"
    options = ["--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid", "-H", host]
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [dockerd, *map(str, options), "--bridge=none", "--iptables=false"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PATH": found},
        )
    try:
        _wait_for(host, daemon, folder / "log")
        yield host
    finally:
        _stop(daemon)
        _remove(folder)


def _wait_for(host: str, daemon: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not answers(host):
        if daemon.poll() is not None or time.monotonic() > deadline:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise RuntimeError(f"a private Docker daemon did not start:\n{last}")
        time.sleep(0.1)


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()


def _remove(folder: Path) -> None:
    mounts = Path("/proc/mounts").read_text().splitlines()
    inside = [line.split()[1] for line in mounts if line.split()[1].startswith(f"{folder}/")]
    for mount in sorted(inside, reverse=True):
        subprocess.run(["umount", "-l", mount], check=False)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def docker_daemon() -> Iterator[str | None]:
    """Yield the address of a Docker daemon: one that answers, a private one, or None (and say why)."""
    host = find_docker()
    dockerd = shutil.which("dockerd") or shutil.which("dockerd", path="/usr/sbin:/sbin")
    if host:
        yield host
    elif dockerd and os.geteuid() == 0:
        try:
            with private_docker(dockerd) as own:
                yield own
        except RuntimeError as problem:
            print(problem, flush=True)
            yield None
    else:
        print(f"No Docker daemon: {'only root may start one' if dockerd else 'dockerd is not installed'}", flush=True)
        yield None


def main(command: list[str]) -> int:
    """Run `command` with the services; its exit status."""
    if not command:
        raise SystemExit(__doc__)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    with docker_daemon() as host:
        environment = os.environ | ({"DOCKER_HOST": host} if host else {})
        with subprocess.Popen(command, env=environment) as child:
            signal.signal(signal.SIGTERM, lambda *_: child.terminate())
            while True:
                with suppress(KeyboardInterrupt):  # the child gets the same signal and ends by itself
                    return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
