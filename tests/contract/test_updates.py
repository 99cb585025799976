"""The check that the GPU tests of new keys and rotary positions make: the reference's results pass, mistakes do not."""

import numpy as np
import pytest
from updates import Update, UpdateProblem, bits

from fa3_cute.contract.reference import attention_reference, to_bits

RAGGED = Update(
    new=(2, 0, 3, 7), packs_new=True, queries=(2, 5, 1, 7), packs_queries=True, page_size=64, is_indexed=True,
    rotary="halves",
)  # fmt: skip
UPDATES = [
    Update(),
    Update(dtype="fp8_e4m3", page_size=64),
    RAGGED,
    Update(rotary="neighbours", dtype="fp16", table_dtype="fp16", starts=(9, 560, 0, 3), is_causal=False),
    Update(kv_dtype="fp8_e4m3", page_size=64, is_indexed=True),
    Update(kv_dtype="fp8_e4m3", rotary="halves"),
    Update(kv_dtype="fp8_e4m3", is_new_stored=True),
]


def computed(problem: UpdateProblem) -> dict:
    q, options, (k, v) = problem.expected_caches()
    out, lse = attention_reference(q, k, v, **options)
    return {"k": k, "v": v, "out": out_bits(problem, out), "lse": lse.astype(np.float32)}


def out_bits(problem: UpdateProblem, out):
    return to_bits(out, "fp16" if problem.update.dtype == "fp16" else "bf16")


@pytest.mark.parametrize("update", UPDATES)
def test_right_results_pass(update):
    problem = UpdateProblem(update)
    problem.check(computed(problem))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("mistake", ["k", "v", "old", "out", "lse"])
def test_mistakes_are_found(update, mistake):
    problem = UpdateProblem(update)
    found = computed(problem)
    if mistake in "kv":  # the last element that is written
        given, made = bits(problem.arrays[mistake]), bits(found[mistake])
        place = tuple(np.argwhere(made != given)[-1])
        made[place] = given[place]
    elif mistake == "old":
        bits(found["k"]).reshape(-1)[-1] ^= 1
    elif mistake == "out":  # that of the lengths before
        q, options, (k, v) = problem.expected_caches()
        old = np.maximum(problem.arrays["seqused_k"], 1)
        found["out"] = out_bits(problem, attention_reference(q, k, v, **options | {"seqused_k": old})[0])
    else:
        found["lse"] += np.float32(0.02)
    with pytest.raises(AssertionError):
        problem.check(found)
