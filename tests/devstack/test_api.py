"""The API as strangers may use it: wrong types, wrong keys, wrong sizes, wrong moments."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import pytest

from bacalhau_node import dagjson
from bacalhau_node.api import answers, jobs, shapes
from bacalhau_node.api.auth import Caller, own_key
from bacalhau_node.api.door import SPARE, Seats
from bacalhau_node.api.server import ApiServer, bind
from bacalhau_node.cid import DAG_JSON, Cid
from bacalhau_node.client import LocalClient
from bacalhau_node.content import car
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.http_client import HttpClient
from bacalhau_node.ids import job_id, node_id
from bacalhau_node.node import open_node
from bacalhau_node.selection import Selection
from bacalhau_node.sources.limits import Limits
from bacalhau_node.spec import JobSpec, PythonCell, Sharding
from bacalhau_node.testing.builders import a_job_id

KEYS = {"ann": "submit", "ben": "submit", "root": "admin"}
ID = a_job_id(1)
NOWHERE = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
ROUTES = [
    ("POST", "/v0/jobs"),
    ("GET", "/v0/jobs"),
    ("GET", "/v0/jobs/find?prefix=j"),
    ("GET", f"/v0/jobs/{ID}"),
    ("POST", f"/v0/jobs/{ID}/cancel"),
    ("GET", f"/v0/jobs/{ID}/updates"),
    ("POST", "/v0/plan"),
    ("POST", "/v0/bundle"),
    ("POST", "/v0/blocks/missing"),
    ("POST", "/v0/car"),
    ("GET", f"/ipfs/{NOWHERE}?format=car"),
    ("GET", f"/v0/content/{NOWHERE}"),
    ("GET", "/v0/nodes"),
    ("GET", "/v0/version"),
    ("GET", "/metrics"),
    ("GET", "/nowhere"),
]


@dataclass
class Api:
    """A server, the client of its node, and requests as somebody with a key."""

    server: ApiServer
    local: LocalClient
    session: aiohttp.ClientSession

    async def ask(
        self, method: str, path: str, body: Any = None, *, key: str | None = "root", **headers: str
    ) -> tuple[int, Any]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key:
            sent["Authorization"] = f"Bearer {key}"
        data = None if body is None else io.BytesIO(body if isinstance(body, bytes) else msgspec.json.encode(body))
        async with self.session.request(method, self.server.url + path, data=data, headers=sent) as response:
            answer = await response.read()
            try:
                return response.status, msgspec.json.decode(answer)
            except msgspec.DecodeError:
                return response.status, answer

    async def spec(self, source: str = "1", **fields: Any) -> dict[str, Any]:
        bundle = await self.local.put_bundle({"cell.py": source.encode()})
        spec: dict[str, Any] = msgspec.to_builtins(JobSpec(task=PythonCell(bundle=bundle), **fields))
        return spec

    async def ended(self, job: str, key: str = "root") -> dict[str, Any]:
        async with asyncio.timeout(60):
            await self.ask("GET", f"/v0/jobs/{job}/updates", key=key)
        view: dict[str, Any] = (await self.ask("GET", f"/v0/jobs/{job}", key=key))[1]
        return view


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    local = LocalClient(await open_node(tmp_path, executors=[ProcessExecutor(tmp_path / "process", slots=2)]))
    entries = [(sha256(name.encode()).digest(), Caller(name, role)) for name, role in KEYS.items()]  # type: ignore[arg-type]
    server = ApiServer(local, [*entries, own_key("token")])
    await server.start(bind("127.0.0.1", 0))
    async with aiohttp.ClientSession() as session:
        yield Api(server, local, session)
    await local.close()
    await server.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "IDLE_SECONDS", 0.5)


def _head(method: str, path: str, length: int = 0) -> bytes:
    lines = (f"{method} {path} HTTP/1.1", "Host: localhost", "Authorization: Bearer root", f"Content-Length: {length}")
    return "\r\n".join((*lines, "", "")).encode()


async def _until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - of another task, which has no event for it
            await asyncio.sleep(0.02)


# --- who ---


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_wants_a_key_a_local_name_and_no_page(api, method, path):
    for key in (None, "wrong", ""):
        status, answer = await api.ask(method, path, key=key)
        assert (status, answer["error"]) == (401, "NodeUnreachable")
    for headers in ({"Host": "evil.example"}, {"Origin": "http://localhost"}, {"Sec_Fetch_Site": "cross-site"}):
        status, answer = await api.ask(method, path, **headers)
        assert (status, answer["error"]) == (403, "SpecError")


async def test_only_life_signs_are_open(api):
    assert await api.ask("GET", "/health", key=None) == (200, {"alive": True})
    assert await api.ask("GET", "/ready", key=None) == (200, {"ready": True})
    assert (await api.ask("GET", "/health", key=None, Host="evil.example"))[0] == 403


async def test_jobs_of_others_dont_exist(api):
    status, _ = await api.ask("POST", "/v0/jobs", {"job": ID, "spec": await api.spec()}, key="ann")
    assert status == 200
    assert [line["job"] for line in (await api.ask("GET", "/v0/jobs", key="ann"))[1]] == [ID]
    assert (await api.ask("GET", "/v0/jobs", key="ben"))[1] == []
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/updates")):
        status, answer = await api.ask(method, f"/v0/jobs/{ID}{path}", key="ben")
        assert (status, answer) == (404, {"error": "SpecError", "message": f"this node knows no job {ID}"})
    assert "latest are: none" in (await api.ask("GET", "/v0/jobs/find?prefix=j-", key="ben"))[1]["message"]
    assert (await api.ask("GET", f"/v0/jobs/find?prefix={ID[:12]}", key="root"))[1] == {"job": ID}
    again = {"job": ID, "spec": await api.spec()}
    assert (await api.ask("POST", "/v0/jobs", again, key="ben"))[0] == 409


async def test_a_job_of_somebody_else_is_isolated_and_bounded_whatever_it_asks_for(api):
    await api.ask("POST", "/v0/jobs", {"job": ID, "spec": await api.spec(isolation="none", timeout=9e6)}, key="ann")
    view = await api.ended(ID, key="ann")
    assert (view["spec"]["isolation"], view["spec"]["timeout"]) == ("sandbox", 3600.0)
    assert view["state"] == "Failed"
    assert "--isolation sandbox" in view["reason"]
    for fields, text in (({"network": "full"}, "network"), ({"labels": {"bacalhau.owner": "ben"}}, "bacalhau.owner")):
        body = {"job": a_job_id(2), "spec": await api.spec(**fields)}
        status, answer = await api.ask("POST", "/v0/jobs", body, key="ann")
        assert (status, answer["error"]) == (400, "SpecError")
        assert text in answer["message"]


# --- what ---


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/v0/jobs", b"", "not JSON"),
        ("/v0/jobs", b"{", "not JSON"),
        ("/v0/jobs", b"\xff\xfe", "not JSON"),
        ("/v0/jobs", b'{"spec":' + b"[" * 100_000, "Expected `object`"),
        ("/v0/jobs", b'{"x":' + b"[" * 100_000, "x"),
        ("/v0/jobs", [], "Expected `object`"),
        ("/v0/jobs", {"spec": {"task": {"type": "command"}}}, "job"),
        ("/v0/jobs", {"job": "j-1", "spec": {}}, r"\$\.job"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "virus"}}}, "virus"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command", "argv": "ls"}}}, r"\$\.spec\.task\.argv"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command"}, "parallel": "2"}}, r"\$\.spec\.parallel"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command"}, "parallel": 0}}, "parallel is 0"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command"}, "retries": 10**30}}, "retries"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command"}, "timeout": -1}}, "timeout is -1"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command"}, "sharding": {"n": 0}}}, "at least 1"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command"}, "gpuu": 1}}, "spec.gpuu is not known"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command", "x": 1}}}, "spec.task.x is not known"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command"}}, "force": True}, "force"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command"}, "env": {"A=B": "x"}}}, "A=B"),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "command"}, "env": {"A": "\0"}}}, "null"),
        (
            "/v0/jobs",
            {"job": ID, "spec": {"task": {"type": "command"}, "inputs": [{"source": "/etc"}]}},
            "a node takes ipfs",
        ),
        (
            "/v0/jobs",
            {"job": ID, "spec": {"task": {"type": "command"}, "shared": [{"source": "ipfs://x"}]}},
            "not a CID",
        ),
        ("/v0/jobs", {"job": ID, "spec": {"task": {"type": "cell", "bundle": "../x"}}}, "not a CID"),
        (
            "/v0/plan",
            {"spec": {"task": {"type": "command"}, "inputs": [{"source": "file:///etc"}]}},
            "a node takes ipfs",
        ),
        ("/v0/bundle", {"files": {"../x": ""}}, "not a path"),
        ("/v0/bundle", {"files": {"/x": ""}}, "not a path"),
        ("/v0/bundle", {"files": {"a//b": ""}}, "not a path"),
        ("/v0/bundle", {"files": {"x": "no base64!"}}, "base64"),
        ("/v0/blocks/missing", {"cids": ["nonsense"]}, "not a CID"),
        ("/v0/blocks/missing", {"cids": "x"}, r"\$\.cids"),
        ("/v0/blocks/missing", {"cids": [NOWHERE] * 10_001}, "10000"),
    ],
)
async def test_what_is_wrong_with_a_body_is_said_in_one_sentence(api, path, body, text):
    status, answer = await api.ask("POST", path, body)
    assert status in {400, 422}, answer
    assert answer["error"] in {"SpecError", "ContentError"}
    assert re.search(text, answer["message"])
    assert "\n" not in answer["message"]
    assert await api.local.jobs() == []


async def test_a_line_break_behind_an_id_is_part_of_it(api):
    """`$` in a pattern lets it pass: such an id would be a folder's name, and a second line in the log."""
    spec = await api.spec()
    status, error = await api.ask("POST", "/v0/jobs", {"job": f"{ID}\n", "spec": spec})
    assert (status, error["error"]) == (400, "SpecError")
    for read in (job_id, node_id):
        with pytest.raises(SpecError):
            read(f"{ID}\n")


async def test_a_cell_may_come_with_its_job(api):
    body = {"job": ID, "spec": {"task": {"type": "cell", "bundle": "any"}}, "files": {"cell.py": b"6 * 7"}}
    assert (await api.ask("POST", "/v0/jobs", body))[0] == 200
    view = await api.ended(ID)
    assert view["state"] == "Completed"
    assert view["spec"]["task"]["bundle"] == await api.local.put_bundle({"cell.py": b"6 * 7"})
    assert (await api.ask("POST", "/v0/jobs", body))[0] == 200
    odd = {**body, "job": a_job_id(2), "files": {"../cell.py": b""}}
    assert (await api.ask("POST", "/v0/jobs", odd))[0] == 400


async def test_a_cell_that_was_not_sent_is_asked_for(api):
    spec = {"task": {"type": "cell", "bundle": NOWHERE}}
    status, answer = await api.ask("POST", "/v0/jobs", {"job": ID, "spec": spec})
    assert (status, answer["error"]) == (422, "ContentError")


async def test_bodies_that_are_too_large_or_compressed_are_refused(api):
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b" " * 65_536

    async with api.session.post(
        f"{api.server.url}/v0/jobs", data=endless(), headers={"Authorization": "Bearer root"}
    ) as response:
        assert response.status == 413
    assert (await api.ask("POST", "/v0/plan", b" " * (shapes.MAX_JSON + 1)))[0] == 413
    assert (await api.ask("POST", "/v0/car", b"x", Content_Encoding="gzip"))[0] == 415
    files = {"files": {"x": "A" * (2 * shapes.MAX_BUNDLE)}}
    assert (await api.ask("POST", "/v0/bundle", files))[0] == 400


async def test_an_archive_for_which_there_is_no_room_is_refused_before_it_comes(api, monkeypatch):
    """Some of the disk stays free for the node itself, whatever clients send."""
    monkeypatch.setattr(Limits, "check_room", functools.partialmethod(_no_room))
    status, error = await api.ask("POST", "/v0/car", b"x" * 1000, key="ann")
    assert (status, error["message"]) == (422, "no room for 1000 bytes")


def _no_room(_limits: Limits, _folder: Path, size: int) -> None:
    raise ContentError(f"no room for {size} bytes")


async def test_a_job_of_somebody_else_may_not_be_as_large_as_a_request(api):
    spec = await api.spec(labels={"a": "x" * 300_000})
    for key, status in (("ann", 400), ("root", 200)):
        assert (await api.ask("POST", "/v0/jobs", {"job": ID, "spec": spec}, key=key))[0] == status


async def test_unknown_routes_and_methods_answer_as_everything_does(api):
    for method, path, status in (("GET", "/v0/other", 404), ("DELETE", "/v0/jobs", 405), ("PUT", "/v0/car", 405)):
        assert (await api.ask(method, path))[0] == status
        assert (await api.ask(method, path))[1]["error"] == "SpecError"


async def test_what_nobody_foresaw_is_told_without_its_insides(api, monkeypatch, caplog):
    async def broken() -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr(api.local, "nodes", broken)
    status, answer = await api.ask("GET", "/v0/nodes")
    assert (status, answer["error"]) == (500, "BugError")
    assert "secret" not in answer["message"]
    assert "a secret path" in caplog.text


# --- once ---


async def test_a_job_asked_for_many_times_is_one_job(api):
    body = {"job": ID, "spec": await api.spec()}
    found = await asyncio.gather(*(api.ask("POST", "/v0/jobs", body) for _ in range(20)))
    assert {status for status, _ in found} == {200}
    assert len({msgspec.json.encode(answer) for _, answer in found}) == 1
    await api.ended(ID)
    status, again = await api.ask("POST", "/v0/jobs", body)
    assert (status, again["job"], again["count"]) == (200, ID, 1)
    other = {"job": ID, "spec": await api.spec("2")}
    assert (await api.ask("POST", "/v0/jobs", other))[0] == 409
    assert len(await api.local.jobs()) == 1


async def test_a_job_that_could_not_be_made_may_be_tried_again_under_its_id(api):
    root = dagjson.encode({"no": "folder"})
    spec = await api.spec()
    spec["inputs"] = [{"source": f"ipfs://{NOWHERE}"}]
    assert (await api.ask("POST", "/v0/jobs", {"job": ID, "spec": spec}))[1]["error"] == "ContentError"
    spec["inputs"] = [{"source": f"ipfs://{api.local.node.content.put(root, codec='dag-json')}"}]
    assert (await api.ask("POST", "/v0/jobs", {"job": ID, "spec": spec}))[1]["error"] == "ContentError"
    spec["inputs"] = []
    assert (await api.ask("POST", "/v0/jobs", {"job": ID, "spec": spec}))[0] == 200


async def test_a_submission_whose_client_left_is_a_job_all_the_same(api):
    body = msgspec.json.encode({"job": ID, "spec": await api.spec()})
    parts = urlsplit(api.server.url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(_head("POST", "/v0/jobs", len(body)) + body)
    await writer.drain()
    writer.close()
    await _until(api.local.jobs)
    assert (await api.ended(ID))["state"] == "Completed"


async def test_a_node_that_drains_takes_no_job_and_answers_for_those_it_has(api):
    body = {"job": ID, "spec": await api.spec()}
    await api.ask("POST", "/v0/jobs", body)
    api.server.drain()
    assert (await api.ask("POST", "/v0/jobs", body))[0] == 200
    status, answer = await api.ask("POST", "/v0/jobs", {"job": a_job_id(2), "spec": await api.spec()})
    assert (status, answer["error"]) == (503, "NodeUnreachable")
    assert await api.ask("GET", "/ready", key=None) == (503, {"ready": False})
    assert (await api.ended(ID))["state"] == "Completed"


# --- watching ---


def _events(stream: bytes) -> list[tuple[str, str]]:
    """(id, event) of each event."""
    return re.findall(r"id: (\S+)\nevent: (\S+)\ndata: ", stream.decode())


async def test_updates_go_on_after_any_number(api):
    await api.ask("POST", "/v0/jobs", {"job": ID, "spec": await api.spec("print('a')\n1", sharding=Sharding(n=3))})
    await api.ended(ID)
    path = f"/v0/jobs/{ID}/updates"
    whole = _events((await api.ask("GET", path))[1])
    assert [event for _, event in whole].count("text") == 3
    assert whole[-1][1] == "job"
    for at, (number, _) in enumerate(whole):
        assert _events((await api.ask("GET", f"{path}?since={number}"))[1]) == whole[at + 1 :]
        assert _events((await api.ask("GET", path, Last_Event_ID=number))[1]) == whole[at + 1 :]
    assert _events((await api.ask("GET", f"{path}?since=00000000-3"))[1]) == whole
    for odd in ("3", "x-y", "00000000-" + "9" * 30, "-1"):
        assert (await api.ask("GET", f"{path}?since={odd}"))[0] == 400


async def test_a_reader_that_takes_nothing_is_cut_off_and_can_go_on(api, impatient):
    source = "for n in range(40): print(f'{n:02}' + 'x' * 100_000, flush=True)"
    await api.ask("POST", "/v0/jobs", {"job": ID, "spec": await api.spec(source)})
    await api.ended(ID)
    parts = urlsplit(api.server.url)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.to_thread(slow.connect, (parts.hostname, parts.port))
    slow.sendall(_head("GET", f"/v0/jobs/{ID}/updates"))

    async def nobody_watches() -> bool:
        return _watchers(await api.ask("GET", "/metrics")) == 0

    async def somebody_watches() -> bool:
        return not await nobody_watches()

    with slow:
        await _until(somebody_watches)
        await _until(nobody_watches)
        got = b"".join(await asyncio.to_thread(lambda: list(_rest(slow))))
    assert len(got) < 4_000_000
    last = _events(got[: got.rindex(b"\n\n")])[-1][0] if b"\n\n" in got.partition(b"\r\n\r\n")[2] else ""
    rest = (await api.ask("GET", f"/v0/jobs/{ID}/updates", Last_Event_ID=last))[1]
    assert b"39xxx" in rest
    assert _events(rest)[-1][1] == "job"


def _watchers(answer: tuple[int, bytes]) -> int:
    return int(re.findall(rb"^bacalhau_api_watchers (\d+)$", answer[1], re.MULTILINE)[0])


def _rest(sock: socket.socket) -> Iterator[bytes]:
    sock.settimeout(10)
    try:
        while data := sock.recv(65_536):
            yield data
    except ConnectionResetError:
        return


async def test_a_body_that_stops_in_the_middle_is_given_up(api, impatient):
    parts = urlsplit(api.server.url)
    for path in ("/v0/jobs", "/v0/car"):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(_head("POST", path, 99) + b"{")
        async with asyncio.timeout(20):
            assert b"408" in await reader.readline()
        writer.close()


async def test_a_body_that_drips_is_given_up(api, monkeypatch):
    """Each byte comes in time, and the whole would take days."""
    monkeypatch.setattr(answers, "SLOWEST", 0.5)
    parts = urlsplit(api.server.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(_head("POST", "/v0/car", 10_000))

    async def drip() -> None:
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    async with asyncio.timeout(20):
        assert b"408" in await reader.readline()
    dripping.cancel()
    writer.close()


async def test_garbage_is_refused_and_fills_no_log(api, caplog):
    host, port = urlsplit(api.server.url).hostname, urlsplit(api.server.url).port
    for garbage in (b"\x16\x03\x01\x02", b"GET /\xff HTTP/1.1", b"GET / HTTP/9.9", b"X: " + b"a" * 20_000):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(garbage + b"\r\n\r\n")
        async with asyncio.timeout(20):
            assert b" 400 " in await reader.readline()
        writer.close()
    assert not caplog.records


# --- how many ---


async def _connected(server: ApiServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(server.url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def _asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What answers on a connection that stays open; b"" if it was closed."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(20):
            return await reader.readuntil(b"}")
    return b""


async def test_one_connection_too_many_is_told_and_many_more_are_closed(api, monkeypatch):
    """Whoever is connected goes on, and there is room again when somebody leaves."""
    monkeypatch.setattr(api.server._door.seats, "most", 10)
    connected = [await _connected(api.server) for _ in range(10)]
    assert all([b"200 OK" in await _asked(*one) for one in connected])
    reader, writer = await _connected(api.server)
    told = await _asked(reader, writer)
    assert b"503" in told
    assert b"Retry-After: 5" in told
    assert b"as many connections as it takes" in told
    assert await reader.read() == b"", "and it is closed"
    writer.close()
    flood = [await _connected(api.server) for _ in range(100)]
    assert await _asked(*flood[-1]) == b""
    assert all([b"200 OK" in await _asked(*one) for one in connected])
    for _, one in (*connected, *flood):
        one.close()
    await _until(lambda: _is_well(api))


async def _is_well(api: Api) -> bool:
    reader, writer = await _connected(api.server)
    answer = await _asked(reader, writer)
    writer.close()
    return b"200 OK" in answer


async def test_a_client_that_finds_no_room_waits_for_it(api, monkeypatch, tmp_path):
    monkeypatch.setattr(api.server._door.seats, "most", 1)
    reader, writer = await _connected(api.server)
    assert b"200 OK" in await _asked(reader, writer)
    client = HttpClient(api.server.url, token="root", folder=tmp_path / "client")
    asking = asyncio.create_task(client.jobs())
    await _until(lambda: _counted(api, 503))
    writer.close()
    assert await asking == []
    await client.close()


async def _counted(api: Api, status: int) -> bool:
    return any(count for (_, code), count in api.server._traffic.requests.items() if code == status)


@pytest.mark.parametrize(
    ("host", "free"), [("203.0.113.5", 0), ("::ffff:203.0.113.6", 4), ("2001:db8:1:2::5", 1), ("2001:db8:1:3::5", 4)]
)
def test_one_address_has_no_more_connections_than_its_part(host, free):
    seats = Seats(100, 4)
    for number in range(4):
        assert seats.take(("203.0.113.5", number))
    for number in range(3):
        assert seats.take(("2001:db8:1:2::9", number, 0, 0))
    for number in range(200):
        assert seats.take((host, number, "again")) == (number < free + SPARE)
        assert seats.is_surplus((host, number, "again")) == (free <= number < free + SPARE)
    seats.leave((host, 0, "again"))
    assert seats.take((host, 999))


def test_on_loopback_only_all_connections_together_are_counted():
    seats = Seats(100, 4)
    assert [seats.take(("127.0.0.1", number)) for number in range(200)].count(True) == 100 + SPARE
    assert not seats.take(("203.0.113.5", 1))


async def test_a_key_has_so_many_unfinished_jobs_and_no_more(api, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_UNFINISHED", 2)
    monkeypatch.setattr(api.server._jobs, "_rules", Selection(isolation="none"))
    spec = await api.spec("import time; time.sleep(60)")
    for number in (1, 2):
        assert (await api.ask("POST", "/v0/jobs", {"job": a_job_id(number), "spec": spec}, key="ann"))[0] == 200
    status, error = await api.ask("POST", "/v0/jobs", {"job": a_job_id(3), "spec": spec}, key="ann")
    assert (status, error["error"]) == (429, "NoCapacity")
    assert error["message"].startswith("ann has 2 unfinished jobs with 2 shards on this node, which takes no more")
    for number, key in ((1, "ann"), (4, "ben"), (5, "root"), (6, "root"), (7, "root")):
        assert (await api.ask("POST", "/v0/jobs", {"job": a_job_id(number), "spec": spec}, key=key))[0] == 200
    monkeypatch.setattr(jobs, "MOST_UNFINISHED", 100)
    monkeypatch.setattr(jobs, "MOST_SHARDS", 2)
    assert (await api.ask("POST", "/v0/jobs", {"job": a_job_id(3), "spec": spec}, key="ann"))[0] == 429
    await api.ask("POST", f"/v0/jobs/{a_job_id(1)}/cancel", key="ann")
    await api.ended(a_job_id(1))
    assert (await api.ask("POST", "/v0/jobs", {"job": a_job_id(3), "spec": spec}, key="ann"))[0] == 200


# --- content ---


async def test_files_are_given_whole_or_in_ranges(api):
    data = bytes(range(256)) * 4096
    cid = api.local.node.content.add_bytes(data)
    path = f"/v0/content/{cid}"
    assert await api.ask("GET", path) == (200, data)
    for asked, part in (("bytes=0-0", data[:1]), ("bytes=262143-262145", data[262_143:262_146])):
        assert await api.ask("GET", path, Range=asked) == (206, part)
    assert await api.ask("GET", path, Range="bytes=1048570-") == (206, data[-6:])
    assert (await api.ask("GET", path, Range="bytes=1048576-"))[0] == 416
    assert (await api.ask("GET", path, Range="bytes=-5"))[0] == 200
    assert await api.ask("GET", f"/v0/content/{api.local.node.content.add_bytes(b'')}") == (200, b"")


async def test_folders_and_unknown_content_are_said_to_be_so(api, tmp_path):
    (tmp_path / "folder").mkdir()
    cid = api.local.node.content.add_path(tmp_path / "folder")
    assert (await api.ask("GET", f"/v0/content/{cid}"))[0] == 422
    for path in (f"/v0/content/{NOWHERE}", f"/ipfs/{NOWHERE}?format=car"):
        assert (await api.ask("GET", path))[0] == 404
    for path in ("/v0/content/x", "/ipfs/x?format=car"):
        assert (await api.ask("GET", path))[0] == 400


async def test_what_was_taken_out_of_one_store_goes_into_another(api):
    leaf = b"leaf"
    root = dagjson.encode({"to": dagjson.Link(str(Cid.of(leaf)))})
    name = Cid.of(root, codec=DAG_JSON)
    good = car.header([name]) + car.section(name, root) + car.section(Cid.of(leaf), leaf)
    for bad in (good[:-1], good[:-1] + b"x", good[: -len(leaf)], b"", car.header([name]) + car.section(name, root)):
        status, answer = await api.ask("POST", "/v0/car", bad)
        assert (status, answer["error"]) == (422, "ContentError")
        assert (await api.ask("POST", "/v0/blocks/missing", {"cids": [str(name)]}))[1] == {"missing": [str(name)]}
    assert await api.ask("POST", "/v0/car", good) == (200, {"bytes": len(leaf) + len(root)})
    asked = {"cids": [str(name), NOWHERE, str(Cid.of(leaf))]}
    assert (await api.ask("POST", "/v0/blocks/missing", asked))[1] == {"missing": [NOWHERE]}


# --- figures ---


async def test_figures_are_prometheus_text_for_the_owner(api):
    await api.ask("POST", "/v0/jobs", {"job": ID, "spec": await api.spec(sharding=Sharding(n=3))})
    await api.ended(ID)
    status, text = await api.ask("GET", "/metrics")
    assert status == 200
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'bacalhau_[a-z_]+(\{([a-z]+="[^"]*",?)+\})? [0-9.]+', line) for line in lines)
    assert 'bacalhau_jobs{state="Completed"} 1' in lines
    assert 'bacalhau_shards{state="kept"} 3' in lines
    assert "bacalhau_executions_running 0" in lines
    assert 'bacalhau_api_requests_total{route="GET /v0/jobs/{job}",status="200"} 1' in lines
    assert (await api.ask("GET", "/metrics", key="ann"))[0] == 403
