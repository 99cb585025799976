"""FlashAttention-3 for Hopper GPUs, written in the CuTe DSL: raw device pointers in, a status out.

`from fa3_cute import FlashAttentionParams, forward`. Importing the package imports neither CUDA, the DSL nor NumPy: the
public names below are fetched from their modules on first use, and those import CUDA and the DSL when first called.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # type checkers and editors, which do not run __getattr__
    from .api import (
        AttentionMode,
        BackwardParams,
        DataType,
        FlashAttentionParams,
        MergeParams,
        attention,
        backward,
        backward_workspace_size,
        explain,
        forward,
        merge_attention,
        stats,
        warmup,
        workspace_size,
    )
    from .contract.block_mask import BlockMask, block_lists, block_sizes
    from .contract.mods import MaskMod, ScoreMod
    from .contract.quantize import dequantize_fp8, quantize_fp8
    from .contract.status import (
        CudaError,
        FlashAttentionError,
        InvalidCallError,
        KernelCompileError,
        NotWarmedUpError,
        Status,
        UnsupportedDeviceError,
        UnsupportedFeatureError,
        get_error_string,
        last_error,
    )

__version__ = "0.1.0"

_HOME = {
    "api": (
        "AttentionMode",
        "BackwardParams",
        "DataType",
        "FlashAttentionParams",
        "MergeParams",
        "attention",
        "backward",
        "backward_workspace_size",
        "explain",
        "forward",
        "merge_attention",
        "stats",
        "warmup",
        "workspace_size",
    ),
    "contract.block_mask": ("BlockMask", "block_lists", "block_sizes"),
    "contract.mods": ("MaskMod", "ScoreMod"),
    "contract.quantize": ("dequantize_fp8", "quantize_fp8"),
    "contract.status": (
        "CudaError",
        "FlashAttentionError",
        "InvalidCallError",
        "KernelCompileError",
        "NotWarmedUpError",
        "Status",
        "UnsupportedDeviceError",
        "UnsupportedFeatureError",
        "get_error_string",
        "last_error",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
