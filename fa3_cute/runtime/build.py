"""A config -> the kernel's object file, by the DSL's compiler in this process: what worker.py runs in a process of its
own. What this module and the kernel's import is what an object is made of: sources.py takes that from their imports.
"""

import ctypes
import platform
import re
import threading
from importlib import import_module
from typing import Any

from .dsl import cutlass, dsl_settings, runtime_library  # first: kernels/ import the DSL as it is by then
from ..kernels.common.layout import ELEMENT_TYPES
from ..planning.config import KernelConfig

ARCH = "sm_90a"
# The host code of an object is for every machine of its kind, not for the one that compiles: objects travel.
HOST_CPUS = {"x86_64": "x86-64", "aarch64": "generic"}

# Settings of the DSL that change the code it generates; they are part of the cache key.
CODE_SETTINGS = ("CUTE_DSL_LINEINFO", "CUTE_DSL_DEBUG", "CUTE_DSL_COMPILER_OPT", "CUTE_DSL_ENABLE_ASSERTIONS")

cute: Any = import_module("cutlass.cute")
SCALAR_TYPES = {
    "int64": cutlass.Int64,
    "int32": cutlass.Int32,
    "float32": cutlass.Float32,
    "stream": import_module("cuda.bindings.driver").CUstream,
}
POINTED_TYPES = {  # others are the config's own
    "float32": cutlass.Float32,
    "int32": cutlass.Int32,
    "uint64": cutlass.Uint64,
    "bytes": cutlass.Uint8,
}

_lock = threading.RLock()  # concurrent compiles in one process crash the DSL


class CompileError(RuntimeError):
    """A kernel did not compile, or would have to be compiled although FA3_CUTE_DISABLE_JIT is set."""


def typed_arguments(cfg: KernelConfig, values) -> list:
    """The kernel's arguments as DSL objects; `values` are plain numbers in the order of cfg.arguments."""
    pointers = {name: (element, alignment) for name, element, alignment in cfg.entry.pointers}
    return [
        _pointer(cfg, pointers[name], value) if kind == "pointer" else SCALAR_TYPES[kind](value)
        for (name, kind), value in zip(cfg.arguments, values, strict=True)
    ]


def _pointer(cfg: KernelConfig, facts: tuple[str, int], value: int) -> Any:
    element, alignment = facts
    own = {"output": cfg.element_out, "stored": getattr(cfg, "kv_dtype", None)}.get(element) or cfg.dtype
    return cute.runtime.make_ptr(
        POINTED_TYPES.get(element, ELEMENT_TYPES[own]), value, cute.AddressSpace.gmem, assumed_align=alignment
    )


def compile_config(cfg: KernelConfig, options: str = "") -> Any:
    """What the DSL's compiler makes of a config. Raises CompileError."""
    # Under whatever name this package was imported: another copy of it may be in the process.
    module, _, name = cfg.kernel.partition(".")[2].rpartition(".")
    kernel = getattr(import_module(f"{_package()}.{module}"), name)(cfg)  # traced code: imported only here
    stand_ins = typed_arguments(cfg, [0] * len(cfg.arguments))
    try:
        with _lock:
            return cute.compile(kernel, *stand_ins, options=f"--gpu-arch {ARCH} {options}")
    except Exception as error:
        raise CompileError(f"{cfg.name} did not compile: {plain_text(error)}{_with_settings()}") from error


def object_of(cfg: KernelConfig) -> bytes:
    """The object file of a config's kernel: machine code of the host with the cubin inside. Raises CompileError."""
    machine = platform.machine()
    target = f"llvm -mtriple={machine}-unknown-linux-gnu -mcpu={HOST_CPUS.get(machine, 'generic')}"
    compiled = compile_config(cfg, f"--host-target '{target}'")
    try:
        with _lock:
            ctypes.CDLL(runtime_library(), mode=ctypes.RTLD_GLOBAL)  # the exporter links against it
            return compiled.dump_to_object(cfg.name)
    except Exception as error:  # the DSL takes a full disk for its own fault: the cause says more
        cause = plain_text(error.__cause__ or error)
        raise CompileError(f"{cfg.name} could not be exported: {cause}{_with_settings()}") from error


def plain_text(error: object) -> str:
    """An error's text without the DSL's terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()


def _package() -> str:
    return __name__.rpartition(".runtime.")[0]


def foreign_settings() -> list[str]:
    """The DSL's variables that are set and may change a compile in this process, though no key has them."""
    return sorted(name for name in dsl_settings() if name not in CODE_SETTINGS)


def _with_settings() -> str:
    """The settings that may be why a compile in this process fails."""
    names = sorted(dsl_settings())
    return f" (compiled with {', '.join(names)} set)" if names else ""
