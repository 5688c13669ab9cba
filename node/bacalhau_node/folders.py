"""The folders of a user's nodes: one shared store, one locked folder for each running node.

    BACALHAU_DIR/store/       blocks, shared by all of the user's processes
    BACALHAU_DIR/nodes/ID/    one node: its lock, its journal, its work and slots

A node holds an exclusive lock on `nodes/ID/lock` for as long as it lives; the system takes it
back when the process dies. A new node takes over the folder of a dead one (and so its journal
and name), or makes its own: several notebooks at once are the normal case.

The node of a server keeps two more files there: `api.json` says where it is reached, and `token` is the
key for programs of the same user. A server that is started again gets the folder that it had, and so its
jobs and its token; the nodes of notebooks never get a server's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

import msgspec
import platformdirs

from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.ids import NodeId, node_id

_ADDRESS, _TOKEN = "api.json", "token"


def data_folder() -> Path:
    """`BACALHAU_DIR`, else the platform's folder for a user's data."""
    given = os.environ.get("BACALHAU_DIR")
    return Path(given).absolute() if given else Path(platformdirs.user_data_dir("bacalhau"))


class Address(msgspec.Struct, frozen=True):
    """A node's server: what it was asked to listen at (`HOST:PORT`), and the URL at which it does ("": not yet)."""

    asked: str
    url: str = ""


class NodeFolder:
    """The folder of one running node, held by a lock until `close`. `asked`: the `HOST:PORT` of a server."""

    def __init__(self, root: Path, node: NodeId, lock: int, asked: str = "") -> None:
        self.root, self.node, self.asked = root, node, asked
        self.path = root / "nodes" / node
        self._lock = lock

    @property
    def store(self) -> Path:
        """The block store that all nodes of this user share."""
        return self.root / "store"

    def is_alive(self, node: NodeId) -> bool:
        """Whether that node's process lives (this one's included): its lock is held."""
        if node == self.node:
            return True
        lock = _try_lock(self.root / "nodes" / node)
        if lock is not None:
            os.close(lock)
        return lock is None and (self.root / "nodes" / node).is_dir()

    def exists(self, node: NodeId) -> bool:
        """Whether there is a folder of that node, alive or not."""
        return (self.root / "nodes" / node).is_dir()

    def announce(self, address: Address) -> None:
        """Say where this node's server is reached."""
        _write_private(self.path / _ADDRESS, msgspec.json.encode(address))

    def token(self) -> str:
        """The key of this node's server for the user's own programs, made once."""
        path = self.path / _TOKEN
        if not (token := _read(path)):
            token = secrets.token_urlsafe(32).encode()
            _write_private(path, token)
        path.chmod(0o600)
        return token.decode("ascii", "replace")

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._lock)


def servers(root: Path) -> list[tuple[str, str]]:
    """(URL, token) of every server of this user that is alive and reached by a URL."""
    found = []
    for path in sorted((root / "nodes").glob(f"*/{_ADDRESS}")):
        address, token = _address(path.parent), _read(path.parent / _TOKEN)
        if address is None or not address.url:
            continue
        if (lock := _try_lock(path.parent)) is None:
            found.append((address.url, token.decode("ascii", "replace")))
        else:
            os.close(lock)
    return found


def take_folder(root: Path, *, serving: str = "") -> NodeFolder:
    """Lock a node's folder below `root`: one whose node is dead, else a new one; `serving`: `HOST:PORT` of a server."""
    nodes = root / "nodes"
    try:
        nodes.mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)
    except OSError as error:
        raise ContentError(
            f"the data folder {root} cannot be made: {error.strerror}. Set BACALHAU_DIR to a folder that you may write"
        ) from error
    for path in sorted(nodes.iterdir()):
        address = _address(path)
        if (address.asked if address else "") != serving:
            continue
        with contextlib.suppress(SpecError):  # something else lies there
            if (lock := _try_lock(path)) is not None:
                return NodeFolder(root, node_id(path.name), lock, serving)
    node = node_id(f"n-{secrets.token_hex(8)}")
    (nodes / node).mkdir()
    lock = _try_lock(nodes / node)
    if lock is None:
        raise ContentError(f"the new folder {nodes / node} is locked by somebody else: try again")
    folder = NodeFolder(root, node, lock, serving)
    if serving:
        folder.announce(Address(serving))
    return folder


def _address(folder: Path) -> Address | None:
    """What the folder says of its server; None for the folder of another node."""
    try:
        return msgspec.json.decode(_read(folder / _ADDRESS), type=Address)
    except msgspec.DecodeError:
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError:
        return b""


def _write_private(path: Path, data: bytes) -> None:
    """Write a file that nobody else may read, whole or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    fresh.replace(path)


def _try_lock(folder: Path) -> int | None:
    """An open, locked file descriptor, or None when another process holds the lock or the folder is gone."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
