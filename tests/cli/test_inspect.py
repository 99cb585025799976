"""The command inspect, and the units of an SM that it counts by."""

import re
import subprocess
from argparse import ArgumentParser
from dataclasses import replace
from functools import cache

import pytest
from commands import answer
from disassembler import nvdisasm

from fa3_cute.cli import main, units
from fa3_cute.cli import inspect as inspect_command
from fa3_cute.planning.backward_kernels import kernels_of, pass_config
from fa3_cute.planning.config import DecodeConfig
from fa3_cute.planning.mla import mla_config
from fa3_cute.planning.selections import all_configs
from fa3_cute.planning.tables import KeySource, decode_config, forward_config


@pytest.fixture
def compiled_once(monkeypatch):
    """The command's compiles, each kernel's kept for the next time."""
    from fa3_cute.runtime import compiler

    monkeypatch.setattr(compiler, "compile_and_read", cache(compiler.compile_and_read))


@pytest.mark.parametrize(
    "argv, cfg, tensor_clocks",
    [
        (
            ["--head-dim", "64", "--mask", "causal", "--lse", "--varlen", "--dtype", "fp16"],
            forward_config("fp16", 64, "causal", True, True),
            1536,
        ),
        (["--decode", "--mask", "causal"], decode_config("bf16", 128, True), 512),
    ],
)
@pytest.mark.usefixtures("compiled_once")
def test_inspect(argv, cfg, tensor_clocks, capsys):
    status, said = answer(capsys, "inspect", *argv)
    assert (status, said["name"], said["problems"], said["stack_bytes"]) == (0, cfg.name, [], 0)
    assert sum(part["bytes"] for part in said["smem_map"]) == cfg.smem_bytes
    mix = said["instruction_mix"]
    assert sum(mix.values()) == said["instructions"] and mix["tensor"] == said["wgmmas"] and units.OTHER not in mix
    assert said["clocks_per_tile"]["tensor"] == tensor_clocks
    assert said["critical"] == ("memory" if isinstance(cfg, DecodeConfig) else "MUFU")
    assert main(["inspect", *argv]) == 0
    printed = capsys.readouterr().out
    assert f"critical: {said['critical']}, " in printed and all(f"\n{unit} " in printed for unit in mix)


@pytest.mark.parametrize(
    "argv, cfg",
    [
        (["--out-dtype", "fp16", "--varlen"], forward_config("fp8_e4m3", 128, "full", False, True, "fp16")),
        (["--decode"], decode_config("fp8_e4m3", 128, False, "bf16")),
    ],
)
def test_inspect_of_fp8(argv, cfg, capsys):
    status, said = answer(capsys, "inspect", "--dtype", "fp8_e4m3", *argv)
    assert (status, said["name"], said["problems"]) == (0, cfg.name, [])
    rings = ["Q", "K", "V"] if cfg.packs_heads else ["O", "Q", "K", "V", "V transposed"]
    assert [part["name"] for part in said["smem_map"]] == ["barriers", *rings]
    assert said["instruction_mix"]["tensor"] == said["wgmmas"] and units.OTHER not in said["instruction_mix"]


@pytest.mark.parametrize(
    "argv, asked",
    [
        (["--mask", "causal", "--softcap", "--dropout"], {("has_softcap", True), ("has_dropout", True)}),
        (["--mask", "local", "--alibi", "--attention-chunk"], {("has_alibi", True), ("has_chunks", True)}),
        (["--mask", "full", "--attn-mask", "bf16", "--lse"], {("attn_mask", "bf16")}),
    ],
)
@pytest.mark.parametrize("decode", [False, True], ids=["forward", "decode"])
def test_kernels_that_change_scores(argv, asked, decode):
    """Options name their configs."""
    parser = ArgumentParser()
    inspect_command.add_arguments(parser)
    args = parser.parse_args(argv + ["--decode"] * decode)
    features = frozenset(asked)
    cfg = forward_config("bf16", 128, args.mask, args.lse, False, features=features)
    if decode:
        cfg = decode_config("bf16", 128, args.mask != "full", features=features)
    assert inspect_command.config(args) is cfg


@pytest.mark.parametrize("cfg", all_configs(), ids=lambda cfg: cfg.name)
def test_map_of_shared_memory(cfg):
    """Its parts are all of it, and what the barriers and the decode kernel's LSE are padded to is left for them."""
    parts = inspect_command.smem_map(cfg)
    assert sum(part["bytes"] for part in parts) == cfg.smem_bytes and parts[0]["bytes"] == 1024


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--out-dtype", "fp16"], "O is bf16, as Q, K and V are"),
        (["--attention-chunk", "--decode"], "--attention-chunk: only with --mask local, not full"),
    ],
)
def test_inspect_of_what_does_not_exist(argv, said, capsys):
    assert main(["inspect", *argv]) == 2 and said in capsys.readouterr().err


def test_inspect_fails_on_a_problem(monkeypatch, capsys):
    from fa3_cute.runtime import compiler

    def fails(cfg):
        raise compiler.CompileError("does not lower")

    monkeypatch.setattr(compiler, "compile_and_read", fails)
    status, said = answer(capsys, "inspect")
    assert (status, said["problems"]) == (1, ["does not lower"])
    assert main(["inspect"]) == 1 and capsys.readouterr().out == "does not lower\n"


def test_stated_bandwidth():
    assert "4.6 TB/s over 132 SMs at 1830 MHz" in inspect_command.__doc__
    bytes_per_us = units.MEMORY_BYTES * units.NUM_SMS * units.CLOCKS_PER_US
    assert abs(bytes_per_us - 4.6e6) < 1


def test_operations_are_of_one_unit_each():
    operations = [
        number for mnemonics in units.OPERATIONS.values() for numbers in mnemonics.values() for number in numbers
    ]
    assert len(operations) == len(set(operations)) and max(operations) <= units.OPERATION_MASK


def test_clocks_are_those_of_the_inner_loop():
    """What nvdisasm shows of one: per thread and tile 80 scores and 64 elements of O (bf16, d128, 128x160)."""
    clocks = units.clocks_per_tile(forward_config("bf16", 128, "full", False, False))
    warps = 8
    assert clocks["tensor"] == 2560
    assert clocks["MUFU"] == 82 * 32 * warps / 16
    assert clocks["FP32"] == (80 + 80 + 64) * 32 * warps / 128
    assert clocks["ALU"] == (40 + 40) * 32 * warps / 64
    assert clocks["issue"] == (82 + 80 + 80 + 64 + 40 + 40) * warps / 4


def test_clocks_of_wide_values():
    """K of 576 columns is read once, the first 512 of it once more as V; in two parts Q and K have as many columns."""
    clocks = units.clocks_per_tile(mla_config("bf16", False))
    assert clocks == units.clocks_per_tile(mla_config("bf16", False, dims=(64, 512)))
    rows, keys = 64, 64
    assert clocks["tensor"] == 2 * rows * keys * (576 + 512) / 4096
    assert clocks["FP32"] == (2 * rows * keys + rows * 512) / 128
    own = 2 * rows * 576 + 2 * 2 * rows * keys  # Q, and P that is handed over
    assert clocks["shared memory"] == (2 * keys * 576 + 2 * keys * (576 + 512) + own) / 128
    large = units.clocks_per_tile(mla_config("bf16", False, dims=(512, 512)))
    assert large["tensor"] == 2 * rows * 32 * 1024 / 4096


def test_clocks_of_an_fp8_cache():
    """Half of the bytes of memory; in shared memory they are read, and written and read in 16 bit."""
    cfg = decode_config("bf16", 128, False, kv_dtype="fp8_e4m3")
    cached = units.clocks_per_tile(cfg)
    of_16_bit = replace(cfg, kv_dtype=None, num_wide_slots=0, num_kv_stages=1)
    whole = units.clocks_per_tile(of_16_bit)
    numbers = cfg.tile_n * 256
    assert cached["memory"] == whole["memory"] / 2 and cached["tensor"] == whole["tensor"]
    assert cached["shared memory"] - whole["shared memory"] == numbers * (1 + 1 + 2 - 2) / 128
    assert cached["ALU"] - whole["ALU"] == numbers / 2 / 64


def test_clocks_of_fewer_columns_of_v():
    fewer = units.clocks_per_tile(
        forward_config("bf16", 192, "full", False, False, None, frozenset({("head_dim_v", 128)}))
    )
    assert fewer["tensor"] == 2 * 128 * 128 * (192 + 128) / 4096


@pytest.mark.usefixtures("compiled_once")
def test_inspect_of_what_has_no_tiles(capsys):
    argv = ["--append", "--rotary", "halves", "--kv-dtype", "fp8_e4m3"]
    status, said = answer(capsys, "inspect", *argv)
    assert (status, said["name"], said["problems"]) == (0, "append_bf16_into_fp8_e4m3_halves_bf16", [])
    assert "smem_map" not in said and "critical" not in said
    assert units.OTHER not in said["instruction_mix"] and sum(said["instruction_mix"].values()) == said["instructions"]
    assert main(["inspect", *argv]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("append_bf16_into_fp8_e4m3_halves_bf16, 256 threads\n") and "critical" not in printed


@pytest.mark.usefixtures("compiled_once")
def test_inspect_of_an_fp8_cache(capsys):
    """Registers of its warpgroups, which are more kinds than two."""
    argv = ["--kv-dtype", "fp8_e4m3", "--head-dim", "64"]
    status, said = answer(capsys, "inspect", *argv)
    cfg = decode_config("bf16", 64, False, kv_dtype="fp8_e4m3")
    assert (status, said["name"]) == (0, cfg.name) and units.OTHER not in said["instruction_mix"]
    assert said["registers_after_setmaxnreg"] == {role.name: role.registers for role in cfg.roles}
    assert main(["inspect", *argv]) == 0 and "240 (consume), 112 (widen_k)" in capsys.readouterr().out


def test_clocks_of_fp8():
    """Half the clocks of the GEMMs and half the bytes, plus V through shared memory twice more, to transpose it."""
    cfg = forward_config("fp8_e4m3", 128, "full", False, False, "bf16")
    eight, sixteen = (units.clocks_per_tile(each) for each in (cfg, replace(cfg, dtype="bf16", out_dtype=None)))
    assert eight["tensor"] == sixteen["tensor"] / 2
    assert eight["shared memory"] == sixteen["shared memory"] / 2 + 2 * cfg.tile_n * 128 / 128
    assert {unit for unit in eight if eight[unit] != sixteen[unit]} == {"tensor", "shared memory"}


@pytest.mark.parametrize("cfg", all_configs(), ids=lambda cfg: cfg.name)
def test_masked_tiles_cost_more(cfg):
    clocks, masked = (units.clocks_per_tile(cfg, is_masked) for is_masked in (False, True))
    assert {unit for unit in clocks if masked[unit] > clocks[unit]} == {"ALU", "issue"}
    assert ("memory" in clocks) == isinstance(cfg, DecodeConfig)


@pytest.mark.skipif(nvdisasm() is None, reason="needs the nvidia-cuda-nvdisasm wheel")
@pytest.mark.parametrize(
    "cfg",
    [
        forward_config("fp16", 64, "local", True, True),
        forward_config("fp8_e4m3", 64, "causal", True, True, "fp16"),
        decode_config("fp8_e4m3", 64, True, "bf16"),
        forward_config("fp16", 64, "causal", False, False, features=frozenset({("attn_mask", "bf16")})),
        decode_config("fp16", 96, False, source=KeySource(is_ragged=True)),
        *kernels_of(pass_config("bf16", 128, "local", True, True)),
    ],
    ids=lambda cfg: cfg.name,
)
def test_units_agree_with_nvdisasm(cfg, tmp_path):
    from fa3_cute.runtime import compiler
    from fa3_cute.runtime.cubin import read_cubin

    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiler._compile(cfg, f"--keep-cubin --dump-dir {tmp_path}").__cubin__)
    listing = subprocess.run([nvdisasm(), "-c", path], capture_output=True, text=True, check=True).stdout
    (kernel,) = read_cubin(path.read_bytes()).values()
    mnemonics = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\w+)", listing, re.MULTILINE)
    unit_of = {mnemonic: unit for unit, names in units.OPERATIONS.items() for mnemonic in names}
    unit_of |= dict.fromkeys(("CGAERRBAR", "UCGABAR_ARV", "UCGABAR_WAIT"), "control")
    assert not set(mnemonics) - unit_of.keys()
    mix = units.instruction_mix(kernel.opcodes)
    assert mix == {unit: sum(unit_of[name] == unit for name in mnemonics) for unit in mix}
