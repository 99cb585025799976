"""The command explain: what it says of a problem, which kernel it names, which exit status."""

from argparse import ArgumentParser

import pytest
from commands import answer

from fa3_cute.api import kernel_config
from fa3_cute.cli import explain, main
from fa3_cute.planning.config import DecodeConfig
from fa3_cute.planning.tables import KeySource, decode_config, forward_config, forward_row
from fa3_cute.contract.params import DataType, FlashAttentionParams
from fa3_cute.contract.status import FlashAttentionError, Status


def test_explain_names_every_problem(capsys):
    argv = ["explain", "--head-dim", "84", "--num-heads", "6", "--num-heads-k", "4", "--causal", "--window", "1,-1"]
    status, said = answer(capsys, *argv)
    assert status == 1 and set(said) == {"problems"}
    assert [problem["status"] for problem in said["problems"]] == [
        "UNSUPPORTED_HEAD_DIM",
        "INVALID_HEADS",
        "CAUSAL_WINDOW_CONFLICT",
    ]
    assert main(argv) == 1
    assert "  INVALID_HEADS (-4): num_heads=6: must be a multiple of num_heads_k=4\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, cfg",
    [
        ([], forward_config("bf16", 128, "full", False, False)),
        (
            ["--causal", "--lse", "--dtype", "fp16", "--head-dim", "64"],
            forward_config("fp16", 64, "causal", True, False),
        ),
        (["--window=100,-1"], forward_config("bf16", 128, "local", False, False)),
        (["--window=-1,0"], forward_config("bf16", 128, "causal", False, False)),
        (
            ["--mode", "varlen", "--batch-size", "4", "--head-dim", "96"],
            forward_config("bf16", 96, "full", False, True),
        ),
        (["--seqused"], forward_config("bf16", 128, "full", False, True)),
        (["--mode", "decode", "--head-dim", "256"], decode_config("bf16", 256, False)),
        (
            ["--num-splits", "4", "--seqlen-q", "100", "--seqlen-k", "9000", "--causal"],
            decode_config("bf16", 128, True),
        ),
        (["--head-dim", "72"], forward_config("bf16", 96, "full", False, False)),
        (
            ["--head-dim", "192", "--head-dim-v", "128", "--causal"],
            forward_config("bf16", 192, "causal", False, False, None, frozenset({("head_dim_v", 128)})),
        ),
        (["--dtype", "fp8_e4m3", "--head-dim", "96"], forward_config("fp8_e4m3", 96, "full", False, False, "bf16")),
        (
            ["--dtype", "fp8_e4m3", "--out-dtype", "fp16", "--mode", "decode"],
            decode_config("fp8_e4m3", 128, False, "fp16"),
        ),
        (
            ["--mode", "decode", "--kv-dtype", "fp8_e4m3"],
            decode_config("bf16", 128, False, kv_dtype="fp8_e4m3"),
        ),
    ],
)
def test_explain_names_the_kernel(argv, cfg, capsys):
    status, said = answer(capsys, "explain", *argv)
    assert (status, said["problems"], said["kernel"]) == (0, [], cfg.name)
    assert said["config"] == cfg.as_dict() | {"tile_m": cfg.tile_m}
    assert (said["plan"] is not None) == isinstance(cfg, DecodeConfig)
    assert main(["explain", *argv]) == 0
    printed = capsys.readouterr().out
    assert f"kernel    {cfg.name}\n" in printed and f"{said['reason']}\n" in printed
    unit = "us by" if cfg.packs_heads else "us with window" if cfg.mask == "local" else "speed relative to"
    assert said["reason_unit"].startswith(unit) and f"          ({said['reason_unit']})\n" in printed
    assert ("for V transposed" in printed) == (cfg.is_fp8 and not cfg.packs_heads)


SCORES = ["--softcap", "30", "--sinks", "--alibi", "--attention-chunk", "64", "--dropout", "0.1"]


def test_explain_of_what_changes_scores(capsys):
    """Options are fields of the call, and choose its kernel: that of windows where chunks are asked for."""
    status, said = answer(capsys, "explain", "--causal", *SCORES)
    asked = ("has_softcap", "has_alibi", "has_chunks", "has_dropout")
    features = frozenset((field, True) for field in asked)
    cfg = forward_config("bf16", 128, "local", False, False, features=features)
    assert (status, said["kernel"], said["config"]) == (0, cfg.name, cfg.as_dict() | {"tile_m": cfg.tile_m})
    params = explain.params_of(parsed("--sinks", "--dropout", "0.1", "--attn-mask", "fp32"))
    assert params.s_aux and params.rng_state and params.attn_mask and params.attn_mask_dtype is DataType.FP32
    params = explain.params_of(parsed("--attn-mask", "bool"))
    assert params.attn_mask and params.attn_mask_dtype is None and not params.s_aux and not params.rng_state


@pytest.mark.parametrize("mask", ["bool", "bf16"])
def test_explain_names_the_unit_of_the_windows_tiles(mask, capsys):
    """Which serve masks that are read, whatever else is asked for."""
    _, said = answer(capsys, "explain", "--causal", "--attn-mask", mask)
    row = forward_row("bf16", 128, "causal", takes_registers=True)
    assert said["reason"] == row.reason == forward_row("bf16", 128, "local").reason
    assert said["reason_unit"] == explain.WINDOW_US


def test_explain_refuses_scores_that_are_wrong(capsys):
    argv = ["--softcap", "-1", "--dropout", "1", "--mode", "varlen", "--attn-mask", "bool"]
    code, said = answer(capsys, "explain", *argv)
    assert code == 1 and [problem["status"] for problem in said["problems"]] == [
        "INVALID_ARGUMENT",
        "SOFTCAP_UNSUPPORTED",
        "FEATURE_UNSUPPORTED",
    ]


def parsed(*argv: str):
    parser = ArgumentParser()
    explain.add_arguments(parser)
    return parser.parse_args(argv)


PAGED = [
    *("explain", "--mode", "varlen", "--batch-size", "64", "--seqlen-q", "20", "--seqlen-k", "4000"),
    *("--num-heads", "32", "--num-heads-k", "8", "--page-size", "16", "--causal"),
]


def test_explain_of_a_mixed_batch_names_both_kernels(capsys):
    source = KeySource(True, 16, True)
    decode = decode_config("bf16", 128, True, source=source).name
    forward = forward_config("bf16", 128, "causal", False, True, source=source).name
    status, said = answer(capsys, *PAGED)
    assert (status, said["kernel"], [launch["kernel"] for launch in said["before"]]) == (0, forward, [decode])
    assert said["plan"] is None and said["before"][0]["plan"]["has_shares"] and said["workspace_bytes"] > 0
    assert main(PAGED) == 0
    printed = capsys.readouterr().out
    assert printed.index(f"kernel    {decode}\n") < printed.index(f"kernel    {forward}\n")
    assert "splits    by the lengths on the device, in clusters of " in printed
    assert printed.endswith(f"workspace {said['workspace_bytes']} bytes\n")
    status, said = answer(capsys, *PAGED, "--max-seqlen-q", "16")
    assert (status, said["kernel"], said["before"]) == (0, decode, [])


def test_explain_of_lengths_on_the_device_has_whole_clusters(capsys):
    argv = ["explain", "--mode", "decode", "--seqused", "--seqlen-k", "200"]
    _, said = answer(capsys, *argv)
    assert said["plan"]["cluster_size"] > said["plan"]["num_splits"] == 1 and not said["plan"]["has_shares"]
    assert main(argv) == 0
    size = said["plan"]["cluster_size"]
    assert f"splits    {size} of K and V, 1 cluster of {size} CTAs\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, status",
    [
        (["--mode", "varlen", "--page-size", "0"], "PAGED_KV_UNSUPPORTED"),
        (["--max-seqlen-q", "3"], "VARLEN_MISMATCH"),
        (["--dtype", "fp8_e4m3", "--head-dim", "136"], "FP8_HEAD_DIM"),
        (["--dtype", "bf16", "--out-dtype", "fp16"], "INVALID_ARGUMENT"),
    ],
)
def test_explain_refuses_what_does_not_go_together(argv, status, capsys):
    code, said = answer(capsys, "explain", *argv)
    assert code == 1 and [problem["status"] for problem in said["problems"]] == [status]


@pytest.mark.parametrize("batch, splits, ctas_per_sm", [(1, 16, 1), (64, 1, 2)])
def test_explain_says_how_decode_is_laid_out(batch, splits, ctas_per_sm, capsys):
    argv = [
        "explain",
        "--mode",
        "decode",
        "--batch-size",
        str(batch),
        "--seqlen-k",
        "8192",
        "--num-heads",
        "32",
        "--num-heads-k",
        "4",
        "--num-splits",
        str(splits),
    ]
    _, said = answer(capsys, *argv)
    plan = said["plan"]
    assert (plan["packed_heads"], plan["num_splits"], plan["ctas_per_sm"]) == (8, splits, ctas_per_sm)
    assert plan["cluster_size"] <= splits and said["workspace_bytes"] == plan["partial_bytes"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert f"splits    {splits} of K and V, 1 cluster of" in printed
    assert ("one per SM" if ctas_per_sm == 1 else "up to two per SM") in printed


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", ""])
def test_bad_window(text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["explain", f"--window={text}"])
    assert stop.value.code == 2 and "must be two ints" in capsys.readouterr().err


def test_kernel_config_refuses_what_forward_refuses():
    with pytest.raises(FlashAttentionError) as caught:
        kernel_config(FlashAttentionParams())
    assert caught.value.code is Status.NULL_POINTER
    with pytest.raises(TypeError):
        kernel_config({})
