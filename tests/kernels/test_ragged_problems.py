"""The ragged batches of the GPU tests are what they say: the cache or pages on the device hold the packed keys that
results are judged by, and nothing else but NaN."""

from dataclasses import replace
from types import SimpleNamespace

import images
import numpy as np
import pytest
from cases import Case
from ragged_problems import POOLS, Ragged, RaggedProblem
from score_inputs import score_options

from fa3_cute import explain
from fa3_cute.contract.reference import as_float, attention_reference

CASE = Case("bf16", 64, True, 4, 2, 0, 0)
BATCH = Ragged(CASE, (1, 3, 0, 2), (70, 5, 0, 33))
SCORES = {"softcap": 2.0, "sinks": (0.5, -1.0), "alibi": "sequences", "attention_chunk": 40}
WINDOWED = replace(BATCH, case=replace(CASE, is_causal=False, window=(20, 0)))
RAGGED = {
    **{layout: replace(BATCH, layout=layout) for layout in POOLS},
    "page size 1": replace(BATCH, page_size=1),
    "cache": replace(BATCH, page_size=0),
    "rows": replace(BATCH, rows=(3, 1, 0, 1)),
    "cache rows": replace(BATCH, page_size=0, rows=(3, 1, 0, 1)),
    "shared": replace(BATCH, keys=(70, 37, 32, 33), shared=2),
    "capacity": replace(BATCH, keys=(2**31 - 1, 5, 0, 65), capacity=64, stale=2**31 - 1),
    "padding": replace(BATCH, total_q=30, fields={"zero_padding": True}),
    "rest": replace(BATCH, total_q=30),
    "dense queries": replace(BATCH, is_packed=False),
    "window": WINDOWED,
    "scores": replace(BATCH, case=replace(CASE, **SCORES)),
    "scores of rows": replace(BATCH, case=replace(CASE, **SCORES), page_size=0, rows=(3, 1, 0, 1)),
    "left padding": replace(BATCH, leftpad=(65, 2, 3, 40)),
    "cache left padding": replace(BATCH, page_size=0, is_packed=False, leftpad=(65, 2, 3, 40)),
    "FP8": replace(BATCH, case=replace(CASE, dtype="fp8_e4m3", out_dtype="bf16"), layout="odd"),
}


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    """Memory that is nowhere."""
    monkeypatch.setattr(images.cuda, "allocate", lambda nbytes: SimpleNamespace(handle=0x7F00_0000_0000, size=nbytes))
    for name in ("upload", "fill"):
        monkeypatch.setattr(images.cuda, name, lambda *args, **options: None)


def same(problem) -> None:
    """The reference of what is on the device is that of the packed keys."""
    ragged, options = problem.ragged, problem.problem.options
    q, lengths = problem.q.array, {name: tensor.array for name, tensor in problem.lengths.items()}
    if not ragged.is_packed:
        q = q.reshape(problem.batch, -1, *q.shape[1:])
    own = {"causal": ragged.case.is_causal, "window_size": ragged.case.window, **lengths}
    if problem.table is not None:
        own["page_table"] = problem.table.array[:, :-1]
    own |= score_options(ragged.case, problem.scores)
    own["zero_padding"] = ragged.fields.get("zero_padding", False)
    out, lse = attention_reference(q, problem.k.array, problem.v.array, **own)
    if not ragged.is_packed:
        out, lse = out.reshape(problem.q.array.shape), lse.swapaxes(0, 1).reshape(lse.shape[1], -1)
    wanted, wanted_lse = attention_reference(*problem.problem.inputs, **options)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)


@pytest.mark.parametrize("ragged", RAGGED.values(), ids=RAGGED.keys())
def test_the_device_holds_the_packed_keys(ragged):
    problem = RaggedProblem(ragged)
    assert explain(problem.params()) == []
    same(problem)
    used = {"rows": 70 + 33, "scores of rows": 70 + 33, "shared": 32 + 38 + 5 + 1, "capacity": 64 + 5 + 64}
    used["left padding"] = 5 + 3
    name = next(name for name, other in RAGGED.items() if other is ragged)
    expected = used.get(name.removeprefix("cache "), 108)
    assert np.isfinite(as_float(problem.k.array)).all(axis=(2, 3)).sum() == expected
    problem.fill(ragged.queries, (16,) * 4 if ragged.shared == 0 else (40,) * 4)
    same(problem)


CHUNKED = replace(BATCH, case=replace(CASE, attention_chunk=32))


@pytest.mark.parametrize(
    ("ragged", "seen"), [(WINDOWED, (20 + 1, 5, 0, 20 + 2)), (CHUNKED, (70 - 64, 5, 0, 33))], ids=["window", "chunk"]
)
def test_evicted_pages_hold_nothing(ragged, seen):
    """What no query of a sequence sees is NaN; the packed keys have a value there, which no query sees."""
    problem = RaggedProblem(ragged, is_evicted=True)
    same(problem)
    assert np.isfinite(as_float(problem.k.array)).all(axis=(2, 3)).sum() == sum(seen)


@pytest.mark.parametrize("b", [0, 1, 3])
def test_one_alone_has_the_same_values(b):
    problem = RaggedProblem(BATCH)
    alone = problem.alone(b)
    same(alone)
    wanted = problem.sequence(b, *attention_reference(*problem.problem.inputs, **problem.problem.options))
    for found, expected in zip(
        attention_reference(*alone.problem.inputs, **alone.problem.options), wanted, strict=True
    ):
        np.testing.assert_array_equal(found, expected)
