"""Kernels of new keys and rotary positions compile clean, to the code on record, and move 16 bytes at a time.

Every element type, and with rotary positions each with both ways that pairs lie and both types of tables, in turn.
"""

import fingerprints
import pytest
from test_merge_configs import LDG, STG, accesses

from fa3_cute.planning.append import append_config
from fa3_cute.runtime.compiler import compile_and_read

MOST_REGISTERS = 65536 // 1280  # five CTAs of 256 threads on an SM: as many bytes in flight as memory needs
TYPES = [
    ("bf16", "", ""),  # of 16 bit they are moved alike
    ("fp8_e4m3", "", ""),
    ("fp16", "halves", "fp16"),
    ("fp16", "neighbours", "fp32"),
    ("bf16", "neighbours", "bf16"),
    ("bf16", "halves", "fp32"),
]


@pytest.mark.parametrize("dtype, rotary, table", TYPES)
def test_compiles_clean(dtype, rotary, table):
    cfg = append_config(dtype, rotary, table)
    report, kernel = compile_and_read(cfg)
    assert report.problems() == [] and report.smem_bytes == 0
    assert report.registers <= MOST_REGISTERS
    # Of k and v, rotated or as they are; with rotary of q as well. Lengths are stored as they are.
    assert accesses(kernel.code, STG) == {16: 5 if rotary else 2, 4: 1}
    assert accesses(kernel.code, LDG).get(16, 0) >= 2
    known = fingerprints.known().get(cfg.name)
    found = fingerprints.of_compiled(cfg, report, kernel)
    assert known in (None, found), "the kernel changed: on purpose? make fingerprints, say why"
