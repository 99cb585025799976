"""The benchmark's suites and cases: sizes, names, FLOPs, tiles, random numbers, what a suite concludes."""

from argparse import ArgumentParser
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import install

from fa3_cute.cli import bench, main
from fa3_cute.cli import case as case_module
from fa3_cute.cli.case import Case, visible_pairs
from fa3_cute.cli.suites import prefill, varlen, window


def parsed(command, *argv: str):
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


def test_prefill_cases():
    cases = prefill.cases(parsed(bench))
    assert len(cases) == 5 * 2 * 6
    assert {case.batch_size * case.seqlen_q for case in cases} == {16384}
    assert {(case.head_dim, case.num_heads) for case in cases} == {(64, 32), (96, 16), (128, 16), (192, 12), (256, 8)}
    assert all(case.num_heads == case.num_heads_k and case.seqlen_q == case.seqlen_k for case in cases)


def test_prefill_cases_narrowed():
    (case,) = prefill.cases(
        parsed(
            bench,
            "--head-dim",
            "128",
            "--seqlen",
            "1000",
            "--causal",
            "--dtype",
            "fp16",
            "--batch-size",
            "3",
            "--num-heads",
            "8",
            "--num-heads-k",
            "2",
        )
    )
    assert case == Case("fp16", 128, True, 1000, 1000, 3, 8, 2)
    assert case.name == "fp16 d128 causal h8:2 3x1000"
    assert case.flops == 4 * 3 * 8 * 1000 * 1000 * 128 / 2
    assert replace(case, is_causal=False).flops == 2 * case.flops


def test_varlen_cases():
    cases = varlen.cases(parsed(bench))
    assert len(cases) == 2 * 2 * 6 and {(case.head_dim, case.num_heads) for case in cases} == {(64, 16), (128, 16)}
    by_label = {case.label: case for case in cases if case.head_dim == 128 and case.is_causal}
    first = by_label["256+512+128"]
    assert first.name == "bf16 d128 causal h16 256+512+128"
    assert (first.q_shape, first.batch_size, first.seqlen_q) == ((896, 16, 128), 3, 512)
    assert first.flops == 4 * (256**2 + 512**2 + 128**2) * 16 * 128 / 2
    mixed, tiny = by_label["64 of 64..4096"].lengths, by_label[varlen.PER_SEQUENCE].lengths
    assert len(mixed) == 64 and set(mixed) <= set(range(64, 4097))
    assert len(tiny) == 10_000 and set(tiny) == set(range(1, 41))
    assert sum(tiny) == sum(by_label[varlen.IN_2K].lengths) == by_label[varlen.IN_2K].q_shape[0]


def test_varlen_conclusions():
    cases = varlen.cases(parsed(bench, "--head-dim", "64", "--full"))
    times = {case: 3.0 if case.label == varlen.PER_SEQUENCE else 2.0 for case in cases}
    (line,) = varlen.conclusions(times)
    tiny, long = (next(case for case in cases if case.label == label) for label in (varlen.PER_SEQUENCE, varlen.IN_2K))
    assert " 1.50x the time" in line and f" {1.5 * long.flops / tiny.flops:.1f}x per visible FLOP" in line


def test_window_cases_and_conclusions():
    cases = window.cases(parsed(bench, "--head-dim", "128"))
    assert [case.mask for case in cases] == ["causal", "window(1024,0)", "window(512,512)"]
    assert {(case.batch_size, case.seqlen_q, case.num_heads) for case in cases} == {(1, 16384, 16)}
    causal, left, _ = cases
    share = window.visible_tiles(left) / window.visible_tiles(causal)
    (line,) = window.conclusions({causal: 10.0, left: 12.5 * share})
    assert line.startswith(f"{left.name}: 1.25x the time of its tiles")


@pytest.mark.parametrize(
    "suite, option",
    [
        ("varlen", "--seqlen=512"),
        ("varlen", "--batch-size=2"),
        ("window", "--causal"),
        ("decode", "--batch-size=2"),
        ("decode", "--full"),
    ],
)
def test_what_a_suite_decides_is_no_option(suite, option, capsys):
    assert main(["bench", "--suite", suite, option]) == 2
    assert capsys.readouterr().err.startswith(f"the {suite} suite has its own ")


BANDS = [
    (1, 1, -1, -1),
    (70, 70, -1, 0),
    (300, 500, 40, 0),
    (500, 300, 40, 0),
    (300, 1000, 0, 0),
    (257, 400, 30, 70),
    (500, 100, 5, 5),
    (100, 500, 600, -1),
    (130, 300, 1 << 30, 1 << 30),
]


@pytest.mark.parametrize("seqlen_q, seqlen_k, left, right", BANDS)
def test_visible_pairs_and_tiles_against_brute_force(seqlen_q, seqlen_k, left, right, monkeypatch):
    distance = np.arange(seqlen_k) - (np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q)
    seen = (distance >= -left if left >= 0 else True) & (distance <= right if right >= 0 else distance == distance)
    assert visible_pairs(seqlen_q, seqlen_k, left, right) == seen.sum()
    monkeypatch.setattr(window, "forward_config", lambda *_, **__: SimpleNamespace(tile_m=64, tile_n=48))
    case = Case("bf16", 128, False, seqlen_q, seqlen_k, 1, 1, 1, (left, right))
    assert window.visible_tiles(case) == sum(
        seen[row : row + 64, column : column + 48].any()
        for row in range(0, seqlen_q, 64)
        for column in range(0, seqlen_k, 48)
    )
    if max(left, right) >= 0:
        assert case.flops == case.visible_flops == 4 * 128 * seen.sum()


def test_long_tensors_repeat_few_random_numbers(monkeypatch):
    """Uploaded once, doubled on the device, known to the host at any place."""
    gpu = install(monkeypatch)
    monkeypatch.setattr(case_module, "DISTINCT_NUMBERS", 1001)
    case = Case("fp16", 64, False, 5, 70, 2, 4, 2)
    tensors = case_module.Tensors([case], gpu.stream)
    assert {name: host.size for name, host in tensors.host.items()} == {"q": 1001, "k": 1001, "v": 1001}
    pointers = tensors.pointers(case)
    for name, shape in (("q", case.q_shape), ("k", case.kv_shape), ("v", case.kv_shape)):
        there = gpu.read(pointers[name], shape, np.float16)
        assert np.array_equal(there.reshape(-1), np.resize(tensors.host[name], there.size))
        assert np.array_equal(tensors.numbers(name, 0, shape), there)
        assert np.array_equal(tensors.numbers(name, 900, (50, 2)).reshape(-1), there.reshape(-1)[900:1000])
        assert np.array_equal(tensors.numbers(name, 2002, (100,)), there.reshape(-1)[:100])
    assert len(set(tensors.host["q"].tolist())) > 500


def test_numbers_that_are_few_do_not_repeat(monkeypatch):
    tensors = case_module.Tensors([Case("bf16", 64, False, 5, 7, 1, 2, 2)], install(monkeypatch).stream)
    assert [tensors.host[name].shape for name in "qkv"] == [(640,), (896,), (896,)]
