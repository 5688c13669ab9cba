"""The real base image, from nothing: a Debian root by `debootstrap`, `docker import`, then the project's Dockerfile.

    python tests/debian_image.py        # makes it and prints its name

Made once for each text of the Dockerfile and each Debian; a minute and a half, 300 MB from the Debian mirror of
this machine and 70 MB from the package index. Only root may make a Debian root.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import docker

from bacalhau_node.executors.base_image import RECIPE

SUITE = "bookworm"
INCLUDED = ("ca-certificates", "python-is-python3", "python3", "python3-pip")
PACKAGES = "pandas pyarrow"
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")


def problem() -> str | None:
    """Why it can't be made here, or None."""
    if os.geteuid() != 0:
        return "only root may make a Debian root"
    return None if shutil.which("debootstrap", path=_path()) else "debootstrap is not installed (`make test` does it)"


def debian_image(host: str) -> str:
    """The name of the base image on the daemon at `host`, made if it is not there."""
    recipe = (RECIPE / "Dockerfile").read_bytes() + Path(__file__).read_bytes()
    tag = hashlib.sha256(recipe).hexdigest()[:12]
    name, below = f"bacalhau-jupyter/test-debian-base:{tag}", f"bacalhau-jupyter/test-debian:{tag}"
    with contextlib.closing(docker.DockerClient(base_url=host, timeout=600)) as client:
        if not _has(client, name):
            if not _has(client, below):
                _import(host, below)
            client.images.build(
                path=str(RECIPE),
                tag=name,
                network_mode="host",
                buildargs={"FROM_IMAGE": below, "PACKAGES": PACKAGES},
            )
    return name


def _has(client: docker.DockerClient, name: str) -> bool:
    return bool(client.images.list(name=name))


def _import(host: str, name: str) -> None:
    """A Debian with Python and pip as an image."""
    with tempfile.TemporaryDirectory(prefix="debian-") as folder:
        root = Path(folder, "root")
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(INCLUDED)}", SUITE, str(root), _mirror()]
        made = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PATH": _path()})
        if made.returncode:
            raise RuntimeError(f"debootstrap ended with {made.returncode}: {made.stdout[-2000:]}")
        if Path("/", CERTIFICATES).is_file():  # this machine may trust a proxy of its own
            shutil.copyfile(Path("/", CERTIFICATES), root / CERTIFICATES)
        # Debian's pip wants to be told that the image is the environment
        change = ["--change", "ENV PIP_BREAK_SYSTEM_PACKAGES=1"]
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(["docker", "-H", host, "import", *change, "-", name], check=True, stdin=tar.stdout)


def _mirror() -> str:
    """Where this machine's own Debian comes from, if it is one; else Debian's usual place, which debootstrap knows."""
    if not shutil.which("apt-get"):
        return ""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)"]
    lines = subprocess.run(asked, check=False, capture_output=True, text=True).stdout.splitlines()
    return next((line.split()[0] for line in lines if line.split()[1:] == [SUITE, "main"]), "")


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


if __name__ == "__main__":
    print(problem() or debian_image(sys.argv[1] if sys.argv[1:] else os.environ["DOCKER_HOST"]))
