"""`bacalhau-node serve`."""

from __future__ import annotations

from pathlib import Path

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
    click.option("--log-json", is_flag=True, help="Log lines as JSON."),
    JSON,
)
def serve(*, log_json: bool, as_json: bool, api: str, **files: Path | None) -> None:
    """Run a node for notebooks and shells, here or elsewhere, until it is stopped."""
    finish(_serve(api, files, log_json=log_json, as_json=as_json))


async def _serve(api: str, files: dict[str, Path | None], *, log_json: bool, as_json: bool) -> None:
    needs_http()
    from bacalhau_node import serve as service  # noqa: PLC0415 - aiohttp loads when it is needed

    def ready(state: service.Ready) -> None:
        if as_json:
            click.echo(msgspec.json.encode(state))
            return
        key = "" if state.token else ", with its key in BACALHAU_API_KEY"
        click.echo(f"node {state.node} ({state.executor}): in a notebook, %bacalhau connect {state.api}{key}")

    service.start_logging(as_json=log_json)
    await service.serve(service.Settings(api=api, **files), ready)
