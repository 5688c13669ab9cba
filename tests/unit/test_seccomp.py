"""The filter of system calls says what its table says, on both machines, and the kernel takes it."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import textwrap

import pytest

from bacalhau_node.executors.seccomp import (
    ALLOW,
    DENIED_CONTROLS,
    DENIED_FAMILIES,
    FAIL,
    MACHINES,
    NEW_NAMESPACES,
    deny_list,
)

EPERM, ENOSYS = FAIL | errno.EPERM, FAIL | errno.ENOSYS
NAMES = sorted(MACHINES)


def answer(name: str, number: int, *arguments: int, code: int | None = None) -> int:
    """What the program says to a call: the kernel's machine for such programs, as far as this one needs it."""
    program = deny_list(name)
    assert program is not None
    steps = list(struct.iter_unpack("<HBBI", program))
    words = (*arguments, *(0,) * (6 - len(arguments)))
    record = struct.pack("<IIQ6Q", number, MACHINES[name].code if code is None else code, 0, *words)
    at, loaded = 0, 0
    while True:
        operation, then, otherwise, operand = steps[at]
        at += 1
        if operation == 0x06:
            return operand
        if operation == 0x20:
            (loaded,) = struct.unpack_from("<I", record, operand)
        else:
            holds = {0x15: loaded == operand, 0x35: loaded >= operand, 0x45: bool(loaded & operand)}[operation]
            at += then if holds else otherwise


@pytest.mark.parametrize("name", NAMES)
def test_what_is_listed_is_denied_and_all_else_goes_on(name: str) -> None:
    machine = MACHINES[name]
    special = {machine.clone, machine.clone3, machine.socket, machine.ioctl}
    for number in range(600):
        if number not in special:
            assert answer(name, number) == (EPERM if number in machine.denied.values() else ALLOW), number


@pytest.mark.parametrize("name", NAMES)
def test_clone_makes_threads_and_processes_but_no_namespaces(name: str) -> None:
    clone = MACHINES[name].clone
    assert answer(name, clone, 0x003D0F00) == ALLOW  # what a C library starts threads with
    assert answer(name, clone, 0x01200011) == ALLOW  # and processes
    flags = [1 << bit for bit in range(32) if NEW_NAMESPACES & (1 << bit)]
    assert len(flags) == 7
    assert {answer(name, clone, flag | 0x11) for flag in flags} == {EPERM}
    assert answer(name, MACHINES[name].clone3) == ENOSYS


@pytest.mark.parametrize("name", NAMES)
def test_sockets_and_terminals_are_told_apart_by_their_argument(name: str) -> None:
    machine = MACHINES[name]
    assert {answer(name, machine.socket, family) for family in (1, 2, 10, 16)} == {ALLOW}
    assert {answer(name, machine.socket, family) for family in DENIED_FAMILIES} == {EPERM}
    assert answer(name, machine.ioctl, 0, 0x5401) == ALLOW
    assert {answer(name, machine.ioctl, 0, control) for control in DENIED_CONTROLS} == {EPERM}
    assert answer(name, machine.ioctl, DENIED_CONTROLS[0], 0x5401) == ALLOW


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_another_machine_or_interface_do_not_exist(name: str) -> None:
    assert answer(name, 1, code=0x40000003) == ENOSYS
    assert answer(name, 0x40000000 + 1) == ENOSYS


def test_the_two_machines_deny_the_same_calls() -> None:
    """But those that only one of them has."""
    only_one = {"uselib", "modify_ldt", "iopl", "ioperm"}
    assert MACHINES["x86_64"].denied.keys() - only_one == MACHINES["aarch64"].denied.keys()
    assert all(len(set(machine.denied.values())) == len(machine.denied) for machine in MACHINES.values())


def test_a_machine_without_numbers_gets_no_filter() -> None:
    assert deny_list("pdp11") is None


@pytest.mark.skipif(os.uname().machine not in MACHINES, reason="no filter for this machine")
def test_the_kernel_takes_it() -> None:
    """A process that puts it on can work, start threads and processes, and can't make a namespace."""
    script = """
        import ctypes, errno, subprocess, sys, threading
        program = bytes.fromhex(sys.argv[1])
        class Program(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, ctypes.byref(Program(len(program) // 8, program))) == 0
        thread = threading.Thread(target=print, args=["thread"])
        thread.start()
        thread.join()
        subprocess.run(["echo", "process"], check=True)
        assert libc.unshare(0x10000000) == -1 and ctypes.get_errno() == errno.EPERM
        assert libc.ptrace(0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM
    """
    program = deny_list()
    assert program is not None
    command = [sys.executable, "-u", "-c", textwrap.dedent(script), program.hex()]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("thread\nprocess\n", 0), done.stderr
