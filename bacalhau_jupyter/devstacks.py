"""`bacalhau_jupyter.devstack(nodes=10)`: a network of nodes on this machine, for as long as the kernel lives.

The nodes are in a process of their own: a cell that computes would slow hundreds of them down, and they it. The process
ends with its standard input, so it outlives no kernel, however that ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Literal

from bacalhau_jupyter import asking
from bacalhau_jupyter import session as sessions
from bacalhau_jupyter.session import session
from bacalhau_node.errors import NodeUnreachable

if TYPE_CHECKING:
    from typing import Self

STOP_SECONDS = 20.0

_PROGRAM = """
import os, signal, sys, threading
def end():
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=end, daemon=True).start()
from bacalhau_node.cli import main
main()
"""


class Devstack:
    """A running devstack. `api` is its URL, `peer` the multiaddr by which others join it, `nodes` how many they are."""

    def __init__(self, process: subprocess.Popen[bytes], api: str, peer: str, nodes: int, seconds: float) -> None:
        self._process = process
        self.api, self.peer, self.nodes, self.seconds = api, peer, nodes, seconds

    @property
    def stopped(self) -> bool:
        """Whether its process has ended."""
        return self._process.poll() is not None

    def connect(self) -> Self:
        """Let jobs go there from now on."""
        asking.connect(self.api)
        return self

    def stop(self) -> None:
        """End its nodes. Jobs go to the node in this kernel again, if they went there."""
        if sessions.default_node() == self.api:
            sessions.connect(sessions.LOCAL)
        session(self.api).close()
        assert self._process.stdin is not None  # it was opened with a pipe
        self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        where = f"%bacalhau connect {self.api}"
        more = f"; others join by --peer {self.peer}" if self.peer else ""
        return f"devstack of {self.nodes:,} nodes, ready in {self.seconds:.1f} s: {where}{more}"


def devstack(
    nodes: int = 3,
    *,
    peer: str = "",
    bad_actors: int = 0,
    start: Literal["random", "star", "frozen star"] = "random",
) -> Devstack:
    """Start so many nodes that know each other; `peer` is a multiaddr of another network to join.

    `start` says to whom each node is introduced: an earlier one by lot, or always the first; in a "frozen star" nobody
    meets others through it, which shows what the exchange of peers is for. `bad_actors` of them answer wrongly, never
    run what they take, or boast. Raises `NodeUnreachable` with what the process said when it does not start.
    """
    words = ["devstack", "--json", "--nodes", str(nodes), "--bad-actors", str(bad_actors)]
    words += ["--start", start, "--api", "127.0.0.1:0"]
    log = tempfile.TemporaryFile()  # noqa: SIM115 - the process writes there as long as it lives
    process = subprocess.Popen(  # noqa: S603 - this program, with numbers
        [sys.executable, "-c", _PROGRAM, *words, *(["--peer", peer] if peer else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
    )
    assert process.stdout is not None  # it was opened with a pipe
    line = process.stdout.readline()
    if not line:
        process.wait()
        log.seek(0)
        raise NodeUnreachable(f"the devstack did not start: {log.read().decode(errors='replace').strip()[-2000:]}")
    ready = json.loads(line)
    return Devstack(process, ready["api"], ready["peer"], ready["nodes"], ready["seconds"])
