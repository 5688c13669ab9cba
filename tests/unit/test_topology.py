"""The network as a picture needs it."""

from __future__ import annotations

from typing import Any

import msgspec

from bacalhau_node.messages import Engine, NodeRecord
from bacalhau_node.protocol.membership import Entry
from bacalhau_node.topology import Degrees, graph


def an_entry(node: str, *near: str, age: float = 1.0, state: str = "known", **fields: Any) -> Entry:
    return Entry(NodeRecord(node=node, version=1, neighbours=near, **fields), state, age)


def test_a_star_is_one_part_and_its_hub_has_all_links() -> None:
    found = graph([an_entry("n-hub", "n-1aa", "n-2aa", "n-3aa"), *(an_entry(f"n-{n}aa", "n-hub") for n in (1, 2, 3))])
    assert found.links == (("n-1aa", "n-hub"), ("n-2aa", "n-hub"), ("n-3aa", "n-hub"))
    assert found.parts == (4,)
    assert found.degrees == Degrees(1, 1, 3)


def test_a_part_that_hangs_together_is_counted() -> None:
    found = graph([an_entry("n-1aa", "n-2aa"), an_entry("n-2aa", "n-1aa"), an_entry("n-alone")])
    assert found.parts == (2, 1)
    assert found.degrees == Degrees(0, 1, 1)


def test_of_two_ends_the_one_with_the_younger_record_is_believed() -> None:
    old, young = an_entry("n-old", "n-young", age=100), an_entry("n-young", age=1)
    assert graph([old, young]).links == ()
    old, young = an_entry("n-old", age=100), an_entry("n-young", "n-old", age=1)
    assert graph([old, young]).links == (("n-old", "n-young"),)


def test_a_node_without_a_record_is_drawn_without_figures() -> None:
    found = graph([an_entry("n-one", "n-unknown", state="self")])
    assert [(dot.id, dot.state, dot.seconds) for dot in found.nodes] == [
        ("n-one", "self", 1.0),
        ("n-unknown", "unknown", None),
    ]


def test_figures_come_from_the_record() -> None:
    engines = (Engine("docker", "container", "3.12", 2**30, (1, 2)), Engine("plain", "none", "3.12", 2**30))
    entry = an_entry("n-abcdefgh", slots=4, room=2, jobs=3, age=7.04, dropped=5, engines=engines, labels={"group": "b"})
    entry = Entry(msgspec.structs.replace(entry.record, age=0.25), "known", 7.04)
    dot = graph([entry]).nodes[0]
    assert (dot.label, dot.group, dot.slots, dot.room, dot.jobs, dot.gpus) == ("cdefgh", "b", 4, 2, 3, 2)
    assert (dot.age, dot.dropped, dot.seconds) == (0.25, 5, 7.0)
    suspect = graph([Entry(entry.record, "suspect", 1.0)]).nodes[0]
    assert suspect.room == 0


def test_equal_records_give_equal_json() -> None:
    entries = [an_entry(f"n-{n:03d}", f"n-{(n + 1) % 50:03d}", f"n-{(n + 7) % 50:03d}") for n in range(50)]
    assert msgspec.json.encode(graph(entries)) == msgspec.json.encode(graph(reversed(entries)))


def test_nobody_is_an_empty_picture() -> None:
    assert graph([]).parts == ()
