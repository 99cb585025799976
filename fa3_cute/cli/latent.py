"""The benchmark's MLA decode: cases whose V is the first columns of K, their tensors, and the peer that has it too."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from .. import FlashAttentionParams
from ..contract.formats import MLA_DIMS, OUT_BYTES
from ..contract.reference import as_float
from ..arrays.memory import download
from .case import CHECKED_ROWS, Case, Tensors, call_of
from .features import expected

PEER_PAGE = 64  # tokens, of the peer's view of K that lies in one piece


@dataclass(frozen=True)
class LatentCase(Case):
    """A case of MLA_DIMS: Q and K have the first number of columns, V and O the second one."""

    head_dim_v: int = MLA_DIMS[1]

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
    """Q, K and O on the device; V is K."""

    def pointers(self, case: Case, kv_set: int = 0) -> dict[str, int]:
        found = super().pointers(case, kv_set)
        return found | {"v": found["k"]}

    def params(self, case: Case, kv_set: int = 0) -> FlashAttentionParams:
        return FlashAttentionParams(**call_of(case, self.pointers(case, kv_set)))

    def error_of(self, case: Case, kv_set: int = 0) -> float:
        """As that of Tensors."""
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
