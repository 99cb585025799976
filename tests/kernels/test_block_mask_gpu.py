"""Block lists on the GPU: what they leave is what the MaskMod leaves, and blocks that are not listed are not read."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8, Case
from check import check, poison_of, results
from images import contiguous
from mod_cases import BY_DISTANCE, DOCUMENTS, EVEN_KEYS, ModCase, ModProblem, mod_params, of_tensor, with_mods

from fa3_cute import BlockMask, MaskMod, block_lists, block_sizes, forward

pytestmark = pytest.mark.gpu

CAUSAL = Case("bf16", 128, True, 4, 2, 900, 1100, batch=2)
FULL = Case("fp16", 64, False, 4, 2, 700, 1030, batch=2)
E4M3 = Case(FP8, 128, False, 4, 2, 500, 901, batch=2, out_dtype="bf16")
SEEN = 384


def first_keys(batch, head, query, key, info, aux):
    """Whole blocks of keys are hidden from all."""
    return key < SEEN


FIRST_KEYS = ModCase(MaskMod(first_keys))


def lists_of(problem: ModProblem, batches: int, heads: int, rows: int = 1) -> tuple[BlockMask, list]:
    """The lists of its MaskMod on the device, and what holds them; entries behind those listed are of no block."""
    case = problem.case
    q_rows, kv_rows = block_sizes(case.dtype, case.head_dim)
    first = sum(len(mod.mod.pointers) for mod in problem.mods[:-1])
    lists = block_lists(
        problem.mods[-1].mod,
        (batches, heads, case.seqlen_q, case.seqlen_k),
        (q_rows * rows, kv_rows),
        causal=case.is_causal,
        window_size=case.window,
        arrays=[of_tensor(tensor) for tensor in problem.arrays[first:]],
    )
    kept = []
    for name, array in lists._asdict().items():
        tensor = contiguous(name, array.shape, "int32")
        tensor.array[...] = array
        if name.endswith("index"):
            count = getattr(lists, name.replace("index", "count"))[..., None]
            tensor.array[np.arange(array.shape[-1]) >= count] = 1 << 20
        tensor.image.upload()
        kept.append(tensor)
    addresses = dict(zip(lists._fields, (tensor.address for tensor in kept), strict=True))
    return BlockMask(**addresses, q_block=q_rows * rows, kv_block=kv_rows, batches=batches, heads=heads), kept


def run(problem: ModProblem, stream, lists: BlockMask):
    forward(mod_params(problem, block_mask=lists), stream).check()
    return results(problem, stream)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("case", [CAUSAL, replace(CAUSAL, seqlen_q=1100), replace(CAUSAL, seqlen_q=1300)], ids=str)
def test_documents(case, rows, stream):
    """Lists of each sequence; tiles without a key."""
    problem = with_mods(case, DOCUMENTS)
    lists, _kept = lists_of(problem, case.batch, 1, rows)
    check(problem, *run(problem, stream, lists))


@pytest.mark.parametrize("window", [(-1, -1), (300, 100)], ids=str)
def test_lists_of_each_head(window, stream):
    problem = with_mods(replace(FULL, window=window), BY_DISTANCE, EVEN_KEYS)
    lists, _kept = lists_of(problem, 1, FULL.num_heads)
    check(problem, *run(problem, stream, lists))


def test_fp8(stream):
    problem = with_mods(E4M3, DOCUMENTS)
    lists, _kept = lists_of(problem, E4M3.batch, 1)
    check(problem, *run(problem, stream, lists))


@pytest.mark.parametrize("case", [FULL, CAUSAL], ids=str)
def test_blocks_that_are_not_listed_are_not_read(case, stream):
    """NaN in them would reach every row, through P = 0."""
    problem = with_mods(case, FIRST_KEYS)
    lists, _kept = lists_of(problem, 1, 1)
    out, lse = run(problem, stream, lists)
    check(problem, out, lse)
    for tensor in (problem.k, problem.v):
        tensor.array[:, SEEN:] = poison_of(tensor.array.dtype)
        tensor.image.upload()
    problem.poison_outputs()
    again, again_lse = run(problem, stream, lists)
    assert np.array_equal(out, again) and np.array_equal(lse, again_lse)


def test_more_tiles_than_sms(stream):
    """Every CTA walks several lists."""
    case = replace(CAUSAL, batch=4, num_heads=16, num_heads_k=16, seqlen_q=1024, seqlen_k=1024)
    problem = with_mods(case, DOCUMENTS)
    lists, _kept = lists_of(problem, case.batch, 1)
    check(problem, *run(problem, stream, lists))
