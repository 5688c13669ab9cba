"""The cells that a user of each tool would write."""

from __future__ import annotations

SETUP = {
    "ours": "%load_ext bacalhau_jupyter",
    "bare": "",
    "multiprocessing": """\
from multiprocessing import get_context
from tests.bench.work import ticks, trivial
pool = get_context("fork").Pool(2)""",
    "joblib": """\
import joblib
from tests.bench.work import ticks, trivial
parallel = joblib.Parallel(n_jobs=2)""",
    "dask": """\
from distributed import Client, LocalCluster
from tests.bench.work import dask_ticks, trivial
client = Client(LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None))""",
    "ipyparallel": """\
import ipyparallel
from tests.bench.work import ticks, trivial
engines = ipyparallel.Cluster(n=2, log_level=50).start_and_connect_sync(activate=True)
engines[:].execute("from tests.bench.work import ticks", block=True)
view = engines.load_balanced_view()""",
}
"""Run once, before anything is timed."""

CELLS = {
    "ours": "%%bacalhau\n1 + 1",
    "multiprocessing": "pool.apply(trivial, (1,))",
    "joblib": "parallel([joblib.delayed(trivial)(1)])",
    "dask": "client.submit(trivial, 1, pure=False).result()",
    "ipyparallel": "view.apply_sync(trivial, 1)",
}
"""One call that does nothing, and its answer."""

OUR_TICKS = """\
%%bacalhau
import time
for k in range(20):
    print("TICK", k, repr(time.time()), "END")
    time.sleep((0.11, 0.17, 0.13, 0.19, 0.07)[k % 5])"""

TICKS = {
    "ours": OUR_TICKS,
    "bare": OUR_TICKS.removeprefix("%%bacalhau\n"),
    "multiprocessing": "pool.apply(ticks)",
    "dask": "client.submit(dask_ticks, pure=False).result()",
    "ipyparallel": "%%px --targets 0\nticks()",
}
"""Twenty lines, each with the time of its print; the cell waits for them."""
