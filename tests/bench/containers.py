"""`docker run` in a loop: the isolation that others would get, one container a call.

The image is empty, and this machine's interpreter is bound into it read-only: nothing is pulled or built.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.bench.harness import WORKERS

BOUND = ("/usr", "/lib", "/lib64", "/bin")


def _empty() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(".empty"))
    return buffer.getvalue()


@contextmanager
def image() -> Iterator[str]:
    """An empty image for as long as it is needed."""
    name = f"bench-{uuid.uuid4().hex[:8]}"
    subprocess.run(["docker", "import", "-", name], input=_empty(), check=True, capture_output=True)
    try:
        yield name
    finally:
        subprocess.run(["docker", "rmi", "--force", name], check=False, capture_output=True)


def docker_run(name: str, code: str = "print(1)") -> str:
    """One `docker run` of Python without a network; what it printed."""
    folders = {*BOUND, sys.base_prefix, str(Path(os.path.realpath(sys.executable)).parent.parent)}
    binds = [word for folder in sorted(folders) if Path(folder).exists() for word in ("-v", f"{folder}:{folder}:ro")]
    command = ["docker", "run", "--rm", "--network=none", *binds, name, os.path.realpath(sys.executable), "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def docker_loop(name: str, count: int) -> list[str]:
    """So many `docker run`s, two at a time."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda _: docker_run(name), range(count)))


def has_docker_command() -> bool:
    """Whether the `docker` command is here."""
    return shutil.which("docker") is not None
