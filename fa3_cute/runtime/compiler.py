"""FwdConfig -> compiled kernel, on any machine: no GPU, driver, CUDA toolkit or environment variable is needed.

A kernel is looked up in memory, then on disk (disk_cache.py), and compiled only then. Every kernel, cold or warm, comes
out of the DSL's object loader: the DSL gives a cross-compiled function no executable code in its own process, and one
way in is less to test than two.

Environment: FA3_CUTE_CACHE_DIR moves the disk cache; FA3_CUTE_DISABLE_JIT=1 turns a compile into a CompileError.
"""

import ctypes
import hashlib
import json
import logging
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Int64, cute

from ..contract.arguments import pointer_facts
from ..kernels.common.layout import ELEMENT_TYPES
from ..planning.config import SMEM_BYTES_PER_CTA
from ..planning.operations import Config
from . import disk_cache
from .cubin import CubinKernel, read_cubin
from .disk_cache import cache_dir

__all__ = [
    "CompileError",
    "Report",
    "cache_dir",
    "compile_and_read",
    "compile_report",
    "get_kernel",
    "source_hash",
    "typed_arguments",
]

ARCH = "sm_90a"
SCALAR_TYPES = {"int64": Int64, "int32": Int32, "float32": Float32, "stream": CUstream}
POINTED_TYPES = {"float32": Float32, "int32": Int32}  # others are the config's own

# Settings of the DSL that change the code it generates; they are part of the cache key.
CODE_SETTINGS = ("CUTE_DSL_LINEINFO", "CUTE_DSL_DEBUG", "CUTE_DSL_COMPILER_OPT", "CUTE_DSL_ENABLE_ASSERTIONS")

# ptxas remarks that cost performance without failing the compile, and what they mean.
UNACCEPTABLE_REMARKS = {
    "C7508": "setmaxnreg is ignored: the register split between producer and consumers is lost",
    "C7510": "WGMMA is serialised",
    "C7511": "WGMMA is serialised: too few registers",
    "C7512": "WGMMA is serialised",
}

log = logging.getLogger("fa3_cute")

_lock = threading.Lock()  # concurrent compiles crash the DSL
_kernels: dict[Config, Any] = {}


class CompileError(RuntimeError):
    """A kernel did not compile, or would have to be compiled although FA3_CUTE_DISABLE_JIT is set."""


def get_kernel(cfg: Config) -> Any:
    """The compiled kernel of a config, not yet loaded on any device: from memory, else from disk, else compiled.

    Thread-safe; a second caller of the same config waits for the first. Raises CompileError.
    """
    if (kernel := _kernels.get(cfg)) is None:
        with _lock:
            if (kernel := _kernels.get(cfg)) is None:
                kernel = _kernels[cfg] = _find_on_disk(cfg) or _compile_and_store(cfg)
    return kernel


def typed_arguments(cfg: Config, values) -> list:
    """The kernel's arguments as DSL objects; `values` are plain numbers in the order of cfg.arguments."""
    return [_typed(cfg, name, kind, value) for (name, kind), value in zip(cfg.arguments, values, strict=True)]


def _typed(cfg: Config, name: str, kind: str, value) -> Any:
    if kind != "pointer":
        return SCALAR_TYPES[kind](value)
    element, alignment = pointer_facts(name)
    own_type = ELEMENT_TYPES[cfg.element_out if element == "output" else cfg.dtype]
    return cute.runtime.make_ptr(
        POINTED_TYPES.get(element, own_type), value, cute.AddressSpace.gmem, assumed_align=alignment
    )


def dsl_version() -> str:
    """Of the CuTe DSL in use."""
    return cutlass.__version__


def cache_key(cfg: Config) -> str:
    """SHA-256 over all that the object depends on. Plain values only: no length, no pointer, nothing from a call."""
    facts = {
        "sources": source_hash(),
        "dsl": cutlass.__version__,
        "flavour": f"{cutlass.CUDA_VERSION.major}.{cutlass.CUDA_VERSION.minor}",
        "python": "{}.{}".format(*sys.version_info),
        "arch": ARCH,
        "host": platform.machine(),
        "settings": {name: os.environ.get(name, "") for name in CODE_SETTINGS},
        "config": {type(cfg).__name__: cfg.as_dict()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def source_hash() -> str:
    """SHA-256 over the package's Python files in the order of their paths: path ("fa3_cute/..."), NUL, bytes."""
    package = Path(__file__).parents[1]
    paths = {path.relative_to(package.parent).as_posix(): path for path in package.rglob("*.py") if path.is_file()}
    digest = hashlib.sha256()
    for name in sorted(paths):
        digest.update(name.encode() + b"\0" + paths[name].read_bytes())
    return digest.hexdigest()


def _find_on_disk(cfg: Config) -> Any | None:
    path = disk_cache.find(cfg.name, cache_key(cfg))
    try:
        return path and _load(path, cfg.name)
    except Exception as error:  # whatever an object with a good checksum does wrong: compile it again
        log.warning("ignoring %s: %s", path, _plain(error))
        return None


def _compile_and_store(cfg: Config) -> Any:
    if os.environ.get("FA3_CUTE_DISABLE_JIT", "0") not in ("", "0"):
        raise CompileError(f"{cfg.name} is not in the cache ({cache_dir()}) and FA3_CUTE_DISABLE_JIT is set: {cfg}")
    start = time.perf_counter()
    compiled = _compile(cfg)
    try:
        with tempfile.TemporaryDirectory(prefix="fa3_cute_") as folder:
            path = _export(compiled, cfg.name, Path(folder))
            kernel = _load(disk_cache.store(cfg.name, cache_key(cfg), path.read_bytes()) or path, cfg.name)
    except Exception as error:  # no folder to write to at all: what the DSL returned must do
        log.warning("%s could not be exported: %s", cfg.name, _plain(error))
        kernel = compiled
    log.info("compiled %s in %.2f s", cfg.name, time.perf_counter() - start)
    return kernel


def _compile(cfg: Config, options: str = "") -> Any:
    """One run of the DSL's compiler; the caller holds the lock."""
    module, _, name = cfg.kernel.rpartition(".")
    kernel = getattr(import_module(module), name)(cfg)  # traced code: imported only where it will be compiled
    stand_ins = typed_arguments(cfg, [0] * len(cfg.arguments))
    try:
        return cute.compile(kernel, *stand_ins, options=f"--gpu-arch {ARCH} {options}")
    except Exception as error:
        raise CompileError(f"{cfg.name} did not compile: {_plain(error)}") from error


def _export(compiled: Any, name: str, folder: Path) -> Path:
    # The exporter links the host code against the DSL's runtime library, which only a launch or a load would open.
    for library in cute.runtime.find_runtime_libraries(enable_tvm_ffi=False):
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    compiled.export_to_c(str(folder), name, name)
    return folder / f"{name}.o"


def _load(path: Path, name: str) -> Any:
    return cute.runtime.load_module(str(path))[name]


def _plain(error: Exception) -> str:
    """An error's text without the DSL's terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()


@dataclass(frozen=True)
class Report:
    """What the compiler made of one config.

    registers          per thread at launch, before setmaxnreg
    stack_bytes        local memory per thread; spill_*_bytes are ptxas's count of it, spill_stores and spill_loads the
                       instructions that move it
    smem_bytes         dynamic shared memory of one CTA
    wgmmas             WGMMA instructions; setmaxnregs, instructions likewise
    warnings           sentences: ptxas remarks of UNACCEPTABLE_REMARKS
    notes              {code: times} of ptxas's other remarks, such as C7517, a wait that it added
    seconds            of the compile, which runs ptxas twice (see compile_report)
    """

    name: str
    config: Config
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    spill_stores: int
    spill_loads: int
    smem_bytes: int
    wgmmas: int
    setmaxnregs: int
    instructions: int
    warnings: tuple[str, ...]
    notes: dict[str, int]
    seconds: float

    def problems(self) -> list[str]:
        """Why this config must not ship, one sentence each; empty if it may."""
        spilled = (self.stack_bytes, self.spill_store_bytes, self.spill_load_bytes, self.spill_stores, self.spill_loads)
        budget = min(self.config.smem_bytes, SMEM_BYTES_PER_CTA)
        rules = (
            (
                not any(spilled),
                f"spills: {self.stack_bytes} bytes of stack, {self.spill_stores} stores, {self.spill_loads} loads",
            ),
            (0 < self.smem_bytes <= budget, f"{self.smem_bytes} bytes of shared memory: the config allows {budget}"),
            (self.wgmmas > 0, "no WGMMA instruction"),
            (
                self.setmaxnregs >= 2 or not self.config.uses_setmaxnreg,
                f"{self.setmaxnregs} setmaxnreg: producer and consumers need one each",
            ),
        )
        return [sentence for holds, sentence in rules if not holds] + list(self.warnings)

    def as_dict(self) -> dict:
        """The fields as plain values: a JSON row."""
        return asdict(self)


def compile_report(cfg: Config) -> Report:
    """Compile a config, past every cache, and measure the result. Raises CompileError; needs no GPU.

    The counts come from the cubin, which the compiler hands over for free. Whether ptxas serialised WGMMA or ignored
    setmaxnreg, the spilled bytes and the shared memory stand only in the DSL's remark file, for which it runs ptxas a
    second time: 2.9 s instead of 2.2 s for head_dim 128 on a 2-core machine, still the cheapest source of these facts.
    """
    return compile_and_read(cfg)[0]


def compile_and_read(cfg: Config) -> tuple[Report, CubinKernel]:
    """`compile_report`, and with it what the report was read from: the kernel's cubin, every opcode counted."""
    with _lock, tempfile.TemporaryDirectory(prefix="fa3_cute_") as folder:
        remarks = Path(folder, "remarks.yaml")
        start = time.perf_counter()
        compiled = _compile(cfg, f"--keep-cubin --dump-dir {folder} --remark-output {remarks} --remark-filter .*")
        seconds = time.perf_counter() - start
        text = remarks.read_text() if remarks.exists() else ""
    (kernel,) = read_cubin(compiled.__cubin__).values()
    return _report(cfg, kernel, text, seconds), kernel


def _report(cfg: Config, kernel: CubinKernel, remarks: str, seconds: float) -> Report:
    return Report(
        name=cfg.name,
        config=cfg,
        registers=kernel.registers,
        spill_stores=kernel.count("STL"),
        spill_loads=kernel.count("LDL"),
        wgmmas=kernel.count("HGMMA") + kernel.count("QGMMA"),
        setmaxnregs=kernel.count("USETMAXREG"),
        instructions=kernel.opcodes.total(),
        seconds=seconds,
        **_parse_remarks(cfg.name, remarks),
    )


def _parse_remarks(name: str, remarks: str) -> dict:
    """The fields of a Report that only the DSL's remark file knows. Raises CompileError if it does not say them."""
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", remarks)
    smem = re.search(r"Shared memory allocated: (\d+) bytes", remarks)
    if not spills or not smem:
        raise CompileError(f"{name}: the compiler's remarks say nothing of spills or of shared memory")
    stack, stores, loads = map(int, spills.groups())
    codes = Counter(re.findall(r"\((C\d{4})\)", remarks))
    return {
        "stack_bytes": stack,
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
        "smem_bytes": int(smem[1]),
        "warnings": tuple(f"{code}: {meaning}" for code, meaning in UNACCEPTABLE_REMARKS.items() if code in codes),
        "notes": {code: times for code, times in sorted(codes.items()) if code not in UNACCEPTABLE_REMARKS},
    }
