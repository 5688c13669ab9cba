"""What the commands share: exit codes, options, and which node they talk to.

That is, in this order: `--node URL`; `BACALHAU_API_HOST` with `BACALHAU_API_PORT`; the node that this user
serves on this machine, if there is one; else a node in this process, over the data folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import click

from bacalhau_node.client import Client
from bacalhau_node.errors import BacalhauError, NodeUnreachable, SpecError
from bacalhau_node.folders import data_folder, servers
from bacalhau_node.literals import size_text
from bacalhau_node.local import open_local

FAILED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130

TOLD_SECONDS = 2.0
"""Seconds between two lines about one transfer."""

T = TypeVar("T")

NODE = click.option(
    "--node",
    metavar="URL",
    help="The node to ask; default: BACALHAU_API_HOST and _PORT, else the one you serve here, else one in the process.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Literal(click.ParamType[object]):
    """A click type over one of the readers of `literals`."""

    def __init__(self, name: str, read: Callable[[str], object]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """See click."""
        if not isinstance(value, str):
            return value
        try:
            return self._read(value)
        except SpecError as error:
            self.fail(f"{value}: {error}", param, ctx)


def options(*given: Callable[[Any], Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Several click options as one decorator."""
    return lambda function: functools.reduce(lambda inner, option: option(inner), reversed(given), function)


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; errors become one message and an exit code."""
    try:
        return asyncio.run(work)
    except SpecError as error:
        raise SystemExit(_complain(error, USAGE)) from error
    except NodeUnreachable as error:
        raise SystemExit(_complain(error, UNREACHABLE)) from error
    except BacalhauError as error:
        raise SystemExit(_complain(error, FAILED)) from error
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _complain(error: BacalhauError, code: int) -> int:
    click.echo(f"Error: {error}", err=True)
    return code


@contextlib.asynccontextmanager
async def reach(node: str | None) -> AsyncIterator[Client]:
    """The client of the node to talk to; which one that is is told on stderr unless it was named."""
    url = node or _from_environment() or _served()
    client = await open_local(received=_Received()) if url is None else _remote(url)
    if not node:
        where = url or f"a node in this process, over {data_folder()} (no server of yours runs)"
        click.echo(f"node: {where}", err=True)
    try:
        yield client
    finally:
        await client.close()


def _from_environment() -> str | None:
    host, port = os.environ.get("BACALHAU_API_HOST"), os.environ.get("BACALHAU_API_PORT", "1234")
    if not host:
        return None
    return f"{host}:{port}"


def _served() -> str | None:
    """The one server of this user that runs."""
    urls = [url for url, _ in servers(data_folder())]
    if len(urls) > 1:
        raise SpecError(f"several nodes of yours are served, name one with --node: {', '.join(urls)}")
    return urls[0] if urls else None


def _remote(url: str) -> Client:
    needs_http()
    from bacalhau_node.http_client import HttpClient  # noqa: PLC0415 - aiohttp loads when it is needed

    return HttpClient(url, progress=_show_progress, received=_Received())


def needs_http() -> None:
    """Raise `SpecError` where the packages for nodes elsewhere are not installed."""
    try:
        import aiohttp  # noqa: F401, PLC0415 - asked for, not used
    except ImportError as error:
        raise SpecError("talking to nodes elsewhere needs aiohttp: pip install 'bacalhau-jupyter[http]'") from error


class _Received:
    """Tells how much came, every two seconds that something lasts."""

    def __init__(self) -> None:
        self._due, self._last = 0.0, 0

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        if count < self._last:  # another file or folder
            self._due = now + TOLD_SECONDS
        self._last = count
        if not self._due:
            self._due = now + TOLD_SECONDS
        elif now >= self._due:
            self._due = now + TOLD_SECONDS
            click.echo(f"received {size_text(count)}", err=True)


def _show_progress(sent: int, total: int) -> None:
    click.echo(f"sent {sent:,} of {total:,} bytes", err=True)
