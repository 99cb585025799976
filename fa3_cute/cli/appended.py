"""New keys and values of the benchmark's decode steps, and rotary positions: what calls take, and what becomes of Q, K
and V by them."""

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import DataType
from ..contract.reference import to_bits, update_cache

if TYPE_CHECKING:
    from .case import Case

# New values are so much larger than others that one which is not seen shows among thousands of keys.
LOUD = 64.0
BASE = 10000.0  # of the angles


def shapes_of(case: "Case") -> dict[str, tuple[int, ...]]:
    """Of the arrays of a case that appends: rows of each sequence; tables of the whole head_dim."""
    new = case.batch_size, case.scores.append, case.num_heads_k
    found = {"k_new": (*new, case.head_dim), "v_new": (*new, case.columns_v)}
    table = case.seqlen_k, case.head_dim // 2
    return found | ({"rotary_cos": table, "rotary_sin": table} if case.scores.rotary else {})


@cache
def numbers(dtype: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One of them, of the case's element type."""
    if name.startswith("rotary"):
        positions, half = shape
        angles = np.outer(np.arange(positions), BASE ** (-np.arange(half) / half))
        return to_bits((np.cos if name == "rotary_cos" else np.sin)(angles).astype(np.float32), dtype)
    loud = LOUD if name == "v_new" else 1.0
    seed = 2 + (name == "v_new")
    return to_bits(loud * np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def fields_of(case: "Case") -> dict[str, Any]:
    """The fields of its call that are not the arrays' addresses."""
    found: dict[str, Any] = {"seqlen_knew": case.scores.append}
    if case.scores.append and case.kv_dtype:  # the new rows are of Q's type
        found["kv_new_dtype"] = DataType[case.dtype.upper()]
    if case.scores.rotary:
        found |= {"rotary_dim": case.head_dim, "rotary_positions": case.seqlen_k}
    return found


def updated(case: "Case", sequence: int, head: int, q, k, v) -> tuple:
    """Q, K and V [1, rows, 1, columns] of one head of a sequence as attention sees them; K and V are changed."""
    kv_head = head // (case.num_heads // case.num_heads_k)
    found = {name: numbers(case.dtype, name, shape) for name, shape in shapes_of(case).items()}
    for name in ("k_new", "v_new"):
        found[name] = found[name][sequence : sequence + 1, :, kv_head : kv_head + 1]
    before = np.array([k.shape[1] - case.scores.append])
    q, _ = update_cache(q, k, v, seqused_k=before, causal=case.is_causal, **found)
    return q, k, v
