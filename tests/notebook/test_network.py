"""A network of nodes in a notebook: a devstack of its own, jobs that go there, its picture, and joining it."""

from __future__ import annotations

import ast

from tests.notebook.kernels import Kernel, Shown

MET = """
import time
def known(): return len(bj.session.session().call(lambda client: client.network()).nodes)
deadline = time.monotonic() + 60
while known() < {nodes} and time.monotonic() < deadline: time.sleep(0.1)
known()"""


def shown(kernel: Kernel, code: str) -> dict[str, str]:
    """What a cell displayed."""
    displayed: Shown = kernel.run(code)
    return displayed.of("display_data")[0]["data"]


def test_a_devstack_runs_jobs_shows_itself_and_is_joined_by_the_kernels_own_node(kernel):
    started = kernel.run("import bacalhau_jupyter as bj, bacalhau_jupyter.session\nstack = bj.devstack(3)\nstack")
    assert "devstack of 3 nodes, ready in" in started.value, started.error
    kernel.run("stack.connect()")
    assert kernel.run(MET.format(nodes=3)).value == "3"
    assert kernel.run("%%bacalhau --shards 6 -o there\nshard.index").error == ""
    used = ast.literal_eval(kernel.run("sorted({shard.node for shard in there.shards})").value)
    assert len(used) > 1
    picture = shown(kernel, "%bacalhau network")
    assert picture["text/plain"].startswith("3 nodes, ")
    assert 'src="data:image/svg+xml;base64,' in picture["text/html"]
    assert kernel.run("%bacalhau nodes").text().count(" slots") == 3

    joined = kernel.run("get_ipython().run_line_magic('bacalhau', 'connect ' + stack.peer)")
    assert "jobs go to /ip4/127.0.0.1/tcp/" in joined.text(), joined.error
    assert kernel.run("%%bacalhau --shards 6 -o joined\nshard.index").error == ""
    assert kernel.run("[shard.state for shard in joined.shards]").value == repr(["kept"] * 6)
    kernel.run("%bacalhau connect local\nstack.stop()")
    assert kernel.run("stack.stopped").value == "True"


def test_a_node_on_no_network_is_no_picture_but_says_how_to_have_others(kernel):
    alone = shown(kernel, "%bacalhau network")
    assert alone["text/plain"].startswith("1 node, 0 links, in one piece. Others: %bacalhau connect MULTIADDR")
    assert "<img" not in alone["text/html"]


def test_a_network_that_nobody_answers_for_is_named_and_changes_nothing(kernel):
    address = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWQXU5Uufw4HqG4QwxDGYoVbGCbRULDENrABoNN2a53c5j"
    failed = kernel.run(f"%bacalhau connect {address}")
    assert "can't be reached" in failed.text("stderr") + failed.error
    assert "jobs go to: the node in this kernel" in kernel.run("%bacalhau config").text()
