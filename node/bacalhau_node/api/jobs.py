"""Jobs over HTTP: submit, list, watch, cancel.

A submission runs in a task of its own, which the end of its connection doesn't stop: the client made up
the job's id, asks again, and is given the same answer. Watching is reading a feed from a number on (see
`feed`), so this file holds no queue either: a client that is slow or cut off goes on from the last
number that it saw, or gets the present state when that number is of another life of this node.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Coroutine, Iterator, Mapping

import msgspec
from aiohttp import web

from bacalhau_node.api import policy, shapes
from bacalhau_node.api.answers import TRAFFIC, Refused, Stream, answer, read
from bacalhau_node.api.auth import Caller
from bacalhau_node.client import JobView, LocalClient, Submission, the_one
from bacalhau_node.errors import NoCapacity, NodeUnreachable, SpecError
from bacalhau_node.feed import Feed, Update
from bacalhau_node.ids import JobId
from bacalhau_node.protocol.events import FINAL_JOB, CancelRequested
from bacalhau_node.selection import Probe, Selection
from bacalhau_node.spec import JobSpec, PythonCell

CALLER = web.RequestKey("caller", Caller)

ANSWERS_KEPT = 1_000
"""Answers kept for clients that ask again; older ones are made anew, without the plan's notes."""

MOST_UNFINISHED, MOST_SHARDS = 100, 1_000_000
"""Jobs of one key, but the owner's, that have not ended, and their shards (guesses): all are held in memory."""

WHOLE_VIEW = 32
"""Up to so many shards a job is one JSON text; with more it is made as it is sent."""

PART = 256 * 1024
"""Bytes of events sent at once."""

_EVENT_ID = re.compile(r"([0-9a-f]+)-([0-9]{1,15})")


class Jobs:
    """The handlers; `draining` refuses new jobs."""

    def __init__(self, client: LocalClient, rules: Selection) -> None:
        self.draining = False
        self._client = client
        self._rules, self._probe = rules, Probe(rules)
        self._flying: dict[JobId, tuple[JobSpec, asyncio.Task[Submission]]] = {}
        self._answered: OrderedDict[JobId, Submission] = OrderedDict()

    def routes(self) -> list[web.RouteDef]:
        """What is answered here."""
        return [
            web.post("/v0/jobs", self.submit),
            web.get("/v0/jobs", self.jobs, allow_head=False),
            web.get("/v0/jobs/find", self.find, allow_head=False),
            web.get("/v0/jobs/{job}", self.job, allow_head=False),
            web.post("/v0/jobs/{job}/cancel", self.cancel),
            web.get("/v0/jobs/{job}/updates", self.updates, allow_head=False),
            web.post("/v0/plan", self.plan),
        ]

    # --- submitting ---

    async def submit(self, request: web.Request) -> web.Response:
        """Start a job, once however often it is asked for."""
        asked, data = await read(request, shapes.SubmitRequest)
        spec = self._admitted(request, await self._with_bundle(asked), data)
        policy.check_bundle(spec, self._client.node.content)
        job, feeds = asked.job, self._client.node.engine.feeds
        if job not in self._flying and job not in feeds:
            if self.draining:
                raise NodeUnreachable("this node is shutting down and takes no more jobs: try again, or ask another")
            policy.check_selected(spec, request[CALLER], self._rules, self._client.node.content)
            self._check_room(request[CALLER])
            self._begin(job, spec, self._start(job, spec, request[CALLER], asked.secrets))
        flying = self._flying.get(job)
        if (flying[0] if flying else _spec(feeds[job])) != spec:
            raise Refused(409, SpecError(f"{job} is another job already: choose an id that is new"))
        return answer(await asyncio.shield(flying[1]) if flying else self._again(job, feeds[job]))

    def _check_room(self, caller: Caller) -> None:
        """Refuse one more job of who has many that have not ended."""
        if caller.role == "admin":
            return
        flying = sum(policy.owner(spec) == caller.name for spec, _ in self._flying.values())
        going = [feed.row.count for job, feed in self._unfinished(caller) if feed.row and job not in self._flying]
        if flying + len(going) < MOST_UNFINISHED and sum(going) < MOST_SHARDS:
            return
        why = f"{caller.name} has {flying + len(going)} unfinished jobs with {sum(going):,} shards on this node"
        error = NoCapacity(f"{why}, which takes no more at once: wait for one to end, or cancel one")
        raise Refused(429, error, **{"Retry-After": "10"})

    def _unfinished(self, caller: Caller) -> Iterator[tuple[JobId, Feed]]:
        feeds = self._client.node.engine.feeds.items()
        own = ((job, feed) for job, feed in feeds if policy.owner(_spec(feed)) == caller.name)
        return ((job, feed) for job, feed in own if feed.job.state not in FINAL_JOB)

    async def _with_bundle(self, asked: shapes.SubmitRequest) -> JobSpec:
        """The spec, with the cell's folder that came along stored and named."""
        spec = asked.spec
        if not asked.files or not isinstance(spec.task, PythonCell):
            return spec
        policy.check_files(asked.files)
        bundle = await self._client.put_bundle(asked.files)
        return msgspec.structs.replace(spec, task=msgspec.structs.replace(spec.task, bundle=bundle))

    async def _start(self, job: JobId, spec: JobSpec, caller: Caller, secrets: Mapping[str, str]) -> Submission:
        if caller.role != "admin":
            await self._probe.ask(job, spec, caller.name)
        return await self._client.submit(spec, secrets=secrets, job=job)

    def _begin(self, job: JobId, spec: JobSpec, start: Coroutine[object, object, Submission]) -> None:
        task = asyncio.create_task(start)
        self._flying[job] = spec, task
        task.add_done_callback(lambda done: self._landed(job, done))

    def _landed(self, job: JobId, task: asyncio.Task[Submission]) -> None:
        """Keep the answer for who asks again; a submission that failed made no job, and is tried anew then."""
        del self._flying[job]
        if task.cancelled() or task.exception() is not None:
            return
        self._answered[job] = task.result()
        if len(self._answered) > ANSWERS_KEPT:
            self._answered.popitem(last=False)

    def _again(self, job: JobId, feed: Feed) -> Submission:
        node, row = self._client.node, feed.row
        assert row is not None  # a feed is made by its first row
        return self._answered.get(job) or Submission(job, row.count, node.id, node.facilities.capabilities.executor)

    async def plan(self, request: web.Request) -> web.Response:
        """List and split, no more."""
        asked, data = await read(request, shapes.PlanRequest)
        spec = self._admitted(request, asked.spec, data)
        policy.check_selected(spec, request[CALLER], self._rules, self._client.node.content)
        return answer(await self._client.plan(spec))

    def _admitted(self, request: web.Request, spec: JobSpec, data: bytes) -> JobSpec:
        policy.known_fields(shapes.decode(data, dict)["spec"], policy.plain(spec))
        usual = self._client.node.facilities.capabilities.memory_per_slot
        return policy.admitted(spec, request[CALLER], self._rules, usual_memory=usual)

    # --- looking ---

    async def jobs(self, request: web.Request) -> web.Response:
        """All jobs that the caller may see."""
        seen = set(self._seen(request[CALLER]))
        return answer([line for line in await self._client.jobs() if line.job in seen])

    async def find(self, request: web.Request) -> web.Response:
        """The one job that was meant."""
        prefix = request.query.get("prefix", "")
        return answer(shapes.FoundAnswer(the_one(prefix, self._seen(request[CALLER]))))

    async def job(self, request: web.Request) -> web.StreamResponse:
        """One job with all its shards."""
        view = await self._client.job(self._known(request)[0])
        if len(view.shards) <= WHOLE_VIEW:
            return answer(view)
        async with Stream(request, headers={"Content-Type": "application/json"}) as stream:
            for part in _in_parts(_view_parts(view)):
                await stream.send(part)
        return stream.response

    async def cancel(self, request: web.Request) -> web.Response:
        """Ask for the end; of a job that is being made, as soon as it is."""
        flying = self._flying.get(request.match_info["job"])
        if flying is not None and request[CALLER].sees(policy.owner(flying[0])):
            stop = CancelRequested(request.match_info["job"])
            flying[1].add_done_callback(lambda _: self._client.node.engine.post(stop))
        else:
            await self._client.cancel(self._known(request)[0])
        return answer({})

    # --- watching ---

    async def updates(self, request: web.Request) -> web.StreamResponse:
        """The updates of a job after the one that the client saw last, to the end."""
        feed = self._known(request)[1]
        number = _since(request, feed)
        traffic = request.app[TRAFFIC]
        traffic.watchers += 1
        try:
            headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
            async with Stream(request, headers=headers) as stream:
                await _follow(feed, number, stream)
        finally:
            traffic.watchers -= 1
        return stream.response

    # --- whose ---

    def _seen(self, caller: Caller) -> Iterator[JobId]:
        for job, feed in self._client.node.engine.feeds.items():
            if caller.sees(policy.owner(_spec(feed))):
                yield job

    def _known(self, request: web.Request) -> tuple[JobId, Feed]:
        """The job of the path; one of somebody else is as unknown as one that never was."""
        job = request.match_info["job"]
        feed = self._client.node.engine.feeds.get(job)
        if feed is None or not request[CALLER].sees(policy.owner(_spec(feed))):
            raise Refused(404, SpecError(f"this node knows no job {job[:100]}"))
        return job, feed


def _spec(feed: Feed) -> JobSpec:
    assert feed.row is not None  # a feed is made by its first row
    return feed.row.spec


def _since(request: web.Request, feed: Feed) -> int:
    """The number to go on from; 0 (the present state) when the client's is of another epoch."""
    text = request.headers.get("Last-Event-ID") or request.query.get("since", "")
    if not text:
        return 0
    match = _EVENT_ID.fullmatch(text)
    if match is None:
        raise SpecError(f"since={text[:80]!r}: not the id of an event")
    return int(match[2]) if match[1] == feed.epoch else 0


async def _follow(feed: Feed, number: int, stream: Stream) -> None:
    while True:
        try:
            async with asyncio.timeout(shapes.HEARTBEAT):
                more = await feed.wait(number)
        except TimeoutError:
            await stream.send(b":\n\n")
            continue
        if not more:
            return
        news: list[tuple[int, Update]] = feed.after(number)
        number = news[-1][0]
        for part in _in_parts(shapes.event(feed.epoch, at, update) for at, update in news):
            await stream.send(part)


def _view_parts(view: JobView) -> Iterator[bytes]:
    """The JSON of a `JobView`, shard by shard."""
    yield shapes.encode(msgspec.structs.replace(view, shards=()))[:-2]
    for index, shard in enumerate(view.shards):
        yield (b"," if index else b"") + shapes.encode(shard)
    yield b"]}"


def _in_parts(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces joined to parts of about `PART` bytes."""
    part: list[bytes] = []
    size = 0
    for piece in pieces:
        part.append(piece)
        size += len(piece)
        if size >= PART:
            yield b"".join(part)
            part, size = [], 0
    if part:
        yield b"".join(part)
