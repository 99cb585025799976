"""Compiling without a GPU: the key, the lookup in memory and on disk, between threads and processes."""

import importlib
import inspect
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fa3_cute.runtime import build, compiler, disk_cache
from fa3_cute.planning.tables import decode_config, forward_config
from fa3_cute.contract.rules import ALIGNMENT

CFG = forward_config("bf16", 64, "causal", True, False)
DECODE_CFG = decode_config("bf16", 64, True)
OTHER_CFG = forward_config("fp16", 64, "full", False, False)
DESCALES = ("q_descale", "k_descale", "v_descale")
CODE = b"\x7fELF not really" * 100
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
    for name in ("FA3_CUTE_DISABLE_JIT", "FA3_CUTE_CACHE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler, "_kernels", {})
    return folder


@pytest.fixture(scope="module")
def compiled():
    return build.object_of(CFG)


@pytest.fixture
def compiles(compiled, monkeypatch):
    """The configs that were compiled; the compiler itself hands out one ready-made object."""
    configs = []
    monkeypatch.setattr(compiler, "_object", lambda cfg: configs.append(cfg) or compiled)
    return configs


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


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
        "packed_heads": 2,
        "has_softcap": True,
        "has_alibi": True,
        "attn_mask": "bool",
        "score_mod": "a_mod_0",
        "mask_mod": "a_mod_0",
        "has_dropout": True,
        "is_padded": True,
    }
    changed_fp8 = {"out_dtype": "fp16"}  # what only FP8 can change
    changed_ragged = {"is_ragged": True, "page_box": 32, "box_is_wide": True}  # each with the ones before it
    changed_together = (
        {"mask_mod": "a_mod_0", "has_block_lists": True},
        {"is_local": True, "has_chunks": True},
        {"head_dim": 192, "num_q_stages": 1, "head_dim_v": 128},
        {"is_varlen": True, "is_ragged": True, "has_leftpad": True},
    )
    cached = decode_config("bf16", 64, True, kv_dtype="fp8_e4m3")
    of_decode = [DECODE_CFG, cached, replace(cached, num_wide_slots=cached.num_wide_slots - 1)]
    small = replace(CFG, tile_n=64, is_causal=False)  # leaves room to change one field at a time
    small_fp8 = replace(small, dtype="fp8_e4m3", out_dtype="bf16")
    names = {name for some in (changed, changed_fp8, changed_ragged, *changed_together) for name in some}
    assert names | {"kv_dtype", "num_wide_slots"} == {field.name for field in fields(CFG)}
    ragged = [dict(list(changed_ragged.items())[:count]) for count in (1, 2, 3)]
    cfgs = [
        small,
        small_fp8,
        *(replace(small, **{name: value}) for name, value in changed.items()),
        *(replace(small_fp8, **{name: value}) for name, value in changed_fp8.items()),
        *(replace(small, is_varlen=True, **values) for values in ragged),
        *(replace(small, **values) for values in changed_together),
        *of_decode,
    ]
    assert len({compiler.cache_key(cfg) for cfg in cfgs}) == len(cfgs)
    assert {type(value) for cfg in (CFG, small_fp8) for value in cfg.as_dict().values()} <= {int, bool, str, type(None)}


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(compiler, "hash_of_imports", lambda *modules: "other"),
        lambda patch: patch.setattr(compiler.cutlass, "__version__", "0"),
        lambda patch: patch.setattr(compiler.cutlass, "CUDA_VERSION", SimpleNamespace(major=99, minor=0)),
        lambda patch: patch.setattr(compiler, "ARCH", "sm_0"),
        lambda patch: patch.setenv("CUTE_DSL_LINEINFO", "1"),
    ],
    ids=["sources", "DSL version", "flavour", "arch", "DSL setting"],
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
        assert type(argument) is build.SCALAR_TYPES.get(kind, type(arguments[0])), name


def test_pointers_have_their_type_and_no_more_alignment_than_validation_asks_for(monkeypatch):
    monkeypatch.setattr(
        build.cute.runtime,
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
        "page_table": "Int32",
        "kv_batch_idx": "Int32",
        "s_aux": "Uint8",
        "alibi_slopes": "Float32",
        "attn_mask": "Uint8",
        "rng_state": "Uint64",
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


def test_object_that_does_not_load_after_its_compile_is_a_compile_error(monkeypatch):
    monkeypatch.setattr(compiler, "_object", lambda cfg: CODE)
    with pytest.raises(compiler.CompileError, match=f"{CFG.name} was compiled but does not load"):
        compiler.get_kernel(CFG)


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

    monkeypatch.setattr(build.cute, "compile", fail)
    with compiler.in_this_process(), pytest.raises(compiler.CompileError) as raised:
        compiler.get_kernel(CFG)
    assert str(raised.value) == f"{CFG.name} did not compile: no such tile"
    assert compiler._kernels == {}


def test_a_failure_names_the_settings_that_may_be_its_reason(monkeypatch):
    monkeypatch.setenv("CUTE_DSL_DRYRUN", "1")
    monkeypatch.setattr(build.cute, "compile", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(compiler.CompileError, match="CUTE_DSL_DRYRUN set"):
        build.compile_config(CFG)


def test_threads_compile_once(compiles, monkeypatch):
    def slow(cfg, fast=compiler._object):
        time.sleep(0.2)
        return fast(cfg)

    monkeypatch.setattr(compiler, "_object", slow)
    kernels = []
    threads = [threading.Thread(target=lambda: kernels.append(compiler.get_kernel(CFG))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiles == [CFG] and len(kernels) == 8 and len(set(map(id, kernels))) == 1


def test_a_kernel_is_found_while_another_one_compiles(compiled, monkeypatch):
    """In memory and on disk, and a third one may compile too."""
    is_compiling, may_end = threading.Event(), threading.Event()

    def wait(cfg):
        if cfg == CFG:
            is_compiling.set()
            assert may_end.wait(60)
        return compiled

    monkeypatch.setattr(compiler, "_object", wait)
    monkeypatch.setattr(compiler, "_load", lambda code, name: name)
    disk_cache.store(DECODE_CFG.name, compiler.cache_key(DECODE_CFG), compiled)
    thread = threading.Thread(target=compiler.get_kernel, args=(CFG,))
    thread.start()
    assert is_compiling.wait(60)
    for cfg in (DECODE_CFG, DECODE_CFG, OTHER_CFG):
        assert compiler.get_kernel(cfg) == cfg.name
    assert CFG not in compiler._kernels
    may_end.set()
    thread.join()
    assert compiler._kernels[CFG] == CFG.name


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
