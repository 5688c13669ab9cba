"""Write the state tables of the code into ARCHITECTURE.md: `python -m tests.architecture`."""

from __future__ import annotations

from pathlib import Path

from bacalhau_node.protocol.tables import mermaid

DOCUMENT = Path(__file__).resolve().parent.parent / "ARCHITECTURE.md"
BEGIN, END = "<!-- tables:begin -->", "<!-- tables:end -->"


def rendered(document: str) -> str:
    """The document with the tables that the code has now; raises `ValueError` when the marks are gone."""
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{DOCUMENT.name} needs the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{mermaid()}\n\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(DOCUMENT.read_text()))
