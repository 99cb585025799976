"""New keys and values in an FP8 cache with 16-bit queries, on the GPU: quantised, rotated and quantised, or copied."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8
from test_append_gpu import DECODE, PAGED, PREFILL, RAGGED, fresh, run
from test_decode_graph_gpu import captured
from updates import UpdateProblem

from fa3_cute import forward, warmup

pytestmark = pytest.mark.gpu

HALVES = {"rotary": "halves", "table_dtype": "bf16", "rotary_dim": 128}
NEIGHBOURS = {"rotary": "neighbours", "starts": (9, 560, 0, 300)}


@pytest.mark.parametrize(
    "update",
    [
        replace(DECODE, **HALVES),
        replace(RAGGED, page_size=16),
        replace(PREFILL, **NEIGHBOURS),
        replace(PAGED, is_new_stored=True),
        replace(PAGED, **NEIGHBOURS, head_dim=64, dtype="fp16", new=None),
    ],
    ids=["decode", "ragged", "prefill", "copied", "queries alone"],
)
def test_updates(update, stream):
    run(replace(update, kv_dtype=FP8), stream)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_value(dtype, stream):
    """All 65,536 numbers of 16 bit, by descales for which quotients are ties, tiny or huge; values as they are."""
    update = replace(DECODE, kv_dtype=FP8, dtype=dtype, old=(0, 0, 0), new=(256,) * 3, queries=(1,) * 3)
    problem = UpdateProblem(update)
    arrays = problem.arrays
    for name in ("k_new", "v_new"):
        arrays[name] = np.broadcast_to(
            np.arange(1 << 16, dtype=np.uint16).reshape(256, 2, 128).view(arrays[name].dtype), arrays[name].shape
        ).copy()
    arrays["k_descale"][:] = (1.0, 2.0**-126), (7 / 64, 3.3e-5), (1e30, 17.3)
    arrays["v_descale"][:] = np.nan  # which nobody reads
    problem.upload(stream)
    forward(problem.params(v_descale_ptr=None, v_descale_batch_stride=0, v_descale_head_stride=0), stream).check()
    found = problem.results(stream)
    arrays["v_descale"][:] = 1
    _, _, (k, v) = problem.expected_caches()
    assert np.array_equal(found["k"], k) and np.array_equal(found["v"], v)


def test_a_graph_of_steps(device):
    """Captured once, replayed with other lengths and descales, which are read on the device."""
    stream = device.create_stream()
    update = replace(PAGED, kv_dtype=FP8, **HALVES)
    problem = UpdateProblem(update)
    problem.upload(stream)
    warmup(problem.params(), stream).check()
    graph = captured(stream, problem.params())
    for seed, old in enumerate(((0, 5, 511, 300), (0, 500, 1, 64))):
        problem = fresh(problem, replace(update, old=old, seed=seed), stream)
        graph.launch(stream)
        problem.check(problem.results(stream))
