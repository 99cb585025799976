"""Kernels of new keys and rotary positions compile clean, to the code on record, and move 16 bytes at a time.

Every element type, and with rotary positions each with both ways that pairs lie and both types of tables, in turn; into
an FP8 cache pieces of 16 bytes become 8.
"""

from typing import Any, cast

import fingerprints
import pytest
from test_merge_configs import LDG, STG, accesses

from fa3_cute.planning.append import append_config
from fa3_cute.planning.selections import appending_configs
from fa3_cute.planning.tables import KeySource, decode_config
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
    ("bf16", "", "", "fp8_e4m3"),
    ("fp16", "neighbours", "fp16", "fp8_e4m3"),
    ("bf16", "halves", "fp32", "fp8_e4m3"),
]


@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_compiles_clean(types):
    dtype, rotary, table, *into = types
    cfg = append_config(dtype, rotary, table, *into)
    report, kernel = compile_and_read(cast(Any, cfg))
    assert report.problems() == [] and report.smem_bytes == 0
    assert report.registers <= MOST_REGISTERS
    # Of k and v, rotated or as they are; with rotary of q as well. Lengths are stored as they are.
    of_cache, of_q = (3, 2) if rotary else (2, 0)
    stored = {16: of_q, 8: of_cache} if into else {16: of_q + of_cache}
    assert accesses(kernel.code, STG) == {size: count for size, count in stored.items() if count} | {4: 1}
    assert accesses(kernel.code, LDG).get(16, 0) >= 2
    # Attention's launch starts under the one ahead, and nothing is read or written before the wait for that.
    order = [word for word in operations(kernel.code) if word in (STARTS_NEXT, WAITS, LDG, STG)]
    assert order[:2] == [STARTS_NEXT, WAITS] and not {STARTS_NEXT, WAITS} & set(order[2:])
    known = fingerprints.known().get(cfg.name)
    found = fingerprints.of_compiled(cfg, report, kernel)
    assert known in (None, found), "the kernel changed: on purpose? make fingerprints, say why"


@pytest.mark.parametrize("cfg", appending_configs(), ids=lambda cfg: cfg.name)
def test_decode_that_appends_compiles_clean(cfg):
    """What it has besides the decode kernel's code: a piece of K and of V, moved in 16 bytes; nothing is read or
    written before the wait."""
    report, kernel = compile_and_read(cfg)
    assert report.problems() == []
    dims = frozenset({("head_dim_v", cfg.head_dim_v)} if cfg.head_dim_v else ())
    before, _ = compile_and_read(decode_config(cfg.dtype, cfg.head_dim, cfg.is_local, None, dims, source_of(cfg)))
    assert report.registers <= before.registers + 16
    order = [word for word in operations(kernel.code) if word in (STARTS_NEXT, WAITS, LDG, STG)]
    assert order[0] == WAITS and order.count(WAITS) == order.count(STARTS_NEXT) == 1
    assert accesses(kernel.code, STG)[16] >= 4  # K and V, of sequences with queries and of those without
    known, found = fingerprints.known().get(cfg.name), fingerprints.of_compiled(cfg, report, kernel)
    assert known in (None, found), "the kernel changed: on purpose? make fingerprints, say why"


def source_of(cfg) -> KeySource:
    return KeySource(True, cfg.page_box, cfg.box_is_wide)


def operations(code: bytes) -> list[int]:
    """The 12 bits of each instruction that name it."""
    return [int.from_bytes(code[at : at + 2], "little") & 0xFFF for at in range(0, len(code), 16)]
