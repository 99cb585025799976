"""Descales of FP8 on the GPU: every layout in every mode, scales of unlike size, and none that reaches another head."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8, FP8_DECODE_SOME, FP8_FEW, FP8_OUT_DTYPES, FP8_SOME, HEADS, Case, Layout, with_heads
from check import make_problem, packed_problem, run_and_check, run_each_and_check
from descales import LAYOUTS, fixed, per_batch_and_head, spaced
from test_forward_gpu import set_values
from test_varlen_gpu import captured, replay

from fa3_cute.contract.reference import as_float

pytestmark = pytest.mark.gpu

# Sequences of the packed cases: with one empty, so that they are not numbered by what there is to do.
PACKED = Layout((100, 0, 57, 129), (130, 40, 200, 64), before=3, after=7)
SPLITS = [{"num_splits": n} for n in (0, 1, 3)]

each_layout = pytest.mark.parametrize("descale", LAYOUTS.values(), ids=LAYOUTS.keys())


# ---- layouts -------------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("family", FP8_FEW, ids=str)
def test_dense(family, descale, stream):
    run_and_check(make_problem(replace(family, seqlen_q=200, batch=3), descale=descale), stream)


@each_layout
@pytest.mark.parametrize("family", FP8_FEW, ids=str)
def test_packed(family, descale, stream):
    run_and_check(packed_problem(family, PACKED, descale=descale), stream)


@each_layout
@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_decode(family, descale, stream):
    """Whether the query heads of a KV head share a tile or not, each has its own descale."""
    variants = [*SPLITS, {"num_splits": 2, "pack_gqa": False}]
    run_each_and_check(make_problem(replace(family, batch=3), descale=descale), stream, variants)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("kind", ["dense", "packed", "decode"])
def test_head_ratios(kind, heads, stream):
    """q's descales by query head, k's and v's by KV head."""
    family = with_heads(FP8_SOME[4], heads)
    if kind == "packed":
        run_and_check(packed_problem(family, PACKED, descale=per_batch_and_head), stream)
    elif kind == "dense":
        run_and_check(make_problem(family, descale=per_batch_and_head), stream)
    else:
        run_each_and_check(make_problem(replace(family, seqlen_q=1), descale=per_batch_and_head), stream, SPLITS)


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FP8_SOME + FP8_DECODE_SOME, ids=str)
def test_heads_of_unlike_scale(case, stream):
    """Real values of one KV head up to 448, of the other up to 1e-3, and q's the other way round: each wrong scale is
    wrong by 448,000. Stored values reach 448 everywhere."""
    small = 1e-3 / 448
    problem = make_problem(case, softmax_scale=20 / case.head_dim**0.5, descale=per_batch_and_head)
    for name, row in (("q", (small, 1.0)), ("k", (1.0, small)), ("v", (1.0, small))):
        descales = problem.descales[f"{name}_descale"].array
        descales[...] = np.repeat(row, descales.shape[1] // 2)
    values = {name: 150 * as_float(getattr(problem, name).array) for name in "qkv"}
    run_and_check(set_values(problem, **values), stream)


@pytest.mark.parametrize("value", [1e-30, 1e30])
@pytest.mark.parametrize("case", [FP8_SOME[0], FP8_SOME[3], FP8_DECODE_SOME[1]], ids=str)
def test_descales_far_from_one(case, value, stream):
    """O in BF16 holds what FP32 holds."""
    descale = fixed(q=1 / value, k=value, v=value)
    run_and_check(make_problem(replace(case, out_dtype="bf16"), descale=descale), stream)


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("case", FP8_FEW + FP8_DECODE_SOME[:1], ids=str)
def test_descales_of_zero(case, name, stream):
    """Of one head in two: as zeros in its values. Masked scores stay masked, and O is the mean of V, or 0."""
    problem = make_problem(case, descale=per_batch_and_head)
    problem.descales[f"{name}_descale"].array[:, ::2] = 0
    v = np.random.default_rng(1).integers(-4, 5, problem.v.array.shape) / 4  # sums up exactly
    run_and_check(set_values(problem, v=v), stream)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("out_dtype", FP8_OUT_DTYPES)
def test_packed_sequences_with_one_scale_of_a_tenth(out_dtype, is_causal, stream):
    """256, 512 and 128 tokens, 16 heads, head_dim 128: a common call."""
    lengths = (256, 512, 128)
    case = Case(FP8, 128, is_causal, 16, 16, 0, 0, out_dtype=out_dtype)
    problem = packed_problem(case, Layout(lengths, lengths), descale=fixed(q=0.1, k=0.1, v=0.1))
    values = {name: 10 * as_float(getattr(problem, name).array) for name in "qkv"}
    run_and_check(set_values(problem, **values), stream)


@pytest.mark.parametrize("case", [FP8_SOME[3], FP8_DECODE_SOME[2]], ids=str)
def test_descales_are_read_when_a_graph_is_replayed(case, device):
    stream = device.create_stream()
    problem = make_problem(case, descale=spaced)
    graph = captured(problem, stream)
    for factor in (1.0, 0.5, 1.5):
        for tensor in problem.descales.values():
            tensor.array[...] *= np.float32(factor)
        replay(problem, graph, {}, stream)
