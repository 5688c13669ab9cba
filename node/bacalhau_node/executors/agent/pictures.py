"""Values that are shown: what a notebook would display of them, as a MIME bundle."""

from __future__ import annotations

import base64
import io
import json
import sys

from .travel import Value, is_a
from .words import safe_repr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MIME = (
    ("text/html", "_repr_html_"),
    ("image/svg+xml", "_repr_svg_"),
    ("image/png", "_repr_png_"),
    ("image/jpeg", "_repr_jpeg_"),
    ("text/markdown", "_repr_markdown_"),
    ("text/latex", "_repr_latex_"),
)


def encode_mime(value: Any, name: str) -> Value | None:
    """What a notebook would show: a figure, or an object that knows how to draw itself."""
    if isinstance(value, type):
        return None
    bundle = figure_bundle(value) or own_bundle(value)
    if not bundle:
        return None
    bundle.setdefault("text/plain", safe_repr(value))
    data = {kind: base64.b64encode(part).decode() if isinstance(part, bytes) else part for kind, part in bundle.items()}
    try:
        return Value("mime", name, json.dumps(data).encode())
    except (TypeError, ValueError):
        return None


def figure_bundle(value: Any) -> dict[str, Any]:
    """A matplotlib figure, or the one that axes belong to, as a picture."""
    figure = value.figure if is_a(value, "matplotlib.axes", "Axes") else value
    if not is_a(figure, "matplotlib.figure", "Figure"):
        return {}
    sink = io.BytesIO()
    figure.savefig(sink, format="png", bbox_inches="tight")
    return {"image/png": sink.getvalue()}


def drawn_figure() -> Any:
    """The figure that pyplot works on, which a notebook would show below the cell; None where nothing is drawn."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    return pyplot.gcf() if pyplot is not None and pyplot.get_fignums() else None


def own_bundle(value: Any) -> dict[str, Any]:
    """What the value's own display methods give; one that fails is left out, as in a notebook."""
    bundle: dict[str, Any] = {}
    for kind, method in (("", "_repr_mimebundle_"), *MIME):
        draw = getattr(value, method, None)
        if not callable(draw):
            continue
        try:
            part = draw()
        except Exception:  # the user's own object
            continue
        part = part[0] if isinstance(part, tuple) else part
        if not kind and isinstance(part, dict):
            return part
        if kind and part:
            bundle[kind] = part
    return bundle
