"""16-bit queries over keys and values in FP8: which calls have them, and what is not served then. Pure Python.

Such calls are the decode kernel's, whatever their number of queries.
"""

from .params import DataType
from .sentences import Sentences, must

# {field: what to do instead} of what there are no kernels for.
UNSERVED = {
    "softcap": "quantise q, or keep the cache in 16 bit",
    "alibi_slopes": "quantise q, or keep the cache in 16 bit",
    "attn_mask": "quantise q, or keep the cache in 16 bit",
    "attention_chunk": "quantise q, or keep the cache in 16 bit",
    "p_dropout": "a cache is not trained with",
    "score_mod": "quantise q, or keep the cache in 16 bit",
    "mask_mod": "quantise q, or keep the cache in 16 bit",
}


def keys_dtype(p) -> DataType:
    """Of k and v of plain params."""
    return p.dtype if p.kv_dtype is None else p.kv_dtype


def has_fp8_keys(p) -> bool:
    """k and v of plain params are FP8: there may be descales."""
    return keys_dtype(p) is DataType.FP8_E4M3


def has_fp8_cache(p) -> bool:
    """The same, and q is of 16 bit."""
    return p.kv_dtype is DataType.FP8_E4M3 and p.dtype is not DataType.FP8_E4M3


def kv_dtype(p) -> Sentences:
    """The rule of the element type of k and v."""
    if p.kv_dtype is None or p.kv_dtype is p.dtype or p.kv_dtype is DataType.FP8_E4M3:
        return ()
    return [must(p, "kv_dtype", "None (dtype), what dtype is, or FP8_E4M3")]


def unserved(p) -> Sentences:
    """The rule of what 16-bit queries over FP8 keys have no kernel for."""
    if not has_fp8_cache(p):
        return ()
    return [
        must(p, name, f"None or 0 with kv_dtype=FP8_E4M3 and 16-bit queries: {instead}")
        for name, instead in UNSERVED.items()
        if getattr(p, name)
    ]
