"""A simulated NVIDIA driver: `libnvidia-ml.so.1` from a few lines of C, for the real `nvidia-ml-py` to talk to.

It knows the cards that `SIMULATED_GPUS` lists: "GPU-a,GPU-b+MIG-1+MIG-2,GPU-c+" is a whole card, one
that is cut into two slices, and one that may be cut and is not yet. Without the variable it answers
as a driver that is not loaded. What tests with it show is detection, allocation and what is asked of
the system; never that a CUDA program runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

VARIABLE = "SIMULATED_GPUS"

_SOURCE = r"""
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
/* A handle is 1 + 16 * card + slice; slice 0 is the whole card. */
static int word(unsigned card, unsigned slice, char *into, unsigned size) {
    const char *at = getenv("SIMULATED_GPUS");
    if (!at || !*at) return 0;
    for (; card; card--) { at = strchr(at, ','); if (!at) return 0; at++; }
    for (; slice; slice--) { at += strcspn(at, ",+"); if (*at != '+') return 0; at++; }
    unsigned length = strcspn(at, ",+");
    if (length >= size) return 0;
    memcpy(into, at, length);
    into[length] = 0;
    return 1;
}
static char scratch[96];
static unsigned long at(unsigned card, unsigned slice) { return 1 + 16 * card + slice; }
static int named(unsigned long h, char *into, unsigned size) { return word((h - 1) / 16, (h - 1) % 16, into, size); }
int nvmlInitWithFlags(unsigned flags) { return getenv("SIMULATED_GPUS") ? 0 : 9; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "simulated"; }
int nvmlDeviceGetCount_v2(unsigned *count) { for (*count = 0; word(*count, 0, scratch, 96); ++*count); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, unsigned long *handle) { *handle = at(index, 0); return 0; }
int nvmlDeviceGetUUID(unsigned long h, char *into, unsigned size) { return named(h, into, size) ? 0 : 2; }
int nvmlDeviceGetName(unsigned long h, char *into, unsigned size) { strcpy(into, "Simulated GPU"); return 0; }
int nvmlDeviceGetMinorNumber(unsigned long h, unsigned *minor) { *minor = 200 + (h - 1) / 16; return 0; }
int nvmlDeviceGetMemoryInfo(unsigned long h, unsigned long long *of) {
    of[0] = 16000000000ull; of[1] = of[0]; of[2] = 0; return 0;
}
int nvmlDeviceGetMigMode(unsigned long h, unsigned *now, unsigned *later) {
    *now = *later = word((h - 1) / 16, 1, scratch, 96); return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(unsigned long h, unsigned *count) { *count = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(unsigned long h, unsigned index, unsigned long *handle) {
    *handle = at((h - 1) / 16, index + 1);
    return named(*handle, scratch, 96) && *scratch ? 0 : 6;
}
"""


@cache
def simulated_driver() -> Path:
    """The folder with the library, built once; skips the test where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a simulated NVIDIA driver with")
    folder = Path(tempfile.mkdtemp(prefix="simulated-gpus-"))
    source = folder / "nvml.c"
    source.write_text(_SOURCE)
    library = "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", "-o", str(folder / library), str(source)]
    subprocess.run(command, check=True)
    return folder


@cache
def load_simulated_driver() -> None:
    """Have it in this process: the loader then takes it for the driver's library of that name."""
    ctypes.CDLL(str(simulated_driver() / "libnvidia-ml.so.1"))


@pytest.fixture
def device_files() -> Iterator[list[str]]:
    """The names of device files where those of the first two cards would be: what is written to them goes nowhere."""
    paths = [Path("/dev/nvidia200"), Path("/dev/nvidia201")]
    made = []
    try:
        for path in paths:
            with contextlib.suppress(FileExistsError):
                os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
                made.append(path)
                path.chmod(0o666)
    except PermissionError:
        pytest.skip("only root can make device files")
    yield [path.name for path in paths]
    for path in made:
        path.unlink()


def simulate(monkeypatch: pytest.MonkeyPatch, cards: str) -> None:
    """From now on this process sees these cards."""
    load_simulated_driver()
    monkeypatch.setenv(VARIABLE, cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
