"""Every option of `%%bacalhau` in one table: reading, usage, completion and `submit()` all follow it."""

from __future__ import annotations

import ast
import keyword
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from bacalhau_node import literals, requirements
from bacalhau_node.errors import SpecError
from bacalhau_node.spec import MAX_GPU_SHARE, MAX_REPLICAS, MAX_SHARDS, Sharding

if TYPE_CHECKING:
    from collections.abc import Callable

JOB_NAMES = frozenset(("inputs", "outputs", "shard"))
"""What every cell finds bound (DESIGN section 3)."""


@dataclass(frozen=True)
class Option:
    """One option. `read` turns its text into a value and raises `SpecError` with what is allowed.

    `metavar` is empty for a flag. `bare`: the text that stands for a value left out. `choices`
    are for completion and usage; `read` enforces them. `expands`: whether `{expression}` is
    replaced.
    """

    name: str
    help: str
    _: KW_ONLY
    metavar: str = ""
    short: str = ""
    read: Callable[[str], object] = str
    repeats: bool = False
    bare: str | None = None
    choices: tuple[str, ...] = ()
    expands: bool = True

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return f"--{self.name}"

    @property
    def field(self) -> str:
        """The option as a Python name."""
        return self.name.replace("-", "_")


def _text(text: str) -> str:
    if not text or "\0" in text:
        raise SpecError("a value is needed")
    return text


def _variable(text: str) -> str:
    if not text.isidentifier() or keyword.iskeyword(text):
        raise SpecError("not a Python name")
    return text


def _variables(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        _variable(name)
        if name in JOB_NAMES:
            raise SpecError(f"`{name}` is what the job gives the cell; rename your variable")
    return names


def _expression(text: str) -> str:
    try:
        ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: absurdly nested text
        raise SpecError(f"not a Python expression: {getattr(error, 'msg', error)}") from error
    return text.strip()


def _image(text: str) -> str:
    if not text or text.startswith("-") or any(char.isspace() or char == "\0" for char in text):
        raise SpecError("not the name of an image; write something like python:3.11-slim")
    return text


def _node(text: str) -> str:
    return text if text == "local" else literals.node_url(text)


def _only(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise SpecError(f"one of {', '.join(allowed)} is needed{literals.nearest(text, allowed)}")
        return text

    return read


def _environment(text: str) -> tuple[str, str]:
    key, value = literals.pair(text)
    if not key.isidentifier() or "\0" in value:
        raise SpecError("write NAME=VALUE, the name of letters, digits and '_'")
    return key, value


def _secret(text: str) -> str:
    if not text.isidentifier() or not text.isascii():
        raise SpecError("the name of an environment variable is needed, never its value")
    return text


def _shards(text: str) -> Sharding:
    if text == "auto":
        return Sharding(by="auto")
    try:
        return Sharding(by="count", n=literals.count(text, high=MAX_SHARDS))
    except SpecError as error:
        raise SpecError(f"{error}; write a number of shards or auto") from error


def _number(low: int, high: int) -> Callable[[str], int]:
    return lambda text: literals.count(text, low=low, high=high)


def _choice(name: str, text: str, choices: tuple[str, ...]) -> Option:
    return Option(name, text, metavar="|".join(choices), choices=choices, read=_only(*choices))


def _count(name: str, text: str, *, low: int = 1, high: int = 1_000_000) -> Option:
    return Option(name, text, metavar="N", read=lambda word: literals.count(word, low=low, high=high))


GROUPS: dict[str, tuple[Option, ...]] = {
    "What goes in": (
        Option(
            "input",
            "data to split: folder, file, CID, https://…, s3://…, {job}",
            metavar="SRC",
            short="i",
            read=_text,
            repeats=True,
        ),
        Option("with", "data that goes whole to every shard", metavar="SRC", read=_text, repeats=True),
        Option(
            "glob",
            "which files: '*.csv', '**/*.json'; ending in / for folders",
            metavar="PATTERN",
            read=_text,
            repeats=True,
        ),
        Option("vars", "notebook variables that go along: a,b", metavar="A,B", read=_variables, repeats=True),
        Option("module", "more source to send: a module or a path", metavar="NAME|PATH", read=_text, repeats=True),
        Option("pin", "give local inputs a CID and keep them"),
    ),
    "How to split": (
        Option("shards", "so many shards, balanced by bytes", metavar="N|auto", read=_shards, choices=("auto",)),
        Option(
            "batch-size",
            "so many files a shard",
            metavar="K",
            read=lambda text: Sharding(by="batch", n=literals.count(text)),
        ),
        Option(
            "shard-size",
            "so many bytes a shard: 64MB",
            metavar="SIZE",
            read=lambda text: Sharding(by="size", n=literals.size(text)),
        ),
    ),
    "What comes back": (
        Option("out", "bind the job to a name at once", metavar="NAME", short="o", read=_variable),
        Option("df", "bind the joined DataFrame to a name", metavar="NAME", read=_variable),
        Option(
            "reduce", "what to make of the joined frame, called df", metavar="EXPR", read=_expression, expands=False
        ),
        Option("partial", "also when some shards failed"),
        Option(
            "publish",
            "where results go: local:DIR, s3://… (gs, az), ipfs, filecoin",
            metavar="TARGET",
            read=_text,
            choices=(*literals.TARGETS, literals.LOCAL, *(f"{scheme}://" for scheme in literals.BUCKETS)),
        ),
        Option("reuse", "take an equal job's result where there is one"),
    ),
    "What a shard may use": (
        Option(
            "gpu", "GPUs (1 without a number)", metavar="[N]", bare="1", read=lambda text: literals.count(text, high=64)
        ),
        _count("gpu-share", "so many shards on one GPU", high=MAX_GPU_SHARE),
        Option("cpu", "CPU cores: 2 or 0.5", metavar="X", read=literals.cores),
        Option("memory", "memory: 4GB", metavar="SIZE", read=literals.size),
        Option("disk", "disk: 10GB", metavar="SIZE", read=literals.size),
        Option("timeout", "time for one shard: 90, 10m, 1h30m", metavar="TIME", read=literals.seconds),
        Option("job-timeout", "time for the whole job", metavar="TIME", read=literals.seconds),
    ),
    "How it runs": (
        _count("parallel", "at most so many shards at once"),
        _count("retries", "repeat a failing shard so often", low=0, high=100),
        Option("image", "container image", metavar="NAME", read=_image),
        _choice("isolation", "the least isolation that will do", ("container", "sandbox", "none")),
        _choice("container-per", "one container per slot of the job, or per shard", ("job", "shard")),
        _choice("network", "what the shard can reach", ("none", "full")),
        Option("require", "packages to install: 'tabulate>=0.9'", metavar="PKG", read=requirements.split, repeats=True),
        Option("node", "the node to run on; default: see %bacalhau connect", metavar="URL", read=_node),
        Option("raw", "the cell is a shell script, not Python"),
        Option("env", "an environment variable", metavar="K=V", short="e", read=_environment, repeats=True),
        Option(
            "secret",
            "an environment variable of yours: masked, never stored",
            metavar="NAME",
            read=_secret,
            repeats=True,
        ),
        Option("label", "a label of the job", metavar="K=V", short="l", read=literals.pair, repeats=True),
        Option("constraint", "which nodes, by their labels: 'region=eu'", metavar="EXPR", read=_text),
        _count("replicas", "executions of each shard", high=MAX_REPLICAS),
        _count("agree", "how many of them must agree", high=MAX_REPLICAS),
    ),
    "What you see": (
        Option("background", "return at once; the job goes on"),
        _choice("on-interrupt", "what Stop does to the job", ("cancel", "detach")),
        _choice("progress", "how the job is shown", ("auto", "widget", "html", "text", "none")),
        _choice("logs", "which lines of the shards are shown", ("all", "errors", "tail", "none")),
        Option("dry-run", "show plan and bundle, run nothing"),
        Option("no-check", "skip the check for missing names"),
        Option("help", "this text", short="h"),
    ),
}

OPTIONS: dict[str, Option] = {option.flag: option for group in GROUPS.values() for option in group}
SHORT: dict[str, Option] = {f"-{option.short}": option for option in OPTIONS.values() if option.short}
