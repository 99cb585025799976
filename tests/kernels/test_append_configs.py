"""Kernels of new keys and rotary positions compile clean, for all element types, and move 16 bytes at a time."""

import pytest
from test_merge_configs import LDG, STG, accesses

from fa3_cute.planning.append import append_config
from fa3_cute.runtime.compiler import compile_and_read

MOST_REGISTERS = 65536 // 1280  # five CTAs of 256 threads on an SM: as many bytes in flight as memory needs
TYPES = [
    *((dtype, "", "") for dtype in ("fp16", "bf16", "fp8_e4m3")),
    *((dtype, rotary, dtype) for dtype in ("fp16", "bf16") for rotary in ("halves", "neighbours")),
    *((dtype, rotary, "fp32") for dtype in ("fp16", "bf16") for rotary in ("halves", "neighbours")),
]


@pytest.mark.parametrize("dtype, rotary, table", TYPES)
def test_compiles_clean(dtype, rotary, table):
    report, kernel = compile_and_read(append_config(dtype, rotary, table))
    assert report.problems() == [] and report.smem_bytes == 0
    assert report.registers <= MOST_REGISTERS
    # Of k and v, rotated or as they are; with rotary of q as well. Lengths are stored as they are.
    assert accesses(kernel.code, STG) == {16: 5 if rotary else 2, 4: 1}
    assert accesses(kernel.code, LDG).get(16, 0) >= 2
