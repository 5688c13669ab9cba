"""A node dies between a commit and its effects, once in every turn of a job: the job ends completed all the same."""

from __future__ import annotations

import pytest

from bacalhau_node.testing.builders import a_job, a_job_id
from bacalhau_node.testing.simulator import Simulation, Weather

REQUESTER, COMPUTE = "n-0000", "n-0001"


def a_simulation() -> Simulation:
    """Twelve shards over two nodes, one of which is the requester itself."""
    simulation = Simulation(nodes=2, seed=7, slots=2, weather=Weather(shard=(0.1, 0.3)))
    simulation.submit(REQUESTER, a_job(shards=12), at=0.5)
    return simulation


def turns(node: str) -> int:
    """How many turns the node takes when nothing happens to it."""
    simulation = a_simulation()
    simulation.run(until=3600)
    assert simulation.ends[a_job_id()].state == "Completed"
    return simulation.turns(node)


@pytest.mark.parametrize("node", [REQUESTER, COMPUTE])
@pytest.mark.parametrize("down", [0.05, 30.0])
def test_a_job_survives_a_crash_in_any_turn(node: str, down: float) -> None:
    """Whatever was journaled is done, whatever was not is done again; the referee watches."""
    last = turns(node)
    assert last > 20
    done = 0
    for turn in range(1, last + 1):
        simulation = a_simulation()
        simulation.crash_in_turn(node, turn, down=down)
        simulation.run(until=3600)
        row = simulation.referee.jobs.get(a_job_id())
        if row is None:
            continue  # the requester was down when the job should have been handed in
        done += 1
        assert row.state == "Completed", f"crash of {node} in turn {turn}: {row.state} {row.reason}"
        for each in simulation.nodes:
            assert not simulation.host(each).compute.held, f"crash of {node} in turn {turn}"
    assert done >= last - 4, "only the turns before the submission may prevent it"
