"""What the jobs of a network move between the stores of their nodes.

Theory of operation. A job has one **capability** for each node that works for it: a token, made from the requester's
own key, so that a requester which was restarted makes the same one again. It opens at the requester what the offered
shards need (plan, cell, inputs), and at the compute node the results that it owes, and travels in offers over
authenticated links only. The compute node keeps it with each result in its journal: a restart takes nobody's
result away.

**Out.** An offer is packed (`packing`), its roots are opened, and the values of the job's secrets are put in.
**In.** Before a shard runs its node fetches block and cell here, and inputs by their sources, which ask the requester
first: only those of its own shards, each file once. What does not come is the node's fault, so another one is tried.
**Back.** A result up to `INLINE_LIMIT` is in its proposal; its blocks are made again here and must have the CIDs
that it names. Larger ones are fetched, whole, and read: a record that says anything else than the proposal is a lie.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Final
from urllib.parse import urlsplit

from msgspec import structs

from bacalhau_node.cid import Cid
from bacalhau_node.content.fetch import fetch
from bacalhau_node.content.grants import Grants
from bacalhau_node.content.providers import HttpProvider, StreamProvider
from bacalhau_node.content.records import encode_outcome, read_record
from bacalhau_node.errors import BacalhauError, ContentError, NodeUnreachable, ProtocolError, SpecError
from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import ErrorKind, Grant, Offer, Outcome, Propose, ShardError, ShardOffer
from bacalhau_node.packing import Packed, Packing, bundle_of, packed_spec
from bacalhau_node.ports import ContentStore, Provider, Transport
from bacalhau_node.protocol.events import ComputeRow, OfferFailed, ResultMissing, Row, Run
from bacalhau_node.selection import Guests, Refusal
from bacalhau_node.sources.guard import Guard
from bacalhau_node.spec import JobSpec

MAX_RESULT: Final = 11 * 1024**3
"""Bytes of a result that are fetched where the job sets no `--disk`: its default, and text."""

PATIENCE: Final = 30.0
"""Seconds without a byte after which a requester, or a compute node, is given up."""

SLOWEST: Final = 120.0
STEP: Final = 128 * 1024
"""Seconds in which so many bytes have to come, or the rest: else one that sends a byte now and then holds a shard for
ever. A kilobyte a second, as for inputs from the web: a thousand results at once come in time over a slow line."""


class Exchange:
    """One node's part in it. `key`: secret bytes of this node. `secrets`: the values for a job, or why there are none.

    `guests`: what this node does with jobs of others. `gateway`: the base URL where content is served over HTTP, too.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        key: bytes,
        content: ContentStore,
        grants: Grants,
        packing: Packing,
        secrets: Callable[[JobId, JobSpec], Mapping[str, str]],
        guests: Guests,
        gateway: str = "",
    ) -> None:
        self._transport, self._content, self._grants = transport, content, grants
        self._key = hashlib.blake2b(key, person=b"bacalhau-grants").digest()
        self._packing, self._secrets, self._gateway = packing, secrets, gateway
        self.guests = guests
        self._blocks: dict[JobId, dict[str, Packed]] = {}
        self._given: dict[JobId, set[str]] = {}
        self._owing: dict[JobId, set[str]] = {}
        """Tokens that are open: for those who work for a job of this node, and for those whose results are here."""
        self._coming: dict[str, asyncio.Lock] = {}

    # --- the requester's side ---

    async def pack(self, to: NodeId, offer: Offer) -> tuple[Offer, list[OfferFailed]]:
        """The offer with everything that another node needs, and the executions that can't be offered."""
        executions = [Execution(offer.job, one.shard, one.attempt) for one in offer.shards]
        try:
            values = dict(self._secrets(offer.job, offer.spec))
        except SpecError as error:
            return structs.replace(offer, shards=()), [OfferFailed(one, _error(error)) for one in executions]
        bundle = bundle_of(offer.spec)
        roots: list[str] = [] if bundle is None else [bundle]
        shards: list[ShardOffer] = []
        failed: list[OfferFailed] = []
        blocks = self._blocks.setdefault(offer.job, {})
        for one, execution in zip(offer.shards, executions, strict=True):
            try:
                packed = await self._packed(blocks, one.block)
            except (BacalhauError, OSError) as error:
                failed.append(OfferFailed(execution, _error(error)))
            else:
                roots += packed.roots
                shards.append(structs.replace(one, block=packed.block))
        if self._blocks.get(offer.job) is not blocks:  # the job has ended meanwhile: nobody may fetch for it
            return structs.replace(offer, shards=()), failed
        token = self._token(offer.job, to)
        self._open(self._given, offer.job, token, roots)
        grant = Grant(token, (self._gateway,) if self._gateway else ())
        spec = await asyncio.to_thread(packed_spec, offer.spec)
        return structs.replace(offer, spec=spec, shards=tuple(shards), grant=grant, secrets=values), failed

    async def _packed(self, blocks: dict[str, Packed], block: str) -> Packed:
        packed = blocks.get(block)
        if packed is None or not await self._packing.is_good(packed):
            packed = blocks[block] = await self._packing.pack(block)
        return packed

    async def collect(self, sender: NodeId, proposal: Propose) -> ResultMissing | None:
        """Bring the result that another node proposes here, and check it; None when all is well."""
        execution = proposal.execution
        try:
            await self._bring_result(sender, execution, proposal.outcome)
        except (ContentError, NodeUnreachable, OSError) as error:
            return ResultMissing(execution, sender, str(error))
        except BacalhauError as error:  # an outcome that no honest node makes: its numbers, CIDs or sizes
            return ResultMissing(execution, sender, str(error), lied=True)
        return None

    async def _bring_result(self, sender: NodeId, execution: Execution, outcome: Outcome) -> None:
        blobs = (outcome.value.blob, outcome.stdout, outcome.stderr)
        if outcome.outputs is None and all(blob.cid is None for blob in blobs):
            found = read_record(self._content, encode_outcome(self._content, outcome).record)
        else:
            token = self._token(execution.job, sender)
            provider = StreamProvider(self._transport, sender, token=token)
            root = Cid.parse(outcome.record)
            await self._fetch(root, [provider], limit=MAX_RESULT)
            found = await asyncio.to_thread(read_record, self._content, outcome.record)
        if found != outcome:
            raise ProtocolError(f"the result that node {sender} proposed for {execution} is not what it says")

    def ended(self, job: JobId) -> None:
        """A job of this node is over: nobody may fetch for it any more."""
        self._blocks.pop(job, None)
        self._close(self._given, job)

    # --- the compute node's side ---

    async def vet(self, requester: NodeId, offer: Offer) -> Refusal | None:
        """Why the owner of this node does not want a job of another node; None if it may be taken."""
        return await self.guests.vet(requester, offer)

    def providers(self, run: Run) -> tuple[Provider, ...]:
        """Who has what the execution needs: where its requester says, and the requester itself."""
        if run.grant is None:
            return ()
        token = run.grant.token
        named = filter(_is_gateway, run.grant.gateways) if find_spec("aiohttp") is not None else ()
        guard = Guard(own=False, near=self._transport.host_of(run.requester))
        over_http = [HttpProvider(url, token=token, sockets=guard.socket) for url in named]
        return (*over_http, StreamProvider(self._transport, run.requester, token=token))

    async def bring(self, root: str, providers: Sequence[Provider], *, limit: int) -> None:
        """Have all of `root` here; raises `NodeUnreachable` when it is over `limit` bytes, or nobody gives it."""
        key = f"{root} {providers[-1].name}"  # nobody waits for what another requester sends
        lock = self._coming.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                await self._fetch(Cid.parse(root), providers, limit=limit)
        except ContentError as error:
            raise NodeUnreachable(f"what the shard needs did not come: {error}") from error
        finally:
            if not lock.locked():
                self._coming.pop(key, None)

    async def _fetch(self, root: Cid, providers: Sequence[Provider], *, limit: int) -> None:
        """Bring a root here from nodes that may be slow, but do come to an end; raises `ContentError`."""
        clock, mark = asyncio.get_running_loop().time, STEP
        try:
            async with asyncio.timeout(SLOWEST) as deadline:

                def told(done: int) -> None:
                    nonlocal mark
                    if done >= mark:
                        mark = done + STEP
                        deadline.reschedule(clock() + SLOWEST)

                await fetch(self._content, root, providers, limit=limit, told=told, patience=PATIENCE)
        except TimeoutError as error:
            asked = ", ".join(provider.name for provider in providers)
            raise ContentError(
                f"{root} comes too slowly from {asked}: under {STEP:,} bytes in {SLOWEST:g} s"
            ) from error

    def owe(self, execution: Execution, outcome: Outcome, grant: Grant | None) -> None:
        """Let the requester fetch this result."""
        if grant is not None:
            self._open(self._owing, execution.job, grant.token, [outcome.record])

    def released(self, job: JobId) -> None:
        """Nothing is held for this job any more."""
        self._close(self._owing, job)

    def recover(self, rows: Iterable[Row]) -> None:
        """Let requesters fetch what this node owed them when it ended."""
        for row in rows:
            if isinstance(row, ComputeRow) and row.outcome is not None:
                self.owe(row.execution, row.outcome, row.grant)

    # --- capabilities ---

    def _token(self, job: JobId, node: NodeId) -> str:
        made = hashlib.blake2b(f"{job} {node}".encode(), key=self._key, digest_size=32).digest()
        return base64.urlsafe_b64encode(made).decode().rstrip("=")

    def _open(self, tokens: dict[JobId, set[str]], job: JobId, token: str, roots: Iterable[str]) -> None:
        self._grants.open(token, roots)
        tokens.setdefault(job, set()).add(token)

    def _close(self, tokens: dict[JobId, set[str]], job: JobId) -> None:
        for token in tokens.pop(job, ()):
            self._grants.close(token)


def _is_gateway(url: str) -> bool:
    """Whether a URL names a server and no more: what a requester has asked of it is `/ipfs/…`, nothing else."""
    try:
        parts = urlsplit(url)
        server = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return server and not (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc)


def _error(error: Exception) -> ShardError:
    kind: ErrorKind = "environment" if isinstance(error, SpecError) else "input"
    return ShardError(kind, name=type(error).__name__, message=str(error))
