"""Stop, background and what outlives a cell or a kernel."""

from __future__ import annotations

from bacalhau_jupyter.progress import DONE
from tests.notebook.kernels import below, command_of

SLOW = "import time\nprint('running')\ntime.sleep(0 if shard.index == 0 else 600)\nshard.index"


def finished(shown):
    """How many shards are done, as the live view was told last."""
    states = [message["buffers"][0] for message in shown.messages if message["buffers"]]
    return bytes(states[-1]).count(DONE) if states else 0


def test_stop_cancels_keeps_what_is_finished_and_the_next_job_runs(kernel):
    shown = kernel.send(f"%%bacalhau --shards 4 -o j\n{SLOW}")
    kernel.until(lambda: finished(shown) == 1)
    kernel.interrupt()
    kernel.until(lambda: shown.idle, seconds=20)
    assert "JobInterrupted" in shown.error
    assert "1 of 4 shards finished: j.result(partial=True)" in shown.error
    assert kernel.run("j.state, j.result(partial=True).values()").value == "('Stopped', [0])"
    assert "was stopped after 1 of 4 shards" in kernel.run("j.result()").error
    assert "shard 0: 5" in kernel.run("%%bacalhau\n5").value


def test_cells_behind_a_stopped_one_do_not_run(kernel):
    shown = kernel.send("%%bacalhau\nprint('on')\nimport time; time.sleep(600)")
    behind = kernel.send("print('must not run')")
    kernel.until(lambda: "on\n" in shown.text())
    kernel.interrupt()
    kernel.until(lambda: shown.idle and behind.idle, seconds=20)
    assert behind.text() == ""


def test_detach_leaves_the_job_running_and_attach_shows_the_rest(kernel):
    signal = kernel.signals / "leaves"
    body = f"import os, time\nprint('on')\nwhile not os.path.exists({str(signal)!r}): time.sleep(0.01)\nprint('off')\n7"
    shown = kernel.send(f"%%bacalhau --on-interrupt detach -o d\n{body}")
    kernel.until(lambda: "on\n" in shown.text())
    kernel.interrupt()
    kernel.until(lambda: shown.idle, seconds=20)
    assert "the job goes on: %bacalhau attach" in shown.error
    name = kernel.run("d.id[:10]").value.strip("'")
    attached = kernel.run(f"%bacalhau attach {name}")
    signal.touch()
    assert kernel.run("d.wait(60), d.state, d.result().values()").value == "(True, 'Completed', [7])"
    kernel.until(lambda: "off\n" in attached.text(), seconds=10)


def test_a_background_job_prints_under_its_own_cell_and_its_frame_is_bound(kernel):
    signal = kernel.signals / "background"
    body = f"import os, time\nwhile not os.path.exists({str(signal)!r}): time.sleep(0.01)\nprint('late')\n{{'a': 1}}"
    first = kernel.run(f"%%bacalhau --background --df b -o bg\n{body}")
    assert first.value.startswith("job j-")
    second = kernel.send(f"print('mine')\nopen({str(signal)!r}, 'w').close()\nbg.wait(60)\nprint('too')\nlist(b['a'])")
    kernel.until(lambda: second.idle and "late" in first.text())
    assert second.text() == "mine\ntoo\n"
    assert second.value == "[1]"


def test_a_background_failure_is_told_under_its_own_cell(kernel):
    first = kernel.run("%%bacalhau --background -o f\nraise KeyError('gone')")
    kernel.run("f.wait(60)")
    kernel.until(lambda: "JobFailed" in first.text("stderr"), seconds=20)
    assert "KeyError: 'gone' in shard 0" in first.text("stderr")
    assert "\x1b" not in first.text("stderr")


def test_a_kernel_that_ends_leaves_no_process(fresh):
    kernel = fresh()
    kernel.run("%load_ext bacalhau_jupyter")
    shown = kernel.send(f"%%bacalhau --shards 4 --background\n{SLOW}")
    kernel.until(lambda: "running" in shown.text())
    started = below(int(kernel.run("import os; os.getpid()").value))
    assert started
    kernel.close()
    assert [command for pid, command in started.items() if command and command_of(pid) == command] == []


def test_a_job_of_a_killed_kernel_is_told_of_and_kept_but_not_resumed(fresh):
    first = fresh()
    first.run("%load_ext bacalhau_jupyter")
    shown = first.send(f"%%bacalhau --shards 4\n{SLOW}")
    first.until(lambda: finished(shown) == 1)
    first.kill()
    second = fresh()
    loaded = second.run("%load_ext bacalhau_jupyter")
    second.until(lambda: "unfinished job" in loaded.text())
    name = loaded.text().rpartition("attach ")[2].strip("`\n")
    assert "4 shards" in second.run("%bacalhau jobs").text()
    second.run(f"import bacalhau_jupyter as bj\njob = bj.attach({name!r})")
    assert second.run("job.state, job.result(partial=True).values()").value == "('Stopped', [0])"


def test_a_second_stop_leaves_at_once(kernel):
    shown = kernel.send("%%bacalhau --shards 4 --progress html -o s\nimport time\nprint('on')\ntime.sleep(600)")
    kernel.until(lambda: "4 shards" in shown.record)
    kernel.interrupt()
    kernel.interrupt()
    kernel.until(lambda: shown.idle, seconds=20)
    assert "Interrupt" in shown.error + shown.text("stderr")
    kernel.run("s.cancel()\ns.wait(30)")
    kernel.until(lambda: "4 stopped" in shown.record)


def test_stop_right_at_the_start_leaves_no_job(fresh):
    kernel = fresh()
    kernel.run("%load_ext bacalhau_jupyter\nimport bacalhau_jupyter as bj")
    kernel.run("%%bacalhau\n1")  # Python itself loses an interrupt that comes while it loads a module
    shown = kernel.send("print('sent')\nget_ipython().run_cell_magic('bacalhau', '', 'import time; time.sleep(600)')")
    kernel.until(lambda: "sent" in shown.text())
    kernel.interrupt()
    kernel.until(lambda: shown.idle, seconds=30)
    assert "Interrupt" in shown.error + shown.text("stderr")
    kernel.until(lambda: kernel.run("[line.state for line in bj.jobs() if line.state == 'Running']").value == "[]")
