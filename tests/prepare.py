"""Make a fresh machine ready: the virtual environment, this project in it, Debian packages.

The Makefile calls this file with whatever `python3` is on the path, before anything is installed, so
it uses the standard library only, and no syntax newer than Python 3.8. Each step looks at what is
there and does the rest: a set-up that was interrupted goes on where it stopped, and a finished one
costs nothing.

    python3 tests/prepare.py install EXTRA    # .venv with `-e .[EXTRA]`, at the versions of constraints.txt
    python3 tests/prepare.py debian NAME...   # programs by name: chromium, dockerd, bwrap
    python3 tests/prepare.py kubo             # an IPFS daemon for tests, built from its source: needs Go 1.26
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST = (3, 11)
PACKAGE_OF = {
    "chromium": "chromium",
    "dockerd": "docker.io",
    "bwrap": "bubblewrap",
    "node": "nodejs",
    "debootstrap": "debootstrap",
}
KUBO = "0.42.0"
QUICK_APT = ("-q", "-y", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30")


def run(*command: object) -> None:
    """Run a program with its output on ours; raises `CalledProcessError` when it fails."""
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT)


def version_of(python: str | Path) -> tuple[int, int]:
    """The (major, minor) version of an interpreter; (0, 0) when it doesn't run."""
    ask = "import json, sys; print(json.dumps(sys.version_info[:2]))"
    try:
        answer = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return 0, 0
    major, minor = json.loads(answer.stdout)
    return major, minor


def find_python() -> str:
    """The interpreter for the environment: the one that runs this, else the newest suitable one on the path."""
    for name in (sys.executable, "python3.13", "python3.12", "python3.11"):
        found = shutil.which(name)
        if found and version_of(found) >= OLDEST:
            return found
    running = ".".join(map(str, sys.version_info[:2]))
    raise SystemExit(
        f"python3 is {running}, and 3.11 or newer is needed: install it, or name it: make PYTHON=/path/to/python3.12"
    )


def make_environment() -> Path:
    """Return the interpreter of `.venv`, made anew if it is missing, broken or half made."""
    python = VENV / "bin" / "python"
    uv = shutil.which("uv")
    if version_of(python) >= OLDEST and (uv or (VENV / "bin" / "pip").exists()):
        return python
    shutil.rmtree(VENV, ignore_errors=True)
    if uv:
        run(uv, "venv", "--quiet", "--python", find_python(), VENV)
        return python
    base = find_python()
    try:
        run(base, "-m", "venv", VENV)
    except subprocess.CalledProcessError:  # Debian's python3 comes without ensurepip
        shutil.rmtree(VENV, ignore_errors=True)
        problem = install_debian(f"python{'.'.join(map(str, version_of(base)))}-venv")
        if problem:
            raise SystemExit(f"python3 can't make a virtual environment: {problem}") from None
        run(base, "-m", "venv", VENV)
    return python


def find_uv(python: Path) -> str:
    """Return uv, the installer: the machine's, else one put into the environment."""
    own = VENV / "bin" / "uv"
    found = shutil.which("uv") or (str(own) if own.exists() else None)
    if found is None:
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv")
        found = str(own)
    return found


def can_compile(python: Path) -> str | None:
    """Have what libp2p's arithmetic (fastecdsa, which comes as source) is compiled with; why that can't be had."""
    ask = "import sysconfig; print(sysconfig.get_path('include')); print(sysconfig.get_config_var('MULTIARCH') or '')"
    answer = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True)
    include, multiarch = answer.stdout.split("\n")[:2]
    headers = [Path("/usr/include"), Path("/usr/local/include"), Path("/usr/include", multiarch)]
    missing = [] if shutil.which("cc") or shutil.which("gcc") else ["gcc", "libc6-dev"]
    missing += [] if any((folder / "gmp.h").exists() for folder in headers) else ["libgmp-dev"]
    missing += [] if Path(include, "Python.h").exists() else ["python3-dev"]
    return install_debian(*missing) if missing else None


def install(extra: str) -> None:
    """Put this project, editable, with one of its extras into `.venv`, at the locked versions.

    JupyterLab comes with the network where that can be built, and without it where it can't.
    """
    python = make_environment()
    problem = can_compile(python) if extra != "demo" else None
    if problem:
        print(f"Without a C compiler or GMP there is no network of nodes: {problem}", flush=True)
    elif extra == "lab":
        extra = "lab,network"
    print(f"Installing bacalhau-jupyter[{extra}] into {VENV.name} …", flush=True)
    run(
        find_uv(python),
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "--constraints",
        "constraints.txt",
        "-e",
        f".[{extra}]",
    )


def administrator() -> list[str] | None:
    """The words in front of a command that needs root, or None when there is no way to be it."""
    if os.geteuid() == 0:
        return []
    if (
        shutil.which("sudo")
        and subprocess.run(["sudo", "-n", "true"], check=False, capture_output=True).returncode == 0
    ):
        return ["sudo", "-n"]
    return None


def install_debian(*packages: str) -> str | None:
    """Install Debian packages where that is possible; the reason when it is not."""
    words = administrator()
    by_hand = f"apt-get install {' '.join(packages)}"
    if not shutil.which("apt-get"):
        return f"no apt-get here: install {', '.join(packages)} in this system's way"
    if words is None:
        return f"this needs root: sudo {by_hand}"
    print(f"Installing Debian packages: {', '.join(packages)} …", flush=True)
    prefix = [*words, "env", "DEBIAN_FRONTEND=noninteractive"]
    try:
        run(*prefix, "apt-get", *QUICK_APT, "update")
        run(*prefix, "apt-get", *QUICK_APT, "install", "--no-install-recommends", *packages)
    except subprocess.CalledProcessError as error:
        return f"apt-get ended with {error.returncode}: try {by_hand}"
    return None


def debian(*programs: str) -> None:
    """Install what gives these programs. One that can't be had is named, not fatal: its tests say so themselves."""
    sbin = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [name for name in programs if not shutil.which(name, path=sbin)]
    if missing:
        problem = install_debian(*(PACKAGE_OF[name] for name in missing))
        if problem:
            print(f"Without {', '.join(missing)}: {problem}", flush=True)


def kubo_path() -> Path:
    """Where the kubo of tests is, if there is one: outside of this folder, since building it takes minutes."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bacalhau-jupyter-tests" / f"kubo-{KUBO}" / "ipfs"


def kubo() -> None:
    """Build kubo as the tool of a module of its own: `go install` builds no module that excludes versions of others."""
    target = kubo_path()
    if target.exists():
        return
    if not shutil.which("go"):
        raise SystemExit("building kubo needs Go 1.26 or newer; or name a kubo by BACALHAU_TEST_KUBO")
    print(f"Building kubo {KUBO}: some minutes …", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    module = "github.com/ipfs/kubo/cmd/ipfs"
    environment = {**os.environ, "CGO_ENABLED": "0"}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for words in (
            ("mod", "init", "kubo"),
            ("get", "-tool", f"{module}@v{KUBO}"),
            ("build", "-o", str(target.with_name("ipfs.new")), module),
        ):
            subprocess.run(["go", *words], check=True, cwd=folder, env=environment)
    target.with_name("ipfs.new").replace(target)


def main() -> None:
    """Do what the command line says."""
    command, words = "".join(sys.argv[1:2]), sys.argv[2:]
    if command == "install" and len(words) == 1:
        install(*words)
    elif command == "kubo" and not words:
        kubo()
    elif command == "debian":
        debian(*words)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as problem:
        raise SystemExit(f"{' '.join(problem.cmd)} ended with {problem.returncode}; run make again to go on") from None
