"""Cells that attack what is around them, and what each executor lets them reach.

    python -m tests.contract.hostile [FILE]    # the table attack × executor × outcome

`Ground` lays out what there is to attack: a home with secrets, servers, another process, another job
at work. An `Attack` is a cell whose value lists what it reached (nothing: it was held off), or
that has to fail in a certain way. `Ground.harm` looks at the damage from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bacalhau_node.executors.docker import DockerExecutor
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.executors.sandbox import SandboxExecutor
from bacalhau_node.ports import Executor, RawOutcome
from bacalhau_node.spec import Resources
from bacalhau_node.testing.executor_suite import MB, ShardBench, text_of, until, value
from tests.services import DEFAULT_HOST

EXECUTORS = ("process", "sandbox", "container")
"""By their isolation; the first promises none."""


def make_executor(kind: str, folder: Path) -> Executor:
    """An executor of two slots, by the name that the table gives it."""
    if kind == "container":
        return DockerExecutor(folder, node="n-hostile", slots=2)
    return SandboxExecutor(folder, slots=2) if kind == "sandbox" else ProcessExecutor(folder, slots=2)


# --- what there is to attack ---


@dataclass
class Ground:
    """A machine worth attacking, below one folder. `mark` is in every secret and in no other place."""

    folder: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self.home = self.folder / "home"
        self.secrets = [self.home / name for name in (".ssh/id_ed25519", ".config/pip/pip.conf", ".docker/config.json")]
        for path in self.secrets:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.mark)
        self.tcp = socket.create_server(("0.0.0.0", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("0.0.0.0", 0))
        self.udp.setblocking(False)
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.folder / "s"))
        self.unix.listen()
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0{self.mark}")
        self.abstract.listen()
        self.victim = subprocess.Popen([sys.executable, "-c", "input()", self.mark], stdin=subprocess.PIPE)

    def close(self) -> None:
        """End what was started."""
        for each in (self.tcp, self.udp, self.unix, self.abstract):
            each.close()
        self.victim.kill()
        self.victim.communicate()

    @property
    def targets(self) -> dict[str, Any]:
        """What a well-informed attacker knows: the cell's variable `targets`."""
        docker = os.environ.get("DOCKER_HOST", DEFAULT_HOST).removeprefix("unix://")
        return {
            "mark": self.mark[::-1],  # so that what the attacker was told is not what he looks for
            "secrets": [str(path) for path in self.secrets],
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "addresses": ["127.0.0.1", *_own_addresses()],
            "unix": str(self.folder / "s"),
            "docker": [docker, "/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock"],
            "victim": self.victim.pid,
            "folder": str(self.folder),
            "prefix": sys.prefix,
        }

    def harm(self) -> list[str]:
        """What was damaged or received since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while self.udp.recv(100):
                found = ["a datagram arrived"]
        if self.victim.poll() is not None:
            found.append("the victim was killed")
            self.victim.communicate()
            self.victim = subprocess.Popen([sys.executable, "-c", "input()", self.mark], stdin=subprocess.PIPE)
        found += [f"{path.name} was changed" for path in self.secrets if path.read_text() != self.mark]
        return found


def _own_addresses() -> list[str]:
    with contextlib.suppress(OSError):
        return [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return []


@contextlib.contextmanager
def ground_below(folder: Path) -> Iterator[Ground]:
    """A `Ground`, with its secrets in this process's environment too."""
    folder.mkdir()
    ground = Ground(folder)
    before = {name: os.environ.get(name) for name in ("HOME", "HOSTILE_SECRET")}
    os.environ |= {"HOME": str(ground.home), "HOSTILE_SECRET": ground.mark}
    try:
        yield ground
    finally:
        for name, old in before.items():
            os.environ.pop(name) if old is None else os.environ.update({name: old})
        ground.close()


# --- attacks ---


@dataclass(frozen=True)
class Attack:
    """One hostile cell. `ends`: kinds of failure one of which must end it; none: it must reach nothing.

    `boxed`: too dangerous for an executor that promises nothing. `before`: a cell of the same job that
    runs first. `neighbour`: another job is at work, with a secret in all of its folders.
    """

    name: str
    source: str
    ends: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    boxed: bool = False
    before: str = ""
    neighbour: bool = False


@dataclass(frozen=True)
class Finding:
    """What came of it: `held`, and in words how, or what was reached."""

    held: bool
    text: str


PRELUDE = """
import contextlib, ctypes, errno, json, os, signal, socket, stat, subprocess, sys, time
reached = []
targets['mark'] = targets['mark'][::-1]
libc = ctypes.CDLL(None, use_errno=True)

def attempt(what, action):
    try:
        action()
    except (OSError, subprocess.SubprocessError):
        return
    reached.append(what)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def has_mark(path):
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(path)
    with open(path, 'rb') as file:
        if targets['mark'].encode() not in file.read(1_000_000):
            raise OSError('no mark')

def search(folder):
    before = len(reached)
    for base, folders, files in os.walk(folder):
        for name in files:
            path = os.path.join(base, name)
            attempt(path.replace(targets['mark'], '*'), lambda: has_mark(path))
        if len(reached) > before:  # one find says it all, and this machine's folders may be large
            return

def pids():
    return [int(name) for name in os.listdir('/proc') if name.isdigit()]
"""

NEIGHBOUR = """
import os, time
targets['mark'] = targets['mark'][::-1]
for path in (outputs / 'secret', 'secret', '/tmp/secret-' + targets['mark'], '/dev/shm/secret-' + targets['mark']):
    with open(path, 'w') as file:
        file.write(targets['mark'])
print('ready')
time.sleep(60)
"""

ATTACKS = (
    Attack("connect by TCP to this machine", """
        for address in targets['addresses']:
            attempt(address, lambda: socket.create_connection((address, targets['tcp']), 1))
    """),
    Attack("send by UDP to this machine", """
        for address in targets['addresses']:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, contextlib.suppress(OSError):
                one.sendto(b'x', (address, targets['udp']))
    """),
    Attack("ask for the cloud's metadata", """
        for address in ('169.254.169.254', '100.100.100.200', 'fd00:ec2::254'):
            try:
                socket.create_connection((address, 80), 0.5).close()
            except OSError as error:
                if error.errno in (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue
            reached.append(address + ' (a packet went out)')
    """),
    Attack("connect to a unix socket", """
        def connect():
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(targets['unix'])
        attempt('socket', connect)
    """),
    Attack("connect to an abstract unix socket", """
        def connect():
            with socket.socket(socket.AF_UNIX) as one:
                one.connect('\\0' + targets['mark'])
        attempt('socket', connect)
    """),
    Attack("connect to the Docker daemon", """
        for path in targets['docker']:
            def connect():
                with socket.socket(socket.AF_UNIX) as one:
                    one.connect(path)
            attempt('socket', connect)
    """),
    Attack("read secrets of the home", """
        for path in (*targets['secrets'], *(os.path.expanduser(f'~/{name}') for name in ('.ssh/id_ed25519',))):
            attempt(os.path.basename(path), lambda: has_mark(path))
    """),
    Attack("read secrets of the environment", """
        reached += [name for name, text in os.environ.items() if targets['mark'] in text]
        for pid in pids():
            attempt(f'environment of another process', lambda: has_mark(f'/proc/{pid}/environ'))
    """),
    Attack("write to the root file system", """
        import sysconfig
        places = ['/', '/usr', '/usr/bin', '/etc', '/root', '/sbin', '/run', '/dev', targets['prefix'], '/inputs']
        for folder in (*places, '/slot', '/slot/bundle', sysconfig.get_paths()['purelib']):
            path = os.path.join(folder, targets['mark'])
            def write():
                with open(path, 'x'):
                    os.unlink(path)
            attempt(folder if folder not in (targets['prefix'],) else 'sys.prefix', write)
        reached = [place if 'site-packages' not in place else 'site-packages' for place in reached]
    """),
    Attack("write to an input", """
        attempt('written', lambda: open(inputs[0], 'a').close())
        attempt('mode changed', lambda: os.chmod(inputs[0], 0o644))
        attempt('linked into the outputs', lambda: os.link(inputs[0], outputs / 'link'))
        with contextlib.suppress(OSError):
            os.unlink(outputs / 'link')
    """, options={"files": {"a.csv": "data"}}),
    Attack("turn the kernel's knobs", """
        knobs = ['/proc/sys/kernel/core_pattern', '/proc/sys/kernel/hostname', '/proc/sysrq-trigger', '/sys/kernel/mm']
        for base, folders, files in os.walk('/sys/fs/cgroup'):
            knobs += [os.path.join(base, name) for name in files if name in ('cgroup.procs', 'release_agent')]
        for path in knobs:
            attempt('/'.join(path.split('/')[:4]), lambda: os.close(os.open(path, os.O_WRONLY)))
        reached = sorted(set(reached))
    """),
    Attack("read folders of another job", """
        search(targets['folder'])
        for folder in ('/tmp', '/dev/shm', '/slot', '/outputs', '/inputs', '/shared', '/run'):
            search(folder)
        reached = sorted({path.split('/')[1] for path in reached})
    """, neighbour=True),
    Attack("read folders of an earlier shard", """
        for folder in ('.', '..', str(outputs), '/outputs', '/slot', '/dev/shm'):
            search(folder)
        reached = ['found' for _ in reached][:1]
    """, before="(outputs / 'secret').write_text(targets['mark'])\nopen('secret', 'w').write(targets['mark'])"),
    Attack("look at processes of others", """
        for pid in pids():
            attempt('command line', lambda: has_mark(f'/proc/{pid}/cmdline'))
            for name in ('root', 'cwd', 'fd', 'maps'):
                if pid == targets['victim']:
                    attempt(name, lambda: os.listdir(f'/proc/{pid}/{name}'))
        reached = sorted(set(reached))
    """, neighbour=True),
    Attack("signal a process of this machine", """
        with contextlib.suppress(OSError):
            os.kill(targets['victim'], signal.SIGKILL)
    """),
    Attack("signal everything", """
        assert len(pids()) < 50
        os.kill(-1, signal.SIGKILL)
        time.sleep(60)
    """, ends=("signal", "node"), boxed=True),
    Attack("kill the agent", """
        parent = os.getppid()
        for pid in (int(open(f'/proc/{parent}/stat').read().rpartition(')')[2].split()[1]), parent):
            os.kill(pid, signal.SIGKILL)
        time.sleep(60)
    """, ends=("signal", "node")),
    Attack("stop the agent", """
        parent = os.getppid()
        for pid in (int(open(f'/proc/{parent}/stat').read().rpartition(')')[2].split()[1]), parent):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(60)
    """, ends=("timeout", "signal", "node"), options={"timeout": 0.5}, boxed=True),
    Attack("trace a process", """
        ATTACH, DETACH = 16, 17
        def trace():
            call('ptrace', ATTACH, targets['victim'], 0, 0)
            os.waitpid(targets['victim'], 0)
            call('ptrace', DETACH, targets['victim'], 0, 0)
        attempt('traced', trace)
    """),
    Attack("mount", """
        os.mkdir('m')
        def mount():
            call('mount', b'none', b'm', b'tmpfs', 0, None)
            call('umount2', b'm', 2)
        attempt('mounted', mount)
    """),
    Attack("make namespaces", """
        for name, flag in (('user', 0x10000000), ('mount', 0x20000), ('pid', 0x20000000), ('net', 0x40000000)):
            child = os.fork()
            if not child:
                os._exit(0 if libc.unshare(flag) == 0 else 1)
            if os.waitpid(child, 0)[1] == 0:
                reached.append(name)
        attempt('clone3', lambda: subprocess.run(['unshare', '-Ur', 'true'], check=True, stderr=subprocess.DEVNULL))
    """),
    Attack("become root", """
        attempt('setuid', lambda: os.setuid(0))
        if os.getuid() == 0 or os.geteuid() == 0:
            reached.append('is root')
        status = dict(line.split(':\\t', 1) for line in open('/proc/self/status').read().splitlines() if ':\\t' in line)
        if status['NoNewPrivs'] != '1':
            reached.append('set-uid programs count')
        if int(status['CapEff'], 16):
            reached.append('capabilities')
    """),
    Attack("make and open devices", """
        for name, kind, number in (('disk', stat.S_IFBLK, (254, 0)), ('mem', stat.S_IFCHR, (1, 1))):
            attempt(f'{name} made', lambda: os.mknod(name, kind | 0o600, os.makedev(*number)))
        for path in ('/dev/vda', '/dev/sda', '/dev/mem', '/dev/kmsg', '/dev/fuse', '/dev/kvm', '/dev/vhost-vsock'):
            attempt(path, lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
    """),
    Attack("find an open file of the host", """
        for name in os.listdir('/proc/self/fd'):
            with contextlib.suppress(OSError):
                path = os.readlink(f'/proc/self/fd/{name}')
                if path.startswith('/') and not path.startswith(('/dev/', '/proc', os.getcwd(), '/tmp/', '/memfd')):
                    reached.append(path)
    """),
    Attack("use the kernel's odd corners", """
        numbers = {'io_uring': 425, 'userfaultfd': (323, 282), 'bpf': (321, 280), 'perf': (298, 241)}
        numbers['keyctl'] = (250, 219)
        arm = os.uname().machine == 'aarch64'
        space = ctypes.create_string_buffer(256)
        for name, number in numbers.items():
            number = number if isinstance(number, int) else number[arm]
            arguments = (0, 0) if name == 'keyctl' else (1, space, 0)
            denied = (errno.EPERM, errno.EACCES, errno.ENOSYS)
            if libc.syscall(number, *arguments) >= 0 or ctypes.get_errno() not in denied:
                reached.append(name)
        attempt('vsock', lambda: socket.socket(40, socket.SOCK_STREAM).close())
    """),
    Attack("lead out of the outputs by a link", """
        os.symlink(targets['secrets'][0], outputs / 'a')
    """, ends=("output",)),
    Attack("lead out of the outputs by a folder", """
        os.symlink(targets['folder'], outputs / 'a', target_is_directory=True)
    """, ends=("output",)),
    Attack("leave a pipe in the outputs", """
        os.mkfifo(outputs / 'a')
    """, ends=("output",)),
    Attack("fork without end", """
        while True:
            with contextlib.suppress(OSError):
                os.fork()
    """, ends=("timeout", "signal", "memory"), options={"timeout": 2.0}),
    Attack("take all memory", """
        data = []
        while True:
            data.append(b'x' * 10_000_000)
    """, ends=("memory",), options={"resources": Resources(memory=256 * MB)}),
    Attack("take all memory by files", """
        with open('/dev/shm/' + targets['mark'], 'wb') as one, open('/tmp/' + targets['mark'], 'wb') as two:
            while True:
                one.write(bytes(1_000_000))
                two.write(bytes(1_000_000))
    """, ends=("memory", "disk", "exception", "signal"), options={"resources": Resources(memory=256 * MB)}, boxed=True),
    Attack("fill the disk", """
        with open(outputs / 'large', 'wb') as file:
            while True:
                file.write(bytes(1_000_000))
    """, ends=("disk",), options={"resources": Resources(disk=20 * MB)}),
)  # fmt: skip


async def launch(attack: Attack, bench: ShardBench, ground: Ground, *, boxed: bool) -> Finding:
    """Run one attack; afterwards the executor must still work."""
    if attack.boxed and not boxed:
        return Finding(held=False, text="not tried")
    ground.harm()
    async with _neighbour(bench, ground) if attack.neighbour else contextlib.nullcontext():
        finding = _judge(attack, await _run(attack, bench, ground), ground)
    assert value(await bench.run("'the next shard runs'")) == "the next shard runs"
    return finding


async def _run(attack: Attack, bench: ShardBench, ground: Ground) -> RawOutcome:
    variables = {"targets.json": _json(ground.targets)}
    before = textwrap.dedent(attack.before)
    first = f"{PRELUDE}if shard.index == 0:\n{textwrap.indent(before or 'pass', '    ')}\n    raise SystemExit\n"
    source = first + textwrap.dedent(attack.source) + "\nreached"
    if before:
        await bench.run(source, variables=variables, shard=0, **attack.options)
    return await bench.run(source, variables=variables, shard=1, **attack.options)


def _judge(attack: Attack, outcome: RawOutcome, ground: Ground) -> Finding:
    harm = ground.harm()
    kind = outcome.error.kind if outcome.error is not None else ""
    if attack.ends:
        held = kind in attack.ends and not harm and (kind != "output" or outcome.outputs is None)
        return Finding(held, f"ended: {kind}" if held else ", ".join(harm) or kind or "nobody stopped it")
    if not outcome.ok:
        return Finding(held=False, text=f"the attack itself failed: {outcome.error}")
    reached = sorted({*value(outcome), *harm})
    return Finding(not reached, ", ".join(reached) or "held off")


@contextlib.asynccontextmanager
async def _neighbour(bench: ShardBench, ground: Ground) -> AsyncIterator[None]:
    """Another job at work in the other slot."""
    events: list[Any] = []
    variables = {"targets.json": _json(ground.targets)}
    running = asyncio.ensure_future(bench.run(NEIGHBOUR, variables=variables, timeout=60, on_event=events.append))
    await until(lambda: "ready" in text_of(events) or running.done())
    assert not running.done(), running.result()
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait({running})
        await asyncio.to_thread(_sweep, ground.mark)


def _sweep(mark: str) -> None:
    """What a plain neighbour left on this machine when it was killed."""
    for folder in ("/tmp", "/dev/shm"):
        Path(folder, f"secret-{mark}").unlink(missing_ok=True)


def _json(fields: dict[str, Any]) -> bytes:
    import json  # noqa: PLC0415  the cells' own `json` is another one

    return json.dumps(fields).encode()


# --- the table ---


@contextlib.asynccontextmanager
async def open_bench(kind: str, ground: Ground) -> AsyncIterator[ShardBench | None]:
    """An executor on this ground; None where it does not work."""
    work = ground.folder / kind
    await asyncio.to_thread(work.mkdir)
    executor = make_executor(kind, work / "node")
    told = await executor.probe()
    try:
        yield ShardBench(executor, work) if told.problem is None else None
    finally:
        await executor.close()


async def survey(folder: Path) -> tuple[list[str], dict[str, dict[str, str]]]:
    """All attacks on all executors of this machine: (executors that work, attack -> executor -> outcome)."""
    table: dict[str, dict[str, str]] = {attack.name: {} for attack in ATTACKS}
    kinds = []
    with ground_below(folder / "ground") as ground:
        for kind in EXECUTORS:
            async with open_bench(kind, ground) as bench:
                if bench is None:
                    continue
                kinds.append(kind)
                for attack in ATTACKS:
                    found = await launch(attack, bench, ground, boxed=kind != "process")
                    table[attack.name][kind] = found.text if found.held else f"**{found.text}**"
    return kinds, table


def markdown(kinds: list[str], table: dict[str, dict[str, str]]) -> str:
    """The table; what was not held off is bold."""
    heads = {"process": "plain process (promises nothing)", "sandbox": "sandbox", "container": "container"}
    rows = [["attack", *(heads[kind] for kind in kinds)], ["---"] * (len(kinds) + 1)]
    rows += [[name, *(found[kind] for kind in kinds)] for name, found in table.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Print the table, or write it to the file that is named."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        text = markdown(*asyncio.run(survey(Path(folder))))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(sys.argv[1]).write_text(text)
    print(text)
    print(f"{len(ATTACKS)} attacks an executor, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
