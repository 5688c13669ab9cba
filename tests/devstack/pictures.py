"""Pictures of networks as PNG: what becomes of a star, with peer exchange and without.

    python -m tests.devstack.pictures FOLDER [--nodes 30]

Two devstacks of real libp2p hosts, whose nodes were all given the address of node 0: one that never exchanges peers,
one that does. Each is drawn as soon as it is in one piece, and again twenty seconds later, by the code that draws
`%bacalhau network`, in Chromium. What is under a picture is said on standard output, too.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
from html import escape
from pathlib import Path
from typing import Final

from bacalhau_jupyter.layout import arrange
from bacalhau_jupyter.network import sentence, svg
from bacalhau_node.client import LocalClient
from bacalhau_node.devstack import Start, open_devstack
from bacalhau_node.topology import Graph

LATER: Final = 20.0
PATIENCE: Final = 120.0
STARTS: Final[dict[str, Start]] = {"without": "frozen star", "with": "star"}


def save(path: Path, title: str, graph: Graph) -> None:
    """Draw the graph, and say what it is."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - measuring needs no browser

    ids = [dot.id for dot in graph.nodes]
    index = {node: number for number, node in enumerate(ids)}
    places = arrange(ids, [(index[one], index[other]) for one, other in graph.links], {})
    text = f"{sentence(graph)}; at most {graph.degrees.most} links of one node, {graph.degrees.median} in the middle"
    page = f"<body style='font: 15px sans-serif'><b>{escape(title)}</b><br>{escape(text)}{svg(graph, places)}</body>"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        shown = browser.new_page(viewport={"width": 760, "height": 800})
        shown.set_content(page)
        shown.screenshot(path=path, full_page=True)
        browser.close()
    print(f"{path.name}: {title}: {text}", flush=True)


async def star(folder: Path, nodes: int, start: Start) -> tuple[Graph, Graph]:
    """The network as soon as it is one, and later."""
    stack = await open_devstack(nodes, root=folder, start=start, work="fake")
    try:
        client = LocalClient(stack.first)
        async with asyncio.timeout(PATIENCE):
            while len((first := await client.network()).parts) > 1:  # noqa: ASYNC110 - membership wakes nobody
                await asyncio.sleep(0.05)
        await asyncio.sleep(LATER)
        return first, await client.network()
    finally:
        await stack.close()


def main() -> None:
    """Draw from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=30)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name, start in STARTS.items():
        with tempfile.TemporaryDirectory(prefix="star-") as folder:
            graphs = asyncio.run(star(Path(folder), asked.nodes, start))
        for seconds, graph in zip((0, LATER), graphs, strict=True):
            path = asked.folder / f"star-{name}-exchange-{seconds:.0f}s.png"
            save(path, f"a star, {name} peer exchange, after {seconds:.0f} s", graph)


if __name__ == "__main__":
    main()
