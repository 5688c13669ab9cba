"""A filter of system calls for sandboxes: what no cell needs and what kernels have been broken through.

Theory of operation. The kernel runs a small program of the classic BPF machine before each system
call; it sees the machine's architecture, the call's number and its arguments as numbers, and says
whether the call may go on. This module writes such a program, so no library is needed. It is a
list of what is denied; everything else goes on. Denied calls fail with "operation not permitted".
Two of them need a word:

- `clone3` has its flags in memory, where the program can't look. It fails with "no such system
  call", and the C library then uses `clone`, whose flags are a number.
- Sockets of AF_VSOCK lead from a virtual machine to its host and belong to no network namespace;
  AF_ALG opens the kernel's cryptography to everybody.

A container's filter (Docker's own) denies much the same, but for what its version did not know yet; agents in
containers put this one on besides (`agent/shield.py`).
"""

from __future__ import annotations

import base64
import errno
import platform
import struct
from dataclasses import dataclass
from functools import cache
from typing import Final

ALLOW: Final = 0x7FFF0000
"""The program's answer for a call that may go on."""
FAIL: Final = 0x00050000
"""The answer for one that fails, plus its error number."""

_LOAD: Final = 0x20
"""Load the 32-bit word at an offset of the call's record."""
_EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x15, 0x35, 0x45, 0x06
_NUMBER: Final = 0
_MACHINE: Final = 4
_ARGUMENTS: Final = 16
"""Offsets in the record; arguments have 8 bytes each, the low half first."""

_X32: Final = 0x40000000
"""Numbers from here on are the calls of x32, a second interface on x86-64."""
NEW_NAMESPACES: Final = 0x7E020000
"""The flags of `clone` that make a namespace of any kind but time, which `clone` can't make."""
DENIED_FAMILIES: Final = (40, 38)
"""AF_VSOCK, AF_ALG."""
DENIED_CONTROLS: Final = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX, which type into a terminal."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One architecture: the kernel's code for it, and the numbers of the calls that are treated."""

    code: int
    denied: dict[str, int]
    clone: int
    clone3: int
    socket: int
    ioctl: int


_EVERYWHERE: Final = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "quotactl_fd": 443,
}
"""New calls have one number on all architectures."""

_X86_64: Final = Machine(
    0xC000003E,
    _EVERYWHERE
    | {
        "ptrace": 101,
        "syslog": 103,
        "uselib": 134,
        "vhangup": 153,
        "modify_ldt": 154,
        "pivot_root": 155,
        "chroot": 161,
        "acct": 163,
        "settimeofday": 164,
        "mount": 165,
        "umount2": 166,
        "swapon": 167,
        "swapoff": 168,
        "reboot": 169,
        "iopl": 172,
        "ioperm": 173,
        "init_module": 175,
        "delete_module": 176,
        "quotactl": 179,
        "nfsservctl": 180,
        "lookup_dcookie": 212,
        "clock_settime": 227,
        "kexec_load": 246,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "unshare": 272,
        "perf_event_open": 298,
        "fanotify_init": 300,
        "name_to_handle_at": 303,
        "open_by_handle_at": 304,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "kcmp": 312,
        "finit_module": 313,
        "kexec_file_load": 320,
        "bpf": 321,
        "userfaultfd": 323,
    },
    clone=56,
    clone3=435,
    socket=41,
    ioctl=16,
)
_AARCH64: Final = Machine(
    0xC00000B7,
    _EVERYWHERE
    | {
        "lookup_dcookie": 18,
        "umount2": 39,
        "mount": 40,
        "pivot_root": 41,
        "nfsservctl": 42,
        "chroot": 51,
        "vhangup": 58,
        "quotactl": 60,
        "acct": 89,
        "unshare": 97,
        "kexec_load": 104,
        "init_module": 105,
        "delete_module": 106,
        "clock_settime": 112,
        "syslog": 116,
        "ptrace": 117,
        "reboot": 142,
        "settimeofday": 170,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "swapon": 224,
        "swapoff": 225,
        "perf_event_open": 241,
        "fanotify_init": 262,
        "name_to_handle_at": 264,
        "open_by_handle_at": 265,
        "setns": 268,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "kcmp": 272,
        "finit_module": 273,
        "bpf": 280,
        "userfaultfd": 282,
        "kexec_file_load": 294,
    },
    clone=220,
    clone3=435,
    socket=198,
    ioctl=29,
)
MACHINES: Final = {"x86_64": _X86_64, "aarch64": _AARCH64}
"""By the name that `platform.machine` gives."""


def deny_list(machine: str | None = None) -> bytes | None:
    """The program for a machine (None: this one), as the kernel takes it; None for one whose numbers are unknown."""
    found = MACHINES.get(machine or platform.machine())
    return None if found is None else b"".join(_program(found))


@cache
def deny_lists() -> dict[str, str]:
    """The programs for all machines, in base64 by name: for an agent, which finds out on which it runs."""
    return {name: base64.b64encode(b"".join(_program(machine))).decode() for name, machine in MACHINES.items()}


def _program(machine: Machine) -> list[bytes]:
    refused, unknown = FAIL | errno.EPERM, FAIL | errno.ENOSYS
    return [
        _step(_LOAD, _MACHINE),
        *_unless(_EQUAL, machine.code, unknown),
        _step(_LOAD, _NUMBER),
        *_when(_AT_LEAST, _X32, unknown),
        *_when(_EQUAL, machine.clone3, unknown),
        *(step for number in sorted(machine.denied.values()) for step in _when(_EQUAL, number, refused)),
        *_argument(machine.clone, 0, _when(_ANY_BIT, NEW_NAMESPACES, refused)),
        *_argument(machine.socket, 0, [step for each in DENIED_FAMILIES for step in _when(_EQUAL, each, refused)]),
        *_argument(machine.ioctl, 1, [step for each in DENIED_CONTROLS for step in _when(_EQUAL, each, refused)]),
        _step(_RETURN, ALLOW),
    ]


def _argument(call: int, index: int, checks: list[bytes]) -> list[bytes]:
    """For this call: load an argument, apply the checks, and let it go on."""
    block = [_step(_LOAD, _ARGUMENTS + 8 * index), *checks, _step(_RETURN, ALLOW)]
    return [_step(_EQUAL, call, otherwise=len(block)), *block]


def _when(test: int, value: int, answer: int) -> list[bytes]:
    return [_step(test, value, otherwise=1), _step(_RETURN, answer)]


def _unless(test: int, value: int, answer: int) -> list[bytes]:
    return [_step(test, value, then=1), _step(_RETURN, answer)]


def _step(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction; a test skips so many of the next ones, by its result."""
    return struct.pack("<HBBI", code, then, otherwise, value)
