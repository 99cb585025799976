"""FwdConfig -> compiled kernel, on any machine: no GPU, driver, CUDA toolkit or environment variable is needed.

A kernel is looked up in memory, then on disk (disk_cache.py), and compiled only then, in a process of its own
(compile_process.py). Every kernel, cold or warm, comes out of the DSL's object loader: the DSL gives a cross-compiled
function no executable code in its own process, and one way in is less to test than two.

Environment: FA3_CUTE_CACHE_DIR moves the disk cache; FA3_CUTE_CACHE_PATH names folders that are read besides;
FA3_CUTE_DISABLE_JIT=1 turns a compile into a CompileError.
"""

import hashlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..planning.operations import Config
from . import disk_cache
from .build import ARCH, CODE_SETTINGS, CompileError, foreign_settings, object_of, plain_text, typed_arguments
from .build import compile_config as _compile
from .compile_process import compile_elsewhere, described
from .disk_cache import cache_dir
from .dsl import cutlass, load_object
from .report import Report, compile_and_read, compile_report, spills_of
from .sources import hash_of_imports, source_hash
from .tracing.stats import compiled, from_disk

__all__ = [
    "CODE_SETTINGS",
    "CompileError",
    "Report",
    "_compile",
    "cache_dir",
    "compile_and_read",
    "compile_report",
    "get_kernel",
    "in_this_process",
    "source_hash",
    "typed_arguments",
]

log = logging.getLogger("fa3_cute")

_lock = threading.Lock()  # of the two below, never held for long
_locks: dict[Config, threading.Lock] = {}  # one thread compiles a kernel, others wait for it and for no other
_kernels: dict[Config, Any] = {}
_load_lock = threading.Lock()  # the DSL's loader is for one thread at a time; it takes milliseconds
_is_elsewhere = True


def get_kernel(cfg: Config) -> Any:
    """The compiled kernel of a config, not yet loaded on any device: from memory, else from disk, else compiled.

    Thread-safe: a second caller of the same config waits for the first, callers of others do not. Raises CompileError.
    """
    if (kernel := _kernels.get(cfg)) is None:
        with _lock:
            lock = _locks.setdefault(cfg, threading.Lock())
        with lock:
            if (kernel := _kernels.get(cfg)) is None:
                kernel = _kernels[cfg] = _find_on_disk(cfg) or _compile_and_store(cfg)
    return kernel


@contextmanager
def in_this_process() -> Iterator[None]:
    """Inside, kernels are compiled in this process, for one that is there for nothing else; not for threads. Where the
    DSL has settings that no key has, they are compiled elsewhere all the same."""
    global _is_elsewhere
    before, _is_elsewhere = _is_elsewhere, False
    try:
        yield
    finally:
        _is_elsewhere = before


def dsl_version() -> str:
    """Of the CuTe DSL in use."""
    return cutlass.__version__


def cache_key(cfg: Config) -> str:
    """SHA-256 over all that the object depends on. Plain values only: no length, no pointer, nothing from a call.

    The DSL brings its ptxas with it: version and flavour name both. Python's version is not part of it: the host code
    calls no Python, and objects made with Python 3.11 and 3.13 are the same byte for byte.
    """
    facts = {
        "sources": hash_of_imports("runtime.build", cfg.kernel.partition(".")[2].rpartition(".")[0]),
        "dsl": cutlass.__version__,
        "flavour": f"{cutlass.CUDA_VERSION.major}.{cutlass.CUDA_VERSION.minor}",
        "arch": ARCH,
        "host": platform.machine(),
        "settings": {name: os.environ.get(name, "") for name in CODE_SETTINGS},
        "config": {type(cfg).__name__: cfg.as_dict()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _find_on_disk(cfg: Config) -> Any | None:
    found = disk_cache.read(cfg.name, cache_key(cfg))
    if found is None:
        return None
    try:
        kernel = _load(found.code, cfg.name)
    except Exception as error:  # whatever an object with a good checksum does wrong: compile it again
        log.warning("ignoring %s: %s", found.path, plain_text(error))
        return None
    from_disk.add()
    return kernel


def _compile_and_store(cfg: Config) -> Any:
    if os.environ.get("FA3_CUTE_DISABLE_JIT", "0") not in ("", "0"):
        own = cache_dir() or disk_cache.folder_problem()
        folders = ", ".join(map(str, (own, *disk_cache.read_only_dirs())))
        raise CompileError(f"{cfg.name} is not in the cache ({folders}) and FA3_CUTE_DISABLE_JIT is set: {cfg}")
    start = time.perf_counter()
    code = _object(cfg)
    disk_cache.store(cfg.name, cache_key(cfg), code)
    try:
        kernel = _load(code, cfg.name)
    except Exception as error:
        raise CompileError(f"{cfg.name} was compiled but does not load: {plain_text(error)}") from error
    if getattr(cfg, "mod_names", "") and (spills := spills_of(cfg, code)):
        log.warning("%s", spills)
    compiled.add(seconds := time.perf_counter() - start)
    log.info("compiled %s in %.2f s", cfg.name, seconds)
    return kernel


def _object(cfg: Config) -> bytes:
    job = described(cfg) if _is_elsewhere or foreign_settings() else None
    return compile_elsewhere(cfg.name, job) if job else object_of(cfg)


def _load(code: bytes, name: str) -> Any:
    with _load_lock:
        return load_object(code, name)
