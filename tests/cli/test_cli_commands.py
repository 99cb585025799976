"""The commands doctor, explain and inspect: what they find, what they print, which exit status."""

import ctypes
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from disassembler import nvdisasm

import fa3_cute
from fa3_cute.arrays import memory as device
from fa3_cute.api import kernel_config
from fa3_cute.cli import doctor, main, units
from fa3_cute.cli import inspect as inspect_command
from fa3_cute.planning.config import DecodeConfig
from fa3_cute.planning.tables import all_configs, decode_config, forward_config
from fa3_cute.contract.params import FlashAttentionParams
from fa3_cute.contract.reference import attention_reference
from fa3_cute.contract.status import FlashAttentionError, Status

ROOT = Path(__file__).resolve().parents[2]


def answer(capsys, *argv: str) -> tuple[int, dict]:
    """Exit status and JSON of a command."""
    status = main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


# ---- doctor ----------------------------------------------------------------------------------------------------------


class FakeDriver:
    """libcuda with the GPUs that are given: (name, major, minor)."""

    def __init__(self, *gpus, version: int = 13000, init: int = 0):
        self.gpus, self.version, self.init = gpus, version, init

    def cuInit(self, flags):
        return self.init

    def cuDriverGetVersion(self, place):
        return self.write(place, self.version)

    def cuDeviceGetCount(self, place):
        return self.write(place, len(self.gpus))

    def cuDeviceGet(self, place, ordinal):
        return self.write(place, ordinal)

    def cuDeviceGetName(self, buffer, size, device):
        buffer.value = self.gpus[device][0].encode()
        return 0

    def cuDeviceGetAttribute(self, place, number, device):
        _, major, minor = self.gpus[device]
        return self.write(place, {doctor.MAJOR: major, doctor.MINOR: minor, doctor.NUM_SMS: 132}[number])

    @staticmethod
    def write(place, value):
        ctypes.cast(place, ctypes.POINTER(ctypes.c_int))[0] = value
        return 0


H200, A100 = ("NVIDIA H200", 9, 0), ("NVIDIA A100", 8, 0)


def no_driver():
    raise doctor.Wrong("no CUDA driver")


def examined(monkeypatch, driver, *names: str) -> list[doctor.Finding]:
    monkeypatch.setattr(doctor, "load_driver", no_driver if driver is None else lambda: driver)
    return [doctor.finding(name, doctor.CHECKS[name]) for name in names]


@pytest.mark.parametrize(
    "driver, are_right, words",
    [
        (FakeDriver(H200), (True, True), "0: NVIDIA H200, compute capability 9.0, 132 SMs"),
        (FakeDriver(A100, H200), (True, True), "1: NVIDIA H200"),
        (FakeDriver(A100), (True, False), "8.0, 132 SMs: forward needs"),
        (FakeDriver(), (True, False), "none: forward needs"),
        (FakeDriver(H200, version=11080), (False, True), "NVIDIA H200"),
        (FakeDriver(H200, init=100), (True, False), "cuInit failed with 100"),
        (None, (False, False), "no CUDA driver"),
    ],
)
def test_driver_and_gpus(driver, are_right, words, monkeypatch):
    found = examined(monkeypatch, driver, "driver", "GPUs")
    assert tuple(finding.is_right for finding in found) == are_right
    assert words in found[1].text


def test_self_test_runs_on_the_first_hopper_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "forward_once", lambda ordinal: (f"ran on {ordinal}", {}))
    monkeypatch.setattr(doctor, "compile_once", lambda: ("compiled", {}))
    for driver, text in ((FakeDriver(A100, H200), "ran on 1"), (FakeDriver(A100), "compiled"), (None, "compiled")):
        assert examined(monkeypatch, driver, "self-test")[0].text == text


@pytest.mark.parametrize("factor, is_right", [(1, True), (1.1, False), (np.nan, False)])
def test_self_test_compares_with_the_reference(factor, is_right, monkeypatch):
    """On a GPU that computes the reference, times a factor."""
    memory = []

    def upload(array, stream):
        memory.append(array)
        return len(memory)

    def forward(params, stream):
        q, k, v = (memory[number - 1] for number in (params.q, params.k, params.v))
        memory[params.out - 1] = factor * attention_reference(q, k, v)[0]
        return Status.OK

    gpu = SimpleNamespace(name="NVIDIA H200", create_stream=lambda: None)
    fakes = {
        "open_device": lambda ordinal: gpu,
        "upload": upload,
        "address": lambda buffer: buffer,
        "allocate": lambda nbytes, stream: upload(None, stream),
        "fill": lambda buffer, byte, stream: None,
        "download": lambda buffer, shape, dtype, stream: memory[buffer - 1].astype(dtype),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(device, name, fake)
    monkeypatch.setattr(fa3_cute, "forward", forward)
    found = doctor.finding("self-test", lambda: doctor.forward_once(0))
    assert found.is_right == is_right and ("agrees with" if is_right else "is off by") in found.text, found
    json.dumps(found.facts, allow_nan=False)


@pytest.mark.gpu
def test_self_test_on_the_gpu():
    found = doctor.finding("self-test", lambda: doctor.forward_once(0))
    assert found.is_right and found.facts["error"] < 1e-3, found


def test_everything_right(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"this": lambda: ("is well", {"size": 1})})
    assert answer(capsys, "doctor") == (
        0,
        {"is_right": True, "findings": [{"name": "this", "is_right": True, "text": "is well", "facts": {"size": 1}}]},
    )
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok     this          is well\n\nall is right\n"


def test_whatever_a_check_raises_is_a_finding(monkeypatch, capsys):
    def breaks(error):
        def check():
            raise error

        return check

    monkeypatch.setattr(
        doctor,
        "CHECKS",
        {
            "a": breaks(OSError("libsomething.so: cannot open\nsecond line")),
            "b": breaks(ValueError()),
            "c": breaks(doctor.Wrong("is ill", code=7)),
            "d": lambda: ("is well", {}),
        },
    )
    status, said = answer(capsys, "doctor")
    assert (status, said["is_right"]) == (1, False)
    assert [found["text"] for found in said["findings"]] == [
        "OSError: libsomething.so: cannot open",
        "ValueError: no further word",
        "is ill",
        "is well",
    ]
    assert said["findings"][2]["facts"] == {"code": 7}
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("\n\nwrong: a, b, c\n")


@pytest.mark.parametrize(
    "blocked, wrong",
    [
        ("cutlass", {"CuTe DSL", "launch", "self-test"}),
        ("cuda.bindings", {"cuda-python", "launch", "self-test"}),
        ("cuda", {"cuda-python", "cuda-core", "launch", "self-test"}),
        ("numpy", {"NumPy"}),
        ("ml_dtypes", set()),
    ],
)
def test_a_missing_package_is_a_finding(blocked, wrong, tmp_path):
    """In a process that cannot import it, and without a GPU; the other checks go on."""
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {blocked!r} or name.startswith({blocked + '.'!r}):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from fa3_cute.cli import doctor, main\n"
        "def no_driver(): raise doctor.Wrong('no driver')\n"
        "doctor.load_driver = no_driver\n"
        "sys.exit(main(['doctor', '--json']))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "FA3_CUTE_CACHE_DIR": str(tmp_path)},
    )
    # A C extension that misses NumPy prints a traceback of its own, which is none of this package.
    assert ran.returncode == 1 and "fa3_cute" not in ran.stderr, ran.stderr
    findings = json.loads(ran.stdout)["findings"]
    assert [found["name"] for found in findings] == list(doctor.CHECKS)
    assert {found["name"] for found in findings if not found["is_right"]} >= wrong | {"driver", "GPUs"}
    assert all(found["is_right"] for found in findings if found["name"] in ("Python", "cache"))
    (ml_dtypes,) = (found for found in findings if found["name"] == "ml_dtypes")
    assert ml_dtypes["is_right"] == (blocked != "numpy"), ml_dtypes  # it needs NumPy; itself it is optional


@pytest.mark.parametrize(
    "wants, version, is_right",
    [
        ("==4.8.1", "4.8.1", True),
        ("==4.8.1", "4.9.0", False),
        (">=12.9", "12.8.0", False),
        (">=12.9", "13.0", True),
        (">=1.26", "1.26.4", True),
        (">=0.5", "0.5rc1", True),
        ("", "1", True),
    ],
)
def test_versions_must_suit(wants, version, is_right, monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy>=2", f"a-package{wants}", "a-package-2"])
    found = doctor.finding("it", lambda: doctor.must_suit("a-package", version, version, {}))
    assert found.is_right == is_right and (is_right or found.text == f"{version}: must be {wants}")


def test_versions_of_a_source_tree(monkeypatch):
    def not_installed(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", not_installed)
    assert doctor.requirement("numpy") == ("", "")


def test_cache_that_cannot_be_used(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(file / "cache"))
    found = doctor.finding("cache", doctor.check_cache)
    assert not found.is_right and "is not a folder" in found.text and found.facts["is_writable"] is False


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain_names_every_problem(capsys):
    argv = ["explain", "--head-dim", "80", "--num-heads", "6", "--num-heads-k", "4", "--causal", "--window", "1,-1"]
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
        (["--dtype", "fp8_e4m3", "--head-dim", "96"], forward_config("fp8_e4m3", 96, "full", False, False, "bf16")),
        (
            ["--dtype", "fp8_e4m3", "--out-dtype", "fp16", "--mode", "decode"],
            decode_config("fp8_e4m3", 128, False, "fp16"),
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
    assert f"kernel    {cfg.name}\n" in printed and said["reason"] in printed
    assert ("for V transposed" in printed) == (cfg.is_fp8 and not cfg.packs_heads)


@pytest.mark.parametrize(
    "argv, status",
    [
        (["--dtype", "fp8_e4m3", "--head-dim", "256"], "FP8_HEAD_DIM"),
        (["--dtype", "bf16", "--out-dtype", "fp16"], "INVALID_ARGUMENT"),
    ],
)
def test_explain_refuses_types_that_do_not_go_together(argv, status, capsys):
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


# ---- inspect ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("cfg", all_configs(), ids=lambda cfg: cfg.name)
def test_map_of_shared_memory(cfg):
    """Its parts are all of it, and what the barriers and the decode kernel's LSE are padded to is left for them."""
    parts = inspect_command.smem_map(cfg)
    assert sum(part["bytes"] for part in parts) == cfg.smem_bytes and parts[0]["bytes"] == 1024


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--dtype", "fp8_e4m3", "--head-dim", "192"], "fp8_e4m3 has 64, 96, 128"),
        (["--out-dtype", "fp16"], "O is bf16, as Q, K and V are"),
    ],
)
def test_inspect_of_what_does_not_exist(argv, said, capsys):
    assert main(["inspect", *argv]) == 2 and said in capsys.readouterr().out


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
        decode_config("bf16", 64, True),
        forward_config("fp8_e4m3", 64, "causal", True, True, "fp16"),
        decode_config("fp8_e4m3", 64, True, "bf16"),
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
