"""What only a process that has seen no plain numbers can show. test_number_types.py runs it: NumPy types in.

A call leaves its shape, its config and the config's key in the disk cache behind: they must be plain, whatever kind of
number came first. Each kind has a process of its own, forked before any call.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict, fields, replace

import numpy as np

from fa3_cute import AttentionMode, DataType, FlashAttentionParams
from fa3_cute.api import kernel_config
from fa3_cute.contract.plain import plain
from fa3_cute.planning.operations import checked
from fa3_cute.runtime.compiler import cache_key

SIZES = {"batch_size": 2, "seqlen_q": 8, "seqlen_k": 16, "num_heads": 8, "num_heads_k": 2, "head_dim": 64}
STRIDES = {"q_row_stride": 512, "k_head_stride": 64, "out_batch_stride": 4096}
CHOICES = {"softmax_scale": 1.0, "num_splits": 1, "pack_gqa": False, "is_causal": False}
POINTERS = dict.fromkeys(("q", "k", "v", "out", "softmax_lse", "seqused_q", "seqused_k", "tile_counter"), 16)
WINDOW = FlashAttentionParams(**SIZES, **STRIDES, **CHOICES, **POINTERS, window_size_left=8, window_size_right=4)
NO_WINDOW = {"window_size_left": -1, "window_size_right": -1}
CAUSAL = replace(WINDOW, is_causal=True, **NO_WINDOW, dtype=DataType.BF16, seqlen_q=100, out_batch_stride=None)
SPLIT = replace(WINDOW, num_splits=2, workspace=16, workspace_bytes=2**20, pack_gqa=True)
PACKED = FlashAttentionParams(
    **CHOICES,
    **POINTERS,
    batch_size=2,
    num_heads=8,
    num_heads_k=2,
    head_dim=64,
    cu_seqlens_q=16,
    cu_seqlens_k=16,
    total_q=16,
    total_k=32,
    mode=AttentionMode.VARLEN_PREFILL,
    dtype=DataType.FP8_E4M3,
    out_dtype=DataType.FP16,
    q_descale_ptr=16,
    k_descale_ptr=16,
    q_descale_batch_stride=8,
    k_descale_head_stride=1,
)


def written(value, kind):
    """The value as NumPy's kind writes it; itself where it is of another sort or the kind has no such number."""
    sort = bool if kind is np.bool_ else float if issubclass(kind, np.floating) else int
    if not isinstance(value, sort) or sort is int and isinstance(value, bool):
        return value
    if sort is int and not np.iinfo(kind).min <= value <= np.iinfo(kind).max:
        return value
    return kind(value)


def leaves(value) -> list:
    """What a tuple holds, however deep."""
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else [value]


def check(call: dict, base: FlashAttentionParams) -> None:
    params = FlashAttentionParams(**call)
    cfg, shape = kernel_config(params), checked(plain(params))
    kept = {type(leaf) for leaf in leaves((*shape, *(getattr(cfg, field.name) for field in fields(cfg))))}
    assert kept <= {int, float, str, bool, type(None), frozenset}, (call, kept)
    json.dumps(cache_key(cfg))
    assert cfg is kernel_config(base) and shape == checked(base), call


def main(kind) -> None:
    num_written = 0
    for base in (WINDOW, CAUSAL, SPLIT, PACKED):
        given = asdict(base)
        other = {name: written(value, kind) for name, value in given.items()}
        num_written += sum(type(value) is kind for value in other.values())
        check(other, base)
        for name, value in other.items():
            check({**given, name: value}, base)
    assert num_written


def failed(kind: str) -> bool:
    """Whether `main` fails in a fork."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    status = 1
    try:
        main(getattr(np, kind))
        status = 0
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(", ".join(kind for kind in sys.argv[1:] if failed(kind)) or 0)
