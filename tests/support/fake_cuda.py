"""What a script of the launch tests starts with, in a process whose CUDA is fake_cuda.c: calls, and what they recorded.

A script takes all of these names, the modules too: `from fake_cuda import *`.
"""

import ctypes
import json
import struct
import threading  # noqa: F401 (for the scripts)

from fa3_cute import AttentionMode, DataType, FlashAttentionParams
from fa3_cute.runtime import compiler
from fa3_cute.runtime import disk_cache
from fa3_cute.runtime import launch as module
from fa3_cute.runtime.cubin import read_cubin
from fa3_cute.planning.tables import decode_config, forward_config
from fa3_cute.runtime.launch import launch_through as launch  # noqa: F401 (for the scripts)

fake = ctypes.CDLL("libcuda.so.1")

CFG = forward_config("bf16", 128, "causal", True, False)
STREAM = [(device + 1 << 32) + 0x7770 for device in range(3)]
POINTERS = {
    "q": 0x7F1234567000,
    "k": 0x7E0000000000,
    "v": 0xFFFF80000000,
    "out": 0x100000010,
    "softmax_lse": 0x7FFF00000004,
}
SIZES = {"batch_size": 2, "seqlen_q": 1000, "seqlen_k": 1100, "num_heads": 8, "num_heads_k": 2, "head_dim": 128}
STRIDES = {f"{x}_{d}_stride": None for x in ("q", "k", "v", "out") for d in ("batch", "row", "head")}
WINDOW = {"window_size_left": -1, "window_size_right": -1}
LENGTHS = {"cu_seqlens_q": None, "cu_seqlens_k": None, "seqused_q": None, "seqused_k": None, "total_q": 0, "total_k": 0}
CHOICES = {"is_causal": True, "pack_gqa": None, "num_splits": 0, "workspace": None, "softmax_scale": None}
PACKED = {
    "cu_seqlens_q": 0x7F0011223344,
    "cu_seqlens_k": 0x7F0055667788,
    "seqused_q": 0x7F0099AABBCC,
    "seqused_k": 0x7F00DDEEFF10,
    "total_q": 3210,
    "total_k": 2345,
    "batch_size": 77,
    "seqlen_q": None,
    "seqlen_k": "ignored",
}
DECODE_CFG = decode_config("bf16", 128, False)
FP8_CFG = forward_config("fp8_e4m3", 128, "causal", True, False, "bf16")
FP8_DECODE_CFG = decode_config("fp8_e4m3", 128, False, "bf16")
FP8 = {"dtype": DataType.FP8_E4M3}
DESCALES = {"q_descale_ptr": 0x7F2200000010, "k_descale_ptr": 0x7F3300000014, "v_descale_ptr": 0x7F4400000018}
DESCALE_STRIDES = {
    "q_descale_batch_stride": 0x11111,
    "q_descale_head_stride": 0x22222,
    "k_descale_batch_stride": 0x33333,
    "k_descale_head_stride": 0x44444,
    "v_descale_batch_stride": 0x55555,
    "v_descale_head_stride": 0x66666,
}
ONE_TOKEN = {
    "batch_size": 2,
    "seqlen_q": 1,
    "seqlen_k": 8192,
    "num_heads": 16,
    "num_heads_k": 2,
    "head_dim": 128,
    "dtype": DataType.BF16,
    "mode": AttentionMode.DECODE,
}


class Last(ctypes.Structure):
    """`last` of fake_cuda.c: the most recent launch."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("count", ctypes.c_long),
        ("device", ctypes.c_int),
        ("kernel", ctypes.c_uint64),
        ("cluster", ctypes.c_uint * 3),
        ("may_start_early", ctypes.c_int),
    ]


last = Last.in_dll(fake, "last")


def number(name, value=None):
    """An int variable of fake_cuda.c, set first if there is a value."""
    cell = ctypes.c_int.in_dll(fake, name)
    if value is not None:
        cell.value = value
    return cell.value


def numbers(name):
    """A variable of fake_cuda.c with one int per device."""
    return list((ctypes.c_int * 3).in_dll(fake, name))


def numbers64(name):
    """A variable of fake_cuda.c with one uint64 per device, to read or to set; of `capture_stream` only the first."""
    return (ctypes.c_uint64 * 3).in_dll(fake, name)


def params(**changes):
    """A good call, some of its fields changed."""
    return FlashAttentionParams(**POINTERS | SIZES | STRIDES | WINDOW | LENGTHS | CHOICES | changes)


def prefill_params(**changes):
    """A good causal call's fields, some of them changed."""
    return FlashAttentionParams(**POINTERS | SIZES | {"is_causal": True, "dtype": DataType.BF16} | changes)


def decode_params(**changes):
    """A good decode call, some of its fields changed."""
    return FlashAttentionParams(**POINTERS | ONE_TOKEN | changes)


def kernel_parameters(cfg=CFG):
    """Tell the fake where the kernel's parameters lie; return them as (offset, bytes)."""
    module.ensure_loaded(cfg)
    data = disk_cache.find(cfg.name, compiler.cache_key(cfg)).read_bytes()
    (kernel,) = read_cubin(data[data.index(b"\x7fELF", 4) :]).values()
    for i, place in enumerate(kernel.parameters):
        (ctypes.c_int * 128).in_dll(fake, "offsets")[i], (ctypes.c_int * 128).in_dll(fake, "sizes")[i] = place
    number("num_parameters", len(kernel.parameters))
    return kernel.parameters


def recorded(places):
    """The bytes of each parameter at the last launch."""
    blob = bytes((ctypes.c_ubyte * 8192).in_dll(fake, "parameters"))
    return [blob[offset : offset + size] for offset, size in places]


def reached(places, **values):
    """{name: whether the kernel's parameters hold the value, wherever}; addresses have 8 bytes, other numbers 4."""
    given = [p[:64] if len(p) == 128 else p for p in recorded(places)]  # the second half is garbage
    raw = {name: value.to_bytes(8 if value >> 32 else 4, "little") for name, value in values.items()}
    return {
        name: any(p[at : at + len(wanted)] == wanted for p in given for at in range(0, len(p), 4))
        for name, wanted in raw.items()
    }


def descriptors(places):
    """{address: sizes} of the TMA descriptors."""
    words = [struct.unpack("<32I", p) for p in recorded(places) if len(p) == 128]
    return {w[0] | w[1] << 32: [size + 1 for size in w[8:13]] for w in words}


def allocations():
    """[address, bytes, bytes that were cleared] of each piece of device memory, in the order of their making."""
    return [list(row) for row in (ctypes.c_uint64 * 3 * 64).in_dll(fake, "allocations")][: number("num_allocations")]


def scratch(places):
    """The addresses among the kernel's parameters that lie in the library's own device memory, in order."""
    given = [p[:64] if len(p) == 128 else p for p in recorded(places)]
    words = {word for p in given for word in struct.unpack(f"<{len(p) // 8}Q", p[: len(p) // 8 * 8])}
    return sorted(word for word in words if any(at <= word < at + size for at, size, _ in allocations()))


def meaning(places):
    """The parameters without the bytes that nothing initialises: a descriptor's second half, padding in structs."""
    return [p[:64].hex() for p in recorded(places) if len(p) in (4, 128)]


def raised(call):
    """[type, text, code] of what a call raises; None if it does not."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "code", None)]
    return None


def tell(**facts):
    """Hand facts to the test."""
    print("RESULT" + json.dumps(facts))
