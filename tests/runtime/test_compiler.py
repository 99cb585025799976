"""Compiling without a GPU, and the cache: in memory, on disk, between threads and processes, and damaged."""

import importlib
import inspect
import json
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fa3_cute.runtime import compiler
from fa3_cute.runtime import disk_cache
from fa3_cute.planning.tables import decode_config, forward_config
from fa3_cute.contract.rules import ALIGNMENT

CFG = forward_config("bf16", 64, "causal", True, False)
DECODE_CFG = decode_config("bf16", 64, True)
DESCALES = ("q_descale", "k_descale", "v_descale")
KEY, CODE = "0123456789abcdef" * 4, b"\x7fELF not really" * 100
REPOSITORY = Path(compiler.__file__).parents[2]

GET_KERNEL = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from fa3_cute.runtime import compiler
from fa3_cute.planning import tables as heuristics
try:
    print(type(compiler.get_kernel(heuristics.forward_config("bf16", 64, "causal", True, False))).__name__)
except compiler.CompileError as error:
    print("CompileError:", error)
"""


def start_process(script: str, **environment: str) -> subprocess.Popen:
    """A fresh interpreter on this checkout; in its environment only what is given has to do with us or the DSL."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FA3_CUTE", "CUTE_DSL"))}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=clean | environment,
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def output_of(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Each test starts with nothing in memory and a disk cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(folder))
    monkeypatch.delenv("FA3_CUTE_DISABLE_JIT", raising=False)
    monkeypatch.setattr(compiler, "_kernels", {})
    return folder


@pytest.fixture(scope="module")
def compiled():
    return compiler._compile(CFG)


@pytest.fixture
def compiles(compiled, monkeypatch):
    """The configs that were compiled; the compiler itself hands out one ready-made result."""
    configs = []
    monkeypatch.setattr(compiler, "_compile", lambda cfg, options="": configs.append(cfg) or compiled)
    return configs


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


# ---- the disk cache: bytes in, bytes out -----------------------------------------------------------------------------


def test_disk_round_trip(empty_cache):
    assert disk_cache.find("fwd", KEY) is None
    path = disk_cache.store("fwd", KEY, CODE)
    assert path == disk_cache.find("fwd", KEY) == entry(empty_cache)
    assert path.read_bytes().startswith(CODE)
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert disk_cache.find("fwd", "f" * 64) is None


def test_store_replaces(empty_cache):
    disk_cache.store("fwd", KEY, CODE)
    path = disk_cache.store("fwd", KEY, CODE * 2)
    assert path == entry(empty_cache) == disk_cache.find("fwd", KEY)
    assert path.read_bytes().startswith(CODE * 2)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[: -disk_cache.TRAILER_BYTES],
        lambda data: flipped(data, 0),
        lambda data: flipped(data, 700),
        lambda data: flipped(data, len(data) - 1),
        lambda data: bytes(len(data)),
    ],
    ids=["empty", "10 bytes", "half", "one short", "one more", "no trailer", "first bit", "a bit", "last bit", "zeros"],
)
def test_damaged_entry_is_a_miss(damage, caplog):
    path = disk_cache.store("fwd", KEY, CODE)
    path.write_bytes(damage(path.read_bytes()))
    assert disk_cache.find("fwd", KEY) is None
    assert "damaged" in caplog.text
    assert disk_cache.find("fwd", KEY) is None and disk_cache.store("fwd", KEY, CODE) == disk_cache.find("fwd", KEY)


def test_entry_of_another_key_is_a_miss():
    other = disk_cache.store("fwd", "f" * 64, CODE)
    path = disk_cache.store("fwd", KEY, CODE)
    other.replace(path)
    assert disk_cache.find("fwd", KEY) is None


def test_entry_that_is_no_file_of_ours_is_a_miss(empty_cache, tmp_path, monkeypatch):
    path = disk_cache.store("fwd", KEY, CODE)
    elsewhere = tmp_path / "elsewhere.o"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert disk_cache.find("fwd", KEY) is None
    path.unlink()
    path.mkdir()
    assert disk_cache.find("fwd", KEY) is None
    assert disk_cache.store("fwd", KEY, CODE) is None  # no file can take a folder's place: memory only
    assert not list(empty_cache.glob(".*"))


def test_foreign_entry_is_a_miss(monkeypatch):
    path = disk_cache.store("fwd", KEY, CODE)
    facts = os.stat_result([*path.stat()[:4], os.geteuid() + 1, *path.stat()[5:10]])
    monkeypatch.setattr(disk_cache.os, "fstat", lambda handle: facts)
    assert disk_cache.find("fwd", KEY) is None


def test_foreign_folder_is_not_used(monkeypatch, caplog):
    disk_cache.store("fwd", KEY, CODE)
    uid = os.geteuid()
    monkeypatch.setattr(disk_cache.os, "geteuid", lambda: uid + 1)
    assert disk_cache.find("fwd", KEY) is None
    assert disk_cache.store("fwd", KEY, CODE) is None
    assert "only this user" in caplog.text


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_folder_that_others_may_write_to_is_not_used(empty_cache, mode):
    disk_cache.store("fwd", KEY, CODE)
    empty_cache.chmod(mode)
    assert disk_cache.find("fwd", KEY) is None
    assert disk_cache.store("other", KEY, CODE) is None
    assert len(list(empty_cache.iterdir())) == 1


def test_cache_dir_follows_the_environment(monkeypatch):
    for name in ("FA3_CUTE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert disk_cache.cache_dir() == Path("/home/someone/.cache/fa3_cute")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert disk_cache.cache_dir() == Path("/home/someone/.cache/fa3_cute")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/someone")
    assert disk_cache.cache_dir() == Path("/var/cache/someone/fa3_cute")
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", "/somewhere")
    assert disk_cache.cache_dir() == Path("/somewhere")


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_key_depends_on_every_field_and_on_nothing_of_a_call():
    changed = {
        "dtype": "fp16",
        "head_dim": 96,
        "is_causal": True,
        "is_local": True,
        "is_varlen": True,
        "has_lse": False,
        "tile_m": 128,
        "tile_n": 112,
        "num_q_stages": CFG.num_q_stages + 1,
        "num_kv_stages": CFG.num_kv_stages - 1,
        "use_pingpong": not CFG.use_pingpong,
        "rescale_before_pv": not CFG.rescale_before_pv,
    }
    changed_fp8 = {"out_dtype": "fp16"}  # what only FP8 can change
    small = replace(CFG, tile_n=64, is_causal=False)  # leaves room to change one field at a time
    small_fp8 = replace(small, dtype="fp8_e4m3", out_dtype="bf16")
    assert changed.keys() | changed_fp8.keys() == {field.name for field in fields(CFG)}
    cfgs = [
        small,
        small_fp8,
        *(replace(small, **{name: value}) for name, value in changed.items()),
        *(replace(small_fp8, **{name: value}) for name, value in changed_fp8.items()),
    ]
    assert len({compiler.cache_key(cfg) for cfg in cfgs}) == len(cfgs)
    assert {type(value) for cfg in (CFG, small_fp8) for value in cfg.as_dict().values()} <= {int, bool, str, type(None)}


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(compiler, "source_hash", lambda: "other"),
        lambda patch: patch.setattr(compiler.cutlass, "__version__", "0"),
        lambda patch: patch.setattr(compiler.cutlass, "CUDA_VERSION", SimpleNamespace(major=99, minor=0)),
        lambda patch: patch.setattr(compiler.sys, "version_info", (3, 99)),
        lambda patch: patch.setattr(compiler, "ARCH", "sm_0"),
        lambda patch: patch.setenv("CUTE_DSL_LINEINFO", "1"),
    ],
    ids=["sources", "DSL version", "flavour", "Python", "arch", "DSL setting"],
)
def test_key_depends_on_what_compiles_it(change, monkeypatch):
    before = compiler.cache_key(CFG)
    change(monkeypatch)
    assert compiler.cache_key(CFG) != before


@pytest.mark.parametrize("cfg", [CFG, DECODE_CFG], ids=["forward", "decode"])
def test_arguments_follow_the_table(cfg):
    module, _, kernel = cfg.kernel.rpartition(".")
    entry = getattr(importlib.import_module(module), kernel)
    names = list(inspect.signature(entry.__call__).parameters)[1:]
    assert names == [name for name, _ in cfg.arguments]
    arguments = compiler.typed_arguments(cfg, range(0, 16 * len(names), 16))
    for (name, kind), argument in zip(cfg.arguments, arguments, strict=True):
        assert type(argument) is compiler.SCALAR_TYPES.get(kind, type(arguments[0])), name


def test_pointers_have_their_type_and_no_more_alignment_than_validation_asks_for(monkeypatch):
    monkeypatch.setattr(
        compiler.cute.runtime,
        "make_ptr",
        lambda element, value, space, assumed_align: (element.__name__, assumed_align),
    )
    arguments = {}
    for cfg in (CFG, DECODE_CFG):
        arguments |= zip(dict(cfg.arguments), compiler.typed_arguments(cfg, [0] * len(cfg.arguments)), strict=True)
    elements = {
        "q": "BFloat16",
        "k": "BFloat16",
        "v": "BFloat16",
        "out": "BFloat16",
        "softmax_lse": "Float32",
        "cu_seqlens_q": "Int32",
        "cu_seqlens_k": "Int32",
        "seqused_q": "Int32",
        "seqused_k": "Int32",
        "tile_counter": "Int32",
        "arrivals": "Int32",
        "partials": "Float32",
        **dict.fromkeys(DESCALES, "Float32"),
    }
    alignment = (
        ALIGNMENT
        | {name: ALIGNMENT[f"{name}_ptr"] for name in DESCALES}
        | {"tile_counter": 4, "arrivals": 4, "partials": ALIGNMENT["workspace"]}
    )
    pointers = dict.fromkeys(name for cfg in (CFG, DECODE_CFG) for name, kind in cfg.arguments if kind == "pointer")
    assert {name: arguments[name] for name in pointers} == {
        name: (element, alignment[name]) for name, element in elements.items()
    }


# ---- get_kernel ------------------------------------------------------------------------------------------------------


def test_memory_then_disk_then_compile(compiles, empty_cache, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "fa3_cute")
    kernel = compiler.get_kernel(CFG)
    assert compiler.get_kernel(replace(CFG)) is kernel
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == [f"compiled {CFG.name}"]
    monkeypatch.setattr(compiler, "_kernels", {})
    again = compiler.get_kernel(CFG)
    assert again is not kernel and type(again) is type(kernel)
    assert compiles == [CFG] and entry(empty_cache).name.startswith(CFG.name)


def test_damaged_object_is_compiled_again(compiles, empty_cache, monkeypatch):
    compiler.get_kernel(CFG)
    path = entry(empty_cache)
    data = path.read_bytes()
    path.write_bytes(data[:5000])
    monkeypatch.setattr(compiler, "_kernels", {})
    compiler.get_kernel(CFG)
    assert compiles == [CFG, CFG]
    assert disk_cache.find(CFG.name, compiler.cache_key(CFG)) == path


def test_object_that_does_not_load_is_compiled_again(compiles, monkeypatch):
    disk_cache.store(CFG.name, compiler.cache_key(CFG), CODE)  # a good checksum over code that is none
    assert compiler.get_kernel(CFG) is not None
    assert compiles == [CFG]


@pytest.mark.parametrize(
    "make",
    [lambda path: path.write_text("a file"), lambda path: path.mkdir(mode=0o777)],
    ids=["no folder", "writable by all"],
)
def test_without_a_disk_the_kernel_stays_in_memory(make, compiles, empty_cache):
    make(empty_cache)
    if empty_cache.is_dir():
        empty_cache.chmod(0o777)
    kernel = compiler.get_kernel(CFG)
    assert compiler.get_kernel(CFG) is kernel
    assert compiles == [CFG]
    assert empty_cache.is_file() or not list(empty_cache.iterdir())


def test_without_any_folder_to_write_to(compiled, compiles, empty_cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("read-only file system")

    monkeypatch.setattr(compiler.tempfile, "TemporaryDirectory", refuse)
    assert compiler.get_kernel(CFG) is compiled


@pytest.mark.parametrize("value, compiles_it", [("1", False), ("yes", False), ("0", True), ("", True)])
def test_disable_jit(value, compiles_it, compiles, monkeypatch):
    monkeypatch.setenv("FA3_CUTE_DISABLE_JIT", value)
    if compiles_it:
        compiler.get_kernel(CFG)
    else:
        with pytest.raises(compiler.CompileError, match=f"{CFG.name}.*FA3_CUTE_DISABLE_JIT"):
            compiler.get_kernel(CFG)
    assert bool(compiles) == compiles_it


def test_a_failure_to_compile_is_a_compile_error(monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("\x1b[91mno such tile\x1b[0m")

    monkeypatch.setattr(compiler.cute, "compile", fail)
    with pytest.raises(compiler.CompileError, match=f"{CFG.name} did not compile: no such tile$"):
        compiler.get_kernel(CFG)
    assert compiler._kernels == {}


def test_threads_compile_once(compiles, monkeypatch):
    def slow(cfg, fast=compiler._compile):
        time.sleep(0.2)
        return fast(cfg)

    monkeypatch.setattr(compiler, "_compile", slow)
    kernels = []
    threads = [threading.Thread(target=lambda: kernels.append(compiler.get_kernel(CFG))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiles == [CFG] and len(kernels) == 8 and len(set(map(id, kernels))) == 1


def test_two_processes_at_once_and_a_third_that_compiles_nothing(empty_cache):
    racing = [start_process(GET_KERNEL, FA3_CUTE_CACHE_DIR=str(empty_cache)) for _ in range(2)]
    assert all("compiled " + CFG.name in output_of(process) for process in racing)
    path = entry(empty_cache)
    later = output_of(start_process(GET_KERNEL, FA3_CUTE_CACHE_DIR=str(empty_cache), FA3_CUTE_DISABLE_JIT="1"))
    assert later == "CudaDialectJitCompiledFunction\n"
    path.write_bytes(path.read_bytes()[:-100])
    last = output_of(start_process(GET_KERNEL, FA3_CUTE_CACHE_DIR=str(empty_cache), FA3_CUTE_DISABLE_JIT="1"))
    assert "damaged" in last and f"CompileError: {CFG.name}" in last


def test_the_users_architecture_setting_does_not_matter(empty_cache):
    output = output_of(start_process(GET_KERNEL, FA3_CUTE_CACHE_DIR=str(empty_cache), CUTE_DSL_ARCH="sm_100a"))
    assert f"compiled {CFG.name}" in output
    assert disk_cache.find(CFG.name, compiler.cache_key(CFG)) is not None


# ---- compile_report --------------------------------------------------------------------------------------------------


def test_report_shows_what_a_bad_compile_costs(monkeypatch):
    def unoptimised(cfg, options, good=compiler._compile):
        return good(cfg, options + " --opt-level 0")

    monkeypatch.setattr(compiler, "_compile", unoptimised)
    report = compiler.compile_report(CFG)
    assert report.stack_bytes > 0 and report.spill_stores > 0 and report.spill_load_bytes > 0
    problems = " ".join(report.problems())
    assert "spills" in problems and "serialised" in problems
    assert json.loads(json.dumps(report.as_dict()))["config"]["head_dim"] == 64


def test_report_problems_name_each_rule():
    good = compiler.Report(CFG.name, CFG, 128, 0, 0, 0, 0, 0, CFG.smem_bytes, 48, 2, 2000, (), {}, 2.0)
    assert good.problems() == []
    for change in (
        {"stack_bytes": 8},
        {"spill_loads": 1},
        {"smem_bytes": CFG.smem_bytes + 1},
        {"wgmmas": 0},
        {"setmaxnregs": 0},
        {"warnings": ("C7508: setmaxnreg is ignored",)},
    ):
        assert len(replace(good, **change).problems()) == 1


def test_remarks_without_facts_are_an_error(compiled):
    with pytest.raises(compiler.CompileError, match="remarks"):
        compiler._parse_remarks("fwd", "ptxas info : nothing of interest")


def test_remarks_are_told_apart():
    remarks = compiler._parse_remarks(
        "fwd",
        """'Shared memory allocated: 197632 bytes'
        (C7508) setmaxnreg ignored
        (C7517) wait injected around line 1  (C7517) wait injected around line 2
        16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads""",
    )
    assert remarks["smem_bytes"] == 197632 and remarks["notes"] == {"C7517": 2}
    assert (remarks["stack_bytes"], remarks["spill_store_bytes"], remarks["spill_load_bytes"]) == (16, 24, 32)
    (warning,) = remarks["warnings"]
    assert warning.startswith("C7508")


def test_source_hash_covers_every_source(tmp_path, monkeypatch):
    (tmp_path / "fa3_cute" / "kernels").mkdir(parents=True)
    (tmp_path / "fa3_cute" / "runtime").mkdir()
    files = [tmp_path / "fa3_cute" / name for name in ("runtime/compiler.py", "kernels/a.py")]
    monkeypatch.setattr(compiler, "__file__", str(files[0]))
    hashes = set()
    for content in ("1", "2"):
        for path in files:
            path.write_text(content)
            hashes.add(compiler.source_hash.__wrapped__())
    assert len(hashes) == 4
