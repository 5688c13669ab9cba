"""What a user would pick instead, each with two workers, behind one small face.

`map` is the peer's own way to run a function over items; `settle` runs items one by one and says which
came back, whatever happened to the others. Peers are started and warmed before anything is timed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol

from tests.bench.harness import WORKERS


class Peer(Protocol):
    """One tool, started."""

    name: str

    def map(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """The results of `call` for all items, in order."""
        ...

    def settle(self, call: Callable[[Any], Any], items: Sequence[Any], *, seconds: float) -> int:
        """How many items came back before all were settled; raises `TimeoutError` after so many seconds."""
        ...


def _count(outcomes: Sequence[Callable[[], Any]]) -> int:
    kept = 0
    for outcome in outcomes:
        with contextlib.suppress(Exception):
            outcome()
            kept += 1
    return kept


class Multiprocessing:
    """The hand-written pool of most scripts."""

    name = "multiprocessing"

    def __init__(self) -> None:
        self.pool = get_context("fork").Pool(WORKERS)

    def map(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`Pool.map`, whose chunks are its own."""
        return self.pool.map(call, items)

    def settle(self, call: Callable[[Any], Any], items: Sequence[Any], *, seconds: float) -> int:
        """A pool waits for ever for the answer of a dead worker."""
        waiting = [self.pool.apply_async(call, (item,)) for item in items]
        kept = sum(1 for one in waiting if not _is_late(one, seconds=seconds))
        if kept < len(items):
            raise TimeoutError
        return kept

    def close(self) -> None:
        """End the workers."""
        self.pool.terminate()


def _is_late(result: Any, *, seconds: float) -> bool:
    result.wait(seconds)
    return not result.ready()


class Joblib:
    """joblib with its own backend."""

    name = "joblib"

    def __init__(self) -> None:
        import joblib  # noqa: PLC0415
        from joblib.externals import loky  # noqa: PLC0415

        self.joblib = joblib
        self.loky = loky
        self.parallel = joblib.Parallel(n_jobs=WORKERS)

    def map(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`Parallel`, with its own batching."""
        return list(self.parallel(self.joblib.delayed(call)(item) for item in items))

    def settle(self, call: Callable[[Any], Any], items: Sequence[Any], *, seconds: float) -> int:
        """By loky, the executor under it: `Parallel` itself returns nothing when one task fails."""
        executor = self.loky.get_reusable_executor(WORKERS)
        futures = [executor.submit(call, item) for item in items]
        return _count([lambda one=one: one.result(seconds) for one in futures])

    def close(self) -> None:
        """End the workers."""
        self.loky.get_reusable_executor().shutdown(wait=False, kill_workers=True)


class Dask:
    """dask.distributed with worker processes on this machine."""

    name = "dask"

    def __init__(self) -> None:
        from distributed import Client, LocalCluster  # noqa: PLC0415

        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        self.cluster = LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
        )
        self.client = Client(self.cluster)

    def map(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`Client.map` and `gather`; `pure=False`, so that a repeat is run again."""
        return list(self.client.gather(self.client.map(call, items, pure=False)))

    def settle(self, call: Callable[[Any], Any], items: Sequence[Any], *, seconds: float) -> int:
        """Future by future."""
        futures = self.client.map(call, items, pure=False)
        return _count([lambda one=one: one.result(seconds) for one in futures])

    def close(self) -> None:
        """End the cluster."""
        self.client.close()
        self.cluster.close()


class IPyParallel:
    """ipyparallel: the nearest in feel, engines behind cell magics."""

    name = "ipyparallel"

    def __init__(self) -> None:
        import ipyparallel  # noqa: PLC0415

        self.cluster = ipyparallel.Cluster(n=WORKERS, log_level=logging.CRITICAL)
        self.client = self.cluster.start_and_connect_sync(activate=False)
        self.view = self.client.load_balanced_view()

    def map(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`map_sync` of the load-balanced view."""
        return list(self.view.map_sync(call, items))

    def settle(self, call: Callable[[Any], Any], items: Sequence[Any], *, seconds: float) -> int:
        """Task by task."""
        tasks = [self.view.apply_async(call, item) for item in items]
        return _count([lambda one=one: one.get(seconds) for one in tasks])

    def close(self) -> None:
        """End the engines."""
        self.client.close()
        self.cluster.stop_cluster_sync()


PEERS = {kind.name: kind for kind in (Multiprocessing, Joblib, Dask, IPyParallel)}


@contextmanager
def started(*names: str) -> Iterator[dict[str, Peer]]:
    """Start peers by name; they are ended together."""
    with contextlib.ExitStack() as stack:
        peers: dict[str, Peer] = {}
        for name in names:
            peer = PEERS[name]()
            stack.callback(peer.close)
            peers[name] = peer
        yield peers
