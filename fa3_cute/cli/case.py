"""One problem of the benchmark: its sizes, its nominal and its visible FLOPs, its tensors on the device."""
from collections import Counter
from dataclasses import asdict, dataclass, replace
from math import prod

import numpy as np

from .. import AttentionMode, DataType, FlashAttentionParams
from ..device import address, allocate, download, fill, upload
from ..reference import as_float, attention_reference, to_bits

ELEMENT_BYTES = 2
CHECKED_ROWS = 64
# Random numbers drawn per tensor; a longer one repeats them. More than the dense grid needs, and an odd period: no row
# meets its own copy.
DISTINCT_NUMBERS = 40_000_003


@dataclass(frozen=True)
class Case:
    """An attention problem; lengths in tokens.

    window   (left, right) around the bottom-right diagonal, negative is unbounded; not together with is_causal
    lengths  of packed sequences, the same for Q as for K and V; batch_size is then their number, seqlen_* the longest
    label    what the packed sequences are called
    """
    dtype: str
    head_dim: int
    is_causal: bool
    seqlen_q: int
    seqlen_k: int
    batch_size: int
    num_heads: int
    num_heads_k: int
    window: tuple[int, int] = (-1, -1)
    lengths: tuple[int, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.dtype} d{self.head_dim} {self.mask} h{self.heads} {self.layout}"

    @property
    def mask(self) -> str:
        if max(self.window) >= 0:
            return f"window({self.window[0]},{self.window[1]})"
        return "causal" if self.is_causal else "full"

    @property
    def heads(self) -> str:
        return f"{self.num_heads}" if self.num_heads == self.num_heads_k else f"{self.num_heads}:{self.num_heads_k}"

    @property
    def layout(self) -> str:
        """The sequences in short: a packed case's label, else number x length, of Q and of K where they differ."""
        if self.lengths:
            return self.label
        lengths = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"({self.seqlen_q}:{self.seqlen_k})"
        return f"{self.batch_size}x{lengths}"

    @property
    def visible_bounds(self) -> tuple[int, int]:
        """The mask as a window."""
        return (-1, 0) if self.is_causal else self.window

    @property
    def flops(self) -> float:
        """FLOPs as everyone counts them: 4 H Sq Sk d for the two GEMMs of each sequence, half of it under a causal
        mask; with a window those of the keys that a query sees."""
        if max(self.window) >= 0:
            return self.visible_flops
        pairs = sum(seqlen_q * seqlen_k * count for (seqlen_q, seqlen_k), count in self.sequences().items())
        return 4 * self.num_heads * self.head_dim * pairs * (0.5 if self.is_causal else 1)

    @property
    def visible_flops(self) -> float:
        """4 H d for each query and each key that it sees."""
        pairs = sum(visible_pairs(*lengths, *self.visible_bounds) * count
                    for lengths, count in self.sequences().items())
        return 4 * self.num_heads * self.head_dim * pairs

    def sequences(self) -> Counter:
        """How many sequences there are of each (seqlen_q, seqlen_k)."""
        return Counter((length, length) for length in self.lengths) or Counter(
            {(self.seqlen_q, self.seqlen_k): self.batch_size})

    @property
    def q_shape(self) -> tuple[int, ...]:
        return (*self._rows(self.seqlen_q), self.num_heads, self.head_dim)

    @property
    def kv_shape(self) -> tuple[int, ...]:
        return (*self._rows(self.seqlen_k), self.num_heads_k, self.head_dim)

    def _rows(self, seqlen: int) -> tuple[int, ...]:
        return (sum(self.lengths),) if self.lengths else (self.batch_size, seqlen)

    def sequence(self, tensor, index: int):
        """[rows, heads, head_dim] of one sequence of a tensor in the case's shape."""
        if not self.lengths:
            return tensor[index]
        start = sum(self.lengths[:index])
        return tensor[start:start + self.lengths[index]]

    def shortened(self, seqlen: int) -> "Case":
        """One sequence, at most so long, in the same layout."""
        return replace(self, batch_size=1, seqlen_q=min(self.seqlen_q, seqlen), seqlen_k=min(self.seqlen_k, seqlen),
                       lengths=self.lengths and (min(self.seqlen_q, seqlen),))

    def as_dict(self) -> dict:
        """A JSON row: the fields and what the name is made of; up to 10,000 lengths are told by their label."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("lengths", "label")}
        return fields | {"mask": self.mask, "heads": self.heads, "layout": self.layout}


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """How many (query, key) pairs of one sequence a window leaves; a negative bound is no bound."""
    diagonal = np.arange(seqlen_q) + seqlen_k - seqlen_q
    first = 0 if left < 0 else np.clip(diagonal - left, 0, seqlen_k)
    stop = seqlen_k if right < 0 else np.clip(diagonal + right + 1, 0, seqlen_k)
    return int(np.maximum(np.broadcast_to(stop - first, diagonal.shape), 0).sum())


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
        self.host = {name: normal_bits(rng, size, dtype) for name, size in (("q", q_size), ("k", kv_size),
                                                                            ("v", kv_size))}
        self.buffers = {name: upload(array, stream=stream) for name, array in self.host.items()}
        self.buffers["out"] = allocate(ELEMENT_BYTES * q_size, stream=stream)
        self.offsets = {}

    def pointers(self, case: Case) -> dict[str, int]:
        """Addresses of q, k, v and out, and for a packed case of cu_seqlens: one array serves Q and K."""
        found = {name: address(buffer) for name, buffer in self.buffers.items()}
        if case.lengths:
            if case.lengths not in self.offsets:
                offsets = np.cumsum((0, *case.lengths), dtype=np.int32)
                self.offsets[case.lengths] = upload(offsets, stream=self.stream)
            found["cu_seqlens"] = address(self.offsets[case.lengths])
        return found

    def poison_out(self) -> None:
        """Every element of O becomes NaN: what a kernel leaves out shows in its error."""
        fill(self.buffers["out"], 0xFF, stream=self.stream)

    def params(self, case: Case) -> FlashAttentionParams:
        pointers = self.pointers(case)
        if offsets := pointers.pop("cu_seqlens", None):
            rows = {"mode": AttentionMode.VARLEN_PREFILL, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets,
                    "total_q": case.q_shape[0], "total_k": case.kv_shape[0]}
        else:
            rows = {"seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
        return FlashAttentionParams(
            **pointers, **rows, batch_size=case.batch_size, num_heads=case.num_heads, num_heads_k=case.num_heads_k,
            head_dim=case.head_dim, is_causal=case.is_causal, window_size_left=case.window[0],
            window_size_right=case.window[1], dtype=DataType[case.dtype.upper()])

    def error_of_last_rows(self, case: Case) -> float:
        """Relative error (norm) of O against the reference in the last rows of the first, the longest and the last
        sequence, for the first, a middle and the last head.

        The last rows alone are an attention problem of their own, with the same keys: masks are bottom-right aligned.
        """
        q, k, v = (self.host[name][:prod(shape)].reshape(shape)
                   for name, shape in (("q", case.q_shape), ("k", case.kv_shape), ("v", case.kv_shape)))
        out = download(self.buffers["out"], case.q_shape, q.dtype, stream=self.stream)
        longest = case.lengths.index(max(case.lengths)) if case.lengths else 0
        differences, norms = 0.0, 0.0
        for index, head in ((0, 0), (longest, case.num_heads // 2), (case.batch_size - 1, case.num_heads - 1)):
            kv_head = head // (case.num_heads // case.num_heads_k)
            q_rows, out_rows = (case.sequence(tensor, index)[-CHECKED_ROWS:, head] for tensor in (q, out))
            k_rows, v_rows = (case.sequence(tensor, index)[None, :, kv_head, None] for tensor in (k, v))
            exact, _ = attention_reference(q_rows[None, :, None], k_rows, v_rows, window_size=case.visible_bounds)
            differences += np.square(as_float(out_rows) - exact[0, :, 0]).sum()
            norms += np.square(exact).sum()
        return float(np.sqrt(differences / norms))


def normal_bits(rng, size: int, dtype: str) -> np.ndarray:
    """`size` standard-normal numbers as a buffer of `dtype` holds them, repeating after DISTINCT_NUMBERS."""
    distinct = to_bits(rng.standard_normal(min(size, DISTINCT_NUMBERS), np.float32), dtype)
    return distinct if size == distinct.size else np.resize(distinct, size)
