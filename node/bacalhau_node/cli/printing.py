"""What is printed of a job: its lines as they come, its summary, its shards."""

from __future__ import annotations

import time

import click
import msgspec

from bacalhau_node.cli.common import TOLD_SECONDS
from bacalhau_node.client import Client, JobChanged, JobView, ShardBytes, ShardChanged, ShardText, ShardView
from bacalhau_node.messages import Outcome, ShardError
from bacalhau_node.transfers import Transfers


async def follow(client: Client, job: str, *, many: bool, shard: int | None = None) -> JobView:
    """Print what the shards (or that shard) print until the job ends."""
    printer, transfers = Printer(many=many), _Transfers()
    async for update in client.updates(job):
        if isinstance(update, JobChanged):
            if update.state == "Queued" or update.reason.startswith("publishing"):
                click.echo(f"{update.state}: {update.reason}", err=True)
        elif isinstance(update, ShardBytes):
            transfers.take(update)
        elif shard in {None, update.shard}:
            if isinstance(update, ShardText):
                printer.text(update.shard, update.stream, update.text)
            elif isinstance(update, ShardChanged) and update.state == "failed" and update.error:
                click.echo(f"shard {update.shard} failed: {_failure(update.error)}", err=True)
    printer.end()
    transfers.end()
    return await client.job(job)


class _Transfers:
    """Tells on stderr, now and then, what is on its way, and at the end what came."""

    def __init__(self) -> None:
        self._transfers, self._due = Transfers(), 0.0

    def take(self, news: ShardBytes) -> None:
        """Tell of it if something else was told long enough ago."""
        now = time.monotonic()
        self._transfers.take(news, now)
        if now >= self._due and (text := self._transfers.now(now)):
            self._due = now + TOLD_SECONDS
            click.echo(text, err=True)

    def end(self) -> None:
        """Tell what came."""
        if text := self._transfers.fetched():
            click.echo(text, err=True)


class Printer:
    """Shard text to stdout and stderr: as it comes for one shard, in whole named lines for many."""

    def __init__(self, *, many: bool) -> None:
        self._many = many
        self._rest: dict[tuple[int, str], str] = {}

    def text(self, shard: int, stream: str, text: str) -> None:
        """Print a part of what a shard printed."""
        err = stream == "stderr"
        if not self._many:
            click.echo(text, nl=False, err=err)
            return
        key = (shard, stream)
        *lines, self._rest[key] = (self._rest.get(key, "") + text).split("\n")
        for line in lines:
            click.echo(f"[shard {shard}] {line}", err=err)

    def end(self) -> None:
        """Print the unfinished lines."""
        for (shard, stream), rest in sorted(self._rest.items()):
            if rest:
                click.echo(f"[shard {shard}] {rest}", err=stream == "stderr")


def summary(view: JobView) -> dict[str, object]:
    """A job as the command line's JSON has it."""
    return {
        "id": view.job,
        "state": view.state,
        "shards": [_shard_summary(shard) for shard in view.shards],
        "cid": view.cid,
        "published": view.published,
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
        "error": error_text(outcome.error) if outcome and outcome.error else None,
        "disagreed": shard.disagreed,
    }


def error_text(error: ShardError) -> str:
    """One line for an error."""
    return ": ".join(part for part in (error.name, error.message) if part)


def _failure(error: ShardError) -> str:
    """The line, where in the script it was raised, and what is to be done about it."""
    lines = [f" ({frame.file}, line {frame.line})" for frame in error.frames if frame.in_cell]
    return "\n".join((error_text(error) + "".join(lines[-1:]), *error.notes))


def _value(outcome: Outcome) -> object:
    """A JSON value as it is; any other by its kind, type, size and CID."""
    value = outcome.value
    if value.kind == "none":
        return None
    if value.kind == "json" and value.blob.inline is not None:
        return msgspec.Raw(value.blob.inline)
    return {"kind": value.kind, "type": value.type, "bytes": value.blob.size, "cid": value.blob.cid}


def closing_line(view: JobView, seconds: float) -> str:
    """How a job ended, in one line."""
    failed = [str(shard.index) for shard in view.shards if shard.state == "failed"]
    kept = sum(shard.state == "kept" for shard in view.shards)
    text = f"job {view.job} {view.state}: {kept}/{len(view.shards)} shards"
    text += f", failed: {_shortened(failed)}" if failed else ""
    text += f", {seconds:.1f} s, {view.cid or 'no result'}"
    text += "".join(f"\npublished: {where}" for where in view.published)
    text += "".join(f"\n{sentence}" for sentence in view.disagreements())
    reason = view.reason.partition("; ")[2] if failed else view.reason  # which failed is told above
    return f"{text}\n{reason}" if reason else text


def _shortened(indices: list[str]) -> str:
    return ", ".join(indices[:10]) + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")
