"""The benchmark's MLA decode: cases whose V is the first columns of K, their tensors, and the peer that has it too; and
heads of 512 beside them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from .. import FlashAttentionParams
from ..contract.formats import MLA_DIMS, OUT_BYTES, QV_DIMS
from ..contract.reference import as_float
from ..arrays.memory import download
from .case import CHECKED_ROWS, Case, Tensors, call_of
from .features import expected

PEER_PAGE = 64  # tokens, of the peer's view of K that lies in one piece


@dataclass(frozen=True)
class LatentCase(Case):
    """A case of MLA_DIMS: Q and K have the first number of columns, V and O the second one.

    in_parts   the call gets Q and K in two parts: the last QV_DIMS[0] columns, and as q_v and V the first ones
    """

    head_dim_v: int = MLA_DIMS[1]
    in_parts: bool = False

    @property
    def dims(self) -> str:
        return super().dims + " by q_v" * self.in_parts

    @property
    def _pair_flops(self) -> int:
        return 2 * self.num_heads * sum(MLA_DIMS)

    @property
    def nbytes(self) -> int:
        """What has to be read and written: K once, Q and O."""
        keys = sum(seqlen_k * count for (_, seqlen_k), count in self.sequences().items())
        rows = prod(self.q_shape[:-1])
        kv_bytes = self.element_bytes * keys * self.num_heads_k * self.head_dim
        return kv_bytes + rows * (self.element_bytes * self.head_dim + OUT_BYTES * MLA_DIMS[1])


class LatentTensors(Tensors):
    """Q, K and O on the device; V is K in cases of MLA."""

    def pointers(self, case: Case, kv_set: int = 0) -> dict[str, int]:
        found = super().pointers(case, kv_set)
        return found | {"v": found["k"]} if isinstance(case, LatentCase) else found

    def params(self, case: Case, kv_set: int = 0) -> FlashAttentionParams:
        params = FlashAttentionParams(**call_of(case, self.pointers(case, kv_set)))
        return in_parts(case, params) if isinstance(case, LatentCase) and case.in_parts else params

    def error_of(self, case: Case, kv_set: int = 0) -> float:
        """As that of Tensors."""
        if not isinstance(case, LatentCase):
            return super().error_of(case, kv_set)
        *rows, heads, columns = case.out_shape
        out = download(self.buffers["out"], (prod(rows), heads, columns), self.out_type, stream=self.stream)
        differences, norms = 0.0, 0.0
        for index, head in ((0, 0), (case.batch_size - 1, case.num_heads - 1)):
            own = case.rows_of(index, case.seqlen_q)[-CHECKED_ROWS:]
            q = self.vectors("q", own, case.q_shape, head)
            k = self.vectors("k", case.kv_rows_of(index), case.kv_shape, 0)
            exact = expected(case, index, head, q, k, k[..., :columns])
            differences += np.square(as_float(out[own, head]) - exact[0, :, 0]).sum()
            norms += np.square(exact).sum()
        return float(np.sqrt(differences / norms))


def in_parts(case: LatentCase, params: FlashAttentionParams) -> FlashAttentionParams:
    """The same call with Q and K in two parts, which are columns of the whole ones."""
    columns, head_dim = MLA_DIMS[1], case.head_dim
    rest = case.element_bytes * columns  # bytes from a row's start to the second part
    strides = {}
    for names, rows, heads in ((("q", "q_v"), case.q_shape, case.num_heads), (("k", "v"), case.kv_shape, 1)):
        of_row = heads * head_dim
        of = {"head": head_dim, "row": of_row}
        of |= {"batch": rows[-3] * of_row} if len(rows) > 3 else {}
        strides |= {f"{name}_{dim}_stride": stride for name in names for dim, stride in of.items()}
    q, k = params.q or 0, params.k or 0
    pointers = {"q": q + rest, "q_v": q, "k": k + rest, "v": k}
    return replace(params, **pointers, **strides, head_dim=QV_DIMS[0], head_dim_v=QV_DIMS[1])


def vllm_launch(interface: Any, torch: Any, case: Case, q: Any, k: Any, indices: dict[str, Any]) -> Callable:
    """vLLM's FlashAttention-3 as its MLA backend calls it: Q and K in two parts, the last 64 columns and, as q_v and
    V, the others."""
    columns, batch = MLA_DIMS[1], case.batch_size
    steps = partial(torch.arange, dtype=torch.int32, device="cuda")
    if case.page_size:
        lengths = {"cu_seqlens_q": indices["cu_seqlens"], "seqused_k": indices["seqused_k"]}
        table = indices["page_table"]
    else:
        q, k = q.flatten(0, 1), k.flatten(0, 1).unflatten(0, (-1, PEER_PAGE))
        lengths = {
            "cu_seqlens_q": steps(0, case.seqlen_q * (batch + 1), case.seqlen_q),
            "seqused_k": torch.full((batch,), case.seqlen_k, dtype=torch.int32, device="cuda"),
        }
        table = steps(k.shape[0]).view(batch, -1)
    call = partial(
        interface.flash_attn_varlen_func,
        q=q[..., columns:],
        k=k[..., columns:],
        v=k[..., :columns],
        q_v=q[..., :columns],
        max_seqlen_q=case.seqlen_q,
        max_seqlen_k=case.seqlen_k,
        block_table=table,
        softmax_scale=case.head_dim**-0.5,
        causal=case.is_causal,
        num_splits=0,
        fa_version=3,
        **lengths,
    )
    return lambda: call().view(case.out_shape)
