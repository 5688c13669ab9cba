"""Which jobs of others a node takes: what its owner wrote in `policy.toml` in the data folder.

Everything in the file is optional, and read when the node is served:

    requesters = ["ann", "lab-*"]        # names of keys, with wildcards; default: all
    images = ["python:3.*"]              # images that may be asked for; default: all
    isolation = "sandbox"                # the least isolation: "container", "sandbox", "none"
    cpu = 4                              # the most that a shard may ask for
    memory = "8GB"
    gpus = 0
    timeout = "1h"                       # a shard ends after this, whatever it asks for
    stateless = false                    # refuse jobs without inputs
    local_inputs = true                  # refuse jobs with inputs that are not in the store yet
    probe = ["/usr/local/bin/take-it"]   # a program that decides; see below
    probe_seconds = 10

The probe gets `{"job", "requester", "spec"}` as JSON on its standard input. With exit code 0 the job is taken, with
any other, or when the time is over, it is refused; the first line that it prints is the reason. Every
refusal is a sentence for the job's user. Jobs of the owner, by a key with the role `admin`, are not selected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final

import msgspec

from bacalhau_node import literals
from bacalhau_node.api import shapes
from bacalhau_node.api.auth import Caller
from bacalhau_node.errors import NoCapacity, SpecError
from bacalhau_node.ids import JobId
from bacalhau_node.ports import ContentStore
from bacalhau_node.spec import Isolation, JobSpec

log = logging.getLogger(__name__)

POLICY_FILE: Final = "policy.toml"

MOST_PROBES: Final = 4
"""Probes that run at once; more submissions wait (a guess)."""
_REASON: Final = 300
"""Characters of a probe's reason."""


Seconds = Annotated[float, msgspec.Meta(gt=0, le=366 * 86_400)]


class Selection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The owner's rules for jobs of others. Memory in bytes, times in seconds; None: no rule."""

    requesters: tuple[str, ...] | None = None
    images: tuple[str, ...] | None = None
    isolation: Isolation = "sandbox"
    cpu: Annotated[float, msgspec.Meta(gt=0)] | None = None
    memory: Annotated[int, msgspec.Meta(gt=0)] | None = None
    gpus: Annotated[int, msgspec.Meta(ge=0)] | None = None
    timeout: Seconds = 3600.0
    stateless: bool = True
    local_inputs: bool = False
    probe: tuple[str, ...] = ()
    probe_seconds: Seconds = 10.0

    def refusal(self, spec: JobSpec, caller: Caller, content: ContentStore) -> str | None:
        """Why a job is not taken, as what follows "this node"; None if it is, as far as a probe agrees."""
        take = spec.resources
        if self.requesters is not None and not _fits(caller.name, self.requesters):
            return f"takes no jobs of {caller.name}"
        if spec.image is not None and self.images is not None and not _fits(spec.image, self.images):
            return f"runs no image {spec.image}; it runs {', '.join(self.images) or 'none'}"
        if self.cpu is not None and take.cpu > self.cpu:
            return f"gives a shard at most {self.cpu:g} cores, and --cpu asks for {take.cpu:g}"
        if self.memory is not None and (take.memory or 0) > self.memory:
            most, asked = literals.size_text(self.memory), literals.size_text(take.memory or 0)
            return f"gives a shard at most {most} of memory, and --memory asks for {asked}"
        if self.gpus is not None and take.gpus > self.gpus:
            return f"gives a shard at most {self.gpus} GPUs, and --gpu asks for {take.gpus}"
        return self._of_inputs(spec, content)

    def _of_inputs(self, spec: JobSpec, content: ContentStore) -> str | None:
        sources = [source.source for source in (*spec.inputs, *spec.shared)]
        if not sources and not self.stateless:
            return "takes no jobs without inputs"
        missing = [one for one in sources if not _is_here(one, content)] if self.local_inputs else []
        return f"takes only jobs over what it holds, and {missing[0]} is not here" if missing else None


NO_RULES: Final = Selection()


def read_selection(folder: Path) -> Selection:
    """The rules in a data folder; raises `SpecError` that says what in the file is wrong."""
    path = folder / POLICY_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return NO_RULES
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} can't be read: {error}") from error
    try:
        raw = tomllib.loads(text)
        for name, read in (("memory", literals.size), ("timeout", literals.seconds)):
            if isinstance(raw.get(name), str):
                raw[name] = read(raw[name])
        return msgspec.convert(raw, Selection)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, SpecError) as error:
        raise SpecError(f"{path}: {error}") from error


class Probe:
    """Asks the owner's program about jobs that the other rules let through."""

    def __init__(self, selection: Selection) -> None:
        self._command, self._seconds = selection.probe, selection.probe_seconds
        self._turns = asyncio.Semaphore(MOST_PROBES)

    async def ask(self, job: JobId, spec: JobSpec, caller: Caller) -> None:
        """Return if the job may run here; raises `NoCapacity` with the reason if not."""
        if not self._command:
            return
        question = shapes.encode({"job": job, "requester": caller.name, "spec": spec})
        async with self._turns:
            code, reason = await self._run(question)
        if code != 0:
            raise NoCapacity(f"this node does not take the job: {reason or 'its owner refuses it, without a reason'}")

    async def _run(self, question: bytes) -> tuple[int, str]:
        """(exit code, the first line printed)."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            log.error("the probe can't be started: %s", error)  # noqa: TRY400 - the error says all there is
            return -1, "the program that decides for its owner can't be started"
        try:
            async with asyncio.timeout(self._seconds):
                printed, _ = await process.communicate(question)
        except TimeoutError:
            log.warning("the probe gave no answer in %g s", self._seconds)
            return -1, f"the program that decides for its owner gave no answer in {self._seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # then it and all that it started have ended
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        lines = printed.decode(errors="replace").strip().splitlines()
        return process.returncode or 0, lines[0][:_REASON] if lines else ""


def _is_here(source: str, content: ContentStore) -> bool:
    return source.startswith("ipfs://") and content.has(source.removeprefix("ipfs://").partition("/")[0])


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
