"""Calls of other libraries over a dense cache, whose lengths lie on the device. Nothing here imports torch."""

from collections.abc import Callable
from typing import Any

from .case import Case


def fa3(with_cache: Callable, case: Case, q, k, v, indices: dict) -> Callable:
    """A launch of FlashAttention-3's flash_attn_with_kvcache, with as many splits as its heuristic wants; with new rows
    and rotary positions, of which pairs are halves, where the case has them."""
    options: dict[str, Any] = {"cache_seqlens": indices["seqused_k"], "causal": case.is_causal, "num_splits": 0}
    if case.scores.append:
        options |= {"k": indices["k_new"], "v": indices["v_new"]}
    if case.scores.rotary:
        options |= {name: indices[name] for name in ("rotary_cos", "rotary_sin")} | {"rotary_interleaved": False}

    def launch():
        out = with_cache(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return launch
