"""The benchmark of decode steps that append, and of head dims: good calls, every part of a step is checked, K and V are
what they were before the next case, the peer fa3, what is concluded and rendered."""

import json
import sys
from argparse import ArgumentParser
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from fake_append import AppendingGpu

from fa3_cute.cli import bench, main, peers, results
from fa3_cute.cli import case as case_module
from fa3_cute.cli.case import Case
from fa3_cute.cli.features import arrays_of
from fa3_cute.cli.suites import append, dims
from fa3_cute.contract.reference import attention_reference, to_bits
from fa3_cute.contract.status import Status
from fa3_cute.planning.operations import problems

STEP = Case("bf16", 64, False, 1, 96, 3, 4, 2, lengths_k=(96,) * 3, page_size=0, label="3x96", l2="warm")


def parsed(*argv: str):
    parser = ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(argv)


def params_of(case: Case):
    pointers = dict.fromkeys(("q", "k", "v", "out", *case.index_shapes(), *arrays_of(case)), 1 << 20)
    return case_module.Tensors.params(SimpleNamespace(pointers=lambda case, kv_set: dict(pointers)), case)


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [append, dims])
@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3"])
def test_every_case_is_a_good_call(suite, dtype):
    cases = suite.cases(parsed("--dtype", dtype))
    assert len({case.name for case in cases}) == len(cases) >= 9
    for case in cases:
        assert problems(params_of(case)) == [] and case.head_dim in bench.served(case), case.name


def test_steps_stand_beside_the_same_without():
    cases = append.cases(parsed())
    assert len(cases) == 24 and len({case.group for case in cases}) == 12
    for without, step in zip(cases[::2], cases[1::2], strict=True):
        assert replace(step, scores=append.WITHOUT) == without and step.nbytes == without.nbytes
        assert (without.index("seqused_k") == without.seqlen_k).all()
        assert (step.index("seqused_k") == step.seqlen_k - 1).all()
        params = params_of(step)
        assert (params.seqlen_knew, params.rotary_dim, params.rotary_positions) == (1, 128, step.seqlen_k)
        assert bool(params.page_table) == bool(step.page_size) and params.seqlen_k == step.seqlen_k
    assert {case.scores.rotary for case in append.cases(parsed("--dtype", "fp8_e4m3"))} == {False}
    assert append.cases(parsed("--head-dim", "64"))[0].name == "bf16 d64 full h16:2 1x4096 contiguous warm without"


def test_dims():
    cases = dims.cases(parsed())
    deepseek = [case for case in cases if case.head_dim == 192]
    assert [(case.dims, case.mask, case.seqlen_q) for case in deepseek] == [
        ("192:128", "causal", 4096),
        ("192:128", "causal", 16384),
    ]
    (first, _) = deepseek
    assert first.q_shape[:-1] == first.out_shape[:-1] and first.out_shape[-1] == first.v_shape[-1] == 128
    assert params_of(first).head_dim_v == 128
    whole = replace(first, head_dim_v=0)
    assert first.flops == whole.flops * 320 / 384 and first.nbytes == whole.nbytes * 320 / 384
    assert first.kv_bytes == whole.kv_bytes * 320 / 384
    pairs = [(one.head_dim, two.head_dim) for one, two in pairwise(cases) if one.group and one.group == two.group]
    assert pairs == [(96, 80)] * 4 + [(128, 112)] * 4
    for dtype in ("fp8_e4m3", "bf16"):
        *_, decode = dims.cases(parsed("--dtype", dtype))
        assert decode.is_decode and 1.0e9 < decode.kv_bytes < 1.1e9


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(append, "STEPS", ((3, 96), (2, 64)))
    monkeypatch.setattr(append, "HEADS", ((4, 2),))
    monkeypatch.setattr(append, "PAGES", (0, 16))
    monkeypatch.setattr(append, "HEAD_DIM", 64)
    monkeypatch.setattr(case_module, "COLD_BYTES", 200_000)
    for module in (case_module, results):
        monkeypatch.setattr(module, "COPIED_BYTES", 300_000)
    return AppendingGpu(monkeypatch)


def test_bench_from_end_to_end(fake, tmp_path, capsys):
    """Each case finds K and V as they were, whatever calls before it have appended."""
    file = tmp_path / "rows.json"
    assert main(["bench", "--suite", "append", "--rounds", "2", "--batch-ms", "2", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert [row["case"]["scores"] for row in written["rows"]] == ["without", "append, rotary"] * 4
    for row in written["rows"]:
        assert row["errors"][bench.OURS] < 5e-3, row["name"]
        assert row["results"][bench.OURS]["of_first"] == pytest.approx(1)
    assert written["conclusions"][0] == (
        "bf16 d64 full h4:2 3x96 contiguous warm append, rotary: +0.00 us, 1.000x the time of the same step without, "
        "0 MB of K and V"
    )
    capsys.readouterr()
    assert main(["report", str(file)]) == 0
    said = capsys.readouterr().out
    assert "\n| BF16 | 64 | 4:2 | 3x96 | page 16 | append, rotary | " in said


@pytest.mark.parametrize("left_out", ["key", "values", "rotary"])
@pytest.mark.parametrize("page_size", [0, 16])
def test_a_step_that_leaves_something_out_is_wrong(left_out, page_size, fake):
    """Among thousands of keys as well as among a few."""
    seqlen = 2048
    step = replace(STEP, seqlen_k=seqlen, lengths_k=(seqlen,) * 3, page_size=page_size)
    _, case = append.problem(step, (append.WITHOUT, append.ROTATED))
    tensors = case_module.Tensors([case], fake.gpu.stream)
    for fake.left_out, is_right in (("", True), (left_out, False)):
        tensors.poison_out()
        assert fake.forward(tensors.params(case), 1) is Status.OK
        assert (tensors.error_of(case) < bench.limit("bf16", bench.OURS)) == is_right


def test_values_of_fewer_columns(fake):
    """O is as wide as V; a call that reads V as wide as K is wrong."""
    case = Case("bf16", 64, True, 40, 40, 2, 4, 2, head_dim_v=32)
    tensors = case_module.Tensors([case], fake.gpu.stream)
    for columns, is_right in ((32, True), (64, False)):
        tensors.poison_out()
        p = tensors.params(case)
        q, k = (fake.gpu.read(pointer, shape) for pointer, shape in ((p.q, case.q_shape), (p.k, case.kv_shape)))
        v = fake.gpu.read(p.v, (*case.kv_shape[:-1], columns))[..., :32]
        out = to_bits(causal(q, k, v), "bf16")
        fake.gpu.buffers[p.out >> 32].bytes[: out.nbytes] = out.reshape(-1).view(np.uint8)
        assert (tensors.error_of(case) < 5e-3) == is_right


def causal(q, k, v):
    return attention_reference(q, k, v, causal=True)[0]


# ---- FA3 -------------------------------------------------------------------------------------------------------------

POINTERS = {name: name for name in ("q", "k", "v", "out", "seqused_k", "k_new", "v_new", "rotary_cos", "rotary_sin")}


@pytest.fixture
def fa3(monkeypatch):
    """FA3's module: its calls over a cache."""
    fake = SimpleNamespace(
        calls=[],
        flash_attn_func=None,
        flash_attn_varlen_func=None,
        flash_attn_with_kvcache=lambda q, k_cache, v_cache, **options: fake.calls.append(
            ((q, k_cache, v_cache), options)
        ),
    )
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", fake)
    monkeypatch.setattr(peers.metadata, "version", lambda name: "0")
    monkeypatch.setattr(peers, "view", lambda pointer, shape, dtype: (pointer, tuple(shape), dtype))
    return fake


def test_fa3_appends_as_we_do(fa3):
    without, step = append.problem(STEP, (append.WITHOUT, append.ROTATED))
    peers.load("fa3").launch(step, POINTERS)
    peers.load("fa3").launch(without, POINTERS)
    (tensors, options), (same, fewer) = fa3.calls
    assert tensors == same == (("q", (3, 1, 4, 64), "bf16"), *((name, (3, 96, 2, 64), "bf16") for name in "kv"))
    assert options.pop("k") == ("k_new", (3, 1, 2, 64), "bf16") and options.pop("v")[0] == "v_new"
    for name in ("rotary_cos", "rotary_sin"):
        assert options.pop(name) == (name, (96, 32), "bf16")
    assert options.pop("rotary_interleaved") is False
    assert options == fewer == {"cache_seqlens": ("seqused_k", (3,), "int32"), "causal": False, "num_splits": 0}


def test_fa3_without_that_function_is_left_out(fa3):
    del fa3.flash_attn_with_kvcache
    _, step = append.problem(STEP, (append.WITHOUT, append.ROTATED))
    with pytest.raises(peers.PeerMissing, match="^fa3 has no append, no rotary$"):
        peers.load("fa3").launch(step, POINTERS)


# ---- what is concluded -----------------------------------------------------------------------------------------------


def test_conclusions_of_steps():
    cases = append.problem(STEP, (append.WITHOUT, append.ROTATED))
    fa3 = {"host_bound": False, "ratio": 1.25}
    ours = {"of_first": 1.25}
    rows = [{"name": case.name, "case": {}, "results": {bench.OURS: ours, "fa3": fa3}} for case in cases]
    assert append.conclusions({cases[0]: 0.005, cases[1]: 0.0062}, rows) == [
        "slower than the better peer in none of 2 rows",
        f"{cases[1].name}: +1.20 us, 1.250x the time of the same step without, 0 MB of K and V, 0.800x the time of fa3",
    ]


def test_conclusions_of_dims():
    cases = dims.cases(parsed())
    results = {"of_first": 0.875, "of_copy": 0.9}
    rows = [{"name": case.name, "case": {}, "results": {bench.OURS: results}} for case in cases]
    lines = dims.conclusions(dict.fromkeys(cases, 1.0), rows)
    assert lines[0] == "bf16 d80 full h16 4x4096: 0.875x the time of head_dim 96" and len(lines) == 8 + 1
    assert lines[-1].endswith("1.07 GB of K and V, at 90.0% of the bandwidth of a copy on the device")


def test_cells_of_dims():
    """What was not measured is a dash."""
    result = {"ms": 1.0, "tflops": 500.0, "host_bound": False}
    assert [text(result) for _, _, text in dims.SHOWN.markdown] == ["1000.0", "500.0", "-", "-", "-"]
    result |= {"of_first": 0.5, "gbs": 4000.0, "of_copy": 0.85}
    assert [text(result) for _, _, text in dims.SHOWN.markdown][2:] == ["0.500", "4000", "85%"]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_bench_runs_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(append, "HEADS", ((16, 2),))
    monkeypatch.setattr(append, "STEPS", ((2, 1024),))
    file = tmp_path / "rows.json"
    assert main(["bench", "--suite", "append", "--rounds", "1", "--batch-ms", "2", "--json", str(file)]) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert row["errors"][bench.OURS] < bench.limit("bf16", bench.OURS) and row["results"][bench.OURS]["gbs"] > 0
