"""Asking a node for jobs: start one, attach to one, list them, and say which node is asked from now on."""

from __future__ import annotations

import time
import weakref
from functools import partial as bound
from typing import TYPE_CHECKING, TypeVar

from bacalhau_jupyter import sending
from bacalhau_jupyter import session as sessions
from bacalhau_jupyter.failures import CellText
from bacalhau_jupyter.job import ANSWER_SECONDS, Job
from bacalhau_jupyter.progress import JobMonitor
from bacalhau_jupyter.record import Place
from bacalhau_jupyter.session import Session, session
from bacalhau_node.errors import SpecError
from bacalhau_node.ids import JobId, short
from bacalhau_node.protocol.events import FINAL_JOB

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from bacalhau_jupyter.lines import Stream
    from bacalhau_node.client import Client, JobLine, Submission

T = TypeVar("T")

OPENING_SECONDS = 60.0
"""How long the kernel's own node may take to get onto a network: it probes its executors and loads libp2p first."""

TOLD_SECONDS = 0.5
"""How often a cell says how much of its inputs was sent."""

_known: weakref.WeakValueDictionary[JobId, Job] = weakref.WeakValueDictionary()


def start(
    prepared: sending.Prepared,
    *,
    cell: CellText,
    hint: Callable[[JobId], str],
    streams: frozenset[Stream],
    sending_told: Callable[[int, int], None] | None = None,
) -> tuple[Job, tuple[str, ...]]:
    """Submit what was prepared: the job, and sentences for its user. `hint`: how to see all lines of a shard.

    `sending_told` is called with (bytes sent, bytes to send) while inputs are on their way to a node elsewhere.
    """
    asked = session(prepared.node)
    made: list[JobId] = []
    sent = asked.begin(lambda client: sending.send(client, prepared, node=asked.node, made=made))
    try:
        submission, place = _awaited(sent, asked, sending_told)
    except KeyboardInterrupt:
        sent.cancel()
        asked.begin(lambda client: sending.call_off(client, made))
        raise
    age = None if submission.reused else 0.0
    monitor = JobMonitor(submission, hint=hint(submission.job), streams=streams, age=age)
    job = _known[submission.job] = Job(asked, monitor, place, cell)
    if prepared.local is not None:
        job.save(prepared.local)
    return job, prepared.notes if submission.reused else (*prepared.notes, *submission.notes)  # its record has them


def _awaited(sent: Future[T], asked: Session, told: Callable[[int, int], None] | None) -> T:
    """The answer to a submission; meanwhile `told` hears how much of its inputs was sent."""
    asked.uploaded = None
    while True:
        try:
            return sent.result(TOLD_SECONDS)
        except TimeoutError:
            if sent.done():  # the timeout is the answer
                raise
        if told is not None and asked.uploaded is not None:
            told(*asked.uploaded)


def submit(source: str, /, **words: object) -> Job:
    """Run `source` as a job and return at once. `words` are the options of `%%bacalhau`: `input=["data"], shards=10`.

    Raises `SpecError` for what is wrong with them, and for what only a cell can do (`df`, `out`, `progress`).
    """
    namespace = sending.notebook_namespace()
    prepared = sending.from_python(source, words, namespace)
    job, _ = start(prepared, cell=CellText(None, tuple(source.split("\n"))), hint=_hint, streams=frozenset())
    return job


def attach(job: str) -> Job:
    """The job whose id starts with `job`. Raises `SpecError` if there is none, or several."""
    asked, known = _found(job)
    same = _known.get(known)
    if same is not None and same.asks(asked):
        return same
    asking = bound(_submitted, job=known, node=asked.node)
    submission, place, age = asked.call(asking, timeout=ANSWER_SECONDS)
    monitor = JobMonitor(submission, hint=_hint(known), age=age)
    found = _known[known] = Job(asked, monitor, place, CellText())
    return found


def _found(prefix: str) -> tuple[Session, JobId]:
    """The job whose id starts so, and who knows it: the node that jobs go to, else another that was used here."""
    first: SpecError | None = None
    for asked in sessions.sessions():
        try:
            return asked, asked.call(lambda client: client.find(prefix), timeout=ANSWER_SECONDS)
        except SpecError as error:
            first = first or error
    assert first is not None  # there is always one to ask
    raise first


def jobs() -> list[JobLine]:
    """All jobs that the node knows that jobs go to, newest first."""
    return list(session().call(lambda client: client.jobs(), timeout=ANSWER_SECONDS))


def connect(address: str) -> None:
    """Let jobs go to the node at this URL from now on, to the network of a multiaddr, or (`"local"`) to the kernel's.

    Raises `SpecError` for what is neither, and `NodeUnreachable` when no node answers there: then nothing changes.
    """
    wait = OPENING_SECONDS if address.startswith("/") else ANSWER_SECONDS
    session(address).call(lambda client: client.nodes(), timeout=wait)
    sessions.connect(address)


def _hint(job: JobId) -> str:
    return f"%bacalhau logs {short(job)} {{shard}}"


async def _submitted(client: Client, job: JobId, node: str) -> tuple[Submission, Place, float | None]:
    """The answer that the submission of a job got, made again, and how long ago that was if the job goes on."""
    from bacalhau_node.client import Submission  # noqa: PLC0415  loaded with the client; it brings the whole node

    view, nodes = await client.job(job), await client.nodes()
    executor = next((shard.outcome.executor for shard in view.shards if shard.outcome), "")
    submission = Submission(job, len(view.shards), nodes[0].node, executor)
    age = None if view.state in FINAL_JOB else time.time() - view.created
    return submission, sending.place_of(submission, nodes, node=node), age
