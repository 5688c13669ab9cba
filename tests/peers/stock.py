"""py-libp2p with its own classes and defaults as a peer in one gossip topic: `python stock.py FOLDER TOPIC`."""

from __future__ import annotations

import json
import sys

import trio
from libp2p import new_host
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr


def say(**what: object) -> None:
    """One line for whoever started this."""
    print(json.dumps(what), flush=True)


async def main(_folder: str, topic: str) -> None:
    """Run until stdin ends."""
    host = new_host()
    router = GossipSub([PROTOCOL_ID_V11], 6, 4, 12, heartbeat_interval=1)
    pubsub = Pubsub(host, router)
    async with (
        host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]),
        background_trio_service(pubsub),
        background_trio_service(router),
        trio.open_nursery() as nursery,
    ):
        await pubsub.wait_until_ready()
        subscription = await pubsub.subscribe(topic)

        async def hear() -> None:
            async for message in subscription:
                say(**{"from": ID(message.from_id).to_base58(), "data": message.data.decode()})

        nursery.start_soon(hear)
        say(id=host.get_id().to_base58())
        async for line in trio.wrap_file(sys.stdin):
            command, _, rest = line.strip().partition(" ")
            if command == "connect":
                await host.connect(info_from_p2p_addr(Multiaddr(rest)))
                say(connected=0)
            elif command == "publish":
                await pubsub.publish(topic, rest.encode())
                say(published=0)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
