"""The random numbers of a shard: the same in each of its attempts."""

from __future__ import annotations

import random
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import types
    from typing import Any


def seed_generators(seed: int) -> None:
    """Seed `random` now, and `numpy.random` now or when it is imported."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    else:
        sys.meta_path.insert(0, SeedNumpy(seed))


class SeedNumpy:
    """Seeds `numpy.random` in the moment it has been imported; finds nothing itself."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def find_spec(self, name: str, *_: Any) -> Any:
        """The spec of `numpy.random` by the other finders, with a loader that seeds afterwards."""
        if name != "numpy.random":
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute, seed = spec.loader.exec_module, self.seed

        def seeded(module: types.ModuleType) -> None:
            execute(module)
            module.seed(seed)

        spec.loader.exec_module = seeded  # type: ignore[method-assign]  # this one instance only
        return spec
