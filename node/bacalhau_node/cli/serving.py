"""`bacalhau-node serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from bacalhau_node.cli.common import JSON, finish, needs_http, options

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@options(
    click.option("--api", default="127.0.0.1:1234", show_default=True, metavar="HOST:PORT", help="Where to listen."),
    click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="The data folder [BACALHAU_DIR]."),
    click.option("--keys", type=FILE, metavar="FILE", help="Who else may ask; lines: submit|admin SHA256-OF-KEY NAME."),
    click.option("--tls-cert", type=FILE, metavar="FILE", help="Certificate; needed beyond loopback, as --keys is."),
    click.option("--tls-key", type=FILE, metavar="FILE", help="Its key."),
    click.option("--listen", multiple=True, metavar="MULTIADDR", help="Where other nodes reach this one; repeatable."),
    click.option("--peer", "peers", multiple=True, metavar="MULTIADDR", help="A node to join; repeatable."),
    click.option(
        "--network-key",
        type=FILE,
        metavar="FILE",
        help="With --listen or --peer: only nodes with the same secret, the text of this file, get in.",
    ),
    click.option("--log-json", is_flag=True, help="Log lines as JSON."),
    JSON,
)
def serve(
    *, log_json: bool, as_json: bool, api: str, listen: tuple[str, ...], peers: tuple[str, ...], **files: Any
) -> None:
    """Run a node for notebooks, shells and other nodes, here or elsewhere, until it is stopped."""
    finish(_serve(log_json=log_json, as_json=as_json, api=api, listen=listen, peers=peers, **files))


async def _serve(*, log_json: bool, as_json: bool, **settings: Any) -> None:
    needs_http()
    from bacalhau_node import serve as service  # noqa: PLC0415 - aiohttp loads when it is needed

    def ready(state: service.Ready) -> None:
        if as_json:
            click.echo(msgspec.json.encode(state))
            return
        key = "" if state.token else ", with its key in BACALHAU_API_KEY"
        click.echo(f"node {state.node} ({state.executor}): in a notebook, %bacalhau connect {state.api}{key}")
        if state.peer:
            click.echo(f"another node joins by: --peer {state.peer}")

    service.start_logging(as_json=log_json)
    await service.serve(service.Settings(**settings), ready)
