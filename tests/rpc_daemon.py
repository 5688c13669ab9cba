"""IPFS daemons that tests talk to over their RPC: a simulated one, and real ones where there are any.

A kubo binary is the one that `BACALHAU_TEST_KUBO` names, or that `make kubo` has built, and each test that wants one
starts its own: offline, on loopback, in a folder of its own. Building one takes three minutes of processor time and a
GB or two, so no other door does it, and where there is none only the simulated daemon is asked. That one answers what
this project asks (`version`, `id`, `block/get`, `dag/import`, `pin/add`, `pin/ls`) in the words of kubo, over a dict of
blocks. What it can't show, that a real daemon takes what we send and gives it out as files, was seen by these tests
with kubo 0.42.0, and by hand with js-ipfs 0.18.1.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from bacalhau_node.cid import Cid
from bacalhau_node.content.car import CarReader, header, links, section
from tests.prepare import kubo_path

KUBO = os.environ.get("BACALHAU_TEST_KUBO") or (str(kubo_path()) if kubo_path().exists() else "")
"""A kubo binary, "" for none."""

KINDS = ("simulated", *(("kubo",) if KUBO else ()))
"""The sorts of daemons that there are here."""

START_SECONDS = 60
_PEER = "12D3KooWMbbPVGsZYh3ChQjue712NHHGNybRRXwnuSpezYjGbCDS"


@dataclass
class Daemon:
    """A daemon at `address` (HOST:PORT)."""

    kind: str
    address: str
    gateway: str = ""
    """The URL of its gateway, if it has one."""

    def ask(self, command: str) -> bytes:
        """What it answers to a call, such as `cat?arg=CID`, asked by nothing of ours."""
        call = urllib.request.Request(f"http://{self.address}/api/v0/{command}", method="POST")
        with urllib.request.urlopen(call, timeout=30) as answer:
            return answer.read()

    def pins(self) -> dict[str, str]:
        """The names of its recursive pins, by CID."""
        answer = json.loads(self.ask("pin/ls?type=recursive&names=true"))
        return {cid: pin.get("Name", "") for cid, pin in (answer["Keys"] or {}).items()}


@contextmanager
def daemon(kind: str, folder: Path) -> Iterator[Daemon]:
    """A daemon of one of `KINDS` with nothing in it, as long as the block lasts."""
    with simulated() if kind == "simulated" else kubo(folder) as one:
        yield one


# --- a real one ---


@contextmanager
def kubo(folder: Path) -> Iterator[Daemon]:
    """The binary of `BACALHAU_TEST_KUBO` at work in `folder`, alone in the world."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "IPFS_PATH": str(folder / "repo"), "HOME": str(folder)}

    def ipfs(*words: str) -> None:
        subprocess.run([KUBO, *words], env=environment, check=True, capture_output=True, timeout=START_SECONDS)

    folder.mkdir(parents=True, exist_ok=True)
    ipfs("init", "--empty-repo")
    config = folder / "repo/config"
    settings = json.loads(config.read_text())
    settings["Addresses"] |= {"API": "/ip4/127.0.0.1/tcp/0", "Gateway": "/ip4/127.0.0.1/tcp/0", "Swarm": []}
    settings["Bootstrap"] = []
    settings["Discovery"]["MDNS"]["Enabled"] = False
    settings["AutoConf"] = {"Enabled": False}
    config.write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [KUBO, "daemon", "--offline"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield _answering(process, folder)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answering(process: subprocess.Popen[bytes], folder: Path) -> Daemon:
    """The daemon, once it listens: at its RPC first, then at its gateway."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError, IndexError):
            *_, port = (folder / "repo/api").read_text().strip().split("/")
            started = Daemon("kubo", f"127.0.0.1:{port}", (folder / "repo/gateway").read_text().strip())
            started.ask("version")
            return started
        time.sleep(0.05)
    raise RuntimeError(f"kubo did not start:\n{(folder / 'log').read_text(errors='replace')[-2000:]}")


# --- a simulated one ---


@dataclass
class Simulated(Daemon):
    """`searches`: what is not here is looked for without an end, as on a network. `refuses`: why nothing goes in."""

    blocks: dict[bytes, bytes] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    searches: bool = False
    refuses: str = ""

    def archive(self, root: Cid) -> bytes:
        """A CAR of all below a root that it has."""
        waiting, found = [root], {}
        while waiting:
            cid = waiting.pop()
            found[cid] = self.blocks[cid.digest]
            waiting += links(cid, found[cid])
        return header([root]) + b"".join(section(cid, block) for cid, block in found.items())

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer one call."""
        command = request.match_info["command"]
        self.calls.append(f"{command} {request.query.get('arg', '')}".rstrip())
        answer = {
            "version": self._version,
            "id": self._id,
            "block/get": self._block,
            "dag/import": self._import,
            "pin/add": self._pin,
            "pin/ls": self._list,
        }.get(command)
        return await answer(request) if answer is not None else web.Response(status=404, text="404 page not found")

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"Version": "0.42.0", "Commit": "", "Repo": "18", "System": "amd64/linux"})

    async def _id(self, _: web.Request) -> web.Response:
        return web.json_response({"ID": _PEER, "AgentVersion": "kubo/0.42.0/", "Addresses": None})

    async def _block(self, request: web.Request) -> web.Response:
        cid = request.query["arg"]
        block = self.blocks.get(Cid.parse(cid).digest)
        if block is None and self.searches:
            await asyncio.Event().wait()
        if block is None:
            return _refusal(f"block was not found locally (offline): ipld: could not find {cid}")
        return web.Response(body=block, content_type="text/plain")

    async def _import(self, request: web.Request) -> web.Response:
        if self.refuses:
            return _refusal(self.refuses)
        boundary = request.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
        head, _, body = (await request.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"--" + boundary)
        reader = CarReader()
        came = {cid.digest: block for cid, block in reader.feed(body[: body.rindex(b"\r\n--" + boundary)])}
        reader.end()
        self.blocks |= came
        (root,) = reader.roots or ()
        problem = "" if self._whole(root) else "pin: block was not found locally (offline): ipld: could not find"
        if request.query.get("pin-roots", "true") == "true" and not problem:
            self.pinned.setdefault(str(root), "")
        line = {"Root": {"Cid": {"/": str(root)}, "PinErrorMsg": problem}}
        return web.Response(text=json.dumps(line) + "\n", content_type="application/json")

    def _whole(self, root: Cid) -> bool:
        block = self.blocks.get(root.digest)
        return block is not None and all(map(self._whole, links(root, block)))

    async def _pin(self, request: web.Request) -> web.Response:
        cid = request.query["arg"]
        if not self._whole(Cid.parse(cid)):
            return _refusal(f"pin: block was not found locally (offline): ipld: could not find {cid}")
        self.pinned[cid] = request.query.get("name", "")
        return web.json_response({"Pins": [cid]})

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response({"Keys": {cid: {"Type": "recursive", "Name": n} for cid, n in self.pinned.items()}})


def _refusal(message: str) -> web.Response:
    return web.json_response({"Message": message, "Code": 0, "Type": "error"}, status=500)


@contextmanager
def simulated() -> Iterator[Simulated]:
    """A simulated daemon on a thread of its own: whoever asks may block."""
    loop, daemon = asyncio.new_event_loop(), Simulated("simulated", "")

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=1024**3)
        app.router.add_post("/api/v0/{command:.*}", daemon.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        daemon.address = f"127.0.0.1:{runner.addresses[0][1]}"
        return runner

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield daemon
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
