"""compile --backward and explain --backward: which kernels, which words, which exit status."""

import pytest
from commands import answer

from fa3_cute.cli import compile as compile_command
from fa3_cute.cli import main
from fa3_cute.planning.backward_kernels import KeysConfig, MainConfig, SideConfig, kernels_of, pass_config
from fa3_cute.planning.backward_tables import SHORT, TABLE
from fa3_cute.planning.one_side import TABLE as ONE_SIDE

SIZES = ["--num-heads", "6", "--num-heads-k", "2", "--seqlen-q", "700", "--head-dim", "64"]


SPLIT = [row for row, chosen in TABLE.items() if chosen.is_split]  # which deterministic calls do not have


@pytest.mark.parametrize(
    "argv, mains, sided",
    [
        ([], 2 * len(TABLE), 2 * 3),
        (["--all"], 2 * (4 * len(TABLE) - 2 * len(SPLIT) + 2 * len(SHORT)), 2 * 2 * 6),
        (["--varlen", "--dtype", "bf16"], len(TABLE), 3),
        (["--head-dim", "64", "--causal", "--dtype", "fp16,fp8_e4m3"], 1, 0),
        (["--head-dim", "256"], 0, 2 * 3),
    ],
)
def test_compile_selects(argv, mains, sided, monkeypatch, capsys):
    seen = []
    row = {"registers": 168, "stack_bytes": 0, "smem_bytes": 1, "wgmmas": 32, "seconds": 1.0, "problems": []}
    monkeypatch.setattr(compile_command, "compile_row", lambda cfg: seen.append(cfg) or row | {"name": cfg.name})
    assert main(["compile", "--backward", "--jobs", "1", *argv]) == 0
    own = [cfg for cfg in seen if isinstance(cfg, MainConfig)]
    assert len(own) == mains and len({cfg.name for cfg in seen}) == len(seen)
    sides = [cfg for cfg in seen if isinstance(cfg, SideConfig)]
    pairs = [cfg for cfg in seen if isinstance(cfg, KeysConfig)]
    assert len(sides) == len(pairs) == sided
    assert {cfg.is_varlen for cfg in own + sides} == ({False, True} if "--all" in argv else {"--varlen" in argv})
    assert any(cfg.is_deterministic for cfg in own) == ("--all" in argv)
    passes = own + [pass_config(cfg.dtype, cfg.head_dim, cfg.mask, cfg.is_varlen, True) for cfg in sides]
    wanted = {kernel for cfg in passes for kernel in kernels_of(cfg)}
    assert {cfg.name for cfg in seen} == {kernel.name for kernel in wanted}, "with those before and after them"
    assert f"{len(seen)} kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["--page-size", "16"], ["--dtype", "fp8_e4m3"], ["--dtype", "fp8_e4m3", "--head-dim", "256"]]
)
def test_compile_has_no_other_kernels(argv, capsys):
    assert main(["compile", "--backward", *argv]) == 2
    assert "no such kernels" in capsys.readouterr().err


def test_compile_of_decode_or_backward(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compile", "--decode", "--backward"])
    assert caught.value.code == 2 and "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--deterministic", "--causal"], ["--mode", "varlen"], ["--window=10,3"]])
def test_explain_names_the_kernels(argv, capsys):
    mask = "causal" if "--causal" in argv else "local" if "--window=10,3" in argv else "full"
    cfg = pass_config("bf16", 64, mask, "varlen" in argv, "--deterministic" in argv)
    status, said = answer(capsys, "explain", "--backward", *SIZES, *argv)
    assert (status, said["problems"]) == (0, [])
    assert said["kernels"] == [kernel.name for kernel in kernels_of(cfg)]
    assert said["config"] == cfg.as_dict() | {"tile_n": cfg.tile_n}
    assert said["reason"] == TABLE[64, mask].reason
    tiles = 700 // cfg.tile_m + 1 if "varlen" in argv else -(-700 // cfg.tile_m)
    counter, left = 4, 0 if argv else 35 * 2 * 128 * 64 * 4  # by 36 parts of 12 tiles of keys, but for the last
    assert 0 <= said["workspace_bytes"] - tiles * 6 * (cfg.tile_m * (64 + 2) * 4 + 4) - counter - left < 2 * 16
    assert main(["explain", "--backward", *SIZES, *argv]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in said["kernels"]) and f"workspace {said['workspace_bytes']} bytes" in out


@pytest.mark.parametrize("argv", [[], ["--deterministic", "--causal"], ["--mode", "varlen"]])
def test_explain_names_the_kernels_without_sums(argv, capsys):
    cfg = pass_config("bf16", 256, "causal" if "--causal" in argv else "full", "varlen" in argv, False)
    sizes = [*SIZES[:-1], "256", *argv]
    status, said = answer(capsys, "explain", "--backward", *sizes)
    assert (status, said["problems"]) == (0, [])
    assert said["kernels"] == [kernel.name for kernel in kernels_of(cfg)] and said["config"] == cfg.as_dict()
    assert [(side["side"], side["tile_m"], side["tile_n"]) for side in said["config"]["sides"]] == [("dq", 128, 64)]
    assert [(pair["tile_m"], pair["tile_n"]) for pair in said["config"]["pair"]] == [(64, 64)]
    assert said["reason"] == ONE_SIDE[256].reason and said["workspace_bytes"] == 6 * 6 * 128 * 2 * 4
    assert main(["explain", "--backward", *sizes]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in said["kernels"]) and "64 rows of Q, 64 of K and V of dk and dv" in out


def test_explain_refuses_what_backward_refuses(capsys):
    argv = ["explain", "--backward", *SIZES, "--num-splits", "3"]
    assert main(argv) == 1
    assert capsys.readouterr().out.startswith("backward would refuse this:\n  FEATURE_UNSUPPORTED (-16): num_splits=3")
