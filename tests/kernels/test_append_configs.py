"""Kernels of new keys and rotary positions compile clean, to the code on record, and move 16 bytes at a time.

Every element type, and with rotary positions each with both ways that pairs lie and both types of tables, in turn.
"""

import fingerprints
import pytest
from test_merge_configs import LDG, STG, accesses

from fa3_cute.planning.append import append_config
from fa3_cute.runtime.compiler import compile_and_read

STARTS_NEXT, WAITS = 0x82D, 0x82E  # PREEXIT, ACQBULK (nvdisasm)
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
    # Attention's launch starts under the one ahead, and nothing is read or written before the wait for that.
    order = [word for word in operations(kernel.code) if word in (STARTS_NEXT, WAITS, LDG, STG)]
    assert order[:2] == [STARTS_NEXT, WAITS] and not {STARTS_NEXT, WAITS} & set(order[2:])
    known = fingerprints.known().get(cfg.name)
    found = fingerprints.of_compiled(cfg, report, kernel)
    assert known in (None, found), "the kernel changed: on purpose? make fingerprints, say why"


def operations(code: bytes) -> list[int]:
    """The 12 bits of each instruction that name it."""
    return [int.from_bytes(code[at : at + 2], "little") & 0xFFF for at in range(0, len(code), 16)]
