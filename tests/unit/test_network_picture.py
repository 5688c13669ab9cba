"""The picture of a network: where its nodes are drawn, what it says, and when it is drawn again."""

from __future__ import annotations

import itertools
import math
import random
import xml.dom.minidom

import pytest

from bacalhau_jupyter import network
from bacalhau_jupyter.layout import arrange
from bacalhau_node.errors import NodeUnreachable
from bacalhau_node.topology import Degrees, Dot, Graph


def made(ids, links, **of) -> Graph:
    nodes = tuple(Dot(id=node, label=node, **of.get(node, {})) for node in ids)
    return Graph(nodes=nodes, links=tuple(links), parts=(len(ids),), degrees=Degrees())


RING = [f"n{number}" for number in range(12)]
RING_LINKS = [(number, (number + 1) % 12) for number in range(12)]


def distance(one, other) -> float:
    return math.dist(one, other)


def test_all_nodes_lie_in_the_picture_and_no_two_on_one_place():
    places = arrange(RING, RING_LINKS)
    assert set(places) == set(RING)
    assert all(-1.001 <= value <= 1.001 for place in places.values() for value in place)
    assert min(distance(places[a], places[b]) for a, b in itertools.combinations(RING, 2)) > 0.05


def test_linked_nodes_lie_nearer_than_others():
    rng = random.Random(3)
    ids = [f"n{number}" for number in range(60)]
    links = [(a, b) for a, b in itertools.combinations(range(60), 2) if (a < 30) == (b < 30) and rng.random() < 0.2]
    links.append((0, 59))
    places = arrange(ids, links)
    near = [distance(places[ids[a]], places[ids[b]]) for a, b in links]
    far = [distance(places[ids[a]], places[ids[b]]) for a in range(30) for b in range(30, 60)]
    assert sum(near) / len(near) < 0.6 * sum(far) / len(far)


def test_the_same_network_looks_the_same_and_a_new_node_moves_the_others_little():
    before = arrange(RING, RING_LINKS)
    assert arrange(RING, RING_LINKS) == before
    after = arrange([*RING, "new"], [*RING_LINKS, (12, 0)], before)
    moved = [distance(before[node], after[node]) for node in RING]
    assert sum(moved) / len(moved) < 0.4


@pytest.mark.parametrize("ids", [[], ["one"], ["one", "two"]])
def test_a_network_of_hardly_anybody_can_be_drawn(ids):
    places = arrange(ids, [])
    assert len(places) == len(ids)
    assert all(math.isfinite(value) for place in places.values() for value in place)


def test_the_sentence_says_what_there_is():
    graph = made(
        RING, [("n0", "n1")], n0={"state": "self", "jobs": 2, "age": 0.03}, n1={"state": "suspect", "dropped": 1}
    )
    assert network.sentence(graph) == (
        "12 nodes, 1 link, in one piece; 1 at work; 1 suspected; messages take 0.03 s; 1 message dropped"
    )


def test_the_picture_is_whole_xml_with_a_circle_for_each_node_and_a_colour_for_each_group():
    graph = made(RING, [], n0={"group": 'a"<b>'}, n1={"group": "c", "state": "suspect"})
    picture = xml.dom.minidom.parseString(network.svg(graph, arrange(RING, [])))
    circles = picture.getElementsByTagName("circle")
    assert len(circles) == 12 + 3  # and the legend's
    assert len({circle.getAttribute("fill") for circle in circles}) == 3
    assert 'a"<b>, 1 node' in [text.firstChild.data for text in picture.getElementsByTagName("text")]


def test_what_nodes_call_themselves_is_never_markup():
    bundle = network.bundle(made(["n"], [], n={"group": "<script>x</script>"}), {"n": (0.0, 0.0)})
    assert "<script>" not in bundle["text/html"]
    assert "&lt;script&gt;" in bundle["text/html"]


def test_no_label_breaks_the_picture_or_turns_its_text_around():
    graph = made(["n", "m"], [], n={"group": "\x01\x1b[31m\u202e]]>&<"}, m={"group": "b"})
    places = {"n": (0.0, 0.0), "m": (1.0, 1.0)}
    xml.dom.minidom.parseString(network.svg(graph, places))
    assert not {"\x01", "\x1b", "\u202e"} & set(network.bundle(graph, places)["text/html"])


def test_it_is_drawn_again_only_when_what_it_shows_has_changed(monkeypatch):
    monkeypatch.setattr(network, "PERIOD", 0.001)
    monkeypatch.setattr(network, "FOLLOWED", 1.0)
    quiet, busy = made(["n"], []), made(["n"], [], n={"jobs": 1, "seconds": 3.0})
    older = made(["n"], [], n={"jobs": 1, "seconds": 9.0})
    news, drawn = iter([quiet, quiet, busy, busy, older, older]), []

    def look() -> Graph:
        try:
            return next(news)
        except StopIteration:
            raise NodeUnreachable("gone") from None

    picture = network.Picture(look, drawn.append)
    picture.bundle()
    picture._follow()  # ends with the node
    assert [bundle["text/plain"].partition(".")[0] for bundle in drawn] == ["1 node, 0 links, in one piece; 1 at work"]
