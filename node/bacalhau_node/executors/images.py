"""Images that a job names: on the daemon's machine or pulled, and the Python that is in them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec

from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.containers import Recipe
from bacalhau_node.executors.layout import Image, NoEnvironment
from bacalhau_node.ports import Target

if TYPE_CHECKING:
    from pathlib import Path

    from bacalhau_node.executors.containers import Daemon
    from bacalhau_node.executors.layout import Site

PYTHONS: Final = ("python3", "python")
"""What an image may call its Python."""
MOST_NAMES: Final = 32
"""Images that a node tells others of: some 1 kB in each of its records (a guess)."""
_NAMELESS: Final = "<none>:<none>"
_ANSWER_SECONDS: Final = 60.0
_QUESTION: Final = """
import json, platform, re, sys
try:
    from importlib.metadata import distributions
except ImportError:
    distributions = list
versions = {}
for each in distributions():
    name = each.metadata["Name"]
    if name:
        versions.setdefault(re.sub("[-_.]+", "-", name).lower(), each.version)
print(json.dumps({
    "python": platform.python_version(),
    "system": sys.platform,
    "machine": platform.machine(),
    "libc": " ".join(platform.libc_ver()).strip(),
    "versions": versions,
}))
"""
"""What a Python is asked for a `Target`; understood from 3.8 on."""


class Images:
    """The images of one daemon. Many shards may ask for one that is being pulled: it is pulled once."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._targets: dict[str, Target] = {}

    async def here(self, name: str) -> Image | None:
        """The image `name`; None if it is not on the daemon's machine."""
        try:
            return await self._inspect(name)
        except DaemonError as error:
            if error.status != 404:
                raise
        return None

    async def names(self) -> tuple[str, ...]:
        """The names of at most `MOST_NAMES` images on the daemon's machine, the newest first."""
        newest = sorted(await self._daemon.all_images(), key=lambda image: -int(image.get("Created") or 0))
        names = (name for image in newest for name in image.get("RepoTags") or ())
        return tuple(name for name in names if name != _NAMELESS)[:MOST_NAMES]

    async def find(self, name: str) -> Image:
        """The image `name`, pulled if it is not here. Raises `NoEnvironment`."""
        if (image := await self.here(name)) is not None:
            return image
        await self._pull(name)
        return await self._inspect(name)

    async def target(self, image: Image, site: Site) -> Target:
        """The Python in the image, asked once by running it. Raises `NoEnvironment` and `DaemonError`."""
        note = site.folder / "images" / f"{image.id.rpartition(':')[2]}.json"
        target = self._targets.get(image.id) or await asyncio.to_thread(_read, note)
        if target is None:
            target = await self._ask(image, site)
            await asyncio.to_thread(_write, note, target)
        self._targets[image.id] = target
        return target

    async def _ask(self, image: Image, site: Site) -> Target:
        problem = ""
        for python in PYTHONS:
            said, problem = await self._run(_question(python, image, site))
            try:
                return msgspec.json.decode(said, type=Target)
            except msgspec.DecodeError:
                continue
        raise NoEnvironment(
            f"no Python answers in the image {image.name}: cells need one, --raw scripts don't ({problem})"
        )

    async def _run(self, recipe: Recipe) -> tuple[bytes, str]:
        """What a container prints, and the last line of its errors."""
        printed = {1: bytearray(), 2: bytearray()}

        def receive(channel: int, data: bytes) -> None:
            if channel in printed:
                printed[channel] += data

        container = await self._daemon.create(recipe)
        try:
            stream = await self._daemon.attach(container, receive)
            try:
                await self._daemon.start(container)
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await stream.ended.wait()
            except TimeoutError:
                raise NoEnvironment(f"no answer from a container of it within {_ANSWER_SECONDS:.0f} s") from None
            finally:
                stream.close()
        finally:
            await asyncio.shield(asyncio.create_task(self._daemon.remove(container)))
        last = printed[2].decode(errors="replace").strip().splitlines()[-1:]
        return bytes(printed[1]), "".join(last)

    async def _inspect(self, name: str) -> Image:
        found = await self._daemon.image(name)
        return Image(found["Id"], (found.get("Config") or {}).get("WorkingDir") or "", name)

    async def _pull(self, name: str) -> None:
        pull = self._pulls.get(name)
        if pull is None:
            pull = self._pulls[name] = asyncio.create_task(self._daemon.pull(name))
            pull.add_done_callback(lambda _: self._pulls.pop(name))
        try:
            await asyncio.shield(pull)
        except DaemonError as error:
            raise NoEnvironment(
                f"the image {name} is not here and could not be pulled ({error}): check its name, or pull it yourself"
            ) from error

    async def close(self) -> None:
        """End the pulls under way."""
        pulls = list(self._pulls.values())
        for pull in pulls:
            pull.cancel()
        if pulls:
            await asyncio.wait(pulls)


def _question(python: str, image: Image, site: Site) -> Recipe:
    return Recipe(
        image=image.id,
        command=(python, "-c", _QUESTION),
        entrypoint=(),
        environment={"HOME": "/tmp"},  # noqa: S108 - the container's own tmpfs
        mounts=(),
        labels=site.labels(slot="question"),
        user=site.inside,
        folder="/",
        memory=256 * 1024**2,
        cpu=1.0,
        stdin=False,
    )


def _read(note: Path) -> Target | None:
    """What an earlier node on this folder was told by an image of exactly this content."""
    try:
        return msgspec.json.decode(note.read_bytes(), type=Target)
    except (OSError, msgspec.DecodeError):
        return None


def _write(note: Path, target: Target) -> None:
    note.parent.mkdir(exist_ok=True)
    note.write_bytes(msgspec.json.encode(target))
