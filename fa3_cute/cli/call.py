"""A case of the benchmark as the fields of a call."""

from typing import TYPE_CHECKING, Any

from .. import AttentionMode, DataType
from .features import fields_of

if TYPE_CHECKING:
    from .case import Case


def call_of(case: "Case", pointers: dict[str, int]) -> dict[str, Any]:
    """The fields of a call, from the addresses of its arrays."""
    if offsets := pointers.pop("cu_seqlens", None):
        rows = {"mode": AttentionMode.VARLEN_PREFILL, "cu_seqlens_q": offsets, "total_q": case.q_shape[0]}
        if case.page_size:
            num_pages, page_size, *_ = case.kv_shape
            _, max_pages = case.index_shapes()["page_table"]
            rows |= {"max_seqlen_q": case.seqlen_q, "num_pages": num_pages, "page_size": page_size}
            rows |= {"seqlen_k": max_pages * page_size}
        else:
            rows |= {"cu_seqlens_k": offsets, "total_k": case.kv_shape[0]}
    else:
        mode = AttentionMode.DECODE if case.is_decode else AttentionMode.PREFILL
        rows = {"mode": mode, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    rows |= fields_of(case, pointers)
    sizes = ("batch_size", "num_heads", "num_heads_k", "head_dim", "head_dim_v", "is_causal")
    numbers = {name: getattr(case, name) for name in sizes}
    numbers |= dict(zip(("window_size_left", "window_size_right"), case.window, strict=True))
    types = {"dtype": case.dtype, "kv_dtype": case.stored, "out_dtype": case.element_out}
    types = {field: DataType[name.upper()] for field, name in types.items()}
    return pointers | rows | numbers | types
