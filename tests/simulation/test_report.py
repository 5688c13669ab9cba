"""Bounds on the table that `python -m bacalhau_node.testing.report` prints, at a tenth of its size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bacalhau_node
from bacalhau_node.testing.builders import a_job, a_job_id
from bacalhau_node.testing.report import Row, measure
from bacalhau_node.testing.simulator import Simulation, Weather


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return measure(100)


def test_nothing_is_lost_in_any_weather(rows: list[Row]) -> None:
    """Every shard of every job has an outcome that counts."""
    assert [row.lost for row in rows] == [0, 0, 0, 0]


def test_good_weather_costs_little_and_runs_nothing_twice(rows: list[Row]) -> None:
    """A thousand shards of 1.25 s on two hundred slots take 6.25 s at best."""
    plain = rows[0]
    assert plain.doubled == 0
    assert plain.seconds < 9
    assert plain.messages < 14  # ten requesters compete for the slots: some offers are refused


def test_faults_cost_a_few_leases(rows: list[Row]) -> None:
    """A lost node is noticed after one; few executions are made for nothing."""
    assert all(row.seconds < 90 for row in rows)
    assert all(row.messages < 20 for row in rows)
    assert all(row.doubled < 200 for row in rows)


def printed(hash_seed: str) -> str:
    path = os.pathsep.join((str(Path(bacalhau_node.__file__).parents[1]), *sys.path))
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    command = [sys.executable, "-m", "bacalhau_node.testing.report", "50"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_table_is_the_same_on_every_run() -> None:
    """Whatever the hash seed."""
    assert printed("1") == printed("2")


def test_replicas_agree_though_messages_are_lost_and_nodes_die() -> None:
    """Fifty shards on three nodes each, and two have to agree."""
    simulation = Simulation(nodes=40, seed=9, weather=Weather(lost=0.05, repeated=0.05))
    simulation.submit("n-0000", a_job(shards=50, replicas=3, agree=2))
    for n in range(5):
        simulation.crash(f"n-{5 * n + 1:04d}", at=1 + n, back=40 + n)
    simulation.run(until=600)
    assert simulation.ends[a_job_id()].state == "Completed"
