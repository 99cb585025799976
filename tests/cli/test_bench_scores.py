"""The benchmark of scores and masks: its cases are good calls, every feature is checked, rows of a problem share their
rounds, the peer vllm has softcap and sinks."""

import json
import sys
from argparse import ArgumentParser
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import install

from fa3_cute.cli import bench, features, main, peers, report, results
from fa3_cute.cli import case as case_module
from fa3_cute.cli.case import Case
from fa3_cute.cli.features import BIAS, Feature
from fa3_cute.cli.measure import Batch, Stopwatch, Work
from fa3_cute.cli.suites import scores
from fa3_cute.contract.status import Status
from fa3_cute.planning.operations import problems

ROOT = Path(__file__).parents[2]
ARGV = ["bench", "--suite", "scores", "--rounds", "2", "--batch-ms", "2"]
FEATURES = {
    "s_aux": Feature("sinks", s_aux=True),
    "softcap": Feature("softcap", softcap=1.5),
    "score_mod": Feature("a ScoreMod", softcap=1.5, score_mod=True),
    "alibi_slopes": Feature("ALiBi", alibi_slopes=True),
    "p_dropout": Feature("dropout", p_dropout=0.3),
    "attn_mask": Feature("bias", attn_mask=BIAS),
    "boolean": Feature("boolean", attn_mask="bool"),
    "attention_chunk": Feature("chunks", attention_chunk=30),
    "mask_mod": Feature("documents", mask_mod=30),
}


def parsed(*argv: str):
    parser = ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(argv)


def params_of(case: Case):
    pointers = dict.fromkeys(("q", "k", "v", "out", *case.index_shapes(), *features.arrays_of(case)), 1 << 20)
    return case_module.Tensors.params(SimpleNamespace(pointers=lambda case, kv_set: dict(pointers)), case)


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3"])
def test_every_case_is_a_good_call(dtype):
    cases = scores.cases(parsed("--dtype", dtype))
    assert len({case.name for case in cases}) == len(cases) > 25
    for case in cases:
        assert problems(params_of(case)) == [], case.name


def test_problems_stand_together():
    """And their first rows are without."""
    groups = [(name, list(cases)) for name, cases in groupby(scores.cases(parsed()), lambda case: case.group)]
    assert len(dict(groups)) == len(groups)
    for _, (first, *_) in groups:
        assert not first.scores.asked and first.scores.name in ("without", "packed sequences")
    of_documents = [cases for _, cases in groups if cases[0].lengths]
    for cases in of_documents:
        assert len(cases) == 3 and len({case.flops for case in cases}) == 1
    assert {case.head_dim for case in scores.cases(parsed("--head-dim", "64"))} == {64}
    assert all(case.scores.pack_gqa is None for case in scores.cases(parsed("--dtype", "fp8_e4m3")))


def test_chunks_and_documents_count_what_is_seen():
    case = Case("bf16", 64, True, 120, 120, 2, 4, 2)
    chunks = replace(case, scores=Feature(attention_chunk=30))
    assert chunks.flops == case.flops / 4 and chunks.visible_flops == 4 * 4 * 64 * 2 * 4 * (30 * 31 / 2)


def test_fields_of_a_call():
    case = Case("bf16", 64, True, 96, 96, 2, 4, 2, scores=Feature("all", softcap=2.0, s_aux=True, pack_gqa=False))
    params = params_of(case)
    assert (params.softcap, params.score_mod, params.pack_gqa) == (2.0, None, False)
    params = params_of(replace(case, scores=Feature("mod", softcap=2.0, score_mod=True)))
    assert params.softcap == 0 and params.mod_scalars == (2.0, 0.5) and params.pack_gqa is None
    params = params_of(replace(case, scores=Feature("lists", mask_mod=32, block_mask=True)))
    assert params.block_mask.q_block == 128 and params.mod_pointers == (1 << 20,)


# ---- runs ------------------------------------------------------------------------------------------------------------


def options_of(gpu, p, without: str = "") -> dict:
    """What a call asks of the reference, but for one feature."""
    found = {"softcap": p.softcap, "attention_chunk": p.attention_chunk}
    if p.s_aux:
        found["s_aux"] = gpu.read(p.s_aux, (p.num_heads,))
    if p.alibi_slopes:
        found["alibi_slopes"] = gpu.read(p.alibi_slopes, (p.num_heads,), np.float32)
    if p.attn_mask:
        shape = p.batch_size, p.num_heads, p.seqlen_q, p.seqlen_k
        found["attn_mask"] = gpu.read(p.attn_mask, shape, np.uint8 if p.attn_mask_dtype is None else np.uint16)
    if p.p_dropout:
        found |= {"p_dropout": p.p_dropout, "rng_state": gpu.read(p.rng_state, (2,), np.uint64)}
    if p.score_mod:
        found["score_mod"] = p.score_mod.on_host((), p.mod_scalars)
    if p.mask_mod:
        found["mask_mod"] = p.mask_mod.on_host((gpu.read(p.mod_pointers[0], (p.seqlen_k,), np.int32),))
    if without == "p_dropout":
        found.pop("rng_state", None)
    found.pop({"boolean": "attn_mask"}.get(without, without), None)
    return found


@pytest.fixture
def fake_gpu(monkeypatch):
    """Small problems."""
    gpu = install(monkeypatch)
    gpu.options_of = lambda p: options_of(gpu, p)
    every = (scores.WITHOUT, *FEATURES.values())
    monkeypatch.setattr(scores, "PREFILLS", ((64, 4, 2, 2, 120, scores.CAUSAL, every),))
    monkeypatch.setattr(scores, "SHORT", ((64, 4, 2, 2, 40),))
    monkeypatch.setattr(scores, "DECODES", ((64, 4, 2, 2, 128),))
    monkeypatch.setattr(scores, "DOCUMENTS", (64, 2, 3, 40))
    monkeypatch.setattr(features, "DISTINCT_SCORES", 1001)
    features.mask_numbers.cache_clear()
    yield gpu
    features.mask_numbers.cache_clear()


def test_bench_from_end_to_end(fake_gpu, tmp_path, capsys):
    """Every row is checked against the reference with what it asks for."""
    file = tmp_path / "rows.json"
    assert main([*ARGV, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    names = [row["case"]["scores"] for row in written["rows"]]
    of_documents = ["packed sequences", "MaskMod, block lists", "MaskMod"]
    short = ["without", "pack_gqa=True"]
    assert names == [
        *("without", *(feature.name for feature in FEATURES.values())),
        *(*short, *of_documents, *of_documents),
        *("without", "sinks", "softcap 30"),
    ]
    for row in written["rows"]:
        assert row["errors"][bench.OURS] < 5e-3, row["name"]
        assert row["results"][bench.OURS]["of_first"] == pytest.approx(1)
    said = capsys.readouterr().out
    assert "of first" in said and "\nbf16 d64 causal h4:2 2x120 softcap " in said
    bias, boolean = written["conclusions"]
    nbytes = 2 * 2 * 4 * 120 * 121 / 2
    assert bias == (
        "bf16 d64 causal h4:2 2x120 bias: 1.000x the larger of the time without it and of reading it, "
        f"{nbytes / 1e9:.2f} GB of keys that are seen in {nbytes / 4.3e6:.0f} us"
    )
    assert boolean.startswith("bf16 d64 causal h4:2 2x120 boolean: 1.000x the larger")
    assert main(["report", str(file)]) == 0
    said = capsys.readouterr().out
    assert "In a cell" not in said
    assert "| type | head_dim | heads | sequences | mask | scores | us | TFLOP/s | of first |\n" in said
    assert "\n| BF16 | 64 | 4:2 | 2x120 | causal | ALiBi | " in said
    assert "\n| BF16 | 64 | 4:2 | 2x40 | window(39,0) | pack_gqa=True | " in said


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_that_does_nothing_is_a_wrong_result(name, fake_gpu):
    """What is checked depends on each of them."""
    case = Case("bf16", 64, True, 120, 120, 2, 4, 2, scores=FEATURES[name])
    tensors = case_module.Tensors([case], fake_gpu.stream)
    for without, is_right in (("", True), (name, False)):
        fake_gpu.options_of = lambda p, without=without: options_of(fake_gpu, p, without)
        tensors.poison_out()
        assert fake_gpu.forward(tensors.params(case), 1) is Status.OK
        assert (tensors.error_of(case) < bench.limit("bf16", bench.OURS)) == is_right


def test_masks_of_full_size_repeat_few_numbers(fake_gpu):
    """The host knows them at any place."""
    case = Case("bf16", 64, True, 50, 70, 2, 4, 2, scores=FEATURES["attn_mask"])
    tensors = case_module.Tensors([case], fake_gpu.stream)
    there = fake_gpu.read(tensors.params(case).attn_mask, (2, 4, 50, 70))
    assert np.array_equal(features.options_of(case, 1, 2, 7)["attn_mask"], there[1:, 2:3, -7:])
    assert len(set(there.reshape(-1).tolist())) > 500


def test_rows_of_a_problem_share_their_rounds(fake_gpu, monkeypatch):
    """And are compared round by round."""
    timed = []

    def rounds(self, works, rounds, batch_ms, settle_ms):
        timed.append(list(works))
        return {key: [Batch(1.0 + place, 1.0, None, None)] * 2 for place, key in enumerate(works)}

    monkeypatch.setattr(Stopwatch, "rounds", rounds)
    cases = scores.problem(Case("bf16", 64, True, 40, 40, 2, 4, 2), (scores.WITHOUT, scores.SINKS, scores.CAP_30))
    args = parsed()
    args.argv = []
    rows = bench.Bench(args, bench.open_device(), cases).rows(cases)
    assert timed == [[(case, bench.OURS) for case in cases]]
    assert [row["results"][bench.OURS]["of_first"] for row in rows.values()] == [1, 2, 3]
    assert [row["results"][bench.OURS]["ratio"] for row in rows.values()] == [1, 1, 1]


def test_a_ratio_is_the_median_over_rounds():
    mine, others = ([Batch(ms, 1.0, None, None) for ms in times] for times in ((1.0, 6.0, 9.0), (2.0, 2.0, 3.0)))
    assert results.ratio(mine, others) == 3


def test_conclusions_beside_a_peer(fake_gpu):
    """What a feature costs both; the first row costs nothing."""
    first, sinks, _ = scores.problem(
        Case("bf16", 64, True, 96, 96, 2, 4, 2), (scores.WITHOUT, scores.SINKS, scores.CAP_30)
    )
    ours, theirs = {"of_first": 1.01, "host_bound": False}, {"of_first": 1.25, "host_bound": False, "ratio": 1.5}
    rows = [
        {"name": first.name, "case": {}, "results": {bench.OURS: ours | {"of_first": 1.0}, "vllm": theirs}},
        {"name": sinks.name, "case": {}, "results": {bench.OURS: ours, "vllm": theirs}},
    ]
    assert scores.conclusions({first: 1.0, sinks: 1.01}, rows) == [
        "slower than the better peer in none of 2 rows",
        "bf16 d64 causal h4:2 2x96 sinks: 1.010x the time of the first row, 1.250x of vllm",
    ]


def test_the_section_of_a_document():
    """Is a place of its own in docs/performance.md."""
    document = (ROOT / "docs" / "performance.md").read_text()
    written = report.updated(document, [("scores", "a new table")])
    begin, end = (f"<!-- performance of scores: {line} -->" for line in ("begin", "end"))
    assert f"{begin}\na new table\n{end}" in written
    assert report.replaced(written, "", begin, end) == report.replaced(document, "", begin, end)


# ---- vLLM ------------------------------------------------------------------------------------------------------------


class View:
    """A torch tensor, as far as the peer uses one."""

    def __init__(self, pointer, shape, dtype=""):
        self.pointer, self.shape, self.dtype = pointer, shape, dtype

    def flatten(self, first, last):
        merged = int(np.prod(self.shape[first : last + 1]))
        return View(self.pointer, (*self.shape[:first], merged, *self.shape[last + 1 :]))

    def unflatten(self, dim, sizes):
        assert dim == 0 and sizes[0] == -1
        return View(self.pointer, (self.shape[0] // sizes[1], sizes[1], *self.shape[1:]))

    def float(self):
        return self


class Numbers(np.ndarray):
    """Indices as a torch tensor."""

    def view(self, *sizes):
        return self.reshape(*sizes) if isinstance(sizes[0], tuple) else super().view(*sizes)


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's package: its calls."""
    fake = SimpleNamespace(calls=[], metadata=[])
    interface = SimpleNamespace(
        get_scheduler_metadata=lambda **options: fake.metadata.append(options) or "metadata",
        flash_attn_varlen_func=lambda **options: fake.calls.append(options),
    )
    torch = SimpleNamespace(
        __version__="2",
        bfloat16="bfloat16",
        int32=np.int32,
        empty=lambda shape, dtype, device: View("out", shape, dtype),
        arange=lambda *limits, dtype, device: np.arange(*limits, dtype=dtype).view(Numbers),
        full=lambda shape, value, dtype, device: np.full(shape, value, dtype).view(Numbers),
    )
    for name, module in {
        "torch": torch,
        "vllm_flash_attn": SimpleNamespace(flash_attn_interface=interface),
        "vllm_flash_attn.flash_attn_interface": interface,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "view", View)
    monkeypatch.setattr(peers, "is_repeatable", lambda launch, right: True)
    monkeypatch.setattr(peers, "capture", lambda launch, calls: Work(launch, calls))
    return fake


POINTERS = {name: name for name in ("q", "k", "v", "out", "cu_seqlens", "s_aux")}
DENSE = Case("bf16", 64, False, 256, 256, 3, 8, 2, window=(127, 0), scores=Feature("sinks", s_aux=True))


def launched(vllm, case: Case) -> dict:
    """The last of the calls; O has the case's shape."""
    launch = peers.load("vllm").launch(case, POINTERS)
    assert launch().shape == case.q_shape
    return vllm.calls[-1]


def test_vllm_gets_dense_problems_packed(vllm):
    call = launched(vllm, DENSE)
    shapes = {name: (call[name].pointer, call[name].shape) for name in ("q", "k", "v", "out", "s_aux")}
    keys = 768, 2, 64
    assert shapes == {
        "q": ("q", (768, 8, 64)),
        "k": ("k", keys),
        "v": ("v", keys),
        "out": ("out", (768, 8, 64)),
        "s_aux": ("s_aux", (8,)),
    }
    assert call["s_aux"].dtype == "bf16" and call["softcap"] == 0 and call["window_size"] == [127, 0]
    assert call["cu_seqlens_q"].tolist() == call["cu_seqlens_k"].tolist() == [0, 256, 512, 768]
    assert "block_table" not in call and "seqused_k" not in call and not vllm.metadata


def test_vllm_gets_packed_sequences_as_they_are(vllm):
    call = launched(vllm, Case("bf16", 64, True, 40, 40, 2, 8, 2, lengths=(3, 40), label="3+40"))
    assert call["q"].shape == (43, 8, 64) and call["k"].shape == (43, 2, 64) and "s_aux" not in call
    assert call["cu_seqlens_q"].pointer == call["cu_seqlens_k"].pointer == "cu_seqlens"


def test_vllm_decodes_over_pages_in_their_order(vllm):
    case = Case("bf16", 64, False, 1, 512, 3, 8, 2, scores=Feature("softcap", softcap=30.0))
    call = launched(vllm, case)
    assert call["q"].shape == (3, 8, 64) and call["k"].shape == call["v"].shape == (12, 128, 2, 64)
    assert call["block_table"].tolist() == np.arange(12).reshape(3, 4).tolist()
    assert call["seqused_k"].tolist() == [512] * 3 and call["cu_seqlens_q"].tolist() == [0, 1, 2, 3]
    assert call["softcap"] == 30 and call["scheduler_metadata"] == "metadata"
    (metadata,) = vllm.metadata
    assert metadata["has_softcap"] is True and metadata["page_size"] == 128
    with pytest.raises(peers.PeerMissing, match="^vllm decodes in pages of 128 tokens here$"):
        launched(vllm, replace(case, seqlen_k=500))


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in ("softcap", "s_aux")])
def test_vllm_is_left_out_where_it_lacks_a_feature(name, vllm):
    lacking = sorted(FEATURES[name].asked - {"softcap"})
    with pytest.raises(peers.PeerMissing, match=f"^vllm has no {', no '.join(lacking)}$"):
        peers.load("vllm").launch(replace(DENSE, scores=FEATURES[name]), POINTERS)
    assert not vllm.calls


def test_other_peers_are_timed_without_features():
    peer = peers.Peer("fa3", "0", ("bf16",), make_launch=None)
    with pytest.raises(peers.PeerMissing, match="^fa3 has no s_aux$"):
        peer.launch(DENSE, POINTERS)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_bench_runs_on_a_gpu(tmp_path, monkeypatch):
    some = (scores.WITHOUT, scores.SINKS, scores.CAP_30, FEATURES["attn_mask"], FEATURES["p_dropout"])
    monkeypatch.setattr(scores, "PREFILLS", ((128, 4, 2, 2, 300, scores.CAUSAL, some),))
    monkeypatch.setattr(scores, "SHORT", ())
    monkeypatch.setattr(scores, "DECODES", ((128, 4, 2, 2, 256),))
    monkeypatch.setattr(scores, "DOCUMENTS", (128, 2, 3, 100))
    file = tmp_path / "rows.json"
    assert main([*ARGV, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == len(some) + 6 + 3
    for row in rows:
        assert row["errors"][bench.OURS] < bench.limit("bf16", bench.OURS)
        assert row["results"][bench.OURS]["of_first"] > 0
