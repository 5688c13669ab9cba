"""The parent: one loop over the host, the template and the running shard."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque

from .failures import blame
from .folders import has_entries, make_folder, remove_tree
from .host import Host
from .running import LEFT_BEHIND, Running, outcome
from .shield import put_on
from .template import Template, template_process
from .text import Pipes
from .tree import Children, adopt_orphans, descendants, kill_all, reap, send_signal, sweep
from .watch import DISK_WATCH, WATCH, oom_kills, too_much, too_much_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, NoReturn

    from .frames import Header

MAX_DEATHS = 3
"""Templates that may die in a row before this agent gives up and ends."""
TOO_LONG = "the shard ran longer than its --timeout of %g s: give it more, or use smaller shards"


class Agent:
    """The parent process. `streams`: the host's, in and out."""

    def __init__(self, streams: tuple[int, int]) -> None:
        self.selector = selectors.DefaultSelector()
        self.host = Host(streams, self.selector, self.end)
        self.pipes = Pipes()
        self.wake, self.wake_end = os.pipe()
        self.children = Children(os.getpid())
        self.setup: Header = {}
        self.job: Header = {}
        self.queue: deque[Header] = deque()
        self.running: Running | None = None
        self.template: Template | None = None
        self.held = ""
        self.deaths = 0
        self.ooms = 0
        self.listening = False
        self.orders: dict[Any, Callable[[Header], object]] = {
            "hello": self.hello,
            "prepare": self.preload,
            "job": self.take_job,
            "run": self.queue.append,
            "kill": self.cancel,
            "recall": self.give_back,
            "collected": self.release,
            "bye": lambda _: self.end(),
        }

    def start(self) -> NoReturn:
        """Set up and serve the host until it is gone."""
        for fd in (self.wake, self.wake_end):
            os.set_blocking(fd, False)
        adopt_orphans()
        signal.set_wakeup_fd(self.wake_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self.end())
        self.selector.register(self.host.streams[0], selectors.EVENT_READ, self.hear)
        self.selector.register(self.wake, selectors.EVENT_READ, self.woken)
        gc.collect()
        gc.freeze()
        self.host.send({"t": "ready", "python": "%d.%d.%d" % sys.version_info[:3], "pid": os.getpid()})
        while True:
            self.turn()

    def turn(self) -> None:
        """One round: wait, handle what came, look at the clock, write."""
        timers = [at for at in self.running.timers() if at] if self.running else []
        wait = max(0.0, min(timers) - time.monotonic()) if timers else None
        for key, _ in self.selector.select(wait):
            key.data()
        if self.running:
            self.look_at_clock(self.running, time.monotonic())
        template = self.template
        if self.queue and self.running is None and not self.held and self.job and template and template.ready:
            self.start_next(template)
        self.host.write()
        self.listen(on=self.host.keeps_up)

    def woken(self) -> None:
        """A signal came: children have ended, former templates and what shards left to us."""
        with contextlib.suppress(BlockingIOError):  # someone read it already
            os.read(self.wake, 4096)
        reap()

    def end(self, code: int = 0) -> NoReturn:
        """Kill everything and exit."""
        try:
            self.kill_shard()
            if self.running:
                remove_tree(self.running.run["work"])
        finally:
            if self.template:
                send_signal(self.template.pid, signal.SIGKILL)
            os._exit(code)

    # the host's orders

    def hear(self) -> None:
        """Frames of the host."""
        for header in self.host.frames():
            order = self.orders.get(header.get("t"))
            if order is None:
                self.host.send({"t": "error", "message": "unknown frame %r" % (header.get("t"),)})
            else:
                order(header)

    def hello(self, header: Header) -> None:
        """What holds for the whole life of this agent."""
        self.setup = header
        self.ooms = oom_kills(header["oom"])
        put_on(header["filters"])
        os.environ.update(header.get("env", {}))
        for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"):
            os.environ.setdefault(name + "_NUM_THREADS", "1")
        os.environ.setdefault("MPLBACKEND", "agg")
        os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # a second thread forbids the fork
        known = set(sys.path)
        sys.path[:0] = [path for path in header.get("path", ()) if path not in known]
        self.prepare(list(header.get("imports", ())))

    def preload(self, header: Header) -> None:
        """Have these modules, while there is no job; more of them do no harm."""
        imports = header["imports"]
        if self.template is None or not set(imports) <= set(self.template.wanted):
            self.prepare(imports)

    def take_job(self, header: Header) -> None:
        """The job; what is preloaded stays if it serves: same modules, same number of their threads."""
        self.job = header
        os.environ.update(header["env"])
        threads = any(name.endswith("_NUM_THREADS") for name in header["env"])
        wanted = set(header["imports"])
        if self.template is None or threads or not wanted <= set(self.template.wanted):
            self.prepare(sorted(wanted))
        elif self.template.ready:
            self.template.tell(header)

    def cancel(self, header: Header) -> None:
        """End one run, wherever it is."""
        key = header["key"]
        gone = blame("signal", "cancelled")
        if self.running and self.running.key == key:
            self.stop(self.running, gone)
        elif self.unqueue(key):
            self.host.send({"t": "done", "key": key, "ok": False, "exit_code": 137, "error": gone})

    def give_back(self, header: Header) -> None:
        """A run may go elsewhere if it has not started."""
        if self.unqueue(header["key"]):
            self.host.send({"t": "recalled", "key": header["key"]})

    def unqueue(self, key: str) -> bool:
        """Forget a run that has not started; False when there is none."""
        found = [run for run in self.queue if run["key"] == key]
        for run in found:
            self.queue.remove(run)
        return bool(found)

    def release(self, header: Header) -> None:
        """Outputs are taken: go on."""
        if self.held == header["key"]:
            self.held = ""

    # the template

    def prepare(self, imports: list[str], *, really: bool = True) -> None:
        """Replace the template by one that imports these; if not `really`, by one that leaves that to the cell."""
        self.drop_template()
        ours, theirs = socket.socketpair()
        private = [*self.host.streams, self.wake, self.wake_end, self.selector.fileno(), ours.fileno()]
        private += [fd for fd in (self.children.fd,) if fd >= 0]
        pid = os.fork()
        if pid == 0:
            template_process(theirs, imports if really else [], self.pipes, private)
        theirs.close()
        template = self.template = Template(pid, ours, imports)
        self.selector.register(ours, selectors.EVENT_READ, lambda: self.hear_template(template))

    def drop_template(self) -> None:
        """Let the template go."""
        if self.template:
            self.selector.unregister(self.template.channel)
            self.template.kill()
            self.template = None

    def hear_template(self, template: Template) -> None:
        """Reports of the template."""
        if template is not self.template:
            return  # replaced in this very turn
        if not template.receive():
            self.lost_template(template)
            return
        if not template.ready:
            self.greet_template(template)
        if template.ready:
            for what, number, status, max_rss in template.reports():
                self.report(what, number, status=status, max_rss=max_rss)

    def greet_template(self, template: Template) -> None:
        """Its first message: what it has imported, and whether it may fork with that."""
        greeting = template.greeting()
        if greeting is None:
            return
        if not greeting["safe"]:
            self.prepare(template.wanted, really=False)
            return
        template.ready = True
        spent = int(1000 * (time.monotonic() - template.since))
        self.host.send({"t": "warm", "imports": greeting["imports"], "ms": spent})
        if self.job:
            template.tell(self.job)

    def report(self, what: bytes, number: int, *, status: int, max_rss: int) -> None:
        """One report of the template about the running shard (`template.REPORT`)."""
        running = self.running
        if running is None:
            return
        if what == b"p":
            self.deaths = 0
            self.host.send({"t": "started", "key": running.key, "pid": number})
            if running.why:
                self.kill_shard()
        elif what == b"x":
            self.finish(running, status=status, max_rss=max_rss)
        else:
            running.why = blame("node", "no process could be started: %s" % os.strerror(number))
            self.finish(running, status=1 << 8, max_rss=0)

    def lost_template(self, template: Template) -> None:
        """The template is gone, and its shard with it; the next one gets a new one."""
        self.drop_template()
        self.deaths += 1
        if self.deaths > MAX_DEATHS:
            os.write(2, b"the process that imports and compiles the cell ended %d times in a row\n" % self.deaths)
            self.end(1)
        if self.running:
            self.kill_shard()
            self.finish(self.running, status=signal.SIGKILL, max_rss=0)
        self.prepare(template.wanted, really=template.ready)

    # the running shard

    def start_next(self, template: Template) -> None:
        """Start the next run of the queue."""
        run = self.queue.popleft()
        self.running = Running(run, self.host.send)
        for folder in (run["work"], run["outputs"]):
            make_folder(folder)
        if self.setup["watch"]:
            self.running.watch_at = self.running.began + WATCH
        template.tell(run)

    def listen(self, *, on: bool) -> None:
        """Read the shard's pipes, or leave them unread so that it waits."""
        if on == self.listening:
            return
        self.listening = on
        for name, fd in self.pipes.read_ends.items():
            if on:
                self.selector.register(fd, selectors.EVENT_READ, functools.partial(self.read, name))
            else:
                self.selector.unregister(fd)

    def read(self, name: str) -> bool:
        """Take what the running shard wrote to one of its pipes; False when there is nothing."""
        data = self.pipes.read(name)
        if data and self.running:
            self.running.take(name, data, time.monotonic())
        return bool(data)

    def look_at_clock(self, running: Running, now: float) -> None:
        """Send text that is due; enforce the limits."""
        running.flush(now)
        if running.deadline and running.deadline <= now:
            self.stop(running, blame("timeout", TOO_LONG % running.run["timeout"]))
        elif running.linger and running.linger <= now:
            running.linger = 0.0
            running.take("stderr", LEFT_BEHIND, now)
            self.kill_shard()
        elif running.watch_at and running.watch_at <= now:
            running.watch_at = now + WATCH
            self.stop_for(running, too_much(running.run, self.shard_processes()))
        elif running.disk_at and running.disk_at <= now:
            self.stop_for(running, too_much_disk(running.run))
            end = time.monotonic()
            running.disk_at = end + max(DISK_WATCH, 20 * (end - now))

    def stop_for(self, running: Running, why: Header | None) -> None:
        """Kill the running shard if there is a reason."""
        if why:
            self.stop(running, why)

    def stop(self, running: Running, why: Header) -> None:
        """Kill the running shard and remember why; its end comes as every end does."""
        running.why = running.why or why
        running.deadline = running.watch_at = running.disk_at = 0.0
        self.kill_shard()

    def kill_shard(self) -> None:
        """Kill all of the running shard's processes."""
        kill_all(self.shard_processes)

    def shard_processes(self) -> set[int]:
        """All that the running shard started: what is below us, but for the template."""
        roots = self.children.now()
        if self.template:
            roots = [pid for pid in roots if pid != self.template.pid] + self.template.children.now()
        return descendants(roots) if roots else set()

    def finish(self, running: Running, *, status: int, max_rss: int) -> None:
        """The shard's process has ended: clean up behind it, then send its last frame."""
        sweep(self.shard_processes)
        for name in self.pipes.read_ends:
            while self.read(name):
                pass
        self.running = None
        run, now = running.run, time.monotonic()
        if not os.WIFSIGNALED(status):
            running.take("stderr", bytes(running.crash), now)  # another process of the cell crashed
        cut = running.finish_text(now)
        end, body = outcome(running, status, self.new_oom_kills(status), name=self.job["name"])
        remove_tree(run["work"])
        wrote = has_entries(run["outputs"])
        self.held = running.key if wrote and run.get("hold") else ""
        facts = {"seconds": now - running.began, "max_rss": max_rss * 1024, "cut": cut, "outputs": wrote}
        self.host.send({"t": "done", "key": running.key, **end, **facts}, body)

    def new_oom_kills(self, status: int) -> int:
        """How many processes the kernel killed for memory since the last look; looks only after a SIGKILL."""
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            return 0
        before, self.ooms = self.ooms, oom_kills(self.setup["oom"])
        return self.ooms - before


def main() -> NoReturn:
    """Move the host's streams to where no stray print can damage a frame, and serve."""
    streams = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    Agent(streams).start()
