"""The CuTe DSL, imported and made to load objects whatever the environment of the process is like.

The DSL reads its settings, CUTE_DSL_*, once, when it is imported; they are the process's, not this package's, so that
nobody else's are changed here. What matters is that none of them keeps a compiled kernel from being loaded.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

SETTINGS = ("CUTE_DSL_", "CUTE_EXPERIMENTAL_DSL_")  # what the names of the DSL's variables start with
RUNTIME_LIBRARY = "libcute_dsl_runtime.so"

log = logging.getLogger("fa3_cute")


def dsl_settings() -> dict[str, str]:
    """The DSL's variables that are set."""
    return {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}


def _import_dsl() -> ModuleType:
    """The module cutlass.

    The DSL does not import where the working folder is gone, where no temporary folder can be written to, or where one
    of its variables holds what it refuses, such as a log file that cannot be made. As nobody in this process could
    use it then, it is imported once more without these.
    """
    try:
        return import_module("cutlass")
    except ModuleNotFoundError:
        raise
    except Exception as error:
        log.warning("nvidia-cutlass-dsl does not import in this environment (%s): imported without CUTE_DSL_*", error)
    # What did import stays: compiled code registers its types once per process. What it remembers of variables goes.
    for value in vars(sys.modules.get("cutlass.base_dsl.env_manager", object)).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    with _plain_environment():
        return import_module("cutlass")


@contextmanager
def _plain_environment() -> Iterator[None]:
    hidden = dsl_settings()
    getcwd, folder = os.getcwd, tempfile.tempdir
    for name in hidden:
        del os.environ[name]
    try:
        os.getcwd = lambda: "/"  # both are defaults of settings that only a compile with dumps would use
        tempfile.tempdir = os.devnull
        yield
    finally:
        os.getcwd, tempfile.tempdir = getcwd, folder
        os.environ.update(hidden)


cutlass: Any = _import_dsl()


def runtime_library() -> str:
    """The library that objects call into: that of CUTE_DSL_LIBS if it is there, else the one beside the DSL.

    Raises FileNotFoundError where there is none.
    """
    named = os.environ.get("CUTE_DSL_LIBS", "").split(os.pathsep)
    own = [
        parent / folder / RUNTIME_LIBRARY
        for parent in list(Path(cutlass.__file__).parents)[:4]
        for folder in (f"cu{cutlass.CUDA_VERSION.major}/lib", "lib")
    ]
    found = [path for path in (*map(Path, named), *own) if path.name == RUNTIME_LIBRARY and path.is_file()]
    if not found:
        raise FileNotFoundError(f"{RUNTIME_LIBRARY} is not beside {cutlass.__file__}: reinstall nvidia-cutlass-dsl")
    return str(found[0])


def load_object(code: bytes, name: str) -> Any:
    """The function of an exported object, as `cute.runtime.load_module` makes it, but from memory and with the
    library found above: load_module takes that of CUTE_DSL_LIBS as it was at import, there or not."""
    from cutlass.base_dsl.export import ExternalBinaryModule

    module: Any = ExternalBinaryModule.__new__(ExternalBinaryModule)
    module.enable_tvm_ffi = False
    module.engine = module.load_provider.execution_engine_constructor(code, [runtime_library()], True)
    return module[name]
