"""One node's libp2p host on the network's thread: who it has links to, and what peers ask of it.

Theory of operation. The host is libp2p's own with lean settings (`lean`): its swarm, its security, its answers to
identify and ping. How connections come about is decided here and in `dialling`: sockets are opened and accepted here,
and then handed to libp2p to be secured, because its own dialler waits, retries and remembers failures as it likes, and
its listener shares its port with whoever asks. A host of the same process is reached without any socket.

A connection between nodes carries one link (`link`), a gossip stream each way (`meshing`) and a stream for each request
(`asking`). Two nodes that dial each other at the same time have two links, both good; what is sent goes over the one
that was heard last. So each of two processes with one identity hears its own answers, and both find out. On a network
without a key, gossip is also exchanged with peers that are no nodes: kubo, for one.

Whatever a peer sends, however malformed, ends its own connection and nothing else, and is told once.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import resource
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from bacalhau_node.errors import NodeUnreachable, ProtocolError, SpecError
from bacalhau_node.ids import NodeId
from bacalhau_node.ports import Packet, Waiting
from bacalhau_node.protocol.events import LinkDown, LinkUp
from bacalhau_node.transports.libp2p import addresses, asking, gossip, inprocess, link
from bacalhau_node.transports.libp2p.complaints import Complaints
from bacalhau_node.transports.libp2p.dialling import HERE, Dialler, admit, secured
from bacalhau_node.transports.libp2p.inbox import Inbox
from bacalhau_node.transports.libp2p.lean import HANDSHAKE_SECONDS, Handler, lean_host
from bacalhau_node.transports.libp2p.meshing import Mesh
from bacalhau_node.transports.libp2p.streams import BROKEN, agree, propose
from bacalhau_node.transports.libp2p.thread import NetworkThread, guarded

NEGOTIATE_SECONDS = 30
"""For a peer that opens a stream to say what for."""

LINKS = 2
"""Links to one node: two when both dialled; of more the one that has been silent for longest is taken for dead."""


class Host:
    """One node on the network. Everything here happens on the network's thread."""

    def __init__(self, seed: bytes, *, network_key: str, in_process: bool, inbox: Inbox) -> None:
        keys = create_new_key_pair(seed)
        self.id = ID.from_pubkey(keys.public_key)
        self.node: NodeId = self.id.to_base58()
        self.in_process = in_process
        self.complaints = Complaints()
        self.on_question: Callable[[asking.Answer, bytes], None] | None = None
        self._inbox, self._open = inbox, not network_key
        self._greeter = link.Greeter(self.node, network_key)
        topic = (
            f"{gossip.TOPIC}/{hashlib.sha256(network_key.encode()).hexdigest()[:16]}" if network_key else gossip.TOPIC
        )
        chance = random.Random()  # noqa: S311 - who hears what first is no secret
        router = gossip.Router(keys.private_key, topic, chance=chance, now=trio.current_time)
        self.mesh = Mesh(router, inbox, self._spawn)
        self.dialler = Dialler(self, link=self._link, link_up=self._link_up, spawn=self._spawn)
        self._links: dict[NodeId, list[link.Link]] = {}
        self._linked = trio.Event()
        self._visitors = 0
        """Connections that came from outside, of whoever."""
        self._addresses: list[str] = []
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self.host = lean_host(keys, addresses=self._advertised, blame=self._muxer_fault, incoming=self._incoming)
        self._protocols = self._handlers()

    def _handlers(self) -> dict[str, Handler]:
        """What peers may ask for: ours, and what libp2p answers by itself (identify, ping)."""
        theirs: dict[str, Handler] = {
            str(name): one for name, one in self.host.get_mux().handlers.items() if name and one
        }
        ours: dict[str, Handler] = {
            link.PROTOCOL: self._link_offered,
            gossip.PROTOCOL: self._gossip_offered,
            asking.PROTOCOL: self._asked,
        }
        for name, handler in ours.items():
            self.host.set_stream_handler(TProtocol(name), handler)  # so that identify tells of them
        return theirs | ours

    # --- life ---

    async def run(self, listeners: list[trio.SocketListener], *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Be on the network until `stop`."""
        HERE[self.node] = self
        self._addresses = addresses.reachable(listeners) or ([addresses.IN_PROCESS] if self.in_process else [])
        try:
            with self._scope:
                async with self.host.run([]), trio.open_nursery() as self._nursery:
                    if listeners:
                        self._nursery.start_soon(partial(trio.serve_listeners, self._accept, listeners))
                    self._spawn(self.mesh.beat)
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            for one in listeners:
                one.socket.close()
            HERE.pop(self.node, None)
            self._ended.set()

    async def stop(self) -> None:
        """Leave the network, once what was sent is on its way; returns when every connection is closed."""
        HERE.pop(self.node, None)
        async with trio.open_nursery() as nursery:
            for node in list(self._links):
                nursery.start_soon(self.hang_up, node)
        self._scope.cancel()
        await self._ended.wait()

    def addresses(self) -> list[str]:
        """By which others can dial this node."""
        return [f"{one}/p2p/{self.node}" for one in self._addresses]

    def _advertised(self) -> list[Multiaddr]:
        return [Multiaddr(one) for one in self._addresses if one != addresses.IN_PROCESS]

    def _spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Run in the background, where a bug ends nothing else."""
        self._nursery.start_soon(guarded, work, *args)

    # --- sending ---

    def send(self, to: NodeId, data: bytes) -> Coroutine[Any, Any, None] | None:
        """Queue a message for another node; what comes back has to be awaited when that takes time."""
        one = self._link(to)
        if one is None or one.full:
            return self._send_later(to, data)
        one.add(data)
        return None

    async def _send_later(self, to: NodeId, data: bytes) -> None:
        if to == self.node:
            await self._inbox.put(Packet(to, data))
            return
        while (one := await self.dialler.reach(to)).full:
            await one.room()
        one.add(data)

    def publish(self, data: bytes) -> None:
        """Give a message to everybody."""
        self.mesh.router.publish(data)

    def waiting(self) -> Waiting:
        """Bytes that wait to be sent. May be called on any thread."""
        sizes = Counter({node: sum(one.queued for one in tuple(links)) for node, links in list(self._links.items())})
        sizes.update({one.node: one.queued for one in list(self.mesh.router.neighbours.values())})
        return Waiting(sizes.total(), max(sizes.values(), default=0))

    def peers(self) -> list[NodeId]:
        """Nodes to which there is a link. May be called on any thread."""
        return list(self._links)

    def host_of(self, node: NodeId) -> str:
        """The IP address at the other end of the link to a node, "" for none. May be called on any thread."""
        one = self._link(node)
        return one.host if one is not None else ""

    async def hang_up(self, node: NodeId) -> None:
        """Close all links to a node."""
        for one in list(self._links.get(node, ())):
            await one.leave()

    # --- links ---

    def _link(self, node: NodeId) -> link.Link | None:
        links = self._links.get(node)
        return links[-1] if links else None

    async def _link_up(self, conn: IMuxedConn) -> None:
        """Open a link on a connection that we dialled; the connection ends when that fails."""
        node = conn.peer_id.to_base58()
        one = None
        try:
            stream = await conn.open_stream()
            if not await propose(stream, link.PROTOCOL):
                raise ProtocolError(f"it is no node of bacalhau-jupyter: it does not speak {link.PROTOCOL}")
            one = link.Link(node, stream, await self._greeter.dialled(stream, node), inbound=False)
        finally:
            if one is None:
                with trio.CancelScope(shield=True):
                    await conn.close()
        self._add_link(one)
        self._spawn(self._run_link, one)

    async def _link_offered(self, stream: NetStream) -> None:
        """A peer that dialled us opens a link."""
        muxed = stream.muxed_stream
        node = _peer(muxed)
        if node == self.node:
            raise ProtocolError("it has the identity of this very node: two processes may not share a node's folder")
        with trio.fail_after(HANDSHAKE_SECONDS):
            one = link.Link(node, muxed, await self._greeter.answered(muxed, node), inbound=True)
        self._add_link(one)  # before the answer: then the other may send at once
        await self._run_link(one, greet=partial(self._greeter.accept, muxed, node))

    def _add_link(self, one: link.Link) -> None:
        links = self._links.setdefault(one.node, [])
        if not links:
            self._inbox.tell(LinkUp(one.node, inbound=one.inbound))
        links.append(one)
        if len(links) > LINKS:
            links[0].close()
        self._linked.set()
        self._linked = trio.Event()
        self.mesh.join(one.node, one.conn)

    async def _run_link(self, one: link.Link, greet: Callable[[], Awaitable[None]] | None = None) -> None:
        """Live as long as a link does, and close its connection after it."""
        try:
            if greet is not None:
                await greet()
            await one.run(self._inbox, partial(self._heard, one))
        except ProtocolError as error:
            self.complaints.add(f"node {one.node}", "link", error)
        finally:
            one.ended.set()
            self._remove_link(one)
            with trio.CancelScope(shield=True):
                await one.conn.close()

    def _heard(self, one: link.Link) -> None:
        """Something came by this link: so will what is sent."""
        links = self._links[one.node]
        if links[-1] is not one:
            links.remove(one)
            links.append(one)

    def _remove_link(self, one: link.Link) -> None:
        links = self._links[one.node]
        links.remove(one)
        self.mesh.leave(one.node)
        if links:
            self.mesh.join(one.node, links[-1].conn)
        else:
            del self._links[one.node]
            self._inbox.tell(LinkDown(one.node))

    async def _link_to(self, node: NodeId) -> link.Link:
        """The link to a node that opened another stream; the end that dialled may have it a moment later."""
        with trio.move_on_after(NEGOTIATE_SECONDS):
            while not self._links.get(node):
                await self._linked.wait()
        one = self._link(node)
        if one is None:
            raise ProtocolError("it opened a stream without a link")
        return one

    # --- what peers open ---

    async def _accept(self, stream: trio.SocketStream) -> None:
        """Live as long as a connection that came from outside."""
        at, remote, most = Multiaddr(self._addresses[0]), addresses.remote(stream), most_visitors()
        if self._visitors >= most:
            why = f"{most} are connected, half of the files that this process may open: raise `ulimit -n` for more"
            self.complaints.add("whoever dials this node now", "room", why)
            await trio.aclose_forcefully(stream)
            return
        self._visitors += 1
        try:
            conn = await secured(stream, lambda raw: self.host.upgrade_inbound_connection(raw, at), dialled=False)
            await conn.over()
        except ProtocolError as error:
            self.complaints.add(remote, "handshake", error)
        finally:
            self._visitors -= 1

    def visit(self, conn: inprocess.Conn) -> None:
        """Another host of this process has connected."""
        if self._ended.is_set():
            raise NodeUnreachable("it has left")
        self._spawn(self._admit, conn)

    async def _admit(self, conn: inprocess.Conn) -> None:
        with contextlib.suppress(NodeUnreachable, *BROKEN):
            await admit(self.host, conn, direction="inbound")

    async def _incoming(self, stream: NetStream) -> None:
        """A peer has opened a stream: find out what for, and do it."""
        muxed = stream.muxed_stream
        try:
            with trio.fail_after(NEGOTIATE_SECONDS):
                protocol = await agree(muxed, self._protocols)
            if protocol is not None:
                stream.set_protocol(TProtocol(protocol))
                await self._protocols[protocol](stream)
        except ProtocolError as error:
            await self._banish(muxed, error)
        except (*BROKEN, trio.TooSlowError):
            await muxed.reset()
        except Exception as error:  # noqa: BLE001 - libp2p's own handlers raise what they like on garbage
            await self._banish(muxed, ProtocolError(f"{type(error).__name__}: {error}"))
        finally:
            with trio.CancelScope(shield=True):
                await muxed.close()  # our direction; the other end's is over, or it will be reset with the connection

    async def _gossip_offered(self, stream: NetStream) -> None:
        node = _peer(stream.muxed_stream)
        if not self._open:
            await self._link_to(node)
        await self.mesh.listen(node, stream.muxed_stream)

    async def _banish(self, stream: IMuxedStream, error: ProtocolError) -> None:
        self.complaints.add(f"node {_peer(stream)}", "stream", error)
        await stream.muxed_conn.close()

    def _muxer_fault(self, peer: ID, error: ProtocolError) -> None:
        self.complaints.add(f"node {peer.to_base58()}", "yamux", error)

    # --- questions ---

    async def ask(self, asked: asking.Asked, to: NodeId, question: bytes) -> None:
        """Put a question to another node."""
        one = await self.dialler.reach(to)
        await asked.begin(one.conn, question)

    def drop(self, asked: asking.Asked) -> None:
        """Nobody wants the rest of an answer."""
        if not self._ended.is_set():
            self._spawn(asked.close)

    def watch(self, answer: asking.Answer, gone: Callable[[], None]) -> None:
        """Say when nobody wants an answer any more, or it has ended."""
        if not self._ended.is_set():
            self._spawn(answer.until_gone, gone)

    async def _asked(self, stream: NetStream) -> None:
        one = await self._link_to(_peer(stream.muxed_stream))
        async with one.answers:
            answer = asking.Answer(one.node, stream.muxed_stream)
            question = await asking.question(stream.muxed_stream)
            if self.on_question is None:
                await answer.fail("it answers no requests")
                return
            self.on_question(answer, question)
            await answer.watch()


def most_visitors() -> int:
    """How many may be connected from outside: half of the files that this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 100_000 if soft == resource.RLIM_INFINITY else max(64, soft // 2)


def _peer(stream: IMuxedStream) -> NodeId:
    return str(stream.muxed_conn.peer_id.to_base58())


async def join(
    thread: NetworkThread, seed: bytes, listen: Sequence[str], *, inbox: Inbox, network_key: str, in_process: bool
) -> Host:
    """A host on the network; raises `SpecError` where it can't be."""
    host = Host(seed, network_key=network_key, in_process=in_process, inbox=inbox)
    if host.node in HERE:
        raise SpecError(f"node {host.node} is on the network in this process already: two nodes need two identities")
    await thread.start(host.run, addresses.listeners(listen))
    return host
