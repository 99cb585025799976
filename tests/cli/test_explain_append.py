"""The command explain of calls that append, rotate, or have Q in two parts: launches in their order, their grids."""

from argparse import ArgumentParser

import pytest
from commands import answer

from fa3_cute.cli import explain, main
from fa3_cute.contract.params import DataType
from fa3_cute.planning.append import append_config
from fa3_cute.planning.decode_append import ONE_LAUNCH, appending
from fa3_cute.planning.mla import mla_config
from fa3_cute.planning.tables import KeySource, decode_config, forward_config

STEP = ["--mode", "decode", "--batch-size", "300", "--num-heads", "40", "--num-heads-k", "8"]
CACHE = KeySource(True)


def parsed(*argv: str):
    parser = ArgumentParser()
    explain.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    "argv, ahead, attention, grid",
    [
        # Rows, then lengths, 256 to a CTA; pieces of 8 elements, 256 to a CTA: of 8 heads of K, of 40 of Q.
        (["--append", "2"], append_config("bf16"), decode_config("bf16", 128, False, source=CACHE), [602, 1, 1]),
        (
            ["--append", "2", "--rotary", "halves"],
            append_config("bf16", "halves", "bf16"),
            decode_config("bf16", 128, False, source=CACHE),
            [902, 3, 1],
        ),
        (
            ["--rotary", "neighbours", "--rotary-dtype", "fp32", "--dtype", "fp16"],
            append_config("fp16", "neighbours", "fp32"),
            decode_config("fp16", 128, False),
            [300, 3, 1],
        ),
        (
            ["--append", "1", "--kv-dtype", "fp8_e4m3", "--kv-new-dtype", "bf16", "--rotary", "halves"],
            append_config("bf16", "halves", "bf16", "fp8_e4m3"),
            decode_config("bf16", 128, False, source=CACHE, kv_dtype="fp8_e4m3"),
            [602, 3, 1],
        ),
        (
            ["--append", "1", "--kv-dtype", "fp8_e4m3"],
            append_config("fp8_e4m3"),
            decode_config("bf16", 128, False, source=CACHE, kv_dtype="fp8_e4m3"),
            [302, 1, 1],
        ),
    ],
)
def test_what_is_ahead_comes_first(argv, ahead, attention, grid, capsys):
    status, said = answer(capsys, "explain", *STEP, *argv)
    (first,) = said["before"]
    assert (status, first["kernel"], said["kernel"]) == (0, ahead.name, attention.name)
    assert (first["grid"], first["config"], first["plan"]) == (grid, ahead.as_dict(), None)
    assert main(["explain", *STEP, *argv]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"kernel    {ahead.name}\ngrid      {grid[0]}")
    assert printed.index(ahead.name) < printed.index(f"kernel    {attention.name}\n")
    assert printed.endswith(f"workspace {said['workspace_bytes']} bytes\n") and said["workspace_bytes"] > 0


@pytest.mark.parametrize(
    "argv, rotary, page_size",
    [
        (["--append", "1"], ("", ""), 0),
        (["--append", "1", "--rotary", "neighbours", "--rotary-dtype", "fp32"], ("neighbours", "fp32"), 0),
        (["--append", "1", "--rotary", "halves", "--page-size", "64"], ("halves", "bf16"), 64),
    ],
)
def test_one_row_is_one_launch(argv, rotary, page_size, capsys):
    """With the grid and the splits of the step without it; what it spares is said."""
    sizes = [*STEP, "--seqlen-k", "8192"]
    status, said = answer(capsys, "explain", *sizes, *argv)
    cfg = appending(decode_config("bf16", 128, False, source=KeySource(True, page_size, page_size > 0)), *rotary)
    assert (status, said["kernel"], said["before"], said["appends"]) == (0, cfg.name, [], ONE_LAUNCH)
    assert (said["config"]["rotary"], said["config"]["table_dtype"]) == rotary
    pages = ["--page-size", "64"] if page_size else ["--seqused"]
    _, without = answer(capsys, "explain", *sizes, *pages)
    same = "grid", "threads", "plan", "reason", "workspace_bytes"
    assert without["appends"] == "" and [said[name] for name in same] == [without[name] for name in same]
    assert said["grid"] == [said["plan"]["num_clusters"] * said["plan"]["cluster_size"], 1, 1]
    assert main(["explain", *sizes, *argv]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"kernel    {cfg.name}\n") and f"\nappends   itself: {ONE_LAUNCH}\n" in printed


def test_a_prompt_that_rotates(capsys):
    """Of a persistent grid as many CTAs as SMs."""
    argv = ["--rotary", "halves", "--rotary-dim", "64", "--causal", "--seqlen-q", "2000", "--num-heads", "3"]
    _, said = answer(capsys, "explain", *argv)
    assert said["kernel"] == forward_config("bf16", 128, "causal", False, False).name
    assert (said["grid"], said["threads"]) == ([48, 1, 1], 384) and said["before"][0]["grid"] == [2000, 1, 1]
    assert main(["explain", "--num-heads", "40"]) == 0
    assert "\ngrid      132 CTAs of 384 threads\n" in capsys.readouterr().out


def test_options_are_fields():
    params = explain.params_of(
        parsed("--append", "3", "--rotary", "neighbours", "--rotary-dim", "32", "--kv-new-dtype", "fp16")
    )
    assert params.k_new and params.v_new and params.seqused_k and params.rotary_cos and params.rotary_sin
    assert (params.seqlen_knew, params.rotary_dim, params.rotary_interleaved) == (3, 32, True)
    assert (params.kv_new_dtype, params.rotary_dtype) == (DataType.FP16, None)
    params = explain.params_of(parsed("--rotary", "halves", "--head-dim", "64", "--rotary-dtype", "fp32"))
    assert (params.rotary_dim, params.rotary_interleaved, params.rotary_dtype) == (64, False, DataType.FP32)
    assert not (params.k_new or params.seqused_k or params.q_v) and explain.params_of(parsed("--q-v")).q_v


@pytest.mark.parametrize(
    "dims, cfg, splits",
    [
        (["--head-dim", "64", "--head-dim-v", "512", "--q-v"], mla_config("bf16", False, dims=(64, 512)), "as many"),
        (["--head-dim", "576", "--head-dim-v", "512"], mla_config("bf16", False), "V in it"),
        (["--head-dim", "512"], mla_config("bf16", False, dims=(512, 512)), "as many for V"),
    ],
)
def test_wide_values(dims, cfg, splits, capsys):
    argv = ["explain", "--mode", "decode", "--num-heads", "128", "--num-heads-k", "1", *dims]
    status, said = answer(capsys, *argv)
    assert (status, said["kernel"], said["before"]) == (0, cfg.name, [])
    assert said["grid"] == [2 * said["plan"]["num_splits"], 1, 1]
    assert main(argv) == 0 and f" for K, {splits}" in capsys.readouterr().out


def test_a_mixed_batch_that_appends(capsys):
    """Three launches; those of packed queries have the grids that hold for all lengths."""
    argv = ["--mode", "varlen", "--batch-size", "64", "--seqlen-q", "20", "--seqlen-k", "4000", "--page-size", "16"]
    _, said = answer(capsys, "explain", *argv, "--num-heads", "32", "--num-heads-k", "8", "--append", "20")
    append, decode = said["before"]
    assert append["kernel"] == "append_bf16" and append["grid"] == [64 * 20 + 1, 1, 1]
    plan = decode["plan"]
    assert decode["grid"] == [plan["num_clusters"] * plan["cluster_size"], 1, 1]
    assert said["kernel"].startswith("fwd_") and said["grid"] == [132, 1, 1]


def test_a_partial_result(capsys):
    _, said = answer(capsys, "explain", "--out-dtype", "fp32")
    assert said["kernel"] == forward_config("bf16", 128, "full", False, False, "fp32").name


@pytest.mark.parametrize(
    "argv, status",
    [
        (["--rotary-dim", "64"], "ROTARY_UNSUPPORTED"),
        (["--rotary-dtype", "fp32"], "ROTARY_UNSUPPORTED"),
        (["--kv-new-dtype", "bf16"], "INVALID_ARGUMENT"),
        (["--append", "0"], "INVALID_SHAPE"),
        (["--head-dim", "64", "--head-dim-v", "512"], "UNSUPPORTED_HEAD_DIM"),
    ],
)
def test_no_option_is_ignored(argv, status, capsys):
    code, said = answer(capsys, "explain", *argv)
    assert code == 1 and [problem["status"] for problem in said["problems"]] == [status]
