"""The second notebook, run by a real kernel: a star of nodes, the mesh that peer exchange makes of it, a job there."""

from __future__ import annotations

import base64
import re
import xml.dom.minidom

import pytest

from tests import demo

SHOTS = demo.ROOT / "artifacts" / "screenshots"

pytestmark = pytest.mark.slow


def test_a_star_becomes_a_mesh_and_runs_a_job():
    book = demo.execute(demo.NOTEBOOK.with_name("02-network.ipynb"))
    assert not demo.failed(book)
    texts = ["\n".join(map(demo.text_of, cell["outputs"])) for cell in book.cells if cell["cell_type"] == "code"]
    degrees = [tuple(map(int, re.findall(r": (\d+)", text))) for text in texts if text.startswith("links:")]
    star, mesh = degrees
    assert star == (29, 29, 1)
    assert mesh[0] >= 60
    assert mesh[1] < 29
    assert mesh[2] >= 3
    assert "nodes ran the 100 shards; the sum of squares is 328350" in texts[-2]
    pages = [
        output["data"]["text/html"] for cell in book.cells for output in cell.get("outputs", ()) if _is_picture(output)
    ]
    for name, page in zip(("star", "mesh"), pages, strict=True):
        data = re.search(r"base64,([^\"]+)", page)
        assert data is not None
        picture = base64.b64decode(data[1]).decode()
        assert len(xml.dom.minidom.parseString(picture).getElementsByTagName("circle")) == 30
        SHOTS.mkdir(parents=True, exist_ok=True)
        (SHOTS / f"{name}.svg").write_text(picture)


def _is_picture(output) -> bool:
    return "30 nodes, " in output.get("data", {}).get("text/plain", "")
