"""The arrays of attention() that change scores or hide keys: what they must be, and what they say in params."""

from typing import Any

from ..contract.params import DataType, FlashAttentionParams
from ..contract.status import Status, error_for

FLOATS = {"float16": DataType.FP16, "bfloat16": DataType.BF16, "float32": DataType.FP32}
# Element types on a device. A boolean mask is of bytes; a random state of int64 is of the same bits.
SCORE_DTYPES = {
    "s_aux": tuple(FLOATS),
    "alibi_slopes": ("float32",),
    "attn_mask": ("bool8", "uint8", *FLOATS),
    "rng_state": ("uint64", "int64"),
}
SCORES = tuple(SCORE_DTYPES)
HOST_WORDS = {
    "attn_mask": "bool, uint8 or real numbers, as float32",
    "rng_state": "integers, as uint64",
}


def require_score_shapes(shapes: dict, sizes: dict) -> None:
    """Raise for arrays that have no shape that they may have.

    shapes   of the arrays by name
    sizes    fields of FlashAttentionParams that are sizes
    """
    if 0 in shapes["q"]:
        return
    batch, heads = sizes["batch_size"], sizes["num_heads"]
    accepted = {"s_aux": ((heads,),), "alibi_slopes": ((heads,), (batch, heads)), "rng_state": ((2,),)}
    for name, those in accepted.items():
        if name in shapes and shapes[name] not in those:
            words = " or ".join(map(str, those))
            raise error_for(Status.INVALID_SHAPE, f"{name}.shape={shapes[name]}: must be {words}")
    if "attn_mask" in shapes and "seqlen_q" in sizes:  # that of packed queries is refused as such
        shape, full = shapes["attn_mask"], (batch, heads, sizes["seqlen_q"], sizes["seqlen_k"])
        most = full[-len(shape) :] if shape else ()
        if not (0 < len(shape) <= 4 and shape[-1] == full[-1] and all(map(_fits, shape, most))):
            words = f"must broadcast to {full}, with all of the last dimension"
            raise error_for(Status.INVALID_SHAPE, f"attn_mask.shape={shape}: {words}")


def _fits(size: int, most: int) -> bool:
    return size in (1, most)


def set_scores(params: FlashAttentionParams, tensors: dict[str, Any]) -> None:
    """Element types and strides of the arrays, whose addresses the params have."""
    if "s_aux" in tensors:
        params.s_aux_dtype = FLOATS[tensors["s_aux"].dtype]
    slopes, mask = tensors.get("alibi_slopes"), tensors.get("attn_mask")
    if slopes is not None and len(slopes.shape) == 2 and slopes.shape[0] > 1:
        params.alibi_batch_stride = slopes.strides[0]
    if mask is not None:
        params.attn_mask_dtype = FLOATS.get(mask.dtype)
        missing = 4 - len(mask.shape)
        strides = [
            0 if size == 1 else stride
            for size, stride in zip((1,) * missing + mask.shape, (0,) * missing + mask.strides, strict=True)
        ]
        params.attn_mask_batch_stride, params.attn_mask_head_stride, params.attn_mask_row_stride, _ = strides


def require_score_numbers(arrays: dict[str, Any]) -> None:
    """Raise for NumPy arrays that are no numbers, or no masks; numbers of any size are taken."""
    for name, array in arrays.items():
        kind, dtype = array.dtype.kind, array.dtype.name
        is_right = kind in "iu" if name == "rng_state" else kind == "f" or dtype == "bfloat16"
        if not is_right and not (name == "attn_mask" and dtype in ("bool", "uint8")):
            words = HOST_WORDS.get(name, "real numbers, as float32")
            raise error_for(Status.INVALID_ARGUMENT, f"{name} is {dtype}: must be {words}")
