"""The option line of a cell, read into a `CellRequest`. Pure, but for what `notebook` hands in.

Theory of operation: `words.split` cuts the line, `_gather` assigns the words to the options of
`option_table`, `_read` replaces `{expressions}` and turns texts into values, `_request` checks
what must fit together. There are no free words and no abbreviations: whatever is not exactly an
option is refused with the nearest spelling. Every refusal is a `SpecError` that names the option,
its value and what is allowed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bacalhau_jupyter import words
from bacalhau_jupyter.option_table import GROUPS, OPTIONS, SHORT, Option
from bacalhau_node import filesystem, literals
from bacalhau_node.errors import SpecError
from bacalhau_node.spec import Command, InputSource, Isolation, JobSpec, PythonCell, Resources, Sharding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


@dataclass(frozen=True, kw_only=True)
class Notebook:
    """What reading needs of the notebook: `lookup` evaluates an expression in it, `place` knows its folder."""

    lookup: Callable[[str], object]
    place: literals.Place


@dataclass(frozen=True, kw_only=True)
class CellRequest:
    """Everything the line asks for. `sharding` is None when it doesn't say; times in seconds, sizes in bytes.

    `local`: the folder of `--publish local:DIR`, which the notebook's side fills itself: the node's `publish` is
    "store" then.
    """

    inputs: tuple[InputSource, ...] = ()
    shared: tuple[InputSource, ...] = ()
    globs: tuple[str, ...] = ()
    sharding: Sharding | None = None
    vars: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    out: str | None = None
    df: str | None = None
    reduce: str | None = None
    partial: bool = False
    resources: Resources = field(default_factory=Resources)
    timeout: float | None = None
    job_timeout: float | None = None
    parallel: int | None = None
    retries: int = 0
    replicas: int = 1
    agree: int = 1
    image: str | None = None
    isolation: Isolation | None = None
    container_per: Literal["job", "shard"] = "job"
    network: Literal["none", "full"] = "none"
    requires: tuple[str, ...] = ()
    node: str | None = None
    raw: bool = False
    env: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    pin: bool = False
    publish: str = "store"
    local: Path | None = None
    constraint: str = ""
    reuse: bool = False
    background: bool = False
    on_interrupt: Literal["cancel", "detach"] = "cancel"
    progress: Literal["auto", "widget", "html", "text", "none"] = "auto"
    logs: Literal["all", "errors", "tail", "none"] = "all"
    dry_run: bool = False
    no_check: bool = False
    help: bool = False


def notebook(namespace: Mapping[str, Any]) -> Notebook:
    """The `Notebook` of this process and a user's namespace."""

    def lookup(expression: str) -> object:
        if words.JOB.fullmatch(expression):
            from bacalhau_jupyter.asking import attach  # noqa: PLC0415  only a line that names a job needs a node

            return attach(expression)
        return eval(expression, dict(namespace))  # noqa: S307  the user's own expression, in the user's own kernel

    place = literals.Place(
        exists=os.path.lexists,
        cwd=os.getcwd(),  # noqa: PTH109  text in, text out
        home=os.path.expanduser("~"),  # noqa: PTH111  text in, text out
        names=filesystem.names_in,
    )
    return Notebook(lookup=lookup, place=place)


def parse(line: str, notebook: Notebook) -> CellRequest:
    """The request that an option line makes; raises `SpecError`, and what a failed job in `{job}` raises."""
    given = _gather(words.split(line))
    if "--help" in given:
        return CellRequest(help=True)
    texts = {flag: _texts(OPTIONS[flag], values, notebook) for flag, values in given.items()}
    return _request(texts, notebook)


def from_words(given: Mapping[str, object], notebook: Notebook) -> CellRequest:
    """The same from Python: `input=["./data"], glob="*.csv", shards=10`; lists repeat, True sets a flag.

    A trailing underscore frees Python's own words: `with_=["codes.csv"]`.
    """
    texts: dict[str, list[str]] = {}
    for name, value in given.items():
        option = _known(f"--{name.rstrip('_').replace('_', '-')}")
        if value is None or value is False:
            continue
        if value is not True and not option.metavar:
            raise SpecError(f"{name}={value!r}: True or False is needed")
        texts[option.flag] = [option.bare or ""] if value is True else _as_texts(option, value, name)
    return _request(texts, notebook)


def to_spec(request: CellRequest, task: PythonCell | Command) -> JobSpec:
    """The job that the request asks for, around its task."""
    said = {name: getattr(request, name) for name in JobSpec.__struct_fields__ if hasattr(request, name)}
    return JobSpec(**{**said, "task": task, "sharding": request.sharding or Sharding()})


# --- words to texts ---


def _gather(line: list[words.Word]) -> dict[str, list[str | None]]:
    """Option -> the texts given for it, None where it stands alone."""
    given: dict[str, list[str | None]] = {}
    rest = iter(line)
    pending: words.Word | None = next(rest, None)
    while pending is not None:
        flag, equals, text = pending.text.partition("=")
        option = _known(flag, quoted=pending.quoted, whole=pending.text)
        pending = next(rest, None)
        value: str | None = text if equals else None
        if not equals and option.metavar and pending is not None and not _looks_like_option(pending):
            value, pending = pending.text, next(rest, None)
        _take(given, option, value)
    return given


def _looks_like_option(word: words.Word) -> bool:
    return not word.quoted and word.text.startswith("-") and not word.text[1:2].isdigit() and word.text != "-"


def _known(flag: str, *, quoted: bool = False, whole: str = "") -> Option:
    option = OPTIONS.get(flag) or SHORT.get(flag)
    if option and not quoted:
        return option
    dashes = "-–—"  # the longer ones come from word processors
    if quoted or flag[:1] not in dashes:
        raise SpecError(f"unexpected word {whole!r}: no option takes it; quote a value that holds blanks")
    hint = literals.unknown(f"--{flag.strip(dashes)}", OPTIONS)
    raise SpecError(f"unknown option {flag}{hint or '; %bacalhau --help lists them'}")


def _take(given: dict[str, list[str | None]], option: Option, value: str | None) -> None:
    if value is None and option.metavar and option.bare is None:
        raise SpecError(f"{option.flag} needs a value: {option.flag} {option.metavar}")
    if value is not None and not option.metavar:
        raise SpecError(f"{option.flag}={value}: it takes no value")
    if option.flag in given and option.metavar and not option.repeats:
        raise SpecError(
            f"{option.flag} {value or option.bare}: given twice, first as {given[option.flag][0] or option.bare}"
        )
    given.setdefault(option.flag, []).append(option.bare if value is None else value)


def _texts(option: Option, values: Iterable[str | None], notebook: Notebook) -> list[str]:
    found: list[str] = []
    for text in values:
        if text is None or not option.expands:
            found.append(text or "")
            continue
        try:
            found += _as_texts(option, words.expand(text, notebook.lookup), text.strip("{}"))
        except SpecError as error:
            raise SpecError(f"{option.flag} {error}") from error
    return found


def _as_texts(option: Option, value: object, label: str) -> list[str]:
    if isinstance(value, dict):
        value = [f"{key}={words.as_text(item, label)}" for key, item in value.items()]
    if option.repeats and isinstance(value, list | tuple):
        return [words.as_text(item, label) for item in value]
    return [words.as_text(value, label)]


# --- texts to a request ---

_FIELDS = {
    "--input": "inputs",
    "--with": "shared",
    "--glob": "globs",
    "--module": "modules",
    "--label": "labels",
    "--secret": "secrets",
    "--require": "requires",
}
_SPLITS = ("--shards", "--batch-size", "--shard-size")
_RESOURCES = {"--cpu": "cpu", "--memory": "memory", "--disk": "disk", "--gpu": "gpus", "--gpu-share": "gpu_share"}
_NO_FIELD = frozenset((*_SPLITS, *_RESOURCES, "--publish"))


def _request(texts: Mapping[str, list[str]], notebook: Notebook) -> CellRequest:
    _check_together(texts)
    values = {flag: [_value(OPTIONS[flag], text, notebook) for text in each] for flag, each in texts.items()}
    fields: dict[str, Any] = {}
    for flag, each in values.items():
        if flag not in _NO_FIELD:
            fields[_FIELDS.get(flag, OPTIONS[flag].field)] = _joined(flag, each)
    target = values.get("--publish", ["store"])[0]
    if target.startswith(literals.LOCAL):
        fields["local"] = Path(target.removeprefix(literals.LOCAL))
    else:
        fields["publish"] = target
    splits = [values[flag][0] for flag in _SPLITS if flag in values]
    resources = {name: values[flag][0] for flag, name in _RESOURCES.items() if flag in values}
    _check_secrets(fields.get("secrets", ()), fields.get("vars", ()))
    return CellRequest(**fields, sharding=splits[0] if splits else None, resources=Resources(**resources))


def _value(option: Option, text: str, notebook: Notebook) -> Any:
    if not option.metavar:
        return True
    try:
        if option.flag in ("--input", "--with"):
            return literals.source(text, notebook.place)
        if option.flag == "--publish":
            return literals.publish(text, notebook.place)
        return option.read(text)
    except SpecError as error:
        raise SpecError(f"{option.flag} {text}: {error}") from error


def _joined(flag: str, each: list[Any]) -> object:
    if flag == "--secret":
        return tuple(dict.fromkeys(each))
    if flag in ("--vars", "--require"):
        return tuple(dict.fromkeys(name for names in each for name in names))
    if flag in ("--env", "--label"):
        pairs = dict(each)
        if len(pairs) < len(each):
            raise SpecError(f"{flag}: a key is given twice; the keys are {', '.join(key for key, _ in each)}")
        return pairs
    return tuple(each) if OPTIONS[flag].repeats else each[0]


def _check_together(texts: Mapping[str, list[str]]) -> None:
    splits = [flag for flag in _SPLITS if flag in texts]
    if len(splits) > 1:
        raise SpecError(f"{' and '.join(splits)}: only one of {', '.join(_SPLITS)} can say how to split")
    if "--reduce" in texts and "--df" not in texts:
        raise SpecError("--reduce works on the joined frame; add --df NAME to say where the outcome goes")
    if "--df" in texts and texts["--df"] == texts.get("--out"):
        raise SpecError(f"--df {texts['--df'][0]} and --out {texts['--df'][0]}: two different names are needed")
    for flag in ("--vars", "--module", "--require", "--df"):
        if "--raw" in texts and flag in texts:
            raise SpecError(f"--raw makes the cell a shell script; {flag} is for Python cells")
    for flag in _SPLITS[1:]:
        if flag in texts and "--input" not in texts:
            raise SpecError(f"{flag} splits the files of --input; add --input SRC")
    if "--gpu-share" in texts and "--gpu" not in texts:
        raise SpecError("--gpu-share says how many shards share one of the cards of --gpu; add --gpu")
    if "--glob" in texts and "--input" not in texts:
        raise SpecError("--glob chooses among the files of --input; add --input SRC")


def _check_secrets(secrets: Iterable[str], stored: Iterable[str]) -> None:
    """Raise `SpecError` for a secret among the variables that go with the job: those are stored."""
    for name in set(secrets) & set(stored):
        raise SpecError(f"--secret {name} is in --vars too, which are stored: leave it out there")


# --- help ---

_EXAMPLES = """Examples:
  %%bacalhau --input flights --glob '*.csv' --shards 10 --df delays
  %%bacalhau -i ipfs://CID --shard-size 64MB --vars codes,limit --memory 4GB
  %%bacalhau --gpu --shards 10
"""


def usage() -> str:
    """The help text: every option in its group, one line each, and three examples."""
    width = max(len(_spelled(option)) for option in OPTIONS.values()) + 2
    lines = ["%%bacalhau [options]", "  Run the cell on shards of your data.", ""]
    for group, options in GROUPS.items():
        lines += [f"{group}:", *(f"  {_spelled(option):<{width}}{option.help}" for option in options), ""]
    return "\n".join(lines) + _EXAMPLES


def _spelled(option: Option) -> str:
    short = f"-{option.short}, " if option.short else "    "
    return f"{short}{option.flag} {option.metavar}".rstrip()


def line_completions(text: str) -> list[str]:
    """What the last word of `text` (the line up to the cursor) can become: options, or an option's choices."""
    try:
        done = words.split(text)
    except SpecError:
        return []  # inside an open quote
    last = "" if not text or text[-1].isspace() else (done.pop().text if done else "")
    flag, equals, start = last.partition("=")
    if equals:
        option = OPTIONS.get(flag)
        return [f"{flag}={choice}" for choice in option.choices if choice.startswith(start)] if option else []
    before = OPTIONS.get(done[-1].text) or SHORT.get(done[-1].text) if done and not done[-1].quoted else None
    if before and before.metavar and before.bare is None and not last.startswith("-"):
        return [choice for choice in before.choices if choice.startswith(last)]
    used = {word.text.partition("=")[0] for word in done}
    return [
        option.flag
        for option in OPTIONS.values()
        if option.flag.startswith(last) and (option.repeats or option.flag not in used)
    ]
