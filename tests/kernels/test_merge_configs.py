"""Merge kernels compile clean, for all element types, and read and write 16 bytes at a time."""

from itertools import product

import pytest

from fa3_cute.planning.merge import merge_config
from fa3_cute.runtime.compiler import compile_and_read

TYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
LDG, STG = 0x981, 0x986
MOST_REGISTERS = 65536 // 1024  # four CTAs of 256 threads on an SM: as many bytes in flight as memory needs


@pytest.mark.parametrize("dtype, out_dtype", list(product(TYPES, repeat=2)))
def test_compiles_clean(dtype, out_dtype):
    report, kernel = compile_and_read(merge_config(dtype, out_dtype))
    assert report.problems() == [] and report.smem_bytes == 0
    assert report.registers <= MOST_REGISTERS
    chunks, out_bytes = 2, 16 * TYPES[out_dtype] // TYPES[dtype]
    assert accesses(kernel.code, LDG) == {16: 2 * chunks, 4: 2}  # and the two LSEs
    stores = {8: {8: chunks, 4: 1}, 16: {16: chunks, 4: 1}, 32: {16: 2 * chunks, 4: 1}}
    assert accesses(kernel.code, STG) == stores[out_bytes]


def accesses(code: bytes, opcode: int) -> dict[int, int]:
    """{bytes: how often a thread reads or writes so many of global memory with one instruction}."""
    found: dict[int, int] = {}
    for at in range(0, len(code), 16):
        word = int.from_bytes(code[at : at + 16], "little")
        if word & 0xFFF == opcode:
            size = {2: 2, 4: 4, 5: 8, 6: 16}[word >> 73 & 7]  # of sm_90, found by comparing with nvdisasm
            found[size] = found.get(size, 0) + 1
    return found
