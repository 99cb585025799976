"""attn_mask by way of shared memory: which configs stage it, and that no copy outlives the kernel."""

import struct
from dataclasses import replace

import pytest

from fa3_cute.planning.selections import feature_configs
from fa3_cute.planning.tables import forward_config
from fa3_cute.runtime.compiler import compile_and_read

# SASS of sm_90, the low 12 bits of an instruction: the end of a group of cp.async, and the wait for groups.
COMMIT, WAIT = 0x9AF, 0x91A
STAGED = forward_config("fp16", 128, "local", False, False, features=frozenset({("attn_mask", "fp16")}))


def test_the_last_copy_is_waited_for():
    """Each K/V tile brings the one before it: that of the last is taken by nobody, and waited for behind all others."""
    assert STAGED in feature_configs() and STAGED.stages_mask
    report, kernel = compile_and_read(STAGED)
    assert not report.problems(), report
    opcodes = [word & 0xFFF for (word,) in struct.iter_unpack("<H14x", kernel.code)]
    places = {opcode: [place for place, found in enumerate(opcodes) if found == opcode] for opcode in (COMMIT, WAIT)}
    # One of the commits, and one of the waits, is of the start of a tile of O; the others come in pairs, wait first.
    assert len(places[COMMIT]) >= 3 and len(places[WAIT]) > len(places[COMMIT])
    assert places[WAIT][-1] > places[COMMIT][-1]


@pytest.mark.parametrize("tile_n", [112, 80, 16])
def test_staged_tiles_are_whole_steps(tile_n):
    """A step past the end of a row would write to the next one."""
    with pytest.raises(ValueError, match=f"tile_n={tile_n}: must be a multiple of 32 with attn_mask='fp16'"):
        replace(STAGED, tile_n=tile_n)
    for others in ({"attn_mask": "bool"}, {"attn_mask": "fp32"}, {"attn_mask": ""}):
        assert replace(STAGED, tile_n=tile_n, **others).tile_n == tile_n
