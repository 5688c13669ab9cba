"""`list`, `describe`, `logs`, `get`, `cancel`, `nodes`: what can be asked about jobs and nodes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import msgspec

from bacalhau_node.cid import DAG_JSON, Cid
from bacalhau_node.cli.common import JSON, NODE, finish, options, reach
from bacalhau_node.cli.printing import Printer, error_text, follow, summary
from bacalhau_node.client import Client, JobLine, JobView, NodeView, ShardView
from bacalhau_node.download import download
from bacalhau_node.errors import SpecError
from bacalhau_node.ids import JobId, short
from bacalhau_node.messages import Blob
from bacalhau_node.protocol.events import FINAL_JOB, FINAL_SHARD


@click.command("list")
@options(NODE, JSON)
def list_jobs(node: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """List the jobs that the node knows, newest first."""

    async def ask() -> list[JobLine]:
        async with reach(node) as client:
            return list(await client.jobs())

    lines = finish(ask())
    if as_json:
        click.echo(msgspec.json.encode(lines))
    for line in () if as_json else lines:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.created))
        click.echo(f"{short(line.job)}  {line.state:<9}  {line.count:>6,} shards  {when}  {line.reason}".rstrip())


@click.command()
@click.argument("job", metavar="ID")
@options(NODE, JSON)
def describe(job: str, node: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Show one job with its shards. The start of its id is enough."""
    view = finish(_view(job, node))
    click.echo(msgspec.json.encode(summary(view)) if as_json else described(view))


async def _view(job: str, node: str | None) -> JobView:
    async with reach(node) as client:
        return await client.job(await client.find(job))


def described(view: JobView) -> str:
    """A job and its shards, for people."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(view.created))
    head = [f"job {view.job}", f"{view.state} {view.reason}".rstrip(), f"created {when}"]
    head += [f"result {view.cid}"] if view.cid else []
    head += [f"published {where}" for where in view.published]
    return "\n".join([*head, *view.disagreements(), *map(_shard_line, view.shards)])


def _shard_line(shard: ShardView) -> str:
    error = error_text(shard.outcome.error) if shard.outcome and shard.outcome.error else ""
    names = ", ".join(shard.inputs[:3]).encode("utf-8", "backslashreplace").decode()
    more = f" and {len(shard.inputs) - 3:,} more" if len(shard.inputs) > 3 else ""
    text = f"shard {shard.index:>5}  {shard.state:<9}  attempt {shard.attempts}  {shard.node or '-'}  {names}{more}"
    others = f"(not the answer of {', '.join(shard.disagreed)})" if shard.disagreed else ""
    return "  ".join(filter(None, (text.rstrip(), error, others)))


@click.command()
@click.argument("job", metavar="ID")
@click.option("--follow", is_flag=True, help="Go on until the job ends.")
@click.option("--shard", type=click.IntRange(min=0), help="One shard only.")
@options(NODE, JSON)
def logs(job: str, shard: int | None, node: str | None, **flags: bool) -> None:
    """Print what the shards of a job printed."""
    finish(_logs(job, shard, node, following=flags["follow"], as_json=flags["as_json"]))


async def _logs(job: str, shard: int | None, node: str | None, *, following: bool, as_json: bool) -> None:
    async with reach(node) as client:
        view = await client.job(await client.find(job))
        if shard is not None and shard >= len(view.shards):
            raise SpecError(f"--shard {shard}: the job has shards 0 to {len(view.shards) - 1}")
        if following and view.state not in FINAL_JOB and not as_json:
            await follow(client, view.job, many=shard is None and len(view.shards) > 1, shard=shard)
            return
        wanted = view.shards if shard is None else view.shards[shard : shard + 1]
        printer = Printer(many=len(wanted) > 1)
        for each in wanted:
            if as_json:
                click.echo(msgspec.json.encode(await _texts(client, each)))
            else:
                await _print(client, each, printer)
        printer.end()


async def _texts(client: Client, shard: ShardView) -> dict[str, object]:
    streams = {} if shard.outcome is None else {"stdout": shard.outcome.stdout, "stderr": shard.outcome.stderr}
    texts = {name: await _text(client, blob) for name, blob in streams.items()}
    return {"index": shard.index, "state": shard.state, **texts}


async def _print(client: Client, shard: ShardView, printer: Printer) -> None:
    if shard.outcome is None:
        if shard.state not in FINAL_SHARD and shard.attempts:
            click.echo(f"shard {shard.index} has not ended; --follow shows its lines as they come", err=True)
        return
    for stream, blob in (("stdout", shard.outcome.stdout), ("stderr", shard.outcome.stderr)):
        printer.text(shard.index, stream, await _text(client, blob))
    if shard.outcome.cut:
        click.echo(f"shard {shard.index}: {shard.outcome.cut:,} bytes more than the node keeps", err=True)


async def _text(client: Client, blob: Blob) -> str:
    data = blob.inline if blob.cid is None else await client.read(blob.cid)
    return (data or b"").decode("utf-8", "replace")


@click.command()
@click.argument("name", metavar="ID|CID")
@click.option("--output", type=click.Path(path_type=Path), help="The folder to write to; default: job-ID, or the CID.")
@click.option("--raw", is_flag=True, help="Shard by shard only, nothing combined.")
@options(NODE, JSON)
def get(name: str, output: Path | None, node: str | None, **flags: bool) -> None:
    """Download what the shards of a job left behind, or a file or folder by its CID."""
    target, view = finish(_get(name, output, node, raw=flags["raw"]))
    if view is None:
        click.echo(msgspec.json.encode({"cid": name, "output": str(target)}) if flags["as_json"] else target)
        return
    done = sum(shard.outcome is not None for shard in view.shards)
    if flags["as_json"]:
        click.echo(msgspec.json.encode({"id": view.job, "output": str(target), "shards": done}))
    else:
        click.echo(f"{done} of {len(view.shards)} shards in {target}")


async def _get(name: str, output: Path | None, node: str | None, *, raw: bool) -> tuple[Path, JobView | None]:
    async with reach(node) as client:
        cid = _cid(name)
        if cid is not None and cid.codec != DAG_JSON:
            target = output or Path(str(cid))
            await client.download(str(cid), target)
            return target, None
        view = await client.job(await client.find(name) if cid is None else await _job_of(client, str(cid)))
        target = output or Path(f"job-{short(view.job).removeprefix('j-')}")
        await download(client, view, target, raw=raw)
        return target, view


def _cid(text: str) -> Cid | None:
    try:
        return Cid.parse(text.removeprefix("ipfs://"))
    except SpecError:
        return None


async def _job_of(client: Client, result: str) -> JobId:
    """The newest job with this result."""
    for line in await client.jobs():
        if line.cid == result:
            return line.job
    raise SpecError(f"{result} is no file or folder, and not the result of a job that the node knows")


@click.command()
@click.argument("job", metavar="ID")
@options(NODE, JSON)
def cancel(job: str, node: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Ask a job to stop; what is finished is kept."""

    async def ask() -> JobView:
        async with reach(node) as client:
            view = await client.job(await client.find(job))
            await client.cancel(view.job)
            return view

    view = finish(ask())
    told = f"has ended already: {view.state}" if view.state in FINAL_JOB else "asked to stop"
    click.echo(msgspec.json.encode({"id": view.job}) if as_json else f"job {view.job}: {told}")


@click.command()
@options(NODE, JSON)
def nodes(node: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """List the nodes that the node knows, itself first."""

    async def ask() -> list[NodeView]:
        async with reach(node) as client:
            return list(await client.nodes())

    found = finish(ask())
    if as_json:
        click.echo(msgspec.json.encode(found))
    for each in () if as_json else found:
        can = each.executor
        cards = f", {len(can.gpus)} GPU{'s' * (len(can.gpus) != 1)}" if can and can.gpus else ""
        click.echo(f"{each.node}  {f'{can.executor}, {can.slots} slots, Python {can.python}{cards}' if can else '?'}")


COMMANDS: tuple[Any, ...] = (list_jobs, describe, logs, get, cancel, nodes)
