"""The benchmark of serving: its batches and pages, what they read, the peer vllm, what is concluded and rendered."""

import json
import sys
from argparse import ArgumentParser
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import install

from fa3_cute.cli import bench, main, peers, report, results
from fa3_cute.cli import case as case_module
from fa3_cute.cli.case import Case
from fa3_cute.cli.measure import Work
from fa3_cute.cli.suites import serving
from fa3_cute.planning.operations import operation_of, problems
from fa3_cute.planning.problem import ProblemShape

MIXED = Case(
    "bf16", 64, True, 5, 70, 3, 4, 2, lengths=(1, 5, 2), lengths_k=(33, 70, 2), page_size=16, label="mixed", l2="warm"
)


def parsed(*argv: str):
    parser = ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(argv)


def by_keys(cases, label: str) -> dict[str, Case]:
    return {case.keys: case for case in cases if case.label == label}


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_cases():
    cases = serving.cases(parsed())
    assert len(set(cases)) == len(cases) and all(case.l2 == "warm" for case in cases)
    decode = by_keys(cases, "decode 64x4096")
    assert list(decode) == ["contiguous", *(f"page {size}" for size in (128, 64, 16, 8, 1))]
    assert decode["contiguous"].is_decode and not decode["contiguous"].is_causal
    assert len({case.nbytes for case in decode.values()}) == len({case.flops for case in decode.values()}) == 1
    assert decode["page 16"].name == "bf16 d128 causal h32:8 decode 64x4096 page 16 warm"
    several = by_keys(cases, "32 x 4 queries at 8k")["contiguous"]
    assert (several.seqlen_q, several.lengths, several.is_causal) == (4, (), True)
    prompts = by_keys(cases, "8 prompts of 2048")
    assert prompts["contiguous"].index_shapes() == {"cu_seqlens": (9,)}
    assert prompts["contiguous"].nbytes == prompts["page 128"].nbytes
    assert list(by_keys(cases, "64 decodes at 4k, 2 chunks of 1024 on 2k")) == ["page 128", "page 64", "page 16"]
    skewed = by_keys(cases, "255 decodes at 128..4223, one at 32k")["page 16"]
    assert skewed.batch_size == 256 and max(skewed.lengths_k) == 32768 and sorted(skewed.lengths_k)[-2] == 4223
    narrowed = serving.cases(parsed("--head-dim", "64", "--dtype", "fp8_e4m3"))
    assert {(case.dtype, case.head_dim) for case in narrowed} == {("fp8_e4m3", 64)}


def params_of(case: Case):
    pointers = dict.fromkeys(("q", "k", "v", "out", *case.index_shapes()), 1 << 20)
    return case_module.Tensors.params(SimpleNamespace(pointers=lambda case, kv_set: dict(pointers)), case)


def test_every_case_is_a_good_call():
    """Sequences over pages, some of them long, are two launches; whatever else is one."""
    for case in serving.cases(parsed()):
        params = params_of(case)
        assert problems(params) == []
        if case.page_size != 1:
            are_two = bool(case.page_size) and case.seqlen_q > 4
            assert len(operation_of(ProblemShape.of(params)).launches) == 1 + are_two, case.name


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_pages_hold_each_key_once(page_size):
    case = replace(MIXED, page_size=page_size)
    rows = np.concatenate([case.kv_rows_of(index) for index in range(3)])
    num_pages, rows_of_page, *_ = case.kv_shape
    assert rows_of_page == page_size and len(set(rows.tolist())) == len(rows) == sum(case.lengths_k)
    assert rows.min() >= 0 and rows.max() < num_pages * page_size
    table, used = case.index("page_table"), case.index("seqused_k")
    assert table.shape == case.index_shapes()["page_table"] and (used == case.lengths_k).all()
    taken = [row[: -(-n // page_size)] for row, n in zip(table, used, strict=True)]
    assert sorted(np.concatenate(taken).tolist()) == list(range(num_pages))
    assert case.index("cu_seqlens").tolist() == [0, 1, 6, 8]


def test_what_is_read_and_computed():
    assert MIXED.nbytes == 2 * 2 * 105 * 2 * 64 + 4 * 8 * 4 * 64
    pairs = 33 + (66 + 67 + 68 + 69 + 70) + (1 + 2)
    assert MIXED.flops == 4 * 4 * 64 * pairs
    assert MIXED.as_dict()["variant"] == "page 16" and "lengths_k" not in MIXED.as_dict()


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(serving, "DECODES", {64: ((2, 96, 4, 2),)})
    monkeypatch.setattr(serving, "MIXED_HEAD_DIM", 64)
    monkeypatch.setattr(serving, "MIXED_HEADS", (4, 2))
    monkeypatch.setattr(serving, "BATCHES", {"mixed": ((1, 40, 3), (100, 40, 7)), "prompts": ((40, 9), (40, 9))})
    monkeypatch.setattr(case_module, "COLD_BYTES", 200_000)
    for module in (case_module, results):
        monkeypatch.setattr(module, "COPIED_BYTES", 300_000)
    return install(monkeypatch)


ARGV = ["bench", "--suite", "serving", "--rounds", "2", "--batch-ms", "2"]


def test_bench_from_end_to_end(fake_gpu, tmp_path, capsys):
    """Every row is checked against the reference over the pages that the host knows."""
    file = tmp_path / "rows.json"
    assert main([*ARGV, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    variants = [row["case"]["variant"] for row in written["rows"]]
    pages = ["page 128", "page 64", "page 16"]
    assert variants == ["contiguous", *pages, "page 8", "page 1", *pages, "contiguous", *pages]
    for row in written["rows"]:
        result = row["results"][bench.OURS]
        assert row["errors"][bench.OURS] < 5e-3 and result["replayed"] and result["gbs"] > 0 and result["tflops"] > 0
    said = capsys.readouterr().out
    assert "page 16 warm" in said and "TFLOP/s" in said
    decode, prompts = written["conclusions"]
    assert decode.startswith("bf16 d64 h4:2 decode 2x96: ") and prompts.startswith("bf16 d64 h4:2 prompts: ")
    assert "1.000x with pages of 8, 1.000x with pages of 1 the time of contiguous K and V" in decode
    assert main(["report", str(file)]) == 0
    said = capsys.readouterr().out
    assert "In a cell: contiguous / page 128 / page 64 / page 16 / page 8 / page 1." in said
    assert "\n| BF16 | 64 | 4:2 | mixed | - / " in said


def test_wrong_pages_are_a_wrong_result(fake_gpu):
    """A kernel that reads the pages in their order in memory, not the table's."""

    def in_order(params, stream):
        fake_gpu.read(params.page_table, (2, 12), np.int32)[:] = np.arange(24).reshape(2, 12)
        return fake_gpu.forward(params, stream)

    case = Case("bf16", 64, True, 1, 96, 2, 4, 2, lengths=(1, 1), lengths_k=(96, 96), page_size=8)
    tensors = case_module.Tensors([case], fake_gpu.stream)
    for launch, is_right in ((fake_gpu.forward, True), (in_order, False)):
        tensors.poison_out()
        launch(tensors.params(case), 1)
        assert (tensors.error_of(case) < 5e-3) == is_right


# ---- vLLM ------------------------------------------------------------------------------------------------------------


class Out:
    """O as a torch tensor, as far as the peer uses one."""

    def __init__(self, values):
        self.values = np.asarray(values, float)

    def float(self):
        return Out(self.values.copy())

    def fill_(self, value):
        self.values[:] = value

    def norm(self):
        return np.linalg.norm(self.values)

    def __sub__(self, other):
        return Out(self.values - other.values)


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's package: its calls; `works` says whether a call with metadata that was used before does anything."""
    fake = SimpleNamespace(calls=[], metadata=[], works=True)

    def get_scheduler_metadata(**options):
        fake.metadata.append(options)
        return {"uses": 0}

    def flash_attn_varlen_func(out, scheduler_metadata=None, **options):
        fake.calls.append(options | {"scheduler_metadata": scheduler_metadata})
        if scheduler_metadata is None or scheduler_metadata["uses"] == 0 or fake.works:
            out.values[:] = (3, 4)
        if scheduler_metadata is not None:
            scheduler_metadata["uses"] += 1
        return out

    interface = SimpleNamespace(
        get_scheduler_metadata=get_scheduler_metadata, flash_attn_varlen_func=flash_attn_varlen_func
    )
    torch = SimpleNamespace(
        __version__="2", bfloat16="bfloat16", empty=lambda shape, dtype, device: Out(np.zeros(2)), dtype=None
    )
    for name, module in {
        "torch": torch,
        "vllm_flash_attn": SimpleNamespace(flash_attn_interface=interface),
        "vllm_flash_attn.flash_attn_interface": interface,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        peers, "view", lambda pointer, shape, dtype: SimpleNamespace(pointer=pointer, shape=shape, dtype=dtype)
    )
    monkeypatch.setattr(peers, "capture", lambda launch, calls: Work(launch, calls))
    return fake


POINTERS = {name: number for number, name in enumerate(("q", "k", "v", "out", "cu_seqlens", "seqused_k", "page_table"))}


def test_vllm_is_called_as_its_engine_does(vllm):
    launch = peers.load("vllm").launch(MIXED, POINTERS)
    vllm.calls.clear()
    launch()
    (call,), (metadata,) = vllm.calls, vllm.metadata
    shapes = {name: call[name].shape for name in ("q", "k", "v", "cu_seqlens_q", "seqused_k", "block_table")}
    pool = (3 + 5 + 1, 16, 2, 64)
    assert shapes == {
        "q": (8, 4, 64),
        "k": pool,
        "v": pool,
        "cu_seqlens_q": (4,),
        "seqused_k": (3,),
        "block_table": (3, 5),
    }
    assert [call[name].pointer for name in shapes] == [0, 1, 2, 4, 5, 6]
    assert call["scheduler_metadata"]["uses"] > peers.REPLAYS and not hasattr(launch, "note")
    for options in (call, metadata):
        assert (options["max_seqlen_q"], options["max_seqlen_k"], options["num_splits"]) == (5, 70, 0)
        assert options["causal"] is True and options["window_size"] == [-1, -1]
    assert (call["softmax_scale"], call["fa_version"]) == (64**-0.5, 3)
    assert (metadata["page_size"], metadata["num_heads_kv"], metadata["qkv_dtype"]) == (16, 2, "bf16")


def test_vllm_is_timed_without_metadata_that_works_once(vllm):
    vllm.works = False
    launch = peers.load("vllm").launch(MIXED, POINTERS)
    vllm.calls.clear()
    launch()
    assert [call["scheduler_metadata"] for call in vllm.calls] == [None]
    assert launch.note == f"{MIXED.name}: vllm is wrong when it is replayed with metadata, and is timed without"


def test_vllm_is_timed_over_pages_alone(vllm):
    dense = replace(MIXED, page_size=0, lengths=(), lengths_k=())
    with pytest.raises(peers.PeerMissing, match="^vllm is timed over pages alone$"):
        peers.load("vllm").launch(dense, POINTERS)
    assert not vllm.calls


def test_fa3_has_no_pages(monkeypatch):
    fake = SimpleNamespace(flash_attn_func=None, flash_attn_varlen_func=None)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", fake)
    monkeypatch.setattr(peers.metadata, "version", lambda name: "0")
    monkeypatch.setattr(peers, "view", lambda *_: None)
    with pytest.raises(peers.PeerMissing, match="without pages"):
        peers.load("fa3").launch(MIXED, POINTERS)


def test_what_a_launch_has_to_say_is_a_note(fake_gpu, monkeypatch, capsys):
    launch = peers.Noted(lambda: setattr(fake_gpu.stream, "now", fake_gpu.stream.now + 0.01), "said of it")
    peer = SimpleNamespace(version="0", launch=lambda *_: launch, error=lambda *_: 1e-3)
    monkeypatch.setitem(peers.PEERS, "vllm", lambda: peer)
    monkeypatch.setattr(peers, "use_stream", lambda handle: None)
    monkeypatch.setattr(peers, "capture", lambda launch, calls: Work(launch, calls))
    assert main([*ARGV, "--peers", "vllm"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "said of it"


# ---- what is concluded -----------------------------------------------------------------------------------------------


def test_conclusions():
    cases = serving.cases(parsed("--head-dim", "256"))
    times = {case: 1.0 + 0.1 * index for index, case in enumerate(cases)}
    (line,) = serving.conclusions(times, [])
    assert line.startswith("bf16 d256 h8:4 decode 16x4096: 1.100x with pages of 128, 1.200x with pages of 64, ")
    mixed = {case: 1.0 for case in serving.cases(parsed("--head-dim", "128")) if case.label.startswith("64 decodes")}
    assert len(mixed) == 3 and serving.conclusions(mixed, []) == []


def test_files_of_former_runs_have_no_variant():
    assert report.variant({"mask": "causal", "l2": "warm"}) == "warm"
    assert report.variant({"mask": "causal"}) == "causal"
    assert report.variant(MIXED.as_dict()) == "page 16"


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_bench_runs_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "DECODES", {128: ((2, 1024, 16, 2),)})
    monkeypatch.setattr(serving, "DECODE_PAGES", (16,))
    monkeypatch.setattr(serving, "MIXED_PAGES", (16,))
    monkeypatch.setattr(serving, "BATCHES", {"mixed": ((1, 300, 4), (100, 400, 7))})
    file = tmp_path / "rows.json"
    assert main(["bench", "--suite", "serving", "--rounds", "1", "--batch-ms", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"]["variant"] for row in rows] == ["contiguous", "page 16", "page 16"]
    for row in rows:
        assert row["errors"][bench.OURS] < bench.limit("bf16", bench.OURS) and row["results"][bench.OURS]["gbs"] > 0
