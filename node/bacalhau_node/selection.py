"""Which jobs of others a node takes: what its owner wrote in `policy.toml` in the data folder.

Everything in the file is optional, and read when the node is opened:

    requesters = ["ann", "12D3KooW…"]    # names of keys, ids of nodes on the network, with wildcards; default: all
    images = ["python:3.*"]              # images that may be asked for; default: all
    isolation = "sandbox"                # the least isolation: "container", "sandbox", "none"
    cpu = 4                              # the most that a shard may ask for
    memory = "8GB"
    gpus = 0
    disk = "1TB"                         # default: 100GB
    packages = ["numpy", "lab-*"]        # what jobs may have installed by --require; default: anything
    timeout = "1h"                       # a shard ends after this, whatever it asks for
    stateless = false                    # refuse jobs without inputs
    local_inputs = true                  # refuse jobs with inputs that are not in the store yet
    probe = ["/usr/local/bin/take-it"]   # a program that decides, or "https://…", which is asked; see below
    probe_seconds = 10

The probe gets `{"job", "requester", "spec"}` as JSON on its standard input, or by POST. With exit code 0, or status
200, the job is taken, with any other, or when the time is over, it is refused; the first line that it prints, or
answers, is the reason. Every refusal is a sentence for the job's user. Jobs of the owner, by a key with the role
`admin`, are not selected; those that other nodes offer over the network are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import tomllib
from collections import Counter, OrderedDict
from collections.abc import Callable, Container
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from bacalhau_node import literals
from bacalhau_node.bounds import check_bounds
from bacalhau_node.errors import NoCapacity, SpecError
from bacalhau_node.ids import JobId, NodeId
from bacalhau_node.messages import Offer
from bacalhau_node.ports import ContentStore
from bacalhau_node.protocol.fitness import UNNAMED
from bacalhau_node.requirements import name_of
from bacalhau_node.spec import ISOLATION_RANK, OWNER_LABEL, Isolation, JobSpec, PythonCell

log = logging.getLogger(__name__)

POLICY_FILE: Final = "policy.toml"

MOST_PROBES: Final = 4
"""Probes that run at once; more submissions wait (a guess)."""
_REASON: Final = 300
"""Characters of a probe's reason."""

_ANSWER: Final = 4096
HTTP_OK: Final = 200

MOST_DISK: Final = 100_000_000_000
"""Bytes of disk that a shard of somebody else may ask for (a guess): `--disk` has no bound of its own."""

MOST_SPEC: Final = 256 * 1024
"""Bytes of a spec of somebody else, which is held for as long as its job is remembered (a guess)."""

REMEMBERED: Final = 1_000
"""Offered jobs about which the probe was asked and is not asked again (a guess)."""

MOST_WAITING: Final = 64
MOST_OF_ONE: Final = 16
"""Offers of other nodes, and of one of them, that wait for the probe; more are refused for now (guesses)."""

BUSY: Final = "its owner is asked about many jobs already: it may take more in a moment"

Seconds = Annotated[float, msgspec.Meta(gt=0, le=366 * 86_400)]


class Selection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The owner's rules for jobs of others. Memory in bytes, times in seconds; None: no rule."""

    requesters: tuple[str, ...] | None = None
    images: tuple[str, ...] | None = None
    isolation: Isolation = "sandbox"
    cpu: Annotated[float, msgspec.Meta(gt=0)] | None = None
    memory: Annotated[int, msgspec.Meta(gt=0)] | None = None
    gpus: Annotated[int, msgspec.Meta(ge=0)] | None = None
    disk: Annotated[int, msgspec.Meta(gt=0)] = MOST_DISK
    packages: tuple[str, ...] | None = None
    timeout: Seconds = 3600.0
    stateless: bool = True
    local_inputs: bool = False
    probe: tuple[str, ...] | Annotated[str, msgspec.Meta(pattern="^https?://")] = ()
    probe_seconds: Seconds = 10.0

    def refusal(self, spec: JobSpec, requester: str, content: ContentStore) -> str | None:
        """Why a job is not taken, as what follows "this node"; None if it is, as far as a probe agrees."""
        take = spec.resources
        if self.requesters is not None and not _fits(requester, self.requesters):
            return f"takes no jobs of {requester}"
        if spec.image is not None and self.images is not None and not _fits(spec.image, self.images):
            return f"runs no image {spec.image}; it runs {', '.join(self.images) or 'none'}"
        if self.cpu is not None and take.cpu > self.cpu:
            return f"gives a shard at most {self.cpu:g} cores, and --cpu asks for {take.cpu:g}"
        for name, rule, asked in (("memory", self.memory, take.memory), ("disk", self.disk, take.disk)):
            if rule is not None and (asked or 0) > rule:
                most, text = literals.size_text(rule), literals.size_text(asked or 0)
                return f"gives a shard at most {most} of {name}, and --{name} asks for {text}"
        if self.gpus is not None and take.gpus > self.gpus:
            return f"gives a shard at most {self.gpus} GPUs, and --gpu asks for {take.gpus}"
        return self._of_packages(spec) or self._of_inputs(spec, content)

    def _of_packages(self, spec: JobSpec) -> str | None:
        wanted = spec.task.requires if isinstance(spec.task, PythonCell) and self.packages is not None else ()
        for package in wanted:
            if not _fits(name_of(package), self.packages or ()):
                return f"installs no {package}; it installs {', '.join(self.packages or ()) or 'nothing'}"
        return None

    def limited(self, spec: JobSpec, requester: str, *, usual_memory: int) -> JobSpec:
        """How a job of somebody else runs; raises `SpecError` for what it may not ask for.

        `usual_memory`: what a shard gets on this node that doesn't say.
        """
        if (size := len(msgspec.msgpack.encode(spec))) > MOST_SPEC:
            raise SpecError(f"the job itself has {size} bytes, at most {MOST_SPEC} are taken: put data into a file")
        if spec.network != "none":
            raise SpecError(f"--network {spec.network}: the owner of this node gives jobs of others no network")
        if spec.publish != "store":
            raise SpecError(
                f"--publish {spec.publish}: the owner of this node publishes no results of others; get them"
            )
        isolation, take = spec.isolation or "none", spec.resources
        if take.memory is None and self.memory is not None and self.memory < usual_memory:
            take = msgspec.structs.replace(take, memory=self.memory)
        return msgspec.structs.replace(
            spec,
            isolation=max(isolation, self.isolation, key=ISOLATION_RANK.__getitem__),
            timeout=min(spec.timeout or self.timeout, self.timeout),
            resources=take,
            labels={**spec.labels, OWNER_LABEL: requester},
        )

    def _of_inputs(self, spec: JobSpec, content: ContentStore) -> str | None:
        sources = [source.source for source in (*spec.inputs, *spec.shared)]
        if not sources and not self.stateless:
            return "takes no jobs without inputs"
        named = [one for one in sources if one != UNNAMED] if self.local_inputs else []
        missing = [one for one in named if not _is_here(one, content)]
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
        for name, read in (("memory", literals.size), ("disk", literals.size), ("timeout", literals.seconds)):
            if isinstance(raw.get(name), str):
                raw[name] = read(raw[name])
        return msgspec.convert(raw, Selection)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, SpecError) as error:
        raise SpecError(f"{path}: {error}") from error


class Probe:
    """Asks the owner's program about jobs that the other rules let through."""

    def __init__(self, selection: Selection) -> None:
        self._whom, self._seconds = selection.probe, selection.probe_seconds
        self._turns = asyncio.Semaphore(MOST_PROBES)

    async def ask(self, job: JobId, spec: JobSpec, requester: str) -> None:
        """Return if the job may run here; raises `NoCapacity` with the reason if not."""
        whom = self._whom
        if not whom:
            return
        question = msgspec.json.encode({"job": job, "requester": requester, "spec": spec})
        async with self._turns:
            taken, reason = await (self._post(whom, question) if isinstance(whom, str) else self._run(whom, question))
        if not taken:
            raise NoCapacity(f"this node does not take the job: {reason or 'its owner refuses it, without a reason'}")

    async def _post(self, url: str, question: bytes) -> tuple[bool, str]:
        """(whether the answer is 200, its first line)."""
        try:
            async with asyncio.timeout(self._seconds):
                status, body = await asyncio.to_thread(_posted, url, question, self._seconds)
        except (OSError, TimeoutError) as error:
            log.warning("the probe %s gave no answer: %s", url, error)
            return False, "the service that decides for its owner does not answer"
        return status == HTTP_OK, _first_line(body)

    async def _run(self, command: tuple[str, ...], question: bytes) -> tuple[bool, str]:
        """(whether the exit code is 0, the first line printed)."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            log.error("the probe can't be started: %s", error)  # noqa: TRY400 - the error says all there is
            return False, "the program that decides for its owner can't be started"
        try:
            async with asyncio.timeout(self._seconds):
                printed, _ = await process.communicate(question)
        except TimeoutError:
            log.warning("the probe gave no answer in %g s", self._seconds)
            return False, f"the program that decides for its owner gave no answer in {self._seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # then it and all that it started have ended
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        return process.returncode == 0, _first_line(printed)


class Refusal(NamedTuple):
    """Why an offer is not taken, and whether that may change."""

    kind: Literal["busy", "never"]
    reason: str


class Guests:
    """What a node does with jobs that other nodes offer it. `refuse`: why no executor can run a job, or None.

    `family`: nodes of the same owner, whose jobs need no isolation.
    """

    def __init__(
        self,
        rules: Selection,
        content: ContentStore,
        *,
        refuse: Callable[[JobSpec], str | None],
        usual_memory: Callable[[], int],
        family: Container[NodeId] = frozenset(),
    ) -> None:
        self._rules, self._content, self._family = rules, content, family
        self._of_family = msgspec.structs.replace(rules, isolation="none")
        self._executors_refuse, self._usual_memory = refuse, usual_memory
        self._probe = Probe(rules)
        self._asked: OrderedDict[tuple[NodeId, JobId], asyncio.Task[str]] = OrderedDict()
        self._waiting: Counter[NodeId] = Counter()

    def admit(self, requester: NodeId, spec: JobSpec) -> JobSpec:
        """The job as it runs here; raises `SpecError` for what it may not ask for."""
        check_bounds(spec)
        for source in (*spec.inputs, *spec.shared):
            if not source.source.startswith(("ipfs://", "https://", "http://")):
                raise SpecError(f"--input {source.source[:200]} names a place of another machine")
        rules = self._of_family if requester in self._family else self._rules
        return rules.limited(spec, requester, usual_memory=self._usual_memory())

    def refuse(self, requester: NodeId, spec: JobSpec) -> str | None:
        """Why this node never takes a job of this requester, in a sentence for its user; None if it may."""
        try:
            limited = self.admit(requester, spec)
            if (why := self._rules.refusal(spec, requester, self._content)) is not None:
                return f"this node {why}"
            return self._executors_refuse(limited)
        except SpecError as error:
            return str(error)

    async def vet(self, requester: NodeId, offer: Offer) -> Refusal | None:
        """Why a job may not be taken, as far as the owner has a say; None if it may. A probe is asked once for each.

        What is refused anyway is not shown to it.
        """
        if (why := self.refuse(requester, offer.spec)) is not None:
            return Refusal("never", why)
        if not self._rules.probe:
            return None
        key = (requester, offer.job)
        task = self._asked.get(key)
        if task is None or not task.done():
            if self._waiting.total() >= MOST_WAITING or self._waiting[requester] >= MOST_OF_ONE:
                return Refusal("busy", BUSY)
            if task is None:
                task = self._ask(key, offer)
        self._waiting[requester] += 1
        try:
            why = await asyncio.shield(task)
        finally:
            self._waiting -= Counter((requester,))
        return Refusal("never", why) if why else None

    def _ask(self, key: tuple[NodeId, JobId], offer: Offer) -> asyncio.Task[str]:
        task = self._asked[key] = asyncio.create_task(self._decided(key[0], offer))
        if len(self._asked) > REMEMBERED:
            self._asked.popitem(last=False)
        return task

    async def _decided(self, requester: NodeId, offer: Offer) -> str:
        try:
            await self._probe.ask(offer.job, offer.spec, requester)
        except NoCapacity as error:
            return str(error)
        return ""


def _first_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[0][:_REASON] if lines else ""


def _posted(url: str, question: bytes, seconds: float) -> tuple[int, bytes]:
    """(status, the start of the body) of the answer to a POST; raises `OSError`."""
    import urllib.error  # noqa: PLC0415 - with what it needs 30 modules, for those who have a probe at a URL
    import urllib.request  # noqa: PLC0415 - as above

    request = urllib.request.Request(url, question, {"Content-Type": "application/json"})  # noqa: S310 - the pattern of `probe` says which schemes
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:  # noqa: S310 - see above
            return answer.status, answer.read(_ANSWER)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(_ANSWER)


def _is_here(source: str, content: ContentStore) -> bool:
    return source.startswith("ipfs://") and content.has(source.removeprefix("ipfs://").partition("/")[0])


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
