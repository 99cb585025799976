"""Good calls, what they are changed with, and values of every kind: what the tests of the rules share."""

from dataclasses import replace

import numpy as np
from cuda.bindings.driver import CUdeviceptr

from fa3_cute.contract.limits import MAX_SIZE
from fa3_cute.contract.params import AttentionMode, DataType, FlashAttentionParams
from fa3_cute.contract.plain import plain
from fa3_cute.contract.status import Problem
from fa3_cute.planning.operations import checked

A = 0x7F00_0000_0000
FP16, BF16, FP8, FP32 = DataType
PREFILL, DECODE, VARLEN = AttentionMode
POINTERS = {"q": A, "k": A, "v": A, "out": A}
HEADS = {"num_heads": 16, "num_heads_k": 4, "head_dim": 128}
DENSE = FlashAttentionParams(**POINTERS, **HEADS, batch_size=2, seqlen_q=512, seqlen_k=640)
PACKED = FlashAttentionParams(
    **POINTERS, **HEADS, batch_size=3, mode=VARLEN, cu_seqlens_q=A, cu_seqlens_k=A, total_q=896, total_k=700
)
DENSE_FP8, PACKED_FP8 = (replace(call, dtype=FP8) for call in (DENSE, PACKED))
ONE_ROW = replace(DENSE, batch_size=1, seqlen_q=1, seqlen_k=1, num_heads=1, num_heads_k=1)


class Handle:
    """A pointer as cuda.core hands it out."""

    def __int__(self):
        return A


class Array:
    """An array where a pointer belongs: its int is its one element, not its address."""

    def __dlpack__(self):
        return A

    __int__ = __index__ = __dlpack__


def every(names: str, value) -> dict:
    return dict.fromkeys(names.split(), value)


DESCALES = every("q_descale_ptr k_descale_ptr v_descale_ptr", A + 4)
PER_HEAD = {
    "q_descale_batch_stride": 16,
    "q_descale_head_stride": 1,
    "k_descale_batch_stride": 4,
    "k_descale_head_stride": 1,
    "v_descale_batch_stride": MAX_SIZE,
}


def first_problem(params):
    """What `forward` would say."""
    found = checked(plain(params))
    return found if isinstance(found, Problem) else None


class Hostile:
    """Every conversion fails."""

    def __repr__(self):
        raise OSError

    __eq__ = __hash__ = __index__ = __int__ = __float__ = __bool__ = __repr__


VALUES = [
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    -1,
    4,
    8,
    16,
    64,
    100,
    128,
    192,
    512,
    2048,
    2**21,
    MAX_SIZE,
    2**31,
    2**39,
    2**64,
    A,
    A + 4,
    A + 8,
    0.0,
    0.5,
    1.0,
    -1.0,
    1e39,
    float("nan"),
    "",
    "q",
    [],
    (),
    {},
    np.int32(128),
    np.float32(0.5),
    np.zeros(2),
    np.zeros(1, np.int64),
    np.False_,
    CUdeviceptr(0),
    CUdeviceptr(A),
    Handle(),
    Array(),
    Hostile(),
    object(),
    *DataType,
    *AttentionMode,
]


class Recorded:
    """Params that list which of their fields are read."""

    def __init__(self, params):
        self.params, self.read = params, set()

    def __getattr__(self, name):
        if name == "raw":
            raise AttributeError(name)
        self.read.add(name)
        return getattr(self.params, name)
