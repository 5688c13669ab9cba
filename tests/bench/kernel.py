"""A real Jupyter kernel, driven as a front end drives it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jupyter_client.manager import KernelManager

CELL_SECONDS = 120


@dataclass(frozen=True)
class Arrival:
    """A message with text, and the time (as `time.time()`) when it came."""

    at: float
    text: str
    kind: str


@dataclass(frozen=True)
class Answer:
    """What one cell did: seconds from the request until it is idle and has replied, and what came meanwhile."""

    seconds: float
    arrivals: list[Arrival]


class Kernel:
    """A started kernel, as a context manager. `folder` is where its notebook would lie."""

    def __init__(self, folder: Path) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(
            cwd=str(folder),
            extra_arguments=["--log-level=ERROR"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def __enter__(self) -> Self:
        """The kernel itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the kernel, with the node inside given the time to clean up."""
        self.client.stop_channels()
        self.manager.shutdown_kernel()

    def run(self, code: str) -> Answer:
        """Run a cell; raises `RuntimeError` when it fails."""
        start = time.perf_counter()
        request = self.client.execute(code)
        arrivals: list[Arrival] = []
        while (message := self.client.get_iopub_msg(timeout=CELL_SECONDS)) and not _is_idle(message, request):
            arrivals += _text(message)
        reply = self.client.get_shell_msg(timeout=CELL_SECONDS)
        answer = Answer(time.perf_counter() - start, arrivals)
        if reply["content"]["status"] != "ok":
            raise RuntimeError(f"the cell failed:\n{code}\n{reply['content'].get('evalue', reply)}")
        return answer


def _is_idle(message: dict[str, Any], request: str) -> bool:
    ours = message["parent_header"].get("msg_id") == request
    return ours and message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"


def _text(message: dict[str, Any]) -> list[Arrival]:
    content = message["content"]
    if message["msg_type"] == "stream":
        return [Arrival(time.time(), content["text"], "stream")]
    if message["msg_type"] in {"execute_result", "display_data", "update_display_data"}:
        return [Arrival(time.time(), content["data"].get("text/plain", ""), "display")]
    if message["msg_type"] == "comm_msg":
        return [Arrival(time.time(), str(content["data"]), "comm")]
    return []
