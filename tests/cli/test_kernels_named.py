"""Which kernels the options of compile and inspect name: those that forward launches, each once, and no others."""

import json
from argparse import ArgumentParser

import pytest

from fa3_cute.cli import compile as compile_command
from fa3_cute.cli import explain, kernels, main
from fa3_cute.cli import inspect as inspect_command
from fa3_cute.contract.formats import HEAD_DIMS
from fa3_cute.planning.append import all_append_configs, append_config
from fa3_cute.planning.config import DecodeConfig, FwdConfig
from fa3_cute.planning.merge import all_merge_configs, merge_config
from fa3_cute.planning.mla import mla_config
from fa3_cute.planning.selections import (
    appending_configs,
    backward_dim_configs,
    cached_fp8_configs,
    dim_configs,
    mla_configs,
)
from fa3_cute.planning.backward_kernels import kernels_of
from fa3_cute.planning.tables import KeySource, decode_config, dense_configs, forward_config


def parsed(command, *argv: str):
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


def named(*argv: str) -> list:
    """The configs of `compile`."""
    return compile_command.configs_of(parsed(compile_command, *argv))


def launched(*argv: str) -> list[str]:
    """The names of the kernels of a call that `explain` knows."""
    said = explain.served(explain.params_of(parsed(explain, *argv)))
    return [launch["kernel"] for launch in (*said["before"], said)]


# ---- compile ---------------------------------------------------------------------------------------------------------


def test_all_is_the_tables_and_what_tests_compile():
    """A bounded number, which the help says; nothing of it is left out, nothing is there twice."""
    found = named("--all")
    selections = mla_configs(), dim_configs(), cached_fp8_configs(), all_append_configs(), all_merge_configs()
    assert {*found} >= {*dense_configs(), *kernels.of_tables(None), *(cfg for each in selections for cfg in each)}
    assert len({cfg.name for cfg in found}) == len(found) and round(len(found), -2) == 500
    assert "some 500" in compile_command.__doc__
    assert {*named("--all", "--dtype", "bf16")} < {*found} and {*named("--all", "--decode")} < {*found}


def test_all_has_what_the_gpu_tests_run_over_caches():
    """Of wide values, of fewer columns of V than of K and of FP8 caches: what these tests' problems choose."""
    dim_v, narrow, wide = frozenset({("head_dim_v", 128)}), KeySource(True, 64), KeySource(True, 64, True)
    assert {*named("--all")} >= {
        mla_config("bf16", True, None, KeySource(True, 16), (512, 512)),
        mla_config("bf16", True, None, KeySource(True), (64, 512)),
        mla_config("bf16", True, None, narrow),
        decode_config("fp16", 64, False, source=narrow, kv_dtype="fp8_e4m3"),
        decode_config("bf16", 128, True, source=KeySource(True, 1), kv_dtype="fp8_e4m3"),
        decode_config("bf16", 192, False, features=dim_v, source=KeySource(True)),
        decode_config("bf16", 192, True, features=dim_v, source=wide),
        forward_config("bf16", 192, "causal", True, True, features=dim_v, source=wide),
        forward_config("bf16", 192, "local", True, False, features=dim_v),
    }


DIMS = [
    ["--head-dim", "512"],
    ["--head-dim", "576", "--head-dim-v", "512"],
    ["--head-dim", "192", "--head-dim-v", "128"],
    ["--head-dim", "64", "--head-dim-v", "256"],
    ["--head-dim", "72"],
    ["--head-dim", "128"],
]
CALLS = [
    (["--mode", "decode"], ["--decode"]),
    (["--mode", "decode", "--seqused"], ["--decode", "--page-size", "0"]),
    ([], []),
    (["--causal", "--lse"], ["--causal", "--all"]),
    (["--window", "99,0", "--seqused", "--num-heads-k", "2"], ["--local", "--varlen"]),
    (
        ["--mode", "varlen", "--page-size", "16", "--seqlen-q", "200", "--seqlen-k", "900", "--batch-size", "3"],
        ["--page-size", "16", "--all"],
    ),
]


@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: "-".join(dims[1::2]))
@pytest.mark.parametrize("call, options", CALLS, ids=lambda words: " ".join(words))
def test_compile_names_what_forward_launches(dims, call, options):
    """Of every pair of head dims, dense, over a cache and over pages."""
    is_wide = dims in DIMS[:2]
    if is_wide and "--window" in call:
        assert named(*options, *dims) == []  # there are no such calls
        return
    if is_wide and call == ["--mode", "varlen"]:
        options = ["--page-size", "16"]
    names = {cfg.name for cfg in named(*options, *dims, "--dtype", "bf16")}
    assert {*launched(*call, *dims)} <= names


def test_compile_of_q_v():
    expected = {mla_config(dtype, is_local, dims=(64, 512)) for dtype in ("fp16", "bf16") for is_local in (False, True)}
    assert {*named("--q-v")} == {*named("--q-v", "--decode", "--head-dim", "64", "--head-dim-v", "512")} == expected
    assert launched("--q-v", "--head-dim", "64", "--head-dim-v", "512")[0] in {cfg.name for cfg in expected}
    assert named("--head-dim", "64", "--head-dim-v", "512") == named("--q-v", "--head-dim", "128") == []


@pytest.mark.parametrize("page_size, source", [([], KeySource()), (["--page-size", "16"], KeySource(True, 16))])
def test_compile_of_fp8_caches(page_size, source):
    expected = {
        decode_config("bf16", head_dim, is_local, source=source, kv_dtype="fp8_e4m3")
        for head_dim in (64, 128)
        for is_local in (False, True)
    }
    assert {*named("--dtype", "bf16", "--kv-dtype", "fp8_e4m3", *page_size)} == expected
    assert named("--dtype", "fp8_e4m3", "--kv-dtype", "bf16") == []


def test_compile_of_appends_and_merges():
    assert named("--append") == [*all_append_configs(), *appending_configs()]
    assert named("--merge") == all_merge_configs()
    into = named("--append", "--dtype", "bf16", "--kv-dtype", "fp8_e4m3")
    assert {(cfg.dtype, cfg.kv_dtype) for cfg in into} == {("bf16", "fp8_e4m3")} and len(into) == 5
    assert named("--merge", "--dtype", "fp32", "--out-dtype", "bf16") == [merge_config("fp32", "bf16")]
    assert all(isinstance(cfg, FwdConfig | DecodeConfig) for cfg in named("--all", "--varlen"))


@pytest.mark.parametrize("dims", [["--head-dim", "128"], ["--head-dim", "192", "--head-dim-v", "128"]], ids=str)
@pytest.mark.parametrize(
    "call, options",
    [([], []), (["--page-size", "64"], ["--page-size", "64"]), (["--page-size", "16"], ["--page-size", "16"])],
    ids=lambda words: " ".join(words),
)
@pytest.mark.parametrize("rotary", [[], ["--rotary", "halves"], ["--rotary", "neighbours", "--rotary-dtype", "fp32"]])
def test_compile_names_decode_steps_that_append(dims, call, options, rotary):
    """What one launch serves, of each source of K and V and of each way to rotate; of one mask where it is named."""
    every = named("--append", *options, *dims, "--dtype", "bf16")
    assert len({cfg.name for cfg in every}) == len(every) == 10 and {cfg.dtype for cfg in every} == {"bf16"}
    step = ["--mode", "decode", "--append", "1", *call, *dims, *rotary]
    for window, mask in ([], "--full"), (["--window", "99,0"], "--local"):
        (name,) = launched(*step, *window)
        of_mask = named("--append", *options, *dims, "--dtype", "bf16", mask)
        assert name in {cfg.name for cfg in of_mask} and len(of_mask) == 5 and {*of_mask} < {*every}


def test_compile_of_appends_without_kernels():
    """FP8 and columns that tiles have not are appended ahead of attention."""
    assert named("--append", "--head-dim", "72") == named("--append", "--head-dim", "128", "--dtype", "fp8_e4m3") == []
    assert named("--append", "--page-size", "0", "--kv-dtype", "fp8_e4m3") == []
    assert len(named("--append", "--page-size", "0")) == 2 * 2 * 5 * len(HEAD_DIMS)
    assert {*named("--all", "--decode")} >= {*appending_configs()}


def test_compile_of_partial_results():
    found = named("--out-dtype", "fp32", "--dtype", "bf16", "--head-dim", "64", "--decode", "--kv-dtype", "bf16")
    assert found == [decode_config("bf16", 64, is_local, "fp32") for is_local in (False, True)]


def test_compile_of_gradients_of_other_dims():
    expected = [cfg for cfg in backward_dim_configs() if cfg.head_dim == 192 and getattr(cfg, "head_dim_v", 0)]
    found = named("--backward", "--all", "--head-dim", "192", "--head-dim-v", "128")
    unpadded = {kernel.name for cfg in expected for kernel in kernels_of(cfg) if not cfg.is_padded}
    assert unpadded and unpadded <= {cfg.name for cfg in found}
    assert all("_padded" in cfg.name for cfg in named("--backward", "--head-dim", "72"))
    assert named("--backward", "--head-dim", "512") == []


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--append", "--varlen"], "--varlen: not with --append"),
        (["--append", "--q-v"], "--q-v: not with --append"),
        (["--merge", "--causal"], "--masks: not with --merge"),
        (["--backward", "--kv-dtype", "bf16"], "there are no such kernels"),
        (["--head-dim-v", "128"], "--head-dim-v: only with --head-dim"),
        (["--head-dim", "576"], "there are no such kernels"),
    ],
)
def test_compile_ignores_no_option(argv, said, capsys):
    assert main(["compile", "--list", *argv]) == 2
    assert capsys.readouterr().err.startswith(said)


def test_list_compiles_nothing(monkeypatch, capsys):
    monkeypatch.setattr(compile_command, "compile_row", None)
    assert main(["compile", "--list", "--head-dim", "512", "--dtype", "bf16"]) == 0
    names = [mla_config("bf16", is_local, dims=(512, 512)).name for is_local in (False, True)]
    assert capsys.readouterr().out.splitlines() == [*names, "2 kernels"]
    assert main(["compile", "--list", "--head-dim", "512", "--dtype", "bf16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == names


# ---- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, cfg",
    [
        (["--head-dim", "576", "--head-dim-v", "512", "--mask", "causal"], mla_config("bf16", True)),
        (["--head-dim", "512", "--decode", "--out-dtype", "fp32"], mla_config("bf16", False, "fp32", dims=(512, 512))),
        (["--head-dim", "64", "--head-dim-v", "512", "--q-v"], mla_config("bf16", False, dims=(64, 512))),
        (["--kv-dtype", "fp8_e4m3", "--dtype", "fp16"], decode_config("fp16", 128, False, kv_dtype="fp8_e4m3")),
        (
            ["--head-dim", "192", "--head-dim-v", "128", "--mask", "causal"],
            forward_config("bf16", 192, "causal", False, False, features=frozenset({("head_dim_v", 128)})),
        ),
        (["--head-dim", "64", "--head-dim-v", "256"], forward_config("bf16", 256, "full", False, False)),
        (
            ["--head-dim", "64", "--head-dim-v", "256", "--decode", "--softcap"],
            decode_config("bf16", 256, False, features=frozenset({("is_padded", True), ("has_softcap", True)})),
        ),
        (["--append"], append_config("bf16")),
        (
            ["--append", "--dtype", "fp16", "--kv-dtype", "fp8_e4m3", "--rotary", "neighbours"],
            append_config("fp16", "neighbours", "fp16", "fp8_e4m3"),
        ),
        (["--append", "--rotary", "halves", "--rotary-dtype", "fp32"], append_config("bf16", "halves", "fp32")),
        (["--merge", "--dtype", "fp32", "--out-dtype", "fp16"], merge_config("fp32", "fp16")),
    ],
)
def test_inspect_names_the_kernel(argv, cfg):
    assert inspect_command.config(parsed(inspect_command, *argv)) == cfg


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--head-dim", "576"], "head_dim=576: must be a multiple of 8"),
        (["--head-dim", "64", "--head-dim-v", "512"], "head_dim_v=512: must be 0 (head_dim) or a multiple of 8"),
        (["--q-v"], "q_v="),
        (["--head-dim", "512", "--mask", "local"], "--mask local: full or causal with 512 columns of V"),
        (["--head-dim", "512", "--softcap", "--alibi"], "--alibi, --softcap: there are no such kernels of 512 columns"),
        (["--kv-dtype", "fp8_e4m3", "--dropout"], "--dropout: there are no such kernels of 16-bit queries"),
        (["--kv-dtype", "fp8_e4m3", "--head-dim", "96"], "head_dim=96: must be 64 or 128"),
        (["--kv-dtype", "fp16"], "kv_dtype=DataType.FP16: must be"),
        (["--dtype", "fp32"], "--dtype fp32: only with --merge"),
        (["--append", "--dtype", "fp32"], "--dtype fp32: must be one of"),
        (["--append", "--kv-dtype", "fp16"], "--kv-dtype fp16: must be bf16, as new rows are, or fp8_e4m3"),
        (["--append", "--dtype", "fp8_e4m3", "--rotary", "halves"], "--rotary: not with --dtype fp8_e4m3"),
        (["--append", "--rotary-dtype", "fp32"], "--rotary-dtype: only with --rotary"),
        (["--append", "--mask", "full"], "--mask: not with --append"),
        (["--merge", "--out-dtype", "bf16", "--lse"], "--lse: not with --merge"),
        (["--merge", "--dtype", "fp8_e4m3"], "--dtype fp8_e4m3: must be fp16, bf16 or fp32"),
        (["--rotary", "halves"], "--rotary and --rotary-dtype: only with --append"),
    ],
)
def test_inspect_of_what_does_not_exist(argv, said, capsys):
    assert main(["inspect", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
