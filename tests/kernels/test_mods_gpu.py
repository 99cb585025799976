"""ScoreMod and MaskMod on the GPU, against the reference with their NumPy twins: in both kernels, beside what else
changes scores, over lengths that cut tiles and sequences."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8, Case
from check import check, results
from mod_cases import BY_DISTANCE, CAPPED, DOCUMENTS, EVEN_KEYS, T5, ModProblem, mod_params, with_mods

from fa3_cute import ScoreMod, forward

pytestmark = pytest.mark.gpu

BF16 = Case("bf16", 128, True, 4, 2, 300, 333, batch=2)
FP16 = Case("fp16", 64, False, 4, 2, 260, 413, batch=2)
FEW = Case("bf16", 128, True, 8, 2, 3, 1500, batch=3)
E4M3 = Case(FP8, 128, False, 4, 2, 300, 421, batch=2, out_dtype="bf16")
PACKED = {"cu_seqlens_q": (0, 130, 130, 207, 519), "cu_seqlens_k": (0, 201, 210, 287, 700)}


def run(problem: ModProblem, stream, **overrides):
    forward(mod_params(problem, **overrides), stream).check()
    return results(problem, stream)


@pytest.mark.parametrize(
    "mods", [(CAPPED,), (T5,), (BY_DISTANCE, DOCUMENTS)], ids=lambda m: "+".join(c.mod.name for c in m)
)
@pytest.mark.parametrize("lengths", [(300, 333), (333, 200), (129, 128)], ids=str)
def test_causal(mods, lengths, stream):
    """A causal mask cuts what a MaskMod leaves; rows without keys."""
    problem = with_mods(replace(BF16, seqlen_q=lengths[0], seqlen_k=lengths[1]), *mods)
    check(problem, *run(problem, stream))


@pytest.mark.parametrize("mods", [(DOCUMENTS,), (EVEN_KEYS,)], ids=lambda m: m[0].mod.name)
@pytest.mark.parametrize("window", [(-1, -1), (70, 20)], ids=str)
def test_masks_in_tiles_that_nothing_else_cuts(mods, window, stream):
    """Whole rows lose every key of a tile, some of them of all tiles."""
    problem = with_mods(replace(FP16, window=window), *mods)
    check(problem, *run(problem, stream))


@pytest.mark.parametrize("attn_mask", ["bool", "bf16"])
def test_beside_softcap_biases_and_masks(attn_mask, stream):
    """The ScoreMod is called behind softcap and bias, in front of what hides."""
    case = replace(FP16, softcap=20.0, alibi="heads", attn_mask=attn_mask, mask_dims="hqk", sinks=(0.5, -1.0))
    problem = with_mods(case, BY_DISTANCE, EVEN_KEYS)
    check(problem, *run(problem, stream))


def test_packed_sequences(stream):
    case = replace(BF16, batch=4, seqlen_q=519, seqlen_k=700)
    problem = with_mods(case, BY_DISTANCE, EVEN_KEYS, lengths=PACKED)
    check(problem, *run(problem, stream))


@pytest.mark.parametrize("num_splits", [1, 0, 5])
def test_decode(num_splits, stream):
    """The rows of a tile are queries and heads; splits merge what mods have left."""
    problem = with_mods(FEW, BY_DISTANCE, DOCUMENTS)
    check(problem, *run(problem, stream, num_splits=num_splits))


@pytest.mark.parametrize("case", [E4M3, replace(E4M3, seqlen_q=2, num_heads=8)], ids=str)
def test_fp8(case, stream):
    problem = with_mods(case, T5, EVEN_KEYS)
    check(problem, *run(problem, stream))


def test_arguments_may_change_from_call_to_call(stream):
    """Scalars are the call's; equal calls repeat."""
    problem = with_mods(BF16, CAPPED)
    first, _ = run(problem, stream)
    result = run(problem, stream, mod_scalars=(30.0,))
    again, _ = run(problem, stream)
    assert np.array_equal(first, again)
    check(replace(problem, mods=(replace(CAPPED, scalars=(30.0,)),)), *result)


def test_a_mod_that_changes_nothing(stream):
    """Gives the bits of a call without, as scores are scaled before the softmax in both."""
    problem = with_mods(FP16)
    mod = ScoreMod(lambda score, *rest: score, name="same")
    out, lse = run(problem, stream, score_mod=mod)
    check(problem, out, lse)
