"""Text for people, made of what the cell's own objects give: whatever they do, there is a text."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def clean(text: str) -> str:
    """`text` with its lone surrogates written as escapes: they are no JSON for the host."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, both ends kept."""
    text = clean(text)
    if len(text) <= limit:
        return text
    return "%s … %d characters left out … %s" % (text[: limit * 2 // 3], len(text) - limit, text[-(limit // 3) :])


def safe_repr(value: Any) -> str:
    """`repr`, also of an object whose own fails."""
    try:
        return repr(value)
    except Exception as error:  # the user's own object
        return "<%s object whose repr failed with %s>" % (type(value).__name__, type(error).__name__)


def safe_message(error: BaseException) -> str:
    """The text of an exception, also of one whose `__str__` raises."""
    try:
        if isinstance(error, SyntaxError) and error.msg:
            return error.msg
        return str(error)
    except Exception as second:  # the user's own class
        return "<its message could not be made: %s>" % type(second).__name__


def size_text(size: int) -> str:
    """Bytes for people, decimal as they were typed."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return "%.4g %s" % (size / unit, name)
    return "%d bytes" % size
