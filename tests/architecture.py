"""Write what the code says into ARCHITECTURE.md: `python -m tests.architecture`."""

from __future__ import annotations

import tomllib
from pathlib import Path

from bacalhau_node.protocol.tables import mermaid

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "ARCHITECTURE.md"


def layers() -> str:
    """The layers of the node that import-linter holds, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    found = next(one["layers"] for one in contracts if one.get("containers") == ["bacalhau_node"])
    rows = [" │ ".join(name.strip(" ()") for name in row.split("|")) for row in found]
    return "\n".join(["```", *rows, "```"])


PARTS = {"layers": layers, "tables": mermaid}


def rendered(document: str) -> str:
    """The document with what the code says now; raises `ValueError` when the marks of a part are gone."""
    for name, part in PARTS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = document.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{DOCUMENT.name} needs the marks {begin} and {end}")
        document = f"{before}{begin}\n\n{part()}\n\n{end}{after}"
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(DOCUMENT.read_text()))
