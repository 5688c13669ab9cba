"""Membership of many nodes in virtual time, with bounds on what it costs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import bacalhau_node
from bacalhau_node.protocol.circle import SWEEP
from bacalhau_node.protocol.membership import Settings
from bacalhau_node.protocol.view import STALE
from bacalhau_node.testing.mesh import Mesh
from bacalhau_node.testing.mesh_report import Phase, Trial, measure

NODES = 100


def names(nodes: int) -> list[str]:
    return [f"n-{n:04d}" for n in range(nodes)]


def a_star(nodes: int, *, seed: int = 1, weigh: bool = False, view: int = 1024, rate: float = 100.0) -> Mesh:
    """A network whose nodes all join through the first one."""
    mesh = Mesh(seed=seed, weigh=weigh, settings=Settings(view=view))
    first, *others = names(nodes)
    mesh.start(first)
    for n, node in enumerate(others, start=1):
        mesh.start(node, [first], at=n / rate)
    return mesh


def poorest(mesh: Mesh) -> int:
    return min(len(mesh.machine(node)) for node in mesh.alive)


@pytest.fixture(scope="module")
def phases() -> dict[str, Phase]:
    return {row.name: row for row in measure(NODES)}


def test_a_star_becomes_a_mesh_in_seconds(phases: dict[str, Phase]) -> None:
    """Two seconds of joining, and the one they join through gets a few messages of each."""
    joined = phases["all join through one"]
    assert joined.parts == 1
    assert joined.seconds <= 15
    assert joined.busiest <= 4 * NODES
    assert joined.busiest_kilobytes <= 2 * NODES


def test_a_quiet_network_costs_each_node_little(phases: dict[str, Phase]) -> None:
    """Two exchanges of three messages in 25 s, and those of the start; every node's record once in five minutes."""
    quiet = phases["nothing happens"]
    assert quiet.messages <= 20
    assert quiet.kilobytes <= 100
    assert quiet.busiest <= 60 * 5
    assert quiet.known == 1


def test_every_view_is_full_soon_after_the_last_has_joined_and_then_one_more_hurries_nobody() -> None:
    """They join ten a second, through an earlier one by lot. A view that lacks a little compares sooner than usual."""
    mesh, chance = Mesh(seed=4, weigh=False), random.Random(4)
    known = names(160)
    for n, node in enumerate(known):
        mesh.start(node, [chance.choice(known[:n])] if n else [], at=n / 10)
    mesh.run(until=16)
    while poorest(mesh) < len(known) - 1 and mesh.now < 80:
        mesh.run(until=mesh.now + 1)
    assert mesh.now <= 16 + 20
    mesh.run(until=80)
    before = sum(mesh.messages.values())
    mesh.start("n-late", known[:1], at=80)
    mesh.run(until=140)
    assert sum(mesh.messages.values()) - before <= 25 * len(known)


def test_news_is_everywhere_after_a_few_periods(phases: dict[str, Phase]) -> None:
    """At most the gap between two records of a node, and as many periods of 12.5 s as the network has doublings."""
    assert phases["one says something new"].seconds <= NODES / 8 + 8 * 12.5 + 45


def test_the_mesh_outlives_the_one_that_all_joined_through(phases: dict[str, Phase]) -> None:
    churned = phases["the first and a tenth die"]
    assert churned.parts == 1
    assert churned.known == 1
    assert churned.busiest <= 100


def test_a_partition_of_30_s_heals_within_half_a_minute(phases: dict[str, Phase]) -> None:
    """Everybody knows everybody again, as alive, and in one mesh."""
    healed = phases["half out of reach for 30 s"]
    assert healed.parts == 1
    assert healed.seconds <= 60
    assert healed.known >= 0.95  # and the rest a comparison later: see the next phase


def test_lost_messages_cost_nothing_but_time(phases: dict[str, Phase]) -> None:
    lossy = phases["5 % lost"]
    assert lossy.parts == 1
    assert lossy.known == 1
    assert lossy.dead < NODES / 10


def test_the_dead_are_gone_from_every_view_when_their_records_are_stale() -> None:
    """And a sweep later, and what their ages have lost on the way."""
    trial = Trial(60)
    trial.join()
    trial.settle()
    trial.churn()
    trial.mesh.run(until=trial.mesh.now + STALE + SWEEP)
    assert not any(dead in trial.mesh.told[node] for node in trial.mesh.alive for dead in trial._dead)
    assert trial.mesh.complaints == []


@pytest.mark.slow
def test_a_thousand_nodes_join_through_one() -> None:
    """In a minute of virtual time all know all; nobody gets more than a few messages of each other node."""
    mesh = a_star(1000)
    mesh.run(until=60)
    assert mesh.parts() == [1000]
    assert poorest(mesh) >= 950
    assert max(mesh.messages.values()) <= 3000
    assert sum(mesh.messages.values()) <= 70 * 1000
    degrees = sorted(len(mesh.machine(node).neighbours) for node in mesh.alive)
    assert degrees[0] >= 3
    assert degrees[-1] <= 12
    assert mesh.complaints == []
    assert len(mesh.archive) < 3 * 1000, "records are shared"


def test_a_bounded_view_stays_bounded_and_fresh_in_a_larger_network() -> None:
    """A view of 64 in a network of 150: every node is known to some, the views differ, the mesh is one."""
    mesh = a_star(150, view=64)
    mesh.run(until=120)
    assert mesh.parts() == [150]
    assert {len(mesh.machine(node)) for node in mesh.alive} == {64}
    known = [sum(node in mesh.machine(other).view.held for other in mesh.alive) for node in mesh.alive]
    assert min(known) >= 10
    before = {node: set(mesh.machine(node).view.held) for node in mesh.alive}
    mesh.run(until=240)
    changed = sum(len(before[node] - set(mesh.machine(node).view.held)) for node in mesh.alive) / 150
    assert 5 < changed < 60, "views mix, slowly"


def test_who_joins_late_finds_room_as_fast_as_who_came_first() -> None:
    """A door with a small view tells those that it turns away of the latest ones, who have room for neighbours.

    Told of early ones, who are full, each would dial twice as many, and more with every one that joined before.
    """
    mesh = a_star(800, view=64)
    mesh.run(until=12)
    assert mesh.parts() == [800]
    assert mesh.dials <= 10 * 800
    assert sum(mesh.messages.values()) <= 42 * 800
    assert max(mesh.messages.values()) <= 3 * 800


def test_two_networks_that_meet_by_one_link_become_one_mesh() -> None:
    """And stay one when that link's ends die."""
    mesh = Mesh(seed=3, weigh=False)
    for group in ("a", "b"):
        mesh.start(f"n-{group}00", ["n-a00"] if group == "b" else [], at=90.0 if group == "b" else 0.0)
        for n in range(1, 40):
            mesh.start(f"n-{group}{n:02d}", [f"n-{group}00"], at=(100.0 if group == "b" else 0.0) + n / 20)
    mesh.run(until=280)
    assert poorest(mesh) == 79
    mesh.kill(["n-a00", "n-b00"], at=280)
    mesh.run(until=340)
    assert mesh.parts() == [78]


def test_a_network_is_whole_again_after_an_hour_apart() -> None:
    """Both halves have buried each other, and go on knocking."""
    mesh = a_star(24, rate=10.0)
    mesh.run(until=60)
    mesh.partition(names(12), at=60, until=3660)
    mesh.run(until=3660)
    assert {len(mesh.machine(node)) for node in mesh.alive} == {11}
    mesh.run(until=3660 + 1800)
    assert mesh.parts() == [24]
    assert poorest(mesh) == 23


def test_a_node_without_addresses_is_known_to_all_and_links_itself() -> None:
    """The kernel of a laptop behind a router."""
    mesh = a_star(20, rate=10.0)
    mesh.start("n-laptop", ["n-0000"], at=5, dialable=False)
    mesh.run(until=90)
    assert poorest(mesh) == 20
    assert len(mesh.machine("n-laptop").neighbours) >= 3
    mesh.kill(["n-laptop"], at=90)
    mesh.run(until=90 + 660 + 90)
    assert poorest(mesh) == max(len(mesh.machine(node)) for node in mesh.alive) == 19


def test_the_door_that_opens_late_is_found() -> None:
    """`--peer` names a node that starts two minutes later."""
    mesh = Mesh(seed=5, weigh=False)
    mesh.start("n-one", ["n-two"])
    mesh.start("n-two", at=120)
    mesh.run(until=160)
    assert mesh.machine("n-two").neighbours == ("n-one",)


def printed(hash_seed: str) -> str:
    path = os.pathsep.join((str(Path(bacalhau_node.__file__).parents[1]), *sys.path))
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    command = [sys.executable, "-m", "bacalhau_node.testing.mesh_report", "25"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_table_is_the_same_on_every_run() -> None:
    """No choice depends on the order of a set."""
    first = printed("1")
    assert first.count("\n") == 8
    assert first == printed("2")
