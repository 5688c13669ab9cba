"""Cells that say which packages they need, in a real kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.notebook.kernels import Kernel
from tests.wheels import wheel

BLOCK = """\
%%bacalhau --shards 2 --df t
# /// script
# requires-python = ">=3.11"
# dependencies = ["alpha>=1"]
# ///
import alpha
{'version': alpha.VERSION}
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A kernel whose package index is a folder with two wheels."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shelf").mkdir()
    wheel(folder / "shelf", "alpha", "1.0", requires=("beta",))
    wheel(folder / "shelf", "beta", "2.0")
    kernel = Kernel(
        folder,
        PIP_CONFIG_FILE="/dev/null",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(folder / "shelf"),
        UV_CACHE_DIR=str(folder / "cache"),
    )
    kernel.run("%load_ext bacalhau_jupyter")
    yield kernel
    kernel.close()


def test_a_script_block_brings_its_packages_and_says_so_the_first_time(shop):
    shown = shop.run(BLOCK)
    assert not shown.error
    assert "installing alpha>=1 before the first shard" in shown.text()
    assert shop.run("list(t['version'])").value == "['1.0', '1.0']"
    assert "installing" not in shop.run(BLOCK).text()


def test_a_short_line_and_an_option_do_the_same(shop):
    assert "shard 0: '2.0'" in shop.run("%%bacalhau\n# requires: beta\nimport beta\nbeta.VERSION").value
    assert "shard 0: '2.0'" in shop.run("%%bacalhau --require beta>=2\nimport beta\nbeta.VERSION").value


def test_a_dry_run_names_the_packages_and_their_layer(shop):
    shown = shop.run("%%bacalhau --dry-run --require alpha\nimport alpha").text()
    assert "to install: alpha\n" in shown
    assert "environment: " in shown
    assert "packages: layer " in shown


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("%%bacalhau --require nosuch\n1", "there is no package nosuch in the package index of this node"),
        ("%%bacalhau --require msgspec<0.1\n1", "the cell requires msgspec<0.1, and its environment has msgspec"),
        ("%%bacalhau\n\n# requires: a GPU\n1", "line 3, # requires: 'a GPU' is not a package with versions"),
        ("%%bacalhau\n# /// script\n# requires-python = '<3'\n# ///\n1", "the cell needs Python <3"),
        ("%%bacalhau\nimport nosuch", "--require PKG installs a package for the job"),
        ("%%bacalhau\n%pip install alpha", "line 2: packages are installed before the shards start"),
    ],
)
def test_what_cannot_be_had_is_told_in_the_cell(shop, cell, told):
    shown = shop.run(cell)
    assert told in shown.error + shown.text("stderr")


def test_the_kernel_itself_has_none_of_it(shop):
    assert "ModuleNotFoundError" in shop.run("import alpha").error
    assert not Path(shop.run("import sys; sys.prefix").value.strip("'"), "alpha.py").exists()
