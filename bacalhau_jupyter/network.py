"""`%bacalhau network`: the network as a picture that follows it, and stays in the notebook.

Theory of operation. The kernel draws: places by `layout`, the picture as SVG in an image, in one output that is
replaced when the network has changed, at most once a second. So what is saved is the latest picture, readable without
a kernel, in an untrusted notebook and in an exported page, where a widget would be an empty box. One node is asked
for what it knows anyway (its view), nobody else is. The next picture ends the following of the last one.

Groups (one for each devstack) have colours; a ring is around nodes at work, a cross through those that are suspected.
"""

from __future__ import annotations

import base64
import threading
from html import escape
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from bacalhau_jupyter.job import ANSWER_SECONDS
from bacalhau_jupyter.layout import arrange
from bacalhau_jupyter.painters import put
from bacalhau_node.errors import BacalhauError
from bacalhau_node.literals import inert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bacalhau_jupyter.session import Session
    from bacalhau_node.topology import Dot, Graph

SIDE: Final = 640
MARGIN: Final = 24
COLOURS: Final = ("#1e88e5", "#43a047", "#8e24aa", "#f4511e", "#00897b", "#6d4c41", "#3949ab", "#c0ca33")
"""For groups, the largest first; chosen to stand on light and on dark."""
LINK, BUSY, QUIET, SUSPECT = "#9e9e9e", "#fb8c00", "#757575", "#e53935"
MAX_LINKS: Final = 6_000
"""More links than that are one grey; the first so many of them are drawn."""
LEGEND: Final = 6
ALONE: Final = "Others: %bacalhau connect MULTIADDR, or bacalhau_jupyter.devstack(nodes=10).connect() to try some"
"""What to do about a network of one node, which is no picture worth a page."""
ROWS: Final = 100
COLUMNS: Final = ("node", "group", "state", "jobs", "room", "slots", "message age", "dropped")

PERIOD: Final = 1.0
"""Seconds between two looks at the network."""
FOLLOWED: Final = 3600.0
"""Seconds that a picture follows the network (a guess)."""


class Picture:
    """One output that shows the network. `look` gives the graph of now, `change` puts a MIME bundle there."""

    def __init__(self, look: Callable[[], Graph], change: Callable[[dict[str, str]], None]) -> None:
        self._look, self._change = look, change
        self._places: dict[str, tuple[float, float]] = {}
        self._shape: object = None
        self._drawn: Graph | None = None
        self._over = threading.Event()

    def bundle(self) -> dict[str, str]:
        """The picture of now as MIME type -> text."""
        self._drawn = graph = self._look()
        ids = [dot.id for dot in graph.nodes]
        shape = (ids, graph.links)
        if shape != self._shape:
            index = {node: number for number, node in enumerate(ids)}
            self._places = arrange(ids, [(index[one], index[other]) for one, other in graph.links], self._places)
            self._shape = shape
        return bundle(graph, self._places)

    def follow(self) -> None:
        """Draw it again whenever it has changed, in a thread of its own, until `stop`."""
        threading.Thread(target=self._follow, name="bacalhau-network", daemon=True).start()

    def stop(self) -> None:
        """Leave the picture as it is."""
        self._over.set()

    def _follow(self) -> None:
        rounds = int(FOLLOWED / PERIOD)
        for _ in range(rounds):
            if self._over.wait(PERIOD):
                return
            try:
                if _figures(self._look()) != _figures(self._drawn):
                    self._change(self.bundle())
            except BacalhauError:  # the node is gone: its last picture stays
                return


_shown: list[Picture] = []
"""The picture that is followed now."""


def show(asked: Session) -> None:
    """Put the network that this session's node knows into the output of the cell, and follow it."""

    def look() -> Graph:
        return asked.call(lambda client: client.network(), timeout=ANSWER_SECONDS)

    name = uuid4().hex
    picture = Picture(look, lambda made: put(made, display_id=name, update=True))
    put(picture.bundle(), display_id=name)
    while _shown:
        _shown.pop().stop()
    _shown.append(picture)
    picture.follow()


def _figures(graph: Graph | None) -> object:
    """What a picture shows of the graph: the ages of records are not in it."""
    return graph and (graph.links, [(dot.id, dot.group, dot.state, dot.jobs, dot.slots) for dot in graph.nodes])


def bundle(graph: Graph, places: Mapping[str, tuple[float, float]]) -> dict[str, str]:
    """The picture and its sentence as MIME type -> text."""
    text = sentence(graph)
    if len(graph.nodes) == 1:
        text, image = f"{text}. {ALONE}", ""
    else:
        data = base64.b64encode(svg(graph, places).encode()).decode()
        image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(text)}" style="max-width: 100%">'
    html = f'<div style="margin: 2px 0; line-height: 1.5">{escape(text)}<br>{image}{_table(graph)}</div>'
    return {"text/plain": text, "text/html": html}


def sentence(graph: Graph) -> str:
    """`1,000 nodes, 2,512 links, in one piece; 12 at work; messages take 0.03 s; 2 messages dropped`."""
    nodes, parts = graph.nodes, len(graph.parts)
    words = [_count(len(nodes), "node"), f"{_count(len(graph.links), 'link')}, in {_pieces(parts)}"]
    if busy := sum(dot.jobs > 0 for dot in nodes):
        words.append(f"{busy:,} at work")
    if suspects := sum(dot.state == "suspect" for dot in nodes):
        words.append(f"{suspects:,} suspected")
    if ages := sorted(dot.age for dot in nodes if dot.age):
        words.append(f"messages take {ages[len(ages) // 2]:.2g} s")
    if dropped := sum(dot.dropped for dot in nodes):
        words.append(f"{_count(dropped, 'message')} dropped")
    return f"{words[0]}, {'; '.join(words[1:])}"


def _pieces(parts: int) -> str:
    return "one piece" if parts == 1 else f"{parts:,} pieces"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def svg(graph: Graph, places: Mapping[str, tuple[float, float]]) -> str:
    """The picture alone."""
    groups = _groups(graph)
    scale = (SIDE - 2 * MARGIN) / 2
    at = {node: (SIDE / 2 + x * scale, SIDE / 2 + y * scale) for node, (x, y) in places.items()}
    radius = max(2.2, min(9.0, 60 / max(1, len(graph.nodes)) ** 0.5))
    lines = "".join(
        "M{:.0f} {:.0f}L{:.0f} {:.0f}".format(*at[one], *at[other]) for one, other in graph.links[:MAX_LINKS]
    )
    dots = "".join(_dot(dot, at[dot.id], radius, groups) for dot in graph.nodes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE}" height="{SIDE}" viewBox="0 0 {SIDE} {SIDE}" '
        'font-family="system-ui, sans-serif" font-size="12">'
        f'<path d="{lines}" stroke="{LINK}" stroke-opacity="{0.7 if len(graph.nodes) < 100 else 0.35}" fill="none"/>'
        f"{dots}{_legend(graph, groups)}</svg>"
    )


def _dot(dot: Dot, at: tuple[float, float], radius: float, groups: Mapping[str, str]) -> str:
    x, y = at
    size = radius * (1.4 if dot.state == "self" else 1.0)
    ring = f' stroke="{BUSY}" stroke-width="{radius * 0.6:.1f}"' if dot.jobs else ""
    faint = ' fill-opacity="0.35"' if dot.state in {"suspect", "unknown"} else ""
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" fill="{groups[dot.group]}"{ring}{faint}/>'
    if dot.state != "suspect":
        return circle
    left, top, side = x - size, y - size, 2 * size
    cross = f"M{left:.1f} {top:.1f}l{side:.1f} {side:.1f}m0 {-side:.1f}l{-side:.1f} {side:.1f}"
    return f'{circle}<path d="{cross}" stroke="{SUSPECT}"/>'


def _groups(graph: Graph) -> dict[str, str]:
    """Group -> colour: the largest groups first, further ones share a grey."""
    sizes: dict[str, int] = {}
    for dot in graph.nodes:
        sizes[dot.group] = sizes.get(dot.group, 0) + 1
    ordered = sorted(sizes, key=lambda group: (-sizes[group], group))
    return {group: COLOURS[number] if number < len(COLOURS) else QUIET for number, group in enumerate(ordered)}


def _legend(graph: Graph, groups: Mapping[str, str]) -> str:
    if len(groups) < 2:
        return ""
    parts = []
    for number, (group, colour) in enumerate(list(groups.items())[:LEGEND]):
        y = MARGIN / 2 + 16 * number
        size = sum(dot.group == group for dot in graph.nodes)
        parts.append(
            f'<circle cx="10" cy="{y}" r="5" fill="{colour}"/>'
            f'<text x="20" y="{y + 4}" fill="{QUIET}">{escape(inert(group) or "others")}, {_count(size, "node")}</text>'
        )
    return "".join(parts)


def _table(graph: Graph) -> str:
    """The nodes in a folded table, those at work first."""
    nodes = sorted(graph.nodes, key=lambda dot: (-dot.jobs, dot.state != "self", dot.label))
    rows = [COLUMNS, *map(_row, nodes[:ROWS])]
    if len(nodes) > ROWS:
        rows.append((f"… {len(nodes) - ROWS:,} more",))
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<details><summary>{_count(len(nodes), 'node')}</summary><table>{cells}</table></details>"


def _row(dot: Dot) -> tuple[str, ...]:
    figures = (dot.jobs, dot.room, dot.slots, f"{dot.age:.3g} s", dot.dropped)
    return (inert(dot.label), inert(dot.group), dot.state, *map(str, figures))
