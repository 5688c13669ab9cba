"""Where packages come from: what the node's owner told pip, said to uv.

uv reads its own settings (`UV_…`, `uv.toml`) and none of pip's. People who work behind a company's index
have told pip about it; these settings count wherever uv was told nothing.
"""

from __future__ import annotations

import configparser
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_SECTIONS: Final = ("global", "install")
_TRUE: Final = frozenset(("1", "true", "yes", "on"))


def settings(environ: Mapping[str, str], files: Iterable[Path]) -> tuple[dict[str, str], tuple[str, ...]]:
    """(environment, options) of uv: `environ`, and what it and these files of pip's say, in uv's words.

    Later files count more. Where `environ` has words for uv itself, those count.
    """
    said: dict[str, str] = {}
    for file in files:
        said |= _read(file)
    said |= {
        name.removeprefix("PIP_").lower().replace("_", "-"): value
        for name, value in environ.items()
        if name.startswith("PIP_")
    }
    found = dict(_translated(said))
    if environ.keys() & {"UV_INDEX_URL", "UV_DEFAULT_INDEX"}:
        found.pop("UV_DEFAULT_INDEX", None)
    if environ.keys() & {"UV_EXTRA_INDEX_URL", "UV_INDEX"}:
        found.pop("UV_INDEX", None)
    options = ("--no-index",) if said.get("no-index", "").strip().lower() in _TRUE else ()
    return found | dict(environ), options


def pip_files(environ: Mapping[str, str], *, home: Path, prefix: Path = Path(sys.prefix)) -> list[Path]:
    """The files that pip reads, those that count more last."""
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    system = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf")]
    files = [*system, home / ".pip/pip.conf", config / "pip/pip.conf", prefix / "pip.conf"]
    named = environ.get("PIP_CONFIG_FILE")
    if named == "/dev/null":  # how pip is told to read none
        return []
    return [*files, Path(named)] if named else files


def _read(file: Path) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(file, encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError):
        return {}  # pip itself tells its user; nothing here may depend on it
    items = [item for section in _SECTIONS if parser.has_section(section) for item in parser.items(section)]
    return {name.replace("_", "-"): value for name, value in items}


def _translated(said: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    words = {name: value.split() for name, value in said.items()}
    if words.get("index-url"):
        yield "UV_DEFAULT_INDEX", words["index-url"][0]
    if words.get("extra-index-url"):
        yield "UV_INDEX", " ".join(words["extra-index-url"])
    links = [link for link in words.get("find-links", ()) if "://" in link or Path(link).exists()]
    if links:
        yield "UV_FIND_LINKS", ",".join(links)
    if words.get("trusted-host"):
        yield "UV_INSECURE_HOST", " ".join(words["trusted-host"])
    if words.get("cert"):
        yield "SSL_CERT_FILE", said["cert"].strip()
