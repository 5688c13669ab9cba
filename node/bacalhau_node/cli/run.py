"""`bacalhau-node run`: one job, its lines as they come, and how it ended."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from bacalhau_node import filesystem, literals, masking, requirements
from bacalhau_node.bundle import script_task
from bacalhau_node.cli import familiar
from bacalhau_node.cli.common import FAILED, NODE, Literal, finish, options, reach
from bacalhau_node.cli.printing import closing_line, follow, summary
from bacalhau_node.client import Client, JobView
from bacalhau_node.download import download
from bacalhau_node.errors import SpecError
from bacalhau_node.ids import JobId, short
from bacalhau_node.spec import MAX_GPU_SHARE, MAX_SHARDS, Command, JobSpec, PythonCell, Resources, Sharding

SIZE, TIME = Literal("SIZE", literals.size), Literal("TIME", literals.seconds)
COUNT, CORES = Literal("N", literals.count), Literal("X", literals.cores)
PAIR, PACKAGES = Literal("K=V", literals.pair), Literal("PKG", requirements.split)

_RUN_OPTIONS = (
    click.option("-i", "--input", "inputs", multiple=True, metavar="SRC", help="Data to split into shards."),
    click.option("--with", "shared", multiple=True, metavar="SRC", help="Data that goes whole to every shard."),
    click.option("--glob", "globs", multiple=True, metavar="PATTERN", help="Which files."),
    click.option("--shards", metavar="N|auto", help="So many shards, balanced by bytes."),
    click.option("--batch-size", type=COUNT, help="So many files a shard."),
    click.option("--shard-size", type=SIZE, help="So many bytes a shard."),
    click.option("--cpu", type=CORES, default=1.0, show_default=True, help="Cores of one shard."),
    click.option("--memory", type=SIZE, help="Memory of one shard."),
    click.option("--disk", type=SIZE, help="Disk of one shard."),
    click.option(
        "--gpu",
        "gpus",
        type=click.IntRange(min=0),
        is_flag=False,
        flag_value=1,
        default=0,
        metavar="[N]",
        help="GPUs of one shard; 1 without a number.",
    ),
    click.option("--gpu-share", type=click.IntRange(1, MAX_GPU_SHARE), default=1, help="So many shards on one GPU."),
    click.option("--timeout", type=TIME, help="Time for one shard."),
    click.option("--job-timeout", type=TIME, help="Time for the whole job."),
    click.option("--parallel", type=COUNT, help="At most so many shards at once."),
    click.option("--retries", type=click.IntRange(0, 100), default=0, help="Repeat a failing shard so often."),
    click.option("--replicas", type=COUNT, default=1, show_default=True, help="Executions of each shard."),
    click.option("--agree", type=COUNT, default=1, show_default=True, help="How many of them must agree."),
    click.option("--require", "requires", type=PACKAGES, multiple=True, help="A package that FILE.py needs."),
    click.option("--image", metavar="NAME", help="Container image."),
    click.option("--isolation", type=click.Choice(["container", "sandbox", "none"]), help="The least that will do."),
    click.option(
        "--container-per",
        type=click.Choice(["job", "shard"]),
        default="job",
        show_default=True,
        help="A container for each slot of the job, or a new one for each shard.",
    ),
    click.option(
        "--network",
        type=click.Choice(["none", "full"]),
        default="none",
        show_default=True,
        help="What a shard can reach.",
    ),
    click.option("-e", "--env", type=PAIR, multiple=True, metavar="K=V", help="An environment variable."),
    click.option(
        "--secret", "secrets", multiple=True, metavar="NAME", help="A variable of yours; masked, never stored."
    ),
    click.option("-l", "--label", "labels", type=PAIR, multiple=True, metavar="K=V", help="A label of the job."),
    click.option("--raw", is_flag=True, help="FILE is a shell script."),
    click.option("--pin", is_flag=True, help="Give local inputs a CID and keep them."),
    click.option(
        "--publish", default="store", metavar="TARGET", help="local:DIR, s3://…, gs://…, az://…, ipfs, filecoin."
    ),
    click.option("--reuse", is_flag=True, help="Take the result of an equal job that has completed."),
    click.option("--constraint", default="", metavar="EXPR", help="Which nodes, by their labels."),
    click.option("--wait", is_flag=True, expose_value=False, help="Wait and print, which it does anyway."),
    click.option("--download", "target", type=click.Path(path_type=Path), help="Write the results to this folder."),
    NODE,
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object last."),
)


@click.command(cls=familiar.Command)
@click.argument("file", required=False)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@options(*_RUN_OPTIONS)
def run(file: str | None, command: tuple[str, ...], **given: Any) -> None:
    """Run FILE.py, or `--image NAME -- COMMAND…`, as one job; wait, and print what it prints."""
    started = time.monotonic()
    target, as_json, node = given.pop("target"), given.pop("as_json"), given.pop("node")
    view = finish(_one_job(file, command, given, target=target, node=node))
    seconds = time.monotonic() - started
    if as_json:
        click.echo(msgspec.json.encode({**summary(view), "seconds": round(seconds, 3)}))
    else:
        click.echo(closing_line(view, seconds), err=True)
    sys.exit(0 if view.state == "Completed" else FAILED)


# --- one job ---


async def _one_job(
    file: str | None, command: tuple[str, ...], given: dict[str, Any], *, target: Path | None, node: str | None
) -> JobView:
    async with reach(node) as client:
        task = await _task(client, file, command, given)
        spec, local = _spec(task, given)
        submission = await client.submit(spec, secrets=masking.gathered(spec.secrets, os.environ))
        where = f"{submission.count} shard{'s' * (submission.count != 1)} on {submission.node} ({submission.executor})"
        for note in (f"job {submission.job}: {where}", *submission.notes):
            click.echo(note, err=True)
        view = await _follow(client, submission.job, many=submission.count > 1)
        for folder in filter(None, (target, local and local / view.job)):
            await download(client, view, folder)
            click.echo(f"downloaded to {folder}", err=True)
        return view


async def _task(
    client: Client, file: str | None, command: tuple[str, ...], given: dict[str, Any]
) -> PythonCell | Command:
    raw = given.pop("raw")
    requires = tuple(package for packages in given.pop("requires") for package in packages)
    if requires and (raw or not (file or "").endswith(".py")):
        raise SpecError("--require: packages are for a FILE.py; an image or a shell script has its own")
    if given["image"] and (file is None or not file.endswith(".py")) and not raw:
        return Command(argv=(file, *command) if file else command)
    if file is None:
        raise SpecError("nothing to run: name a FILE.py, or `--image NAME -- COMMAND…`")
    if command:
        raise SpecError(f"one file is run: {' '.join(command)!r} is too much (arguments belong to `--image NAME -- …`)")
    try:
        source = await asyncio.to_thread(Path(file).read_text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file} can't be read: {error}") from error
    return Command(shell=source) if raw else await script_task(client, source, Path(file), requires)


def _spec(task: PythonCell | Command, given: dict[str, Any]) -> tuple[JobSpec, Path | None]:
    """The job, and the folder of `--publish local:DIR`."""
    place = literals.Place(exists=os.path.exists, cwd=str(Path.cwd()), home=str(Path.home()), names=filesystem.names_in)
    take = given.pop
    publish = literals.publish(take("publish"), place)
    local = Path(publish.removeprefix(literals.LOCAL)) if publish.startswith(literals.LOCAL) else None
    spec = JobSpec(
        task=task,
        inputs=tuple(literals.source(text, place) for text in take("inputs")),
        shared=tuple(literals.source(text, place) for text in take("shared")),
        sharding=_sharding(take("shards"), take("batch_size"), take("shard_size")),
        resources=Resources(
            cpu=take("cpu"), memory=take("memory"), disk=take("disk"), gpus=take("gpus"), gpu_share=take("gpu_share")
        ),
        env=dict(take("env")),
        labels=dict(take("labels")),
        publish="store" if local else publish,
        **given,
    )
    return spec, local


def _sharding(shards: str | None, batch_size: int | None, shard_size: int | None) -> Sharding:
    if sum(option is not None for option in (shards, batch_size, shard_size)) > 1:
        raise SpecError("one of --shards, --batch-size and --shard-size is possible")
    if batch_size is not None:
        return Sharding(by="batch", n=batch_size)
    if shard_size is not None:
        return Sharding(by="size", n=shard_size)
    if shards == "auto":
        return Sharding(by="auto")
    try:
        return Sharding(by="count", n=1 if shards is None else literals.count(shards, high=MAX_SHARDS))
    except SpecError as error:
        raise SpecError(f"--shards {shards}: {error}; write a number of shards or auto") from error


async def _follow(client: Client, job: str, *, many: bool) -> JobView:
    """Print what the shards print until the job ends; an interrupt cancels the job first."""
    try:
        return await follow(client, job, many=many)
    except asyncio.CancelledError:
        await client.cancel(job)
        async for _ in client.updates(job):
            pass
        click.echo(f"job {job}: stopped; bacalhau-node get {short(JobId(job))} has what was finished", err=True)
        raise
