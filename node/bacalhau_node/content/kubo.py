"""Kubo, the IPFS daemon: content comes from it block by block, results go into it as an archive.

Theory of operation. The address of its RPC port is a setting of the node (`BACALHAU_IPFS_CONNECT`), never of a job: who
reaches that port controls the daemon. Nothing is left to the daemon's own settings: what is put into it was made into
blocks here and goes there as a CAR (`dag/import`), so its CID is the same whatever the daemon would have made of the
files; what comes out of it is single blocks, which the reader checks. `dag/export` is not used: it always sends all
below a root, one block after another, where `fetch` asks for what is missing, several at once, and is no slower (150 MB
out of kubo 0.42: 0.9 of the speed of a checked export with blocks of 256 KiB, 1.6 of it with blocks of 1 MiB).

The daemon looks for blocks that it lacks on its own network for as long as it is asked, so whoever asks has to give up
at some time (`fetch` does).

aioipfs makes the connection and speaks for the small calls. Blocks and archives go past it, over its session: it would
read a block of any size into memory, sends archives from files only, and what it sends them with breaks with
aiohttp 3.12.1 and newer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import warnings
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from bacalhau_node.cid import Cid
from bacalhau_node.content.car import header, section
from bacalhau_node.content.reader import MAX_BLOCK
from bacalhau_node.errors import ContentError, NodeUnreachable, SpecError
from bacalhau_node.ports import Scope

if TYPE_CHECKING:
    import aiohttp
    from aioipfs import AsyncIPFS

CONNECT: Final = "BACALHAU_IPFS_CONNECT"
"""The environment variable with the address; named like the option of the Go system, `--ipfs-connect`."""

INSTALL: Final = "talking to an IPFS daemon needs aioipfs: pip install 'bacalhau-jupyter[ipfs]'"

PATIENCE: Final = 10.0
"""Seconds within which a small question must be answered, and a connection be made."""

IMPORT_PATIENCE: Final = 300.0
"""Seconds in which nothing moves while an archive goes in: after its end the daemon walks over all of it to pin it."""

_PART: Final = 64 * 1024
_MAX_ANSWER: Final = 1024 * 1024
_PORT: Final = 5001
_MULTIADDR = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/([0-9]{1,5})(?:/(https?|tls/http))?(?:/p2p/\w+)?")


def connected() -> Kubo | None:
    """The daemon that the environment names; raises `SpecError` for what is no address."""
    text = os.environ.get(CONNECT, "").strip()
    return Kubo(text) if text else None


class Kubo:
    """`ports.Provider` over a daemon, and what puts content into it. On one loop; connected while it is used.

    `address` of its RPC: a multiaddr (`/ip4/127.0.0.1/tcp/5001`), `HOST:PORT` or a URL.
    """

    def __init__(self, address: str) -> None:
        self._scheme, self._host, self._port = _parsed(address)
        self.name = f"kubo at {f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"
        self._client: AsyncIPFS | None = None
        self._users = 0

    async def version(self) -> str:
        """Its version, such as "0.43.1"; raises `NodeUnreachable` when no daemon answers."""
        return str((await self._told("version")).get("Version", "?"))

    async def id(self) -> str:
        """Its peer id."""
        return str((await self._told("id")).get("ID", "?"))

    # --- out of it ---

    async def car(self, root: Cid, *, path: str = "", scope: Scope = "all") -> AsyncIterator[bytes]:  # noqa: ARG002 - the reader knows what it wants
        """The root alone, of which the reader asks on; see `ports.Provider`."""
        yield header([root]) + section(root, await self.block(root, root=root))

    async def block(self, cid: Cid, *, root: Cid) -> bytes:  # noqa: ARG002 - any block may be asked for
        """See `ports.Provider`."""
        async with self._posted("block/get", {"arg": str(cid)}) as response:
            return await _read(response, MAX_BLOCK)

    # --- into it ---

    async def take(self, root: Cid, archive: AsyncIterator[bytes]) -> None:
        """Put the CAR of `root` into it and pin it there; a second time changes nothing. `ContentError`: it refuses."""
        import aiohttp  # noqa: PLC0415 - an extra: only for who has a daemon

        loop = asyncio.get_running_loop()
        async with self._opened(), asyncio.timeout(IMPORT_PATIENCE) as deadline:

            async def watched() -> AsyncIterator[bytes]:
                async for part in archive:
                    deadline.reschedule(loop.time() + IMPORT_PATIENCE)
                    yield part

            form = aiohttp.FormData()
            form.add_field("file", watched(), filename=f"{root}.car", content_type="application/vnd.ipld.car")
            async with self._posted("dag/import", {"pin-roots": "true"}, form) as response:
                answer = await _read(response, _MAX_ANSWER)
        problem = _import_problem(answer, root)
        if problem:
            raise ContentError(f"{self.name} did not take {root}: {problem}")

    async def pin(self, root: Cid, *, name: str) -> None:
        """Keep `root` and all below it there, under a name that `ipfs pin ls --names` shows; raises `ContentError`."""
        async with self._opened() as client, asyncio.timeout(IMPORT_PATIENCE):
            async for _ in client.pin.add(str(root), progress=False, name=name):
                pass

    # --- connections ---

    async def _told(self, what: str) -> dict[str, Any]:
        async with self._opened() as client, asyncio.timeout(PATIENCE):
            answer = await getattr(client, what)()
        if not isinstance(answer, dict):
            raise NodeUnreachable("nobody answers there")  # aioipfs makes None of broken connections
        return answer

    @contextlib.asynccontextmanager
    async def _posted(
        self, endpoint: str, params: dict[str, str], data: aiohttp.FormData | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The good answer to a call; raises `ContentError` for another one."""
        import aiohttp  # noqa: PLC0415 - see above

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE)
        async with (
            self._opened() as client,
            client.session.post(client.api_endpoint(endpoint), params=params, data=data, timeout=timeout) as response,
        ):
            if response.status != 200:
                raise ContentError(_refusal(response.status, await _read(response, _MAX_ANSWER)))
            yield response

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[AsyncIPFS]:
        """A client that lasts as long as it has users, its errors in ours."""
        aiohttp, aioipfs = _libraries()
        if self._client is None:
            self._client = aioipfs.AsyncIPFS(host=self._host, port=self._port, scheme=self._scheme)
        client = self._client
        self._users += 1
        try:
            yield client
        except aioipfs.APIError as error:
            raise ContentError(f"it answers: {getattr(error, 'message', '') or type(error).__name__}") from error
        except aioipfs.RPCAccessDenied as error:
            raise ContentError(f"it lets nobody in without its API.Authorizations ({error})") from error
        except TimeoutError as error:
            raise NodeUnreachable("it does not answer in time") from error
        except (aiohttp.ClientError, aioipfs.IPFSConnectionError, OSError) as error:
            said = str(error) or type(error).__name__
            raise NodeUnreachable(f"it does not answer, or breaks off: {said}") from error
        finally:
            self._users -= 1
            if not self._users:
                self._client = None
                await client.close()


def _libraries() -> tuple[Any, Any]:
    """Load aiohttp and aioipfs when they are first needed; raises `SpecError` without them."""
    try:
        import aiohttp  # noqa: PLC0415 - extras, and slow to import

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it still imports distutils
            import aioipfs  # noqa: PLC0415
    except ImportError as error:
        raise SpecError(f"{INSTALL} ({error.name} is missing)") from error
    return aiohttp, aioipfs


def _parsed(address: str) -> tuple[str, str, int]:
    """(scheme, host, port) of an address."""
    if found := _MULTIADDR.fullmatch(address):
        host, port, over = found.groups()
        if 0 < int(port) < 65536:
            return ("https" if over in {"https", "tls/http"} else "http"), host, int(port)
    elif not address.startswith("/"):
        try:
            parts = urlsplit(address if "://" in address else f"http://{address}")
            plain = not (parts.username or parts.query or parts.fragment) and parts.path in {"", "/"}
            if parts.scheme in {"http", "https"} and parts.hostname and plain:
                return parts.scheme, parts.hostname, parts.port or _PORT
        except ValueError:
            pass  # no port, or no IPv6 address: told below
    raise SpecError(
        f"{CONNECT}={address!r:.200} is not the address of an IPFS daemon's RPC: write /ip4/127.0.0.1/tcp/{_PORT}"
        f" or HOST:PORT"
    )


# --- answers ---


class _Refusal(msgspec.Struct):
    message: str = msgspec.field(name="Message")


class _Root(msgspec.Struct, rename="pascal"):
    cid: dict[str, str]
    pin_error_msg: str = ""


class _Imported(msgspec.Struct, rename="pascal"):
    root: _Root | None = None
    message: str = ""


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, or its first `limit` bytes and some more."""
    found = bytearray()
    async for part in response.content.iter_chunked(_PART):
        found += part
        if len(found) > limit:
            break
    return bytes(found)


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"it answers: {msgspec.json.decode(body, type=_Refusal).message:.500}"
    except msgspec.DecodeError:
        return f"it answers {status}, so it may be no IPFS daemon's RPC"


def _import_problem(answer: bytes, root: Cid) -> str:
    """Why an archive did not go in; "" when its root is there and pinned."""
    with contextlib.suppress(msgspec.DecodeError, SpecError):
        for line in msgspec.json.Decoder(_Imported).decode_lines(answer):
            if line.message:
                return line.message
            if line.root is not None and Cid.parse(line.root.cid.get("/", "")).digest == root.digest:
                return line.root.pin_error_msg
    return f"it answers {answer[:200]!r}"
