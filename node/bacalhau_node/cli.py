"""`bacalhau-node`: one job from the command line, and what works on this machine.

Exit codes: 0 completed, 1 the job failed, 2 wrong usage, 3 node not reachable, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from bacalhau_node import __version__, literals
from bacalhau_node.bundle import script_task
from bacalhau_node.client import Client, JobChanged, JobView, ShardChanged, ShardText, ShardView, open_local
from bacalhau_node.doctor import Finding, examine, healthy
from bacalhau_node.download import download
from bacalhau_node.errors import BacalhauError, NodeUnreachable, SpecError
from bacalhau_node.messages import Outcome, ShardError
from bacalhau_node.spec import MAX_SHARDS, Command, JobSpec, PythonCell, Resources, Sharding

FAILED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130

T = TypeVar("T")


class _Literal(click.ParamType[object]):
    """A click type over one of the readers of `literals`."""

    def __init__(self, name: str, read: Callable[[str], object]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self._read(value)
        except SpecError as error:
            self.fail(f"{value}: {error}", param, ctx)


SIZE, TIME = _Literal("SIZE", literals.size), _Literal("TIME", literals.seconds)
COUNT, CORES = _Literal("N", literals.count), _Literal("X", literals.cores)
PAIR = _Literal("K=V", literals.pair)

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
    click.option("--gpu", "gpus", type=click.IntRange(min=0), is_flag=False, flag_value=1, default=0, metavar="[N]"),
    click.option("--timeout", type=TIME, help="Time for one shard."),
    click.option("--job-timeout", type=TIME, help="Time for the whole job."),
    click.option("--parallel", type=COUNT, help="At most so many shards at once."),
    click.option("--retries", type=click.IntRange(0, 100), default=0, help="Repeat a failing shard so often."),
    click.option("--image", metavar="NAME", help="Container image."),
    click.option("--isolation", type=click.Choice(["container", "sandbox", "none"]), help="The least that will do."),
    click.option("--container-per", type=click.Choice(["job", "shard"]), default="job", show_default=True),
    click.option("--network", type=click.Choice(["none", "full"]), default="none", show_default=True),
    click.option("-e", "--env", type=PAIR, multiple=True, metavar="K=V", help="An environment variable."),
    click.option("-l", "--label", "labels", type=PAIR, multiple=True, metavar="K=V", help="A label of the job."),
    click.option("--raw", is_flag=True, help="FILE is a shell script."),
    click.option("--pin", is_flag=True, help="Give local inputs a CID and keep them."),
    click.option("--download", "target", type=click.Path(path_type=Path), help="Write the results to this folder."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object last."),
)


def _with(options: tuple[Callable[[Any], Any], ...]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    return lambda function: functools.reduce(lambda inner, option: option(inner), reversed(options), function)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run shards of your data in containers, on this machine or on a network of nodes."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def version(as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Print the version."""
    click.echo(f'{{"version":"{__version__}"}}' if as_json else __version__)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Try what a first job needs, and say what to do about what doesn't work."""
    findings = _run(examine())
    if as_json:
        click.echo(msgspec.json.encode(findings))
    else:
        for finding in findings:
            click.echo(_finding_text(finding))
    sys.exit(0 if healthy(findings) else FAILED)


@main.command(context_settings={"ignore_unknown_options": False})
@click.argument("file", required=False)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@_with(_RUN_OPTIONS)
def run(file: str | None, command: tuple[str, ...], **options: Any) -> None:
    """Run FILE.py, or `--image NAME -- COMMAND…`, as one job; wait, and print what it prints."""
    started = time.monotonic()
    target, as_json = options.pop("target"), options.pop("as_json")
    view = _run(_one_job(file, command, options, target=target))
    if as_json:
        click.echo(msgspec.json.encode(_summary(view, time.monotonic() - started)))
    else:
        click.echo(_closing_line(view, time.monotonic() - started), err=True)
    sys.exit(0 if view.state == "Completed" else FAILED)


def _run(work: Coroutine[Any, Any, T]) -> T:
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


# --- one job ---


async def _one_job(
    file: str | None, command: tuple[str, ...], options: dict[str, Any], *, target: Path | None
) -> JobView:
    async with _client() as client:
        task = await _task(client, file, command, options)
        submission = await client.submit(_spec(task, options))
        where = f"{submission.count} shard{'s' * (submission.count != 1)} on {submission.node} ({submission.executor})"
        for note in (f"job {submission.job}: {where}", *submission.notes):
            click.echo(note, err=True)
        view = await _follow(client, submission.job, many=submission.count > 1)
        if target is not None:
            await download(client, view, target)
        return view


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[Client]:
    client = await open_local()
    try:
        yield client
    finally:
        await client.close()


async def _task(
    client: Client, file: str | None, command: tuple[str, ...], options: dict[str, Any]
) -> PythonCell | Command:
    raw = options.pop("raw")
    if options["image"] and (file is None or not file.endswith(".py")) and not raw:
        return Command(argv=(file, *command) if file else command)
    if file is None:
        raise SpecError("nothing to run: name a FILE.py, or `--image NAME -- COMMAND…`")
    if command:
        raise SpecError(f"one file is run: {' '.join(command)!r} is too much (arguments belong to `--image NAME -- …`)")
    try:
        source = await asyncio.to_thread(Path(file).read_text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file} can't be read: {error}") from error
    return Command(shell=source) if raw else await script_task(client, source, Path(file))


def _spec(task: PythonCell | Command, options: dict[str, Any]) -> JobSpec:
    place = literals.Place(exists=os.path.exists, cwd=str(Path.cwd()), home=str(Path.home()))
    take = options.pop
    return JobSpec(
        task=task,
        inputs=tuple(literals.source(text, place) for text in take("inputs")),
        shared=tuple(literals.source(text, place) for text in take("shared")),
        sharding=_sharding(take("shards"), take("batch_size"), take("shard_size")),
        resources=Resources(cpu=take("cpu"), memory=take("memory"), disk=take("disk"), gpus=take("gpus")),
        env=dict(take("env")),
        labels=dict(take("labels")),
        **options,
    )


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
    printer = _Printer(many=many)
    try:
        async for update in client.updates(job):
            if isinstance(update, ShardText):
                printer.text(update)
            elif isinstance(update, ShardChanged) and update.state == "failed" and update.error:
                click.echo(f"shard {update.shard} failed: {_error(update.error)}", err=True)
            elif isinstance(update, JobChanged) and update.state == "Queued":
                click.echo(f"Queued: {update.reason}", err=True)
    except asyncio.CancelledError:
        await client.cancel(job)
        async for _ in client.updates(job):
            pass
        raise
    printer.end()
    return await client.job(job)


class _Printer:
    """Shard text to stdout and stderr: as it comes for one shard, in whole named lines for many."""

    def __init__(self, *, many: bool) -> None:
        self._many = many
        self._rest: dict[tuple[int, str], str] = {}

    def text(self, update: ShardText) -> None:
        err = update.stream == "stderr"
        if not self._many:
            click.echo(update.text, nl=False, err=err)
            return
        key = (update.shard, update.stream)
        *lines, self._rest[key] = (self._rest.get(key, "") + update.text).split("\n")
        for line in lines:
            click.echo(f"[shard {update.shard}] {line}", err=err)

    def end(self) -> None:
        for (shard, stream), rest in sorted(self._rest.items()):
            if rest:
                click.echo(f"[shard {shard}] {rest}", err=stream == "stderr")


# --- what is printed last ---


def _summary(view: JobView, seconds: float) -> dict[str, object]:
    return {
        "id": view.job,
        "state": view.state,
        "shards": [_shard_summary(shard) for shard in view.shards],
        "cid": view.cid,
        "seconds": round(seconds, 3),
    }


def _shard_summary(shard: ShardView) -> dict[str, object]:
    outcome = shard.outcome
    return {
        "index": shard.index,
        "state": shard.state,
        "node": shard.node,
        "attempts": shard.attempts,
        "exit_code": outcome.exit_code if outcome else None,
        "value": _value(outcome) if outcome else None,
        "error": _error(outcome.error) if outcome and outcome.error else None,
    }


def _error(error: ShardError) -> str:
    return ": ".join(part for part in (error.name, error.message) if part)


def _value(outcome: Outcome) -> object:
    """A JSON value as it is; any other by its kind, type, size and CID."""
    value = outcome.value
    if value.kind == "none":
        return None
    if value.kind == "json" and value.blob.inline is not None:
        return msgspec.Raw(value.blob.inline)
    return {"kind": value.kind, "type": value.type, "bytes": value.blob.size, "cid": value.blob.cid}


def _closing_line(view: JobView, seconds: float) -> str:
    failed = [str(shard.index) for shard in view.shards if shard.state == "failed"]
    kept = sum(shard.state == "kept" for shard in view.shards)
    text = f"job {view.job} {view.state}: {kept}/{len(view.shards)} shards"
    text += f", failed: {_shortened(failed)}" if failed else ""
    text += f", {seconds:.1f} s, {view.cid or 'no result'}"
    return text if failed or not view.reason else f"{text}\n{view.reason}"


def _shortened(indices: list[str]) -> str:
    return ", ".join(indices[:10]) + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")


def _finding_text(finding: Finding) -> str:
    mark = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}[finding.state]
    remedy = f"\n          -> {finding.remedy}" if finding.remedy else ""
    return f"{mark}  {finding.what}: {finding.detail}{remedy}"
