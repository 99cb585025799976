"""One problem of the benchmark: its sizes, its nominal FLOPs, its tensors on the device."""
from dataclasses import dataclass
from math import prod

import numpy as np

from .. import DataType, FlashAttentionParams
from ..device import address, allocate, download, fill, upload
from ..reference import as_float, attention_reference, to_bits

ELEMENT_BYTES = 2
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Case:
    """A dense attention problem; lengths in tokens."""
    dtype: str
    head_dim: int
    is_causal: bool
    seqlen_q: int
    seqlen_k: int
    batch_size: int
    num_heads: int
    num_heads_k: int

    @property
    def name(self) -> str:
        heads = f"{self.num_heads}" if self.num_heads == self.num_heads_k else f"{self.num_heads}:{self.num_heads_k}"
        lengths = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        mask = "causal" if self.is_causal else "full"
        return f"{self.dtype} d{self.head_dim} {mask} b{self.batch_size} h{heads} s{lengths}"

    @property
    def flops(self) -> float:
        """Nominal FLOPs, as everyone counts them: 4 B H Sq Sk d for the two GEMMs, half of it under a causal mask."""
        full = 4 * self.batch_size * self.num_heads * self.seqlen_q * self.seqlen_k * self.head_dim
        return full * (0.5 if self.is_causal else 1)

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        return self.batch_size, self.seqlen_q, self.num_heads, self.head_dim

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        return self.batch_size, self.seqlen_k, self.num_heads_k, self.head_dim


class Tensors:
    """Q, K, V (standard normal, seeded) and O on the device, large enough for every case of a run.

    Uploaded once per run: each case reads the same numbers in its own shape, and so does each implementation.
    """

    def __init__(self, cases: list[Case], stream):
        self.stream = stream
        rng = np.random.default_rng(0)
        dtype = cases[0].dtype
        q_size = max(prod(case.q_shape) for case in cases)
        kv_size = max(prod(case.kv_shape) for case in cases)
        self.host = {name: to_bits(rng.standard_normal(size, np.float32), dtype)
                     for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size))}
        self.buffers = {name: upload(array, stream=stream) for name, array in self.host.items()}
        self.buffers["out"] = allocate(ELEMENT_BYTES * q_size, stream=stream)

    def pointers(self) -> dict[str, int]:
        return {name: address(buffer) for name, buffer in self.buffers.items()}

    def poison_out(self) -> None:
        """Every element of O becomes NaN: what a kernel leaves out shows in its error."""
        fill(self.buffers["out"], 0xFF, stream=self.stream)

    def params(self, case: Case) -> FlashAttentionParams:
        return FlashAttentionParams(
            **self.pointers(), batch_size=case.batch_size, seqlen_q=case.seqlen_q, seqlen_k=case.seqlen_k,
            num_heads=case.num_heads, num_heads_k=case.num_heads_k, head_dim=case.head_dim, is_causal=case.is_causal,
            dtype=DataType[case.dtype.upper()])

    def error_of_last_rows(self, case: Case) -> float:
        """Relative error (norm) of O against the reference in the last rows of the first and the last head.

        The last rows alone are an attention problem of their own, with the same keys: the mask is bottom-right aligned.
        """
        rows = min(CHECKED_ROWS, case.seqlen_q)
        q, k, v = (self.host[name][:prod(shape)].reshape(shape)
                   for name, shape in (("q", case.q_shape), ("k", case.kv_shape), ("v", case.kv_shape)))
        out = download(self.buffers["out"], case.q_shape, q.dtype, stream=self.stream)
        differences, norms = 0.0, 0.0
        for batch, head in ((0, 0), (case.batch_size - 1, case.num_heads - 1)):
            kv_head = head // (case.num_heads // case.num_heads_k)
            exact, _ = attention_reference(
                q[batch, None, -rows:, head, None], k[batch, None, :, kv_head, None], v[batch, None, :, kv_head, None],
                causal=case.is_causal)
            differences += np.square(as_float(out[batch, -rows:, head]) - exact[0, :, 0]).sum()
            norms += np.square(exact).sum()
        return float(np.sqrt(differences / norms))
