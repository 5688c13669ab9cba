"""The folders of a user's nodes: one shared store, one locked folder for each running node.

    BACALHAU_DIR/store/       blocks, shared by all of the user's processes
    BACALHAU_DIR/nodes/ID/    one node: its lock, its journal, its work and slots

A node holds an exclusive lock on `nodes/ID/lock` for as long as it lives; the system takes it
back when the process dies. A new node takes over the folder of a dead one (and so its journal
and name), or makes its own: several notebooks at once are the normal case.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

import platformdirs

from bacalhau_node.errors import ContentError
from bacalhau_node.ids import NodeId, node_id


def data_folder() -> Path:
    """`BACALHAU_DIR`, else the platform's folder for a user's data."""
    given = os.environ.get("BACALHAU_DIR")
    return Path(given).absolute() if given else Path(platformdirs.user_data_dir("bacalhau"))


class NodeFolder:
    """The folder of one running node, held by a lock until `close`."""

    def __init__(self, root: Path, node: NodeId, lock: int) -> None:
        self.root, self.node = root, node
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

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._lock)


def take_folder(root: Path) -> NodeFolder:
    """Lock a node's folder below `root`: one whose node is dead, else a new one."""
    nodes = root / "nodes"
    try:
        nodes.mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)
    except OSError as error:
        raise ContentError(
            f"the data folder {root} cannot be made: {error.strerror}. Set BACALHAU_DIR to a folder that you may write"
        ) from error
    for path in sorted(nodes.iterdir()):
        with contextlib.suppress(ValueError):
            if (lock := _try_lock(path)) is not None:
                return NodeFolder(root, node_id(path.name), lock)
    node = node_id(f"n-{secrets.token_hex(8)}")
    (nodes / node).mkdir()
    lock = _try_lock(nodes / node)
    if lock is None:
        raise ContentError(f"the new folder {nodes / node} is locked by somebody else: try again")
    return NodeFolder(root, node, lock)


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
