"""merge_attention on the GPU against the reference: types, head dims, layouts, rows that saw no key, in place."""

import math
from itertools import product

import numpy as np
import pytest
from merges import MergeProblem, Strided, assert_merged, make_merge, rows_of_all

from fa3_cute import FlashAttentionParams, forward, merge_attention, warmup
from fa3_cute.arrays import memory as cuda
from fa3_cute.contract.reference import attention_reference

pytestmark = pytest.mark.gpu

TYPES = list(product(("fp16", "bf16", "fp32"), repeat=2))
SAME = [pair for pair in TYPES if pair[0] == pair[1]]
HEAD_DIMS = (8, 40, 64, 96, 128, 192, 256, 264, 512)
LAYOUTS = {"rows first": ("brh", "bhr"), "heads first": ("bhr", "brh"), "batch innermost": ("rhb", "hrb")}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_types_and_head_dims(types, head_dim, stream):
    """A hundred rows of 2 x 3 heads: several CTAs, the last one not full."""
    problem = make_merge((2, 100, 3, head_dim), types, stream, seed=head_dim)
    assert_merged(problem.run(), problem.expected(), types[1])


@pytest.mark.parametrize("pad", [0, 8])
@pytest.mark.parametrize("orders", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("types", [("bf16", "bf16"), ("fp32", "fp16")], ids="-".join)
def test_layouts(types, orders, pad, stream):
    """Nothing outside of the rows is written; what lies between them is NaN."""
    problem = make_merge((3, 50, 5, 64), types, stream, orders, pad)
    assert_merged(problem.run(), problem.expected(), types[1])


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (1, 6, 1, 64), (7, 1, 3, 128), (1, 5000, 8, 64)], ids=str)
def test_few_rows_and_many(shape, stream):
    """One row alone is without keys in a; 40,000 are more CTAs than run at once."""
    problem = make_merge(shape, ("fp16", "fp16"), stream)
    assert_merged(problem.run(), problem.expected(), "fp16")


def test_base_2(stream):
    problem = make_merge((2, 100, 3, 64), ("bf16", "bf16"), stream, lse_base=2.0)
    found = problem.run()
    assert_merged(found, problem.expected(), "bf16")
    problem.lse_base = math.e
    assert np.abs(problem.expected()[1][:, 5:] - found[1][:, 5:]).max() > 0.01, "the base would not matter"


def test_parts_of_unlike_layouts(stream):
    """A prefix's results of packed rows beside those of a batch of single queries, as a cascade has them."""
    batch, heads, head_dim = 100, 6, 128
    problem = make_merge((batch, 1, heads, head_dim), ("bf16", "bf16"), stream)
    lse = problem.lse_a.array.copy()  # all rows saw no key in a: the first row of each batch entry did not
    lse[1:] = 1.5
    problem.lse_a = Strided(lse, (1, 1, batch), "fp32", stream)  # [heads, all rows]
    values = np.random.default_rng(1).standard_normal((batch, 1, heads, head_dim))
    problem.out_a = Strided(values, rows_of_all(values.shape, "bhr", 8), "bf16", stream)
    assert_merged(problem.run(), problem.expected(), "bf16")


@pytest.mark.parametrize("types", SAME, ids="-".join)
def test_what_saw_no_key_changes_nothing(types, stream):
    """The other part comes out as it is, bit for bit."""
    problem = make_merge((2, 100, 3, 96), types, stream)
    problem.lse_a.array[...] = -np.inf
    problem.lse_b.array[...] = np.random.default_rng(2).standard_normal(problem.lse_b.array.shape) * 30
    problem.out_b.array[:, 1:3] = problem.out_b.array[:, 3:5]  # instead of NaN
    problem.out_a.array[...] = problem.out_a.array[0, 0, 0, 0]  # NaN
    for tensor in (problem.lse_a, problem.lse_b, problem.out_a, problem.out_b):
        tensor.upload()
    out, lse = problem.run()
    assert np.array_equal(out, problem.out_b.array)
    np.testing.assert_allclose(lse, problem.lse_b.array, rtol=0, atol=1e-6)


def test_without_lse(stream):
    problem = make_merge((2, 100, 3, 64), ("bf16", "bf16"), stream)
    expected, poison = problem.expected(), problem.lse.array.copy()
    out, lse = problem.run(lse=None)
    assert np.array_equal(lse, poison, equal_nan=True), "written"
    assert_merged((out, expected[1]), expected, "bf16")


def test_nan_in_an_lse_is_seen(stream):
    problem = make_merge((1, 20, 2, 64), ("fp16", "fp16"), stream)
    problem.lse_b.array[:, 7] = np.nan
    problem.lse_b.upload()
    out, lse = problem.run()
    assert np.isnan(out[:, 7]).all() and np.isnan(lse[:, 7]).all()
    is_rest = np.arange(20) != 7
    assert np.isfinite(out[:, is_rest]).all() and not np.isnan(lse[:, is_rest]).any()


@pytest.mark.parametrize("head_dim", [64, 96, 264])
@pytest.mark.parametrize("types", SAME, ids="-".join)
@pytest.mark.parametrize("part", "ab")
def test_in_place(part, types, head_dim, stream):
    """out and lse lie over a part and its LSE: the bits that two places give. Rows of 96 and 264 cross warps."""
    problem = make_merge((1, 3000, 8, head_dim), types, stream)
    apart = problem.run()
    assert_merged(apart, problem.expected(), types[1])
    problem.out, problem.lse = getattr(problem, f"out_{part}"), getattr(problem, f"lse_{part}")
    out, lse = problem.run()
    assert np.array_equal(out, apart[0]) and np.array_equal(lse, apart[1])


def test_rows_beyond_four_gigabytes(device, stream):
    """The second batch entry of a part lies 2^31 + 64 elements behind the first one."""
    shape, stride = (2, 4, 3, 64), 2**31 + 64
    problem = make_merge(shape, ("fp16", "fp16"), stream)
    entry = problem.out_a.array[0].nbytes
    far = cuda.allocate(2 * stride + entry, stream=stream)
    for index in range(2):
        cuda.upload(problem.out_a.array[index], cuda.window(far, 2 * stride * index, entry), stream=stream)
    found = problem.run(out_a=int(far.handle), out_a_batch_stride=stride)
    assert_merged(found, problem.expected(), "fp16")


# ---- order ----------------------------------------------------------------------------------------------------------


def test_a_captured_merge_is_replayed(device):
    stream = device.create_stream()
    problem = make_merge((2, 100, 3, 128), ("bf16", "fp32"), stream)
    params = problem.params()
    warmup(params, stream).check()
    builder = stream.create_graph_builder().begin_building()
    merge_attention(params, builder).check()
    graph = builder.end_building().complete()
    assert np.isnan(problem.out.result()).all(), "the capture launched something"
    for seed in range(3):
        other = make_merge((2, 100, 3, 128), ("bf16", "fp32"), stream, seed=seed)
        for name in ("out_a", "lse_a", "out_b", "lse_b"):
            getattr(problem, name).array[...] = getattr(other, name).array
            getattr(problem, name).upload()
        graph.launch(stream)
        assert_merged((problem.out.result(), problem.lse.result()), problem.expected(), "fp32")


def test_three_parts_one_after_the_other(stream):
    """A merge reads what the one before it on the stream wrote, in place: twenty times, each time anew."""
    first = make_merge((1, 3000, 8, 128), ("fp32", "fp32"), stream)
    second = make_merge((1, 3000, 8, 128), ("fp32", "fp32"), stream, seed=1)
    chained = MergeProblem(first.out, first.lse, second.out_b, second.lse_b, first.out, first.lse)
    first.run()
    middle_out, middle_lse = first.expected()
    first.out.array[...], first.lse.array[...] = middle_out, middle_lse
    expected = chained.expected()
    bits = None
    for _ in range(20):
        first.out.poison()
        first.lse.poison()
        merge_attention(first.params(), stream).check()
        merge_attention(chained.params(), stream).check()
        found = chained.out.result(), chained.lse.result()
        assert_merged(found, expected, "fp32")
        bits = bits or found
        assert np.array_equal(found[0], bits[0]) and np.array_equal(found[1], bits[1])


@pytest.mark.parametrize("rows", [1, 300])
def test_parts_of_forward_are_the_whole(rows, stream):
    """Two calls over disjoint keys and their merge, against one over all keys; with one query decode's kernel, whose
    end a merge that starts early has to wait for."""
    heads, head_dim, cut, keys = 8, 128, 700, 1000
    rng = np.random.default_rng(3)
    q = rng.standard_normal((2, rows, heads, head_dim), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, 2, keys, heads, head_dim), np.float32).astype(np.float16)
    problem = make_merge((2, rows, heads, head_dim), ("fp16", "fp16"), stream)
    q_gpu = cuda.upload(q, stream=stream)
    calls = []
    for name, rows_of_k in (("a", slice(cut)), ("b", slice(cut, None))):
        part = [cuda.upload(x[:, rows_of_k], stream=stream) for x in (k, v)]
        call = FlashAttentionParams(
            q=int(q_gpu.handle),
            k=int(part[0].handle),
            v=int(part[1].handle),
            out=int(getattr(problem, f"out_{name}").buffer.handle),
            softmax_lse=int(getattr(problem, f"lse_{name}").buffer.handle),
            batch_size=2,
            seqlen_q=rows,
            seqlen_k=k[:, rows_of_k].shape[1],
            num_heads=heads,
            num_heads_k=heads,
            head_dim=head_dim,
        )
        calls.append((call, part))  # the parts live as long as their call
    whole_out, whole_lse = attention_reference(q, k, v)
    for _ in range(20):
        for tensor in (problem.out_a, problem.lse_a, problem.out_b, problem.lse_b, problem.out, problem.lse):
            tensor.poison()
        for call, _part in calls:
            forward(call, stream).check()
        out, lse = problem.run()
        # Each part is rounded to FP16, and so is their merge; values are below 1.
        np.testing.assert_allclose(out.astype(np.float64), whole_out, rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(lse.swapaxes(1, 2), whole_lse, rtol=0, atol=1e-3)
