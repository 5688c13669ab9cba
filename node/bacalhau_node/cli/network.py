"""`bacalhau-node network`: who is connected to whom."""

from __future__ import annotations

import click
import msgspec

from bacalhau_node.cli.common import JSON, NODE, finish, options, reach
from bacalhau_node.client import Graph


@click.command()
@options(NODE, JSON)
def network(*, node: str | None, as_json: bool) -> None:
    """Show the network as the node knows it: its nodes, their links, what each has to do."""

    async def ask() -> Graph:
        async with reach(node) as client:
            return await client.network()

    found = finish(ask())
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    near = found.degrees
    counts = (("node", len(found.nodes)), ("part", len(found.parts)), ("link", len(found.links)))
    nodes, parts, links = (f"{count} {noun}{'s' * (count != 1)}" for noun, count in counts)
    spread = f": {near.least} to {near.most} a node, {near.median} in the middle" if found.links else ""
    click.echo(f"{nodes} in {parts}, {links}{spread}")
    for dot in found.nodes:
        said = "" if dot.seconds is None else f", said {dot.seconds:.0f} s ago"
        said += f", messages take {dot.age:.2g} s" if dot.age else ""
        said += f", {dot.dropped:,} dropped" if dot.dropped else ""
        click.echo(f"{dot.id}  {dot.state}: {dot.jobs} at work, room for {dot.room} of {dot.slots}{said}")
