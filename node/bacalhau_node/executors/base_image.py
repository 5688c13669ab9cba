"""The base image: a Python of its own, for cells that this machine's Python can't serve.

Theory of operation (DESIGN section 6). The host environment comes first, because it has the notebook's
exact versions. The base image serves a cell that needs another Python or other versions, and it serves
everything where this machine's Python can't be shown to containers: it is that of another system, or
its folder holds the user's home. Which one it is, is for the node's owner to say (`BACALHAU_IMAGE`); one that
was named is pulled, the default only looked for. Its Python is asked once, by running it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bacalhau_node.executors.fit import mismatch, own_target, python_version
from bacalhau_node.spec import PythonCell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bacalhau_node.executors.images import Images
    from bacalhau_node.executors.layout import Image, Site
    from bacalhau_node.ports import Target
    from bacalhau_node.spec import JobSpec

VARIABLE: Final = "BACALHAU_IMAGE"
RECIPE: Final = Path(__file__).with_name("base")
"""The folder of its Dockerfile."""


@dataclass(frozen=True, slots=True)
class BaseImage:
    """A base image that is here, and its Python."""

    name: str
    image: Image
    target: Target


@dataclass(slots=True)
class Environments:
    """What cells without an image of their own can run in. `problem`: why this machine's Python is none of it."""

    versions: Mapping[str, str]
    base: BaseImage | None = None
    problem: str | None = None

    def lack(self, cell: PythonCell) -> str | None:
        """Why neither of them serves `cell`, or None."""
        own = self.problem or mismatch(cell, self.versions)
        if own is None or self.base is None:
            return own
        there = self._base_lacks(cell, self.base)
        return f"{own}; {there}" if there else None

    def base_for(self, spec: JobSpec) -> BaseImage | None:
        """The base image if that is what the job runs in."""
        if spec.image is not None or self.base is None:
            return None
        if self.problem is not None:
            return self.base
        cell = spec.task
        return self.base if isinstance(cell, PythonCell) and mismatch(cell, self.versions) else None

    def usual(self) -> Target:
        """The Python of most cells."""
        return self.base.target if self.problem and self.base else own_target(self.versions)

    @staticmethod
    def _base_lacks(cell: PythonCell, base: BaseImage) -> str | None:
        return mismatch(cell, base.target.versions, python=base.target.python, where=f"the image {base.name}")


def name() -> str:
    """What the base image is called on this machine."""
    return os.environ.get(VARIABLE) or f"bacalhau-jupyter/base:{python_version()}"


def advice() -> str:
    """How to come by a base image."""
    return f"or have a base image: `docker build -t {name()} --build-arg PYTHON={python_version()} {RECIPE}`"


async def find(images: Images, site: Site) -> BaseImage | None:
    """The base image; None if there is none. Raises `NoEnvironment` for one that was named and can't be used."""
    named = os.environ.get(VARIABLE)
    image = await images.find(named) if named else await images.here(name())
    if image is None:
        return None
    return BaseImage(name(), image, await images.target(image, site))
