"""Ragged batches on the GPU: queries, a cache or pages amid poison, what `forward` makes of them, and its judgement.

What a sequence attends to is known on the host as packed keys, whatever the layout on the device: the rules of check.py
judge results as those of packed sequences. Every byte of K and V that no sequence uses is NaN.
"""

import zlib
from dataclasses import dataclass, field, replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
from cases import Case
from check import DATA_TYPES, Problem, check, poison_of
from images import Image, Tensor, contiguous
from score_inputs import score_inputs, score_params

from fa3_cute import AttentionMode, FlashAttentionParams, forward
from fa3_cute.contract.reference import to_bits

# ---- layouts of pools: (k, v), each [num_pages, page_size, num_heads_k, head_dim] -----------------------------------


def _separate(shape, dtype):
    return tuple(contiguous(name, shape, dtype) for name in "kv")


def _pairs(shape, dtype):
    """K and V of a page side by side."""
    image = Image((shape[0], 2, *shape[1:]), dtype)
    return image.tensor(image.whole[:, 0]), image.tensor(image.whole[:, 1])


def _heads_first(shape, dtype):
    pages, rows, heads, dim = shape
    image = Image((pages, 2, heads, rows, dim), dtype)
    return tuple(image.tensor(image.whole[:, index].swapaxes(1, 2)) for index in (0, 1))


def _in_one_row(shape, dtype):
    """K and V of a token and head side by side, heads first."""
    pages, rows, heads, dim = shape
    image = Image((pages, heads, rows, 2 * dim), dtype)
    return tuple(image.tensor(image.whole[..., part].swapaxes(1, 2)) for part in (slice(dim), slice(dim, None)))


def _one_of_three_layers(shape, dtype):
    image = Image((shape[0], 3, 2, *shape[1:]), dtype)
    return image.tensor(image.whole[:, 1, 0]), image.tensor(image.whole[:, 1, 1])


def _odd_stride(shape, dtype):
    """Pages of K that are no multiple of heads apart: boxes of these are narrow."""
    size = int(np.prod(shape[1:]))
    image = Image((shape[0], size + 16 * (shape[-1] // 16 | 1)), dtype)
    view = image.whole[:, :size].reshape(shape)
    assert np.shares_memory(view, image.whole)
    return image.tensor(view), contiguous("v", shape, dtype)


POOLS = {
    "nhd": _separate,
    "pairs": _pairs,
    "hnd": _heads_first,
    "one row": _in_one_row,
    "layers": _one_of_three_layers,
    "odd": _odd_stride,
}


@dataclass(frozen=True)
class Ragged:
    """A ragged batch.

    case        dtype, heads, head_dim, mask, score options but attn_mask, and whether there is an LSE; its lengths are
                not used
    queries, keys   of each sequence; keys beyond the capacity do not exist
    page_size   0: a dense cache
    layout      of POOLS
    capacity    of a sequence; 0: the most keys
    rows        kv_batch_idx of each sequence; None: none. Sequences of one row have the same keys
    shared      pages that all sequences start with, the same ones
    leftpad     first rows of each sequence that do not exist; None: leftpad_k is not given. Not with `shared`, nor with
                rows that sequences share
    total_q     packed rows, those of sequences and behind them; 0: those of sequences
    is_packed   else queries are dense, with seqused_q
    stale       page ids behind the used ones
    spare       pages of the pool that nobody uses
    fields      other fields of the params
    """

    case: Case
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    page_size: int = 16
    layout: str = "nhd"
    capacity: int = 0
    rows: tuple[int, ...] | None = None
    shared: int = 0
    leftpad: tuple[int, ...] | None = None
    total_q: int = 0
    is_packed: bool = True
    stale: int = -1
    spare: int = 3
    fields: dict[str, Any] = field(default_factory=dict)


class RaggedProblem:
    """A ragged batch on the device; `fill` gives it other lengths, tables and values within its bounds.

    is_evicted   pages left of what a window or a chunk shows are one page full of NaN, and NaN fills the rest of them
    """

    def __init__(self, ragged: Ragged, descale=None, inputs=None, is_evicted: bool = False):
        self.ragged, self.is_evicted, case = ragged, is_evicted, ragged.case
        self.batch, self.longest_q = len(ragged.queries), max(ragged.queries)
        self.total_q = ragged.total_q or sum(ragged.queries)
        if not ragged.is_packed:
            self.total_q = self.batch * self.longest_q
        capacity, size = ragged.capacity or max(1, *ragged.keys), ragged.page_size
        self.num_rows = max(ragged.rows or range(self.batch)) + 1 + (ragged.rows is not None)
        kv_dims = (case.num_heads_k, case.head_dim)
        if size:
            self.width = -(-capacity // size)
            self.capacity, self.num_pages = self.width * size, self.num_rows * self.width + ragged.spare
            self.k, self.v = POOLS[ragged.layout]((self.num_pages, size, *kv_dims), case.stored)
            if case.head_dim_v:
                _, self.v = POOLS[ragged.layout]((self.num_pages, size, case.num_heads_k, case.dim_v), case.stored)
            self.table = contiguous("table", (self.num_rows, self.width + 1), "int32")
        else:
            self.capacity, self.table = capacity, None
            self.k, _ = _separate((self.num_rows, capacity, *kv_dims), case.stored)
            _, self.v = _separate((self.num_rows, capacity, case.num_heads_k, case.dim_v), case.stored)
        if case.is_mla:
            self.v = self.k.image.tensor(self.k.array[..., : case.dim_v])
        self.q = contiguous("q", (self.total_q, case.num_heads, case.head_dim), case.dtype)
        self.q_v = contiguous("q_v", (*self.q.array.shape[:-1], case.dim_v), case.dtype) if case.has_qv else None
        self.out = contiguous("out", (*self.q.array.shape[:-1], case.dim_v), case.element_out)
        self.lse = contiguous("lse", self.lse_shape, "fp32") if case.has_lse else None
        self.lengths = {name: contiguous(name, (size,), "int32") for name, size in self.length_sizes().items()}
        heads = {"q": case.num_heads, "k": case.num_heads_k, "v": case.num_heads_k}
        self.descales = {
            f"{name}_descale": descale(name, (self.batch, count)) for name, count in heads.items() if descale
        }
        self.scores = score_inputs(replace(case, batch=self.batch))
        self.fill(ragged.queries, ragged.keys, inputs)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        heads = self.ragged.case.num_heads
        return (heads, self.total_q) if self.ragged.is_packed else (self.batch, heads, self.longest_q)

    def length_sizes(self) -> dict[str, int]:
        """{array of lengths on the device: its entries}."""
        own = {"cu_seqlens_q": self.batch + 1} if self.ragged.is_packed else {"seqused_q": self.batch}
        own |= {"leftpad_k": self.batch} if self.ragged.leftpad else {}
        return own | {"seqused_k": self.batch} | ({"kv_batch_idx": self.batch} if self.ragged.rows else {})

    def pads(self, keys) -> list[int]:
        """Rows of each sequence that do not exist."""
        return [min(pad, n) for pad, n in zip(self.ragged.leftpad or [0] * self.batch, keys, strict=True)]

    # ---- what it holds -------------------------------------------------------------------------

    def fill(self, queries, keys, inputs=None) -> None:
        """Bring these lengths to the device, with random values or `inputs`, packed q, k and v of the sequences."""
        ragged, case = self.ragged, self.ragged.case
        keys_there = [min(n, self.capacity) for n in keys]
        rng = np.random.default_rng(zlib.crc32(f"{case} {queries} {keys} {ragged.shared}".encode()))
        randn = lambda *shape, dtype=case.stored: to_bits(rng.standard_normal(shape, np.float32), dtype)
        q, k, v = inputs or (randn(sum(queries), case.num_heads, case.head_dim, dtype=case.dtype), None, None)
        self.starts = list(accumulate(queries, initial=0))
        if not ragged.is_packed:
            self.starts = [b * self.longest_q for b in range(self.batch + 1)]
        self.q.array[...] = poison_of(self.q.array.dtype)
        for start, n, first in zip(self.starts, queries, accumulate(queries, initial=0), strict=False):
            self.q.array[start : start + n] = q[first : first + n]
        if self.q_v:
            self.q_v.array[...] = poison_of(self.q_v.array.dtype)
            for start, n in zip(self.starts, queries, strict=False):
                self.q_v.array[start : start + n] = randn(n, case.num_heads, case.dim_v, dtype=case.dtype)
        if k is None:
            k, v = (self.values_of(keys_there, randn, columns) for columns in (case.head_dim, case.dim_v))
        if case.is_mla:
            v = k[..., : case.dim_v]
        self.store(queries, keys_there, k, v, rng)
        given = {"cu_seqlens_q": self.starts, "seqused_q": queries, "seqused_k": keys, "kv_batch_idx": ragged.rows}
        given["leftpad_k"] = ragged.leftpad
        for name, tensor in self.lengths.items():
            tensor.array[...] = given[name]
        self.problem = self.logical(queries, keys_there, k, v)
        self.upload()

    def values_of(self, keys, randn, columns: int) -> np.ndarray:
        """Packed keys or values: sequences of one row of the cache have the same, and all have the shared pages."""
        case, rows = self.ragged.case, self.ragged.rows or range(self.batch)
        dims = case.num_heads_k, columns
        prefix = randn(self.ragged.shared * self.ragged.page_size, *dims)
        longest = {row: max(n for n, other in zip(keys, rows, strict=True) if other == row) for row in rows}
        by_row = {row: np.concatenate([prefix, randn(n, *dims)]) for row, n in longest.items()}
        return np.concatenate([by_row[row][:n] for row, n in zip(rows, keys, strict=True)])

    def store(self, queries, keys, k, v, rng) -> None:
        """Lay packed keys out in the cache or in pages in any order, the pool's last one among them."""
        ragged, size = self.ragged, self.ragged.page_size
        for tensor in (self.k, self.v):
            tensor.array[...] = poison_of(tensor.array.dtype)
        rows = ragged.rows or range(self.batch)
        firsts = list(accumulate(keys, initial=0))
        null, *free = rng.permutation(self.num_pages - 1).tolist() if size else (0,)
        free += [self.num_pages - 1] if size else []
        shared = [free.pop() for _ in range(ragged.shared)]
        if size:
            self.table.array[...] = ragged.stale
        step, done = size or self.capacity, set()
        for b in sorted(range(self.batch), key=lambda b: -keys[b]):
            n, row, first = keys[b], rows[b], firsts[b]
            pad = self.pads(keys)[b]
            unseen = pad + max(self.first_seen(n - pad - queries[b]), 0) if self.is_evicted else pad
            for start in range(0, 0 if row in done else n, step):
                end, place = min(start + step, n), row
                if size:
                    page = start // size
                    is_shared, is_null = page < len(shared), start + size <= unseen
                    place = null if is_null else shared[page] if is_shared else free.pop()
                    self.table.array[row, page] = place
                seen = min(max(start, unseen), end)
                for tensor, values in ((self.k, k), (self.v, v)):
                    tensor.array[place, seen - start : end - start] = values[first + seen : first + end]
            done.add(row)

    def first_seen(self, diagonal: int) -> int:
        """The first key that a query sees."""
        (left, _), chunk = self.ragged.case.window, self.ragged.case.attention_chunk
        starts = 0, diagonal - left if left >= 0 else 0, diagonal // chunk * chunk if chunk else 0
        return max(starts)

    def logical(self, queries, keys, k, v) -> Problem:
        """The same as packed sequences on the host, and padding that is to be filled as one that sees no key."""
        ragged, pads, starts = self.ragged, self.pads(keys), accumulate(keys, initial=0)
        exists = np.concatenate(
            [np.arange(first + pad, first + n) for first, pad, n in zip(starts, pads, keys, strict=False)]
        )
        k, v, keys = k[exists], v[exists], [n - pad for n, pad in zip(keys, pads, strict=True)]
        offsets = {"cu_seqlens_q": self.starts, "cu_seqlens_k": list(accumulate(keys, initial=0))}
        if not ragged.is_packed:
            offsets["seqused_q"] = list(queries)
        if ragged.fields.get("zero_padding"):
            offsets = {name: [*values, values[-1]] for name, values in offsets.items()}
            offsets["cu_seqlens_q"][-1] = self.total_q
        arrays = {name: SimpleNamespace(array=np.array(values)) for name, values in offsets.items()}
        batch = len(offsets["cu_seqlens_q"]) - 1
        case = replace(ragged.case, batch=batch, seqlen_q=self.total_q, seqlen_k=len(k))
        host: list[Any] = [SimpleNamespace(array=array) for array in (k, v)]
        given: dict[str, Any] = {"scores": self.scores, "q_v": self.q_v}
        return Problem(case, self.q, *host, self.out, self.lse, None, arrays, self.descales, **given)

    @property
    def inputs(self) -> list[Tensor]:
        """All that the device reads."""
        tables = [] if self.table is None else [self.table]
        second = [] if self.q_v is None else [self.q_v]
        return [self.q, *second, self.k, self.v, *tables, *(self.lengths | self.descales | self.scores).values()]

    def upload(self) -> None:
        """Bring the inputs to the device, poison the outputs."""
        for image in {id(tensor.image): tensor.image for tensor in self.inputs}.values():
            image.upload()
        self.poison()

    def poison(self, stream=None) -> None:
        self.problem.poison_outputs(stream)

    # ---- the call ------------------------------------------------------------------------------

    def params(self, **overrides) -> FlashAttentionParams:
        ragged, case = self.ragged, self.ragged.case
        tensors = {"q": self.q, "k": self.k, "v": self.v, "out": self.out, **self.lengths}
        tensors |= {"q_v": self.q_v} if self.q_v else {}
        fields: dict[str, Any] = {name: tensor.address for name, tensor in tensors.items()}
        for name in "kv":
            strides = zip(("batch", "row", "head"), tensors[name].strides, strict=False)
            fields |= {f"{name}_{dim}_stride": stride for dim, stride in strides}
        for name, tensor in self.descales.items():
            strides = zip(("batch", "head"), tensor.strides, strict=True)
            fields |= {f"{name}_ptr": tensor.address} | {f"{name}_{dim}_stride": stride for dim, stride in strides}
        if ragged.is_packed:
            fields |= {"mode": AttentionMode.VARLEN_PREFILL, "total_q": self.total_q}
        else:
            fields["seqlen_q"] = self.longest_q
        if self.table is not None:
            fields |= {"page_table": self.table.address, "page_table_batch_stride": self.width + 1}
            fields |= {"page_size": ragged.page_size, "num_pages": self.num_pages}
        if ragged.rows:
            fields["batch_size_k"] = self.num_rows
        left, right = case.window
        fields |= {"is_causal": case.is_causal, "window_size_left": left, "window_size_right": right}
        fields |= {"dtype": DATA_TYPES[case.dtype], "out_dtype": case.out_dtype and DATA_TYPES[case.out_dtype]}
        fields |= {"kv_dtype": DATA_TYPES[case.kv_dtype] if case.kv_dtype else None}
        fields |= {"softmax_lse": self.lse and self.lse.address, "batch_size": self.batch, "seqlen_k": self.capacity}
        fields |= {name: getattr(case, name) for name in ("num_heads", "num_heads_k", "head_dim", "head_dim_v")}
        return FlashAttentionParams(**fields | score_params(case, self.scores) | ragged.fields | overrides)

    def results(self, stream) -> tuple[np.ndarray, np.ndarray | None]:
        """(out [total_q, heads, head_dim] as bits, LSE [heads, total_q]), the memory around both checked."""
        lse = self.lse and self.lse.read(stream)
        if lse is not None and not self.ragged.is_packed:
            lse = lse.swapaxes(0, 1).reshape(-1, self.total_q)
        return self.out.read(stream), lse

    def run(self, stream, **overrides) -> tuple[np.ndarray, np.ndarray | None]:
        """`forward` over poisoned outputs."""
        self.poison(stream)
        forward(self.params(**overrides), stream).check()
        return self.results(stream)

    def check(self, out, lse) -> None:
        """Judge a result; rows that no sequence has are poison still, unless padding is to be filled."""
        check(self.problem, out, lse)

    def sequence(self, b: int, out, lse) -> tuple[np.ndarray, np.ndarray]:
        """A sequence's part of a result."""
        rows = slice(self.starts[b], self.starts[b] + self.ragged.queries[b])
        return out[rows], lse[:, rows]

    def alone(self, b: int) -> "RaggedProblem":
        """One of the sequences as a batch of its own, with the same values and bounds of its keys."""
        k, v = (tensor.array for tensor in (self.problem.k, self.problem.v))
        first = sum(min(n, self.capacity) for n in self.ragged.keys[:b])
        keys, queries = min(self.ragged.keys[b], self.capacity), self.ragged.queries[b]
        q = self.q.array[self.starts[b] : self.starts[b] + queries]
        own = replace(self.ragged, queries=(queries,), keys=(keys,), rows=None, total_q=0, capacity=self.capacity)
        return RaggedProblem(own, inputs=(q, k[first : first + keys], v[first : first + keys]))


def run_and_check(ragged: Ragged, stream, descale=None, **options) -> None:
    problem = RaggedProblem(ragged, descale, **options)
    problem.check(*problem.run(stream))
