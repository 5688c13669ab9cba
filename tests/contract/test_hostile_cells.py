"""Hostile cells reach nothing outside of their box, in every executor that claims isolation.

`hostile.py` has the attacks. That each of them is a real one shows in the plain process, which
promises nothing: `test_a_plain_process_holds_nothing_off` runs those that do no harm there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from bacalhau_node.testing.executor_suite import ShardBench
from tests.contract.hostile import ATTACKS, Attack, Ground, ground_below, launch, open_bench

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOXES = (
    pytest.param("sandbox", marks=pytest.mark.sandbox),
    pytest.param("container", marks=pytest.mark.docker),
)
HELD_BY_NOTHING = (
    "connect by TCP to this machine",
    "connect to a unix socket",
    "connect to an abstract unix socket",
    "read secrets of the home",
    "read secrets of the environment",
    "read folders of another job",
    "look at processes of others",
    "signal a process of this machine",
    "write to an input",
)
"""Attacks that any plain process can do, whoever runs it."""


class Benches:
    """One executor of each kind on one ground, opened when a test first asks for it."""

    def __init__(self, ground: Ground, stack: AsyncExitStack) -> None:
        self.ground = ground
        self._stack = stack
        self._known: dict[str, ShardBench] = {}

    async def get(self, kind: str) -> ShardBench:
        if kind not in self._known:
            bench = await self._stack.enter_async_context(open_bench(kind, self.ground))
            assert bench is not None, f"the {kind} executor does not work here"
            self._known[kind] = bench
        return self._known[kind]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def benches(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Benches]:
    with ground_below(tmp_path_factory.mktemp("hostile") / "ground") as ground:
        async with AsyncExitStack() as stack:
            yield Benches(ground, stack)


@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
async def test_a_box_holds_the_attack_off(attack: Attack, kind: str, benches: Benches) -> None:
    finding = await launch(attack, await benches.get(kind), benches.ground, boxed=True)
    assert finding.held, finding.text


@pytest.mark.parametrize("name", HELD_BY_NOTHING)
async def test_a_plain_process_holds_nothing_off(name: str, benches: Benches) -> None:
    attack = next(attack for attack in ATTACKS if attack.name == name)
    assert not (await launch(attack, await benches.get("process"), benches.ground, boxed=False)).held
