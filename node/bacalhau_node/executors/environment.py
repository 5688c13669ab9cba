"""The host environment: the notebook's own interpreter and packages, read-only, in an empty root.

Theory of operation (DESIGN section 6). A container for a cell needs the interpreter and the
packages that the notebook has, at the same paths, because virtual environments hold absolute
paths. So the image is a tar of a few kilobytes with mount points, links such as `/bin`, and a
passwd of two lines; the host's folders are bound over it, read-only. Nothing is built or
pulled, and the versions are the notebook's by construction.

What is bound: `/usr` (and `/bin`, `/lib*` where they are not links into it), every
`sys.prefix`, `sys.base_prefix`, the folders that the interpreter's links lead through, every
entry of `sys.path`, and a few files of `/etc` without which names, time zones, certificates
and fonts don't work. What is not: the home folder, the current folder (local modules travel as
source, so that the job runs the same elsewhere), `/etc` as a whole, sockets. Files inside a
prefix that hold credentials for package indexes are covered by an empty one.

`/sbin` is always a folder of the image, never a link: the daemon mounts its init there, and a
link into `/usr` would put that mount below ours.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

IMAGE_NAME: Final = "bacalhau-jupyter/host"
USER: Final = "shard"
MOUNT_POINTS: Final = ("etc", "inputs", "outputs", "proc", "run", "sbin", "shared", "slot", "sys", "dev", "usr")
_MERGED: Final = ("bin", "lib", "lib32", "lib64", "libx32")
_ETC: Final = ("alternatives", "fonts", "ld.so.cache", "localtime", "mime.types", "ssl/certs")
_SECRETS: Final = ("pip.conf", "uv.toml", ".condarc", "condarc", ".netrc", ".pypirc", "etc/pip.conf")
_MAX_LINKS: Final = 40
"""As many links as the kernel follows in one path before it gives up."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """What describes a running Python: the facts that `describe` needs, taken once."""

    executable: Path
    prefixes: tuple[Path, ...]
    path: tuple[str, ...]

    @classmethod
    def current(cls) -> Interpreter:
        """The interpreter that runs this code."""
        prefixes = dict.fromkeys((sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix))
        return cls(Path(sys.executable), tuple(map(Path, prefixes)), tuple(sys.path))


@dataclass(frozen=True, slots=True)
class HostEnvironment:
    """How to show this machine's Python to a container.

    `binds` are mounted read-only, each at its own path; `masks` are files below them that an
    empty file must cover. `search` are folders that the interpreter would not find by itself.
    `problem` says why this environment can't be used; the rest is then of no use.
    """

    executable: Path
    binds: tuple[Path, ...]
    masks: tuple[Path, ...]
    search: tuple[Path, ...]
    image: bytes
    tag: str
    problem: str | None = None

    def stamp(self) -> tuple[int, ...]:
        """Changes when a package is installed or removed: when the folders that are searched were last written.

        Those that no container is shown don't count: a notebook's own folder changes all the time.
        """
        folders = (*_search(sys.path, Path("/"), Path.home()), *self.search)
        return tuple(folder.stat().st_mtime_ns for folder in folders if folder.is_dir())

    def variables(self, base: Mapping[str, str]) -> dict[str, str]:
        """The environment of a container: names on an allow list, taken from `base` or set here."""
        folders = (str(self.executable.parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")
        found = {
            **user_variables(base),
            "PATH": ":".join(dict.fromkeys(folders)),
        }
        if self.search:
            found["PYTHONPATH"] = os.pathsep.join(map(str, self.search))
        return found


def user_variables(base: Mapping[str, str]) -> dict[str, str]:
    """What any container gets so that programs find a home, a name, a time zone and a language.

    Every cache lies below `/tmp`, the only place besides the outputs that can be written.
    """
    return {
        "HOME": "/tmp",  # noqa: S108 - the container's own tmpfs
        "USER": USER,
        "LOGNAME": USER,
        "LANG": base.get("LANG", "C.UTF-8"),
        "MPLCONFIGDIR": "/tmp/.matplotlib",  # noqa: S108 - as above
        "XDG_CACHE_HOME": "/tmp/.cache",  # noqa: S108 - as above
        **({"TZ": base["TZ"]} if "TZ" in base else {}),
    }


def describe(
    interpreter: Interpreter, *, uid: int, gid: int, root: Path = Path("/"), home: Path | None = None
) -> HostEnvironment:
    """The environment of `interpreter` for a container that runs as `uid:gid`.

    `root` and `home` are where the machine's files and the user's home lie; tests pass others.
    """
    home = home or Path.home()
    prefixes = tuple(dict.fromkeys(interpreter.prefixes))
    wanted = [
        *_system(root),
        *prefixes,
        *_links(interpreter.executable, prefixes),
        *_search(interpreter.path, root, home),
    ]
    binds = collapse(path for path in wanted if path.exists())
    image = _image(root, uid=uid, gid=gid)
    return HostEnvironment(
        executable=interpreter.executable,
        binds=binds,
        masks=_masks((*binds, *prefixes)),
        search=_beyond(_search(interpreter.path, root, home), (*prefixes, root / "usr")),
        image=image,
        tag=f"{IMAGE_NAME}:{hashlib.sha256(image).hexdigest()[:16]}",
        problem=_problem(interpreter, prefixes, home, root),
    )


def collapse(paths: Iterable[Path]) -> tuple[Path, ...]:
    """`paths` without those that lie below another one, shortest first."""
    kept: list[Path] = []
    for path in sorted(set(paths), key=lambda path: (len(path.parts), path)):
        if not any(path.is_relative_to(above) for above in kept):
            kept.append(path)
    return tuple(kept)


def _problem(interpreter: Interpreter, prefixes: Sequence[Path], home: Path, root: Path) -> str | None:
    if not interpreter.executable.is_absolute():
        name = str(interpreter.executable)
        return f"the notebook's interpreter has no path ({name!r}): start Jupyter from an installed Python"
    for prefix in prefixes:
        if _too_wide(prefix, root, home):
            return (
                f"the notebook's Python lies in {prefix} itself, so a container would see your whole home or machine: "
                "use a virtual environment, for example `python -m venv ~/venvs/jupyter`"
            )
    return None


def _too_wide(folder: Path, root: Path, home: Path) -> bool:
    """Whether binding `folder` would show the machine's root or the user's home, or hide one of the image's own."""
    own = [root / name for name in (*MOUNT_POINTS, "tmp") if name != "usr"]
    return folder == root or home.is_relative_to(folder) or folder in own


def _system(root: Path) -> list[Path]:
    unmerged = [root / name for name in _MERGED if not (root / name).is_symlink()]
    ldconfig = [] if (root / "sbin").is_symlink() else [root / "sbin/ldconfig"]
    return [root / "usr", *unmerged, *ldconfig, *(root / "etc" / name for name in _ETC)]


def _masks(folders: Iterable[Path]) -> tuple[Path, ...]:
    found = (folder / name for folder in dict.fromkeys(folders) for name in _SECRETS)
    return tuple(path for path in found if path.is_file())


def _links(executable: Path, prefixes: Sequence[Path]) -> list[Path]:
    """The prefixes that the interpreter's chain of links leads through and that no prefix covers.

    A virtual environment's `bin/python` often names `…/cpython-3.12/bin/python3.12`, where
    `cpython-3.12` is itself a link to the folder that `sys.base_prefix` reports.
    """
    found: list[Path] = []
    hop = executable
    for _ in range(_MAX_LINKS):
        if not any(hop.is_relative_to(prefix) for prefix in prefixes):
            found.append(hop.parent.parent if hop.parent.name == "bin" else hop.parent)
        if not hop.is_symlink():
            break
        hop = Path(os.path.normpath(hop.parent / hop.readlink()))
    return found


def _search(entries: Iterable[str], root: Path, home: Path) -> list[Path]:
    """The entries of `sys.path` that a container may see: all but the current folder, home, and relative ones."""
    here = Path.cwd()
    paths = (Path(entry) for entry in entries if entry)
    return [
        path
        for path in paths
        if path.is_absolute() and path != here and path.exists() and not _too_wide(path, root, home)
    ]


def _beyond(paths: Iterable[Path], known: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(path for path in dict.fromkeys(paths) if not any(path.is_relative_to(folder) for folder in known))


def _image(root: Path, *, uid: int, gid: int) -> bytes:
    """The tar of the empty root: equal bytes for equal machines, so its hash can name the image."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in MOUNT_POINTS:
            tar.addfile(_member(name, tarfile.DIRTYPE, 0o755))
        tar.addfile(_member("tmp", tarfile.DIRTYPE, 0o1777))  # a tmpfs takes the mode of its mount point
        for name in _MERGED:
            if (root / name).is_symlink():
                tar.addfile(_member(name, tarfile.SYMTYPE, 0o777, link=str((root / name).readlink())))
        if (root / "sbin").is_symlink():
            tar.addfile(_member("sbin/ldconfig", tarfile.SYMTYPE, 0o777, link="../usr/sbin/ldconfig"))
        for name, text in (
            ("etc/passwd", _passwd(uid, gid)),
            ("etc/group", f"root:x:0:\n{USER}:x:{gid}:\n" if gid else "root:x:0:\n"),
        ):
            data = text.encode()
            tar.addfile(_member(name, tarfile.REGTYPE, 0o644, size=len(data)), io.BytesIO(data))
    return buffer.getvalue()


def _passwd(uid: int, gid: int) -> str:
    root_line = "root:x:0:0::/tmp:/bin/sh\n"
    return root_line + f"{USER}:x:{uid}:{gid}::/tmp:/bin/sh\n" if uid else root_line


def _member(name: str, kind: bytes, mode: int, *, link: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.linkname, member.size = kind, mode, link, size
    return member
