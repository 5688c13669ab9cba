"""Check the syntax of the front end's ES modules with Node.js: `python tests/frontend.py FILE.js...`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(files: list[str]) -> int:
    """The number of files with a syntax error; also 1 when there is no Node.js and everything is asked for."""
    node = shutil.which("node")
    if node is None:
        print("front end: left out, because Node.js is not installed")
        return int(os.environ.get("BACALHAU_REQUIRE_ALL") == "1")
    check = [node, "--input-type=module", "--check", "-"]
    bad = [name for name in files if subprocess.run(check, input=Path(name).read_bytes(), check=False).returncode]
    print(f"front end: {len(files)} modules, {len(bad)} with syntax errors", *bad)
    return len(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
