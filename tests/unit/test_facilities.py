"""Which executor a job gets, and when the others are tried."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bacalhau_node.executors.fake import FakeExecutor
from bacalhau_node.facilities import Facilities
from bacalhau_node.layers.store import Layers
from bacalhau_node.ports import Capabilities
from bacalhau_node.spec import Command, Isolation, JobSpec


class Tried(FakeExecutor):
    """Counts how often it was tried. `problem`: why it does not work."""

    def __init__(self, isolation: Isolation, *, refusal: str | None = None, problem: str | None = None) -> None:
        super().__init__(isolation=isolation, refusal=refusal)
        self.problem, self.tries = problem, 0

    async def probe(self) -> Capabilities:
        self.tries += 1
        works = await super().probe()
        return Capabilities(
            executor=f"the {works.isolation}",
            isolation=works.isolation,
            slots=works.slots,
            memory_per_slot=works.memory_per_slot,
            python=works.python,
            problem=self.problem,
        )


SPEC = JobSpec(task=Command(shell="true"))


@pytest.fixture
def layers(tmp_path):
    return Layers(tmp_path)


async def test_nothing_is_tried_beyond_the_first_executor_that_works(layers):
    executors = [Tried("container", problem="no daemon"), Tried("sandbox"), Tried("none")]
    facilities = await Facilities.open(executors, layers)
    await facilities.try_for(SPEC)
    assert [executor.tries for executor in executors] == [1, 1, 0]
    assert facilities.choose(SPEC) == (executors[1], "the sandbox")
    assert facilities.problems() == ["no daemon"]


async def test_a_job_that_those_tried_refuse_gets_the_next_that_takes_it(layers):
    executors = [Tried("container", refusal="not here"), Tried("sandbox", refusal="nor here"), Tried("none")]
    facilities = await Facilities.open(executors, layers)
    assert [executor.tries for executor in executors] == [1, 0, 0]
    await facilities.try_for(SPEC)
    assert [executor.tries for executor in executors] == [1, 1, 1]
    assert facilities.choose(SPEC) == (executors[2], "the none")


async def test_when_the_best_has_broken_the_next_is_tried(layers):
    executors = [Tried("container"), Tried("sandbox")]
    facilities = await Facilities.open(executors, layers)
    executors[0].problem, facilities.at_fault = "the daemon has gone", True
    await facilities.probe_again()
    assert facilities.capabilities.executor == "the sandbox"


async def test_closing_ends_those_that_were_never_tried_too(layers):
    executors = [Tried("container"), Tried("sandbox")]
    facilities = await Facilities.open(executors, layers)
    await facilities.close()
    assert all(executor.closed for executor in executors)


def test_what_executors_need_is_loaded_without_the_rest_of_the_node():
    code = "import sys, bacalhau_node.local; sys.exit('bacalhau_node.engine' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
