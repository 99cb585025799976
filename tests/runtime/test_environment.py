"""A filled cache serves in whatever environment, and a compile sees none of it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fa3_cute.planning.tables import forward_config
from fa3_cute.runtime import build, compiler, disk_cache

CFG = forward_config("bf16", 64, "causal", True, False)
REPOSITORY = Path(compiler.__file__).parents[2]
GET_KERNEL = """
from fa3_cute.runtime import compiler
from fa3_cute.planning.tables import forward_config
try:
    kernel = compiler.get_kernel(forward_config("bf16", 64, "causal", True, False))
    print(type(kernel).__name__, callable(kernel.capi_func), len(kernel._get_cuda_init_and_load()))
except compiler.CompileError as error:
    print("CompileError:", error)
"""
FOUND = "CudaDialectJitCompiledFunction True 2"
NO_WORKING_FOLDER = """
import os, tempfile
folder = tempfile.mkdtemp()
os.chdir(folder)
os.rmdir(folder)
"""
NO_TEMPORARY_FOLDER = """
import tempfile
tempfile._candidate_tempdir_list = lambda: ["/dev/null/none"]
"""
SETTINGS = {
    "CUTE_DSL_LIBS": "/nowhere/libcute_dsl_runtime.so",
    "CUTE_DSL_DRYRUN": "1",
    "CUTE_DSL_ENABLE_TVM_FFI": "1",
    "CUTE_DSL_LOG_TO_FILE": "1",
    "CUTE_DSL_LOG_TO_CONSOLE": "1",
    "CUTE_DSL_LOG_LEVEL": "loud",
    "CUTE_DSL_WARNINGS_AS_ERRORS": "1",
    "CUTE_DSL_NO_CACHE": "1",
    "CUTE_DSL_KEEP": "sass",
    "CUTE_DSL_ARCH": "sm_100a",
    "CUTE_DSL_COMPILER_BACKEND": "none such",
    "CUTE_DSL_ENABLE_PYIR": "1",
    "CUTE_DSL_DUMP_DIR": "/nowhere",
    "CUTE_DSL_CACHE_DIR": "/dev/null/none",
    "CUTE_EXPERIMENTAL_DSL_DRYRUN": "maybe",
    "TMPDIR": "/dev/null/none",
}


# Those with which the DSL imports, three kinds of them, each kind in a process; those that it refuses one by one: with
# them it is imported without any.
KINDS = {
    "code": ("DRYRUN", "ENABLE_TVM_FFI", "WARNINGS_AS_ERRORS", "ARCH", "COMPILER_BACKEND", "ENABLE_PYIR"),
    "folders": ("LIBS", "LOG_TO_FILE", "DUMP_DIR", "CACHE_DIR"),
    "output": ("LOG_TO_CONSOLE", "NO_CACHE", "KEEP"),
    "a level": ("LOG_LEVEL",),
}
TOGETHER = {kind: [f"CUTE_DSL_{name}" for name in names] for kind, names in KINDS.items()}
TOGETHER |= {"a switch": ["CUTE_EXPERIMENTAL_DSL_DRYRUN"], "temporary folder": ["TMPDIR"]}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache folder that holds CFG."""
    folder = tmp_path_factory.mktemp("environment") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FA3_CUTE_CACHE_DIR", str(folder))
        patch.delenv("FA3_CUTE_DISABLE_JIT", raising=False)
        patch.setattr(compiler, "_kernels", {})
        with compiler.in_this_process():
            compiler.get_kernel(CFG)
    return folder


def said(script: str, cwd: Path = REPOSITORY, without: tuple[str, ...] = (), **environment: str) -> list[str]:
    """The lines that a fresh process prints, its standard error included."""
    ours = ("FA3_CUTE", "CUTE_DSL", *without)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    clean["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean | environment,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    return done.stdout.splitlines()


def served(folder: Path, script: str = GET_KERNEL, **environment) -> bool:
    """Whether the kernel comes out of this folder."""
    lines = said(script, FA3_CUTE_CACHE_DIR=str(folder), FA3_CUTE_DISABLE_JIT="1", **environment)
    assert lines[-1] == FOUND, lines
    return True


@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
def test_a_filled_cache_serves_whatever_is_set(names, filled, tmp_path):
    assert served(filled, cwd=tmp_path, **{name: SETTINGS[name] for name in names})


def test_every_setting_is_tried():
    assert sorted(name for names in TOGETHER.values() for name in names) == sorted(SETTINGS)


def test_a_filled_cache_serves_with_everything_set_and_nothing_there(filled):
    """Where a log file cannot be made either: the working folder is gone."""
    assert served(filled, NO_WORKING_FOLDER + NO_TEMPORARY_FOLDER + GET_KERNEL, without=("HOME", "USER"), **SETTINGS)


def test_a_filled_cache_serves_through_a_relative_folder_and_through_home(filled):
    away = GET_KERNEL.replace("try:", "import os\nos.chdir('/')\ntry:")
    first = "from fa3_cute.runtime.disk_cache import cache_dir\ncache_dir()\n"
    assert served(filled.relative_to(filled.parent), first + away, cwd=filled.parent)
    assert served(Path("~") / filled.name, HOME=str(filled.parent))


def test_a_filled_cache_that_is_only_read_serves(filled):
    """The own folder cannot even be made."""
    environment = {"FA3_CUTE_CACHE_DIR": "/dev/null/none", "FA3_CUTE_CACHE_PATH": str(filled)}
    assert said(GET_KERNEL, FA3_CUTE_DISABLE_JIT="1", **environment)[-1] == FOUND


def test_a_compile_sees_nothing_of_it():
    """And the cache cannot be written: the kernel stays in memory."""
    script = NO_WORKING_FOLDER + GET_KERNEL
    lines = said(script, without=("HOME", "USER"), FA3_CUTE_CACHE_DIR="/dev/null/none", **SETTINGS)
    assert lines[-1] == FOUND, lines


def test_a_compile_without_any_temporary_folder_names_the_cause(monkeypatch):
    """The DSL's exporter needs one."""
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/none")
    with pytest.raises(
        compiler.CompileError, match=r"could not be exported: \[Errno 20\] Not a directory: '/dev/null/none/"
    ):
        build.object_of(CFG)


def test_a_setting_that_the_dsl_refuses_is_named_and_left_out(tmp_path):
    """One that is part of the key, so that nothing else is found under it."""
    lines = said(GET_KERNEL, FA3_CUTE_CACHE_DIR=str(tmp_path), CUTE_DSL_DEBUG="maybe")
    assert lines[-1] == FOUND and "CUTE_DSL_DEBUG='maybe'" in lines[0] and "without CUTE_DSL_*" in lines[0]
    (entry,) = disk_cache.entries(tmp_path)
    assert entry.path != disk_cache._path(tmp_path, CFG.name, compiler.cache_key(CFG))
