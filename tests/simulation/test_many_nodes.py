"""Many nodes in virtual time: every job ends as it should, alike on every run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bacalhau_node
from bacalhau_node.testing.builders import a_job, a_job_id
from bacalhau_node.testing.simulator import Simulation, Weather

BAD = Weather(lost=0.05, repeated=0.05, failing=0.02)


def fifty_nodes(seed: int) -> Simulation:
    """Ten jobs of forty shards, bad weather, and ten nodes that die for half a minute, requesters among them."""
    simulation = Simulation(nodes=50, seed=seed, weather=BAD)
    for n in range(10):
        simulation.submit(f"n-{n:04d}", a_job(n, shards=40, retries=2), at=n * 0.1)
        simulation.crash(f"n-{5 * n:04d}", at=2 + n, back=32 + n)
    simulation.run(until=1200)
    return simulation


def test_every_job_ends_completed_in_good_weather() -> None:
    """A hundred executions at once finish 400 shards of 0.5 to 2 s in the time of a few rounds."""
    simulation = Simulation(nodes=50, seed=1)
    for n in range(10):
        simulation.submit(f"n-{n:04d}", a_job(n, shards=40))
    simulation.run(until=15)
    assert {end.state for end in simulation.ends.values()} == {"Completed"}
    assert len(simulation.ends) == 10


def test_every_job_ends_though_messages_are_lost_and_nodes_die() -> None:
    """And when all is over no node holds anything any more."""
    simulation = fifty_nodes(seed=2)
    assert len(simulation.ends) == 10
    assert {end.state for end in simulation.ends.values()} <= {"Completed", "Failed"}
    assert sum(end.state == "Completed" for end in simulation.ends.values()) >= 5
    for node in simulation.nodes:
        assert not simulation.host(node).compute.held
        assert not simulation.host(node).requester.book.jobs


def test_a_job_costs_few_messages() -> None:
    """In good weather: per shard a take, a start, a proposal and its two answers, and its part of an offer."""
    simulation = Simulation(nodes=50, seed=3)
    simulation.submit("n-0000", a_job(shards=400))
    simulation.run(until=60)
    assert simulation.ends[a_job_id()].state == "Completed"
    assert simulation.messages <= 400 * 7


def test_a_thousand_nodes_finish_though_a_tenth_of_them_dies() -> None:
    """Ten jobs of a hundred shards; the dead stay away for ten minutes, requesters among them."""
    simulation = Simulation(nodes=1000, seed=6, weather=Weather(lost=0.05, repeated=0.05))
    for n in range(10):
        simulation.submit(f"n-{n:04d}", a_job(n, shards=100), at=n * 0.1)
    for n in range(100):
        simulation.crash(f"n-{n * 10:04d}", at=3, back=600)
    simulation.run(until=1000)
    assert {simulation.ends[a_job_id(n)].state for n in range(10)} == {"Completed"}
    assert simulation.messages <= 1000 * 15


def trace_with_hash_seed(hash_seed: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += "from test_many_nodes import fifty_nodes\nprint(fifty_nodes(seed=4).trace)"
    path = os.pathsep.join((str(Path(bacalhau_node.__file__).parents[1]), *sys.path))
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_a_seed_gives_one_trace_whatever_the_hash_seed() -> None:
    """The machines never depend on the order of a set; another seed gives another trace."""
    first, second = trace_with_hash_seed("1"), trace_with_hash_seed("2")
    assert len(first) == 64
    assert first == second
    assert fifty_nodes(seed=5).trace != first
