"""One of a hundred shards is killed: how soon is all settled, and what is kept?"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import bacalhau_jupyter as bj
from bacalhau_node.errors import JobFailed
from tests.bench import ours
from tests.bench.harness import Figure, at_least, at_most
from tests.bench.peers import Peer, started
from tests.bench.work import die_at_50, trivial

TITLE = "one of 100 killed"
EXECUTORS = ("local", "docker")
COUNT = 100
PATIENCE = 10.0
TIMES = 3
CELL = """\
import os, signal, time
if shard.index == 50:
    time.sleep(1)
    print("dies at", repr(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)
shard.index"""


def ours_settles() -> tuple[float, int]:
    """(seconds from the last death until the job had ended, shards kept)."""
    job = bj.submit(CELL, shards=COUNT)
    with contextlib.suppress(JobFailed):
        job.wait()
    settled = time.time()
    death = float(job.logs(50).split("dies at")[-1].split()[0])
    return settled - death, len(job.result(partial=True).values())


def peer_settles(peer: Peer) -> str:
    """The same of a peer, in words; a pool that never ends is given up."""
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "death"
        items = [(index, str(marker)) for index in range(COUNT)]
        try:
            kept = peer.settle(die_at_50, items, seconds=PATIENCE)
        except TimeoutError:
            return f"never (after {PATIENCE:.0f} s)"
        return f"{time.time() - float(marker.read_text()):.2f} s, {kept} kept"


def run(executor: str) -> list[Figure]:
    """Ours three times, each peer once."""
    ours.warm()
    runs = [ours_settles() for _ in range(TIMES)]
    seconds = statistics.median(one for one, _ in runs)
    kept = min(count for _, count in runs)
    beside = []
    for name in ("multiprocessing", "joblib", "dask", "ipyparallel") if executor != "docker" else ():
        with started(name) as peers:
            peers[name].map(trivial, range(8))
            beside.append(f"{name} {peer_settles(peers[name])}")
    what = f"one of 100 shards killed, {executor}"
    return [
        Figure(
            what=f"{what}: settled after its death",
            ours=f"{1000 * seconds:.0f} ms",
            beside=", ".join(beside),
            measured=seconds,
            goal=at_most(0.1, "s"),
        ),
        Figure(what=f"{what}: kept", ours=str(kept), beside="", measured=kept, goal=at_least(99, "shards")),
    ]
