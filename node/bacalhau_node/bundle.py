"""A Python file as the task of a job: its source, and the modules beside it, in one folder by CID."""

from __future__ import annotations

import ast
import asyncio
import platform
from pathlib import Path

from bacalhau_node import modules, requirements
from bacalhau_node.client import Client
from bacalhau_node.errors import SpecError
from bacalhau_node.spec import PythonCell


def _local(imported: frozenset[str], path: Path) -> tuple[dict[str, bytes], frozenset[str]]:
    return modules.local(imported, path.resolve().parent)


async def script_task(client: Client, source: str, path: Path, requires: tuple[str, ...] = ()) -> PythonCell:
    """The task that runs `source`, the text of `path`, as a cell; raises `SpecError` where it is not Python.

    `requires` are packages that it needs besides those that its text asks for.
    """
    try:
        tree = ast.parse(source, str(path))
        compile(source, str(path), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise SpecError(f"{path} is not a Python program: {error}") from error
    said = requirements.declared(source)
    requirements.check_python(said.python, platform.python_version())
    requires = requirements.merged(requires, said.requires)
    sent, everything = await asyncio.to_thread(_local, modules.imports(tree), path)
    files = {"cell.py": source.encode(), **{f"modules/{name}": data for name, data in sent.items()}}
    local = {name.partition("/")[0].removesuffix(".py") for name in sent}
    outside = everything - local
    return PythonCell(
        bundle=await client.put_bundle(files),
        name=str(path),
        imports=modules.preload(outside),
        python=".".join(platform.python_version_tuple()[:2]),
        versions=requirements.beyond(modules.versions(outside), requires),
        requires=requires,
    )
