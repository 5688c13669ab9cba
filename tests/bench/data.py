"""Seeded data for the glob case: 200 CSV files, 200 MB. Same seed, same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from tests.bench.harness import OUT

FILES = 200
ROWS = 22_500
REGIONS = np.array([f"region-{name}" for name in "abcdefghijklmnopqrst"])


def part(rng: np.random.Generator, number: int) -> pa.Table:
    """One file's table."""
    return pa.table(
        {
            "at": np.arange(ROWS) + 1_656_633_600 + number * ROWS,
            "region": REGIONS[rng.integers(0, len(REGIONS), ROWS)],
            "bytes": rng.integers(0, 1_000_000, ROWS),
            "seconds": np.round(rng.gamma(2.0, 0.7, ROWS), 4),
            "score": np.round(rng.normal(0, 10, ROWS), 5),
        }
    )


def csv_files() -> list[Path]:
    """The files, made when they are not there yet, and read once: the disk is not what is measured."""
    folder = OUT / "csv"
    paths = [folder / f"part-{number:05}.csv" for number in range(FILES)]
    if not paths[-1].exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(7)
        for number, path in enumerate(paths):
            draft = path.with_suffix(".draft")
            csv.write_csv(part(rng, number), draft)
            draft.rename(path)
    for path in paths:
        path.read_bytes()
    return paths
