"""The arrays of attention() that update the cache or rotate q: what they must be, and what they say in params."""

from typing import Any

from ..contract.params import FlashAttentionParams
from ..contract.status import Status, error_for
from .scores import FLOATS

NEW = ("k_new", "v_new")
TABLES = ("rotary_cos", "rotary_sin")
UPDATES = NEW + TABLES  # besides cu_seqlens_k_new and seqlens_rotary, which are among the arrays of integers


def update_sizes(shapes: dict) -> dict:
    """The fields of FlashAttentionParams that are sizes, of the shapes of these arrays."""
    found = {}
    if len(shapes.get("k_new", ())) > 2:
        found["seqlen_knew"] = shapes["k_new"][-3]
    if len(shapes.get("rotary_cos", ())) == 2:
        found |= {"rotary_dim": 2 * shapes["rotary_cos"][1], "rotary_positions": shapes["rotary_cos"][0]}
    return found


def require_update_shapes(shapes: dict, batch: int) -> None:
    """Raise for arrays that have no shape that they may have; that the others are given too the rules say."""
    k, new, table = shapes["k"], shapes.get("k_new"), shapes.get("rotary_cos")
    if new is not None:
        packed = "cu_seqlens_k_new" in shapes
        dims, words = (3, f"[rows, {k[-2]}, {k[-1]}]") if packed else (4, f"[{batch}, rows, {k[-2]}, {k[-1]}]")
        if len(new) != dims or new[-2:] != k[-2:] or not packed and new[0] != batch:
            raise error_for(Status.INVALID_SHAPE, f"k_new.shape={new}: must be {words}")
        if 0 in shapes["q"] and "cu_seqlens_q" not in shapes:
            raise error_for(Status.INVALID_SHAPE, f"q.shape={shapes['q']}: must not be empty with k_new")
    if table is not None and (len(table) != 2 or 0 in table):
        raise error_for(Status.INVALID_SHAPE, f"rotary_cos.shape={table}: must be [positions, rotary_dim / 2]")
    for one, other in (NEW, TABLES):
        if one not in shapes or other not in shapes:
            continue
        expected = (*shapes[one][:-1], *shapes["v"][-1:]) if one == "k_new" else shapes[one]
        if shapes[other] != expected:
            raise error_for(Status.INVALID_SHAPE, f"{other}.shape={shapes[other]}: must be {expected}")


def update_dtypes(q: str, k: str) -> dict[str, tuple[str, ...]]:
    """Element types on a device, of a q and k of these: new rows are of k's, or of q's over FP8."""
    new = tuple(dict.fromkeys((k, q)))
    return {name: new if name in NEW else tuple(FLOATS) for name in UPDATES}


def require_writable(tensors: dict[str, Any]) -> None:
    """Raise for a cache that cannot be written where that is asked for, for new rows of two element types, and for
    tables that lie in unlike ways."""
    if all(name in tensors for name in NEW):
        _require_one_dtype(*(tensors[name].dtype for name in NEW))
    if "k_new" in tensors:
        for name in ("k", "v"):
            if tensors[name].is_readonly:
                raise error_for(Status.INVALID_ARGUMENT, f"{name} is read-only: must be writable with k_new")
    if all(name in tensors for name in TABLES):
        cos, sin = (tensors[name] for name in TABLES)
        if cos.dtype != sin.dtype or cos.shape[0] > 1 and cos.strides[0] != sin.strides[0]:
            facts = f"{sin.dtype} of the strides {sin.strides}"
            words = f"as rotary_cos, {cos.dtype} of the strides {cos.strides}"
            raise error_for(Status.INVALID_ARGUMENT, f"rotary_sin is {facts} (elements): must be {words}")


def set_updates(params: FlashAttentionParams, tensors: dict[str, Any]) -> None:
    """Element type of new rows, element type and stride of the tables, whose addresses the params have."""
    if "k_new" in tensors and tensors["k_new"].dtype != tensors["k"].dtype:
        params.kv_new_dtype = params.dtype
    if "rotary_cos" in tensors:
        cos = tensors["rotary_cos"]
        params.rotary_dtype = FLOATS[cos.dtype]
        params.rotary_row_stride = cos.strides[0] if cos.shape[0] > 1 else None


def _require_one_dtype(k_new: str, v_new: str) -> None:
    if k_new != v_new:
        raise error_for(Status.INVALID_ARGUMENT, f"v_new is {v_new}: must be {k_new}, as k_new is")


# ---- on the host -----------------------------------------------------------------------------------------------------


def require_update_numbers(arrays: dict[str, Any], q: Any, k: Any, v: Any) -> None:
    """Raise for NumPy arrays of other numbers than they must hold, and for a cache that cannot be written."""
    for name, array in arrays.items():
        accepted = list(dict.fromkeys((k.dtype.name, q.dtype.name)))
        if name in NEW and array.dtype.name not in accepted:
            as_what = ", as k is" if len(accepted) == 1 else ""
            sentence = f"{name} is {array.dtype.name}: must be {' or '.join(accepted)}{as_what}"
            raise error_for(Status.INVALID_ARGUMENT, sentence)
        if name in TABLES and array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            raise error_for(Status.INVALID_ARGUMENT, f"{name} is {array.dtype.name}: must be real numbers, as float32")
    if all(name in arrays for name in NEW):
        _require_one_dtype(*(arrays[name].dtype.name for name in NEW))
    for name, cache in (("k", k), ("v", v)):
        if "k_new" in arrays and not cache.flags.writeable:
            raise error_for(Status.INVALID_ARGUMENT, f"{name} is read-only: must be writable with k_new")


def updated_on_host(arrays: tuple, options: dict) -> tuple[Any, dict]:
    """(q, options of attention): the cache is updated in place. Raises ValueError as the reference does."""
    from ..contract.reference import update_cache

    names = (*UPDATES, "cu_seqlens_k_new", "seqlens_rotary", "rotary_interleaved")
    q, seqused_k = update_cache(*arrays, **options)
    return q, {name: value for name, value in options.items() if name not in names} | {"seqused_k": seqused_k}
