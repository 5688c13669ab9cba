"""Where a shard finds its files: the mount of each input, and what may lie where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bacalhau_node.errors import SpecError
from bacalhau_node.sharding.entries import Entry, LocalStamp, UrlRef, shown
from bacalhau_node.spec import InputSource, JobSpec

_SYSTEM = ("/bin", "/dev", "/etc", "/lib", "/lib64", "/outputs", "/proc", "/sbin", "/sys", "/usr")


def mounts(spec: JobSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where each of `spec.inputs` and of `spec.shared` lies in a container: absolute, no trailing `/`.

    One input lies at `/inputs`, several at `/inputs/0`, `/inputs/1`…; what `--with` brings at
    `/shared`, or `/shared/0`…; a mount that was given wins. Raises `SpecError` for a mount that
    can't be one and for two that are the same.
    """
    inputs = _mounts(spec.inputs, "/inputs")
    shared = _mounts(spec.shared, "/shared")
    taken: dict[str, InputSource] = {}
    for mount, source in zip((*inputs, *shared), (*spec.inputs, *spec.shared), strict=True):
        if other := taken.get(mount):
            raise SpecError(
                f"{shown(other.source)} and {shown(source.source)} are both mounted at {mount}: give one another mount"
            )
        taken[mount] = source
    return inputs, shared


def _mounts(sources: Sequence[InputSource], default: str) -> tuple[str, ...]:
    usual = (default,) if len(sources) == 1 else tuple(f"{default}/{index}" for index in range(len(sources)))
    return tuple(
        place if source.mount is None else _checked_mount(source.mount)
        for source, place in zip(sources, usual, strict=True)
    )


def _checked_mount(mount: str) -> str:
    place = mount.rstrip("/")
    levels = place.split("/")
    if levels[0] or len(levels) < 2 or not all(levels[1:]) or {".", ".."} & set(levels) or not place.isprintable():
        raise SpecError(f"mount {mount!r}: an absolute path such as /data is needed, without '.', '..' or '//'")
    if (owner := f"/{levels[1]}") in _SYSTEM:
        raise SpecError(f"mount {mount!r}: {owner} belongs to the container itself; choose another, such as /data")
    return place


def container_path(mount: str, source: InputSource, entry: Entry) -> str:
    """Where a shard finds `entry` of `source`, whose place is `mount`.

    A file that is itself the input, with a mount given: the mount names the file, as with
    `docker run --volume`, unless it ends in `/`. Everything else lies below the mount.
    """
    named = source.mount is not None and not source.mount.endswith("/") and _is_source_itself(source, entry)
    return mount if named else f"{mount}/{entry.path}"


def _is_source_itself(source: InputSource, entry: Entry) -> bool:
    if isinstance(entry.reference, LocalStamp):
        return entry.reference.path == source.source
    if isinstance(entry.reference, UrlRef):
        return entry.reference.url == source.source.partition("#")[0]
    return entry.path == source.source.rpartition("/")[2]


def check_places(spec: JobSpec, entries: Iterable[Entry], shared: Iterable[Entry]) -> None:
    """Raise `SpecError` when two entries would lie at the same place, or one below another that is a file."""
    inputs_at, shared_at = mounts(spec)
    found: dict[str, InputSource] = {}
    sides = ((entries, spec.inputs, inputs_at), (shared, spec.shared, shared_at))
    for side, sources, places in sides:
        for entry in side:
            source = sources[entry.source]
            place = container_path(places[entry.source], source, entry)
            if other := found.get(place):
                raise SpecError(_clash(place, other, source))
            found[place] = source
    _check_below_files(found)


def _check_below_files(found: Mapping[str, InputSource]) -> None:
    """Only mounts can lie inside each other, so it is enough to look at the folders, each once."""
    folders = {place.rpartition("/")[0]: source for place, source in found.items() if not place.endswith("/")}
    for folder, source in folders.items():
        above = folder
        while above:
            if other := found.get(above):
                raise SpecError(_clash(above, other, source))
            above = above.rpartition("/")[0]


def _clash(place: str, first: InputSource, second: InputSource) -> str:
    return (
        f"{shown(first.source)} and {shown(second.source)} both want {shown(place)} in the container: "
        f"mount one of them elsewhere, as in {shown(second.source)}:/other"
    )
