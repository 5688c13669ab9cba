"""`put` and `cat`: files into the content store, and out of it."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from bacalhau_node.cid import Cid
from bacalhau_node.cli.common import JSON, NODE, finish, options, reach
from bacalhau_node.client import Stored
from bacalhau_node.literals import size_text
from bacalhau_node.node import PROFILE


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--profile", default=PROFILE, show_default=True, metavar="NAME", help="The UnixFS profile of its CID.")
@options(NODE, JSON)
def put(path: Path, profile: str, node: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Put a file or folder into the node's content store and print its CID: that of `ipfs add -r --hidden`."""
    path = path.resolve()

    async def ask() -> Stored:
        async with reach(node) as client:
            return await client.put(path, profile=profile)

    stored = finish(ask())
    if as_json:
        click.echo(msgspec.json.encode(stored))
        return
    click.echo(stored.cid)
    click.echo(f"{stored.files:,} file{'s' * (stored.files != 1)}, {size_text(stored.bytes)}, {profile}", err=True)


@click.command()
@click.argument("where", metavar="CID[/PATH]")
@options(NODE, JSON)
def cat(where: str, node: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Write a file to stdout, every block of it checked. As JSON: in base64.

    It comes from the content store, else from the IPFS daemon or the gateways that the environment names.
    """
    data = bytearray()

    async def copy() -> None:
        cid, _, path = where.removeprefix("ipfs://").partition("/")
        write = data.extend if as_json else sys.stdout.buffer.write
        async with reach(node) as client:
            async for part in client.cat(str(Cid.parse(cid)), path.strip("/")):
                write(part)

    finish(copy())
    if as_json:
        text = base64.b64encode(data).decode("ascii")
        click.echo(msgspec.json.encode({"bytes": len(data), "base64": text}))
    sys.stdout.flush()


COMMANDS: tuple[Any, ...] = (put, cat)
