"""Images for tests, made from files of this machine: nothing is pulled.

    python tests/images.py        # makes them and prints their names

`shell_image` has a shell and a few programs; `python_image` has a Python (this one's version, its
standard library) besides, `base_image` a package as well. All are named by a hash of what goes in,
so they are made once.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import docker

PROGRAMS = ("sh", "cat", "env", "false", "id", "ls", "mkdir", "sleep", "touch", "true")
LEFT_OUT = {"test", "idlelib", "lib2to3", "ensurepip", "turtledemo", "tkinter", "site-packages", "dist-packages"}
FOLDERS = ("etc", "inputs", "outputs", "slot", "shared", "tmp", "work")


@cache
def shell_image(host: str) -> str:
    """An image without Python; its own folder is /work, and GREETING is set."""
    programs = [Path(found).resolve() for name in PROGRAMS if (found := shutil.which(name))]
    links = {f"bin/{name}": str(Path(found).resolve()) for name in PROGRAMS if (found := shutil.which(name))}
    return _image(host, "shell", [*programs, *_libraries(programs)], links)


@cache
def python_image(host: str) -> str:
    """An image with `python3` and nothing else for Python."""
    return _image(host, "python", *_python())


def _python() -> tuple[list[Path], dict[str, str]]:
    """(files, links) of a Python with its standard library, and of a few programs."""
    executable = Path(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined]  # the one below a venv
    library = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in _walk(library) if "_tkinter" not in path.name]
    shared = [path for path in modules if path.suffix == ".so"]
    programs = [Path(found).resolve() for name in PROGRAMS if (found := shutil.which(name))]
    links = {f"bin/{name}": str(Path(found).resolve()) for name in PROGRAMS if (found := shutil.which(name))}
    links["usr/local/bin/python3"] = str(executable)
    files = [executable, *modules, *programs, *_libraries([executable, *shared, *programs])]
    return files, links


@cache
def base_image(host: str) -> str:
    """A small stand-in for the base image: a Python with one package that no other has, `onlyhere` 1.0."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = {
        f"{library}/onlyhere.py": "VERSION = '1.0'\n",
        f"{library}/onlyhere-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: onlyhere\nVersion: 1.0\n",
    }
    return _image(host, "base", *_python(), texts)


def _walk(folder: Path) -> Iterator[Path]:
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
        yield from (Path(base, name) for name in names)


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """The shared libraries, with the loader, that these programs want."""
    text = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False).stdout
    words = (word for line in text.splitlines() if line.startswith("\t") for word in line.split())
    return {Path(word) for word in words if word.startswith("/") and Path(word).is_file()}


def _image(
    host: str, kind: str, files: list[Path], links: dict[str, str], texts: Mapping[str, str] = MappingProxyType({})
) -> str:
    facts = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    content = "\n".join((*facts, *map(str, links.items()), *map(str, texts.items()), Path(__file__).read_text()))
    tag = hashlib.sha256(content.encode()).hexdigest()[:12]
    name = f"bacalhau-jupyter/test-{kind}"
    api = docker.APIClient(base_url=host, timeout=300)
    try:
        if not api.images(f"{name}:{tag}", quiet=True):
            changes = ["ENV GREETING=hello", "WORKDIR /work", "ENV PATH=/usr/local/bin:/usr/bin:/bin"]
            api.import_image_from_data(_tar(files, links, texts), repository=name, tag=tag, changes=changes)
    finally:
        api.close()
    return f"{name}:{tag}"


def _tar(files: list[Path], links: dict[str, str], texts: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for folder in FOLDERS:
            member = tarfile.TarInfo(folder)
            member.type, member.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(member)
        for path in dict.fromkeys(files):
            member = tarfile.TarInfo(str(path).lstrip("/"))
            member.size, member.mode = path.stat().st_size, 0o755
            with path.open("rb") as file:
                tar.addfile(member, file)
        for name, text in texts.items():
            member = tarfile.TarInfo(name.lstrip("/"))
            member.size, member.mode = len(text.encode()), 0o644
            tar.addfile(member, io.BytesIO(text.encode()))
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            if f"/{name}" != target:
                tar.addfile(member)
    return buffer.getvalue()


if __name__ == "__main__":
    address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    print(shell_image(address))
    print(python_image(address))
    print(base_image(address))
