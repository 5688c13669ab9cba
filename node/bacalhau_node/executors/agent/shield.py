"""A filter of system calls, put on by the agent itself: for containers whose daemon's own lets too much through."""

from __future__ import annotations

import base64
import ctypes
import os
import sys

from .tree import LIBC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict

PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
STEP = 8
"""Bytes of one instruction."""


class Program(ctypes.Structure):
    """The kernel's `sock_fprog`: how many instructions, and where."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def put_on(filters: Dict[str, str]) -> None:
    """Filter the calls of this process and of all that it starts, by the program (base64) for its machine.

    A machine or a kernel without one goes on with the container's own filter. It can't be taken off.
    """
    steps = base64.b64decode(filters.get(os.uname().machine, ""))
    if steps and sys.maxsize > 2**32:  # a 32-bit Python makes calls of another machine
        program = Program(len(steps) // STEP, steps)
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
