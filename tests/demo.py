"""Run the first notebook in a real kernel and print what it shows: `python -m tests.demo`.

The executed notebook is written to `artifacts/`, where it stays readable without a kernel.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "01-first-job.ipynb"
SHOWN = ("data", "job", "table", "check")
CELL_SECONDS = 300


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook, run from top to bottom in its own folder by a new kernel; stops at the first error."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        extra_arguments=["--log-level=ERROR"],  # new kernels warn about their own local sockets
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        print(error, file=sys.stderr)
    return notebook


def text_of(output: dict[str, Any]) -> str:
    """One output as a terminal shows it."""
    if output["output_type"] == "stream":
        return str(output["text"])
    return str(output.get("data", {}).get("text/plain", ""))


def failed(notebook: nbformat.NotebookNode) -> bool:
    """Whether a cell ended with an error."""
    return any(output["output_type"] == "error" for cell in notebook.cells for output in cell.get("outputs", []))


def main() -> int:
    """Run, print, save; 1 when a cell failed."""
    start = time.monotonic()
    notebook = execute(NOTEBOOK)
    seconds = time.monotonic() - start
    target = ROOT / "artifacts" / NOTEBOOK.name
    target.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, target)
    for cell in notebook.cells:
        if cell["id"] in SHOWN:
            print(*(text_of(output).strip("'\n") for output in cell["outputs"]), sep="\n", end="\n\n")
    print(f"The notebook ran in {seconds:.1f} s and lies in {target.relative_to(ROOT)}")
    return int(failed(notebook))


if __name__ == "__main__":
    sys.exit(main())
