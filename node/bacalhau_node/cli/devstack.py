"""`bacalhau-node devstack`: many nodes in one process."""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Literal

import click
import msgspec

from bacalhau_node.cli.common import JSON, finish, needs_http, options
from bacalhau_node.folders import data_folder, take_folder


class Ready(msgspec.Struct, frozen=True):
    """The one line that says that the devstack can be used. `peer`: the multiaddr for `--peer` of another one."""

    api: str
    peer: str
    nodes: int
    seconds: float


@click.command()
@options(
    click.option("--nodes", default=3, show_default=True, metavar="N", help="How many."),
    click.option(
        "--peer",
        "peers",
        multiple=True,
        metavar="MULTIADDR",
        help="A node to join, of another devstack or alone; repeatable.",
    ),
    click.option("--bad-actors", default=0, metavar="N", help="So many of them answer wrongly, never run, or boast."),
    click.option(
        "--transport",
        type=click.Choice(["libp2p", "memory"]),
        default="libp2p",
        show_default=True,
        help="memory: without libp2p; nobody else can join then.",
    ),
    click.option(
        "--api",
        default="127.0.0.1:1234",
        show_default=True,
        metavar="HOST:PORT",
        help="Where node 0 listens for notebooks and shells; port 0: any.",
    ),
    click.option(
        "--data",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Where the nodes keep keys, journals and stores, for the next time, too; default: a folder that is"
        " removed at the end.",
    ),
    click.option(
        "--start",
        type=click.Choice(["random", "star", "frozen star"]),
        default="random",
        show_default=True,
        help="To whom each is introduced: an earlier one, node 0, or node 0 and nobody is met through others.",
    ),
    click.option("--simulate", is_flag=True, help="Run nothing: every shard ends at once, with no value."),
    click.option(
        "--network-key",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A closed network: only nodes with the same secret, the text of this file, get in.",
    ),
    JSON,
)
def devstack(*, as_json: bool, **wanted: object) -> None:
    """Run many nodes in one process, connected to each other, until it is stopped."""
    finish(_devstack(msgspec.convert(wanted, _Wanted, strict=False), as_json=as_json))


class _Wanted(msgspec.Struct, frozen=True, kw_only=True):
    nodes: int
    peers: tuple[str, ...]
    bad_actors: int
    transport: Literal["libp2p", "memory"]
    start: Literal["random", "star", "frozen star"]
    api: str
    data: Path | None
    simulate: bool
    network_key: Path | None


async def _devstack(wanted: _Wanted, *, as_json: bool) -> None:
    needs_http()
    from bacalhau_node import devstack as many  # noqa: PLC0415 - loads libp2p
    from bacalhau_node import serve as service  # noqa: PLC0415 - aiohttp loads when it is needed
    from bacalhau_node.api.server import ApiServer, bind  # noqa: PLC0415 - like the one above
    from bacalhau_node.client import LocalClient  # noqa: PLC0415 - like the one above

    service.start_logging(as_json=False)
    began = time.monotonic()
    host, port = service.address(wanted.api)
    bound = bind(host, port)
    with (
        tempfile.TemporaryDirectory() if wanted.data is None else nullcontext(str(wanted.data)) as root,
        closing(await asyncio.to_thread(take_folder, data_folder(), serving=wanted.api)) as door,
    ):
        stack = await many.open_devstack(
            wanted.nodes,
            root=Path(root),
            transport=wanted.transport,
            start=wanted.start,
            group=f"devstack at {host}:{bound.getsockname()[1]}",
            peers=wanted.peers,
            bad_actors=wanted.bad_actors,
            work="fake" if wanted.simulate else "real",
            network_key=await asyncio.to_thread(service.read_network_key, wanted.network_key),
        )
        server = ApiServer(LocalClient(stack.first), service.own_keys(door, host))

        def ready() -> None:
            state = Ready(server.url, stack.peer, len(stack.nodes), round(time.monotonic() - began, 2))
            if as_json:
                click.echo(msgspec.json.encode(state))
                return
            click.echo(f"{state.nodes} nodes in {state.seconds} s: in a notebook, %bacalhau connect {state.api}")
            if state.peer:
                click.echo(f"another devstack joins by: bacalhau-node devstack --peer {state.peer}")

        await service.attend(stack.first, door, server, bound, ready=ready, close=stack.close)
