"""A cell that uses its card for real, by the driver's library alone: identity, memory both ways, a kernel.

Its value is what CUDA says: how many cards there are, the UUID of the first, and whether a kernel
added one to each of a thousand numbers.
"""

import array
import ctypes
import os
import time

KERNEL = b"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry add_one(.param .u64 numbers, .param .u32 count)
{
    .reg .pred %past;
    .reg .b32 %block, %size, %thread, %index, %all, %number;
    .reg .b64 %start, %offset, %place;
    ld.param.u64 %start, [numbers];
    ld.param.u32 %all, [count];
    mov.u32 %block, %ctaid.x;
    mov.u32 %size, %ntid.x;
    mov.u32 %thread, %tid.x;
    mad.lo.u32 %index, %block, %size, %thread;
    setp.ge.u32 %past, %index, %all;
    @%past bra END;
    cvta.to.global.u64 %start, %start;
    mul.wide.u32 %offset, %index, 4;
    add.u64 %place, %start, %offset;
    ld.global.u32 %number, [%place];
    add.u32 %number, %number, 1;
    st.global.u32 [%place], %number;
END:
    ret;
}
"""
COUNT = 1000

cuda = ctypes.CDLL("libcuda.so.1")


def ask(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {code} {(text.value or b'').decode()}")


def identity(device):
    raw = (ctypes.c_ubyte * 16)()
    ask("cuDeviceGetUuid_v2" if hasattr(cuda, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid", raw, device)
    return bytes(raw).hex()


def added():
    context, module, kernel, memory = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
    ask("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    ask("cuCtxSetCurrent", context)
    ask("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(KERNEL))
    ask("cuModuleGetFunction", ctypes.byref(kernel), module, b"add_one")
    numbers = array.array("I", range(COUNT))
    size = ctypes.c_size_t(4 * COUNT)
    place = ctypes.c_void_p(numbers.buffer_info()[0])
    ask("cuMemAlloc_v2", ctypes.byref(memory), size)
    ask("cuMemcpyHtoD_v2", memory, place, size)
    count = ctypes.c_uint32(COUNT)
    given = (ctypes.c_void_p * 2)(ctypes.addressof(memory), ctypes.addressof(count))
    ask("cuLaunchKernel", kernel, 4, 1, 1, 256, 1, 1, 0, None, given, None)
    ask("cuCtxSynchronize")
    ask("cuMemcpyDtoH_v2", place, memory, size)
    ask("cuMemFree_v2", memory)
    return list(numbers) == list(range(1, COUNT + 1))


ask("cuInit", 0)
cards, device = ctypes.c_int(), ctypes.c_int()
ask("cuDeviceGetCount", ctypes.byref(cards))
ask("cuDeviceGet", ctypes.byref(device), 0)
found = {
    "given": os.environ["CUDA_VISIBLE_DEVICES"],
    "cards": cards.value,
    "uuid": identity(device),
    "added": added(),
    "from": time.time(),
}
time.sleep(0.5)  # so that shards which should share nothing are there at the same time
{**found, "to": time.time()}
