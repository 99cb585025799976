"""One problem of the benchmark: its sizes, its nominal and its visible FLOPs, its bytes, its tensors on the device."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from math import ceil, prod

import numpy as np

from .. import FlashAttentionParams
from ..contract.formats import ELEMENT_BYTES, FP8, FP8_OUT_DTYPES, OUT_BYTES
from ..arrays.memory import address, allocate, download, fill, upload
from ..arrays.memory import window as window_of
from ..contract.reference import as_float, to_bits
from .call import call_of
from .features import Array, Feature, arrays_of, expected
from .measure import CALLS_PER_GRAPH
from .passes import FORWARD, PRODUCTS, visible_pairs

CHECKED_ROWS = 64
# Random numbers per tensor; a longer one repeats them. More than the dense grid needs, odd: no row meets its own copy.
DISTINCT_NUMBERS = 40_000_003
# K/V sets that a cold case reads in turn are together larger than this: several times the L2 cache of any Hopper GPU.
COLD_BYTES = 300_000_000
COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """An attention problem; lengths in tokens.

    dtype      of Q, K and V, kv_dtype of K and V if not None; out_dtype of O where Q is FP8, None: BF16
    head_dim_v   columns of V and O; 0: head_dim
    window     (left, right) around the bottom-right diagonal, negative is unbounded; not together with is_causal
    lengths    of packed sequences, batch_size is then their number, seqlen_* the longest; with pages those of Q alone
    lengths_k  keys of each sequence, in pages or in a dense cache; those that the call appends are the last of them
    page_size  tokens of a page of K and V, whose order in memory is random; 0: K and V are contiguous, beside other
               cases whose are not; None: contiguous, not looked at
    label      what the sequences are called
    l2         "cold": successive calls read different sets of K and V, so that the L2 cache never holds what comes
               next; "warm": they all read the same one, and as many are in a graph as of the cold case; "": either
    scores     what else is asked of scores
    passes     what is timed of it (passes.py)
    group      cases that are called the same, one after the other, are timed in the same rounds; "": alone
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
    l2: str = ""
    out_dtype: str | None = None
    lengths_k: tuple[int, ...] = ()
    page_size: int | None = None
    scores: Feature = Feature()
    passes: str = FORWARD
    group: str = ""
    head_dim_v: int = 0
    kv_dtype: str | None = None

    @property
    def name(self) -> str:
        keys = f" over {self.kv_dtype}" if self.kv_dtype else ""
        out = keys if self.element_out in (self.dtype, FP8_OUT_DTYPES[0]) else f"->{self.out_dtype}"
        parts = f"{self.dtype}{out} d{self.dims} {self.mask} h{self.heads} {self.layout}"
        return " ".join(filter(None, (parts, self.keys, self.l2, self.scores.name, self.passes)))

    @property
    def dims(self) -> str:
        """head_dim, and head_dim_v where it differs."""
        return f"{self.head_dim}" if self.columns_v == self.head_dim else f"{self.head_dim}:{self.columns_v}"

    @property
    def columns_v(self) -> int:
        """Of V and O."""
        return self.head_dim_v or self.head_dim

    @property
    def keys(self) -> str:
        """How K and V lie in memory, if that is looked at."""
        return "" if self.page_size is None else f"page {self.page_size}" if self.page_size else "contiguous"

    @property
    def variant(self) -> str:
        """What tables have side by side: pages, warm and cold, or masks."""
        return self.keys or self.l2 or self.mask

    @property
    def element_out(self) -> str:
        """The element type of O."""
        return (self.out_dtype or FP8_OUT_DTYPES[0]) if self.dtype == FP8 else self.dtype

    @property
    def element_bytes(self) -> int:
        """Of an element of Q, K or V in the GEMMs."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def stored(self) -> str:
        return self.kv_dtype or self.dtype

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
        """The sequences in short: their label, else number x length, of Q and of K where they differ."""
        if self.label:
            return self.label
        lengths = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"({self.seqlen_q}:{self.seqlen_k})"
        return f"{self.batch_size}x{lengths}"

    @property
    def visible_bounds(self) -> tuple[int, int]:
        """The mask as a window."""
        return (-1, 0) if self.is_causal else self.window

    @property
    def flops(self) -> float:
        """FLOPs as everyone counts them: 2 H Sq Sk d for each GEMM of the passes and each sequence, half of it under a
        causal mask; with a window, or where pages are looked at, those of the keys that a query sees. Documents and
        chunks are sequences of their own."""
        if max(self.window) >= 0 or self.page_size is not None:
            return self.visible_flops
        pairs = sum(seqlen_q * seqlen_k * count for (seqlen_q, seqlen_k), count in self.segments().items())
        return self._pair_flops * pairs * (0.5 if self.is_causal else 1)

    @property
    def visible_flops(self) -> float:
        """The same of each query and each key that it sees."""
        pairs = sum(visible_pairs(*lengths, *self.visible_bounds) * count for lengths, count in self.segments().items())
        return self._pair_flops * pairs

    @property
    def _pair_flops(self) -> int:
        return PRODUCTS[self.passes] * self.num_heads * (self.head_dim + self.columns_v)

    @property
    def nbytes(self) -> int:
        """What has to be read and written: K and V once, Q and O."""
        keys = sum(seqlen_k * count for (_, seqlen_k), count in self.sequences().items())
        kv_bytes = ELEMENT_BYTES[self.stored] * keys * self.num_heads_k * (self.head_dim + self.columns_v)
        return kv_bytes + self.element_bytes * prod(self.q_shape) + OUT_BYTES * prod(self.out_shape)

    @property
    def kv_bytes(self) -> int:
        """One set of K and V, as they lie in memory."""
        return ELEMENT_BYTES[self.stored] * (prod(self.kv_shape) + prod(self.v_shape))

    @property
    def kv_sets(self) -> int:
        """How many sets of K and V successive calls read in turn."""
        return self._cold_sets if self.l2 == "cold" else 1

    @property
    def calls_per_graph(self) -> int:
        """CALLS_PER_GRAPH; warm and cold, as many more as read every set of the cold case equally often."""
        return self._cold_sets * ceil(CALLS_PER_GRAPH / self._cold_sets) if self.l2 else CALLS_PER_GRAPH

    @property
    def _cold_sets(self) -> int:
        return COLD_BYTES // self.kv_bytes + 1

    @property
    def is_decode(self) -> bool:
        """One query per sequence."""
        return self.seqlen_q == 1 and not self.lengths

    def sequences(self) -> Counter[tuple[int, int]]:
        """How many sequences there are of each (seqlen_q, seqlen_k)."""
        queries = self.lengths or (self.seqlen_q,) * len(self.lengths_k)
        packed = Counter(zip(queries, self.lengths_k or queries, strict=True))
        return packed or Counter({(self.seqlen_q, self.seqlen_k): self.batch_size})

    def segments(self) -> Counter[tuple[int, int]]:
        """The same of what queries see nothing outside of: the sequences, or their documents or chunks."""
        if not (length := self.scores.segment):
            return self.sequences()
        return Counter(
            {(length, length): sum(seqlen_k * count for (_, seqlen_k), count in self.sequences().items()) // length}
        )

    @property
    def q_shape(self) -> tuple[int, ...]:
        return (*self._rows(self.seqlen_q), self.num_heads, self.head_dim)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q_shape[:-1], self.columns_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """[batch, num_heads, seqlen_q], packed [num_heads, total_q]."""
        *batch, rows, heads, _ = self.q_shape
        return (*batch, heads, rows)

    @property
    def kv_shape(self) -> tuple[int, ...]:
        """Of K."""
        rows = (sum(self._pages), self.page_size) if self.page_size else self._rows(self.seqlen_k)
        return (*rows, self.num_heads_k, self.head_dim)

    @property
    def v_shape(self) -> tuple[int, ...]:
        return (*self.kv_shape[:-1], self.columns_v)

    @property
    def _pages(self) -> list[int]:
        """Pages of each sequence."""
        return [ceil(length / (self.page_size or 1)) for length in self.lengths_k]

    def index_shapes(self) -> dict[str, tuple[int, ...]]:
        """The int32 arrays that say where the sequences lie."""
        shapes = {"cu_seqlens": (self.batch_size + 1,)} if self.lengths else {}
        if self.lengths_k:
            shapes["seqused_k"] = (self.batch_size,)
        return shapes | ({"page_table": (self.batch_size, max(self._pages))} if self.page_size else {})

    def index(self, name: str) -> np.ndarray:
        """One of them. Pages have an order that is random and the same in every run."""
        if name == "cu_seqlens":
            return np.cumsum((0, *self.lengths), dtype=np.int32)
        if name == "seqused_k":
            return np.array(self.lengths_k, np.int32) - self.scores.append
        order = np.random.default_rng(0).permutation(sum(self._pages)).astype(np.int32)
        table = np.zeros(self.index_shapes()[name], np.int32)
        for row, pages in zip(table, np.split(order, np.cumsum(self._pages)[:-1]), strict=True):
            row[: len(pages)] = pages
        return table

    def _rows(self, seqlen: int) -> tuple[int, ...]:
        return (sum(self.lengths),) if self.lengths else (self.batch_size, seqlen)

    def rows_of(self, index: int, seqlen: int) -> np.ndarray:
        """The rows of one sequence in a tensor of [rows, heads, head_dim]; `seqlen` is the tensor's, if it is dense."""
        start, length = (sum(self.lengths[:index]), self.lengths[index]) if self.lengths else (index * seqlen, seqlen)
        return np.arange(start, start + length)

    def kv_rows_of(self, index: int) -> np.ndarray:
        """Those of its keys in K and V."""
        if not self.page_size:
            return self.rows_of(index, self.seqlen_k)
        keys = np.arange(self.lengths_k[index])
        return self.index("page_table")[index, keys // self.page_size] * self.page_size + keys % self.page_size

    def shortened(self, seqlen: int) -> "Case":
        """One sequence, at most so long, in the same layout."""
        return replace(
            self,
            batch_size=1,
            seqlen_q=min(self.seqlen_q, seqlen),
            seqlen_k=min(self.seqlen_k, seqlen),
            lengths=self.lengths and (min(self.seqlen_q, seqlen),),
        )

    def as_dict(self) -> dict:
        """A JSON row: the fields and what the name is made of; up to 10,000 lengths are told by their label."""
        told = "lengths", "lengths_k", "label", "scores"
        fields = {name: value for name, value in asdict(self).items() if name not in told}
        made = {name: getattr(self, name) for name in ("dims", "mask", "heads", "layout", "variant", "kv_sets")}
        return fields | made | {"scores": self.scores.name}


class Tensors:
    """Q, K, V (standard normal, seeded) and O on the device, large enough for every case of a run, of the same dtypes.

    Uploaded once per run: each case reads the same numbers in its own shape, and so does each implementation. K and V
    hold the sets of a cold case one after the other.
    """

    def __init__(self, cases: list[Case], stream):
        self.stream = stream
        rng = np.random.default_rng(0)
        dtypes = {"q": cases[0].dtype, "k": cases[0].stored, "v": cases[0].stored}
        self.element_bytes = ELEMENT_BYTES[dtypes["k"]]
        self.out_type = to_bits(np.zeros(1, np.float32), cases[0].element_out).dtype
        q_size = max(prod(case.q_shape) for case in cases)
        kv_size = max(prod(case.kv_shape) * case.kv_sets for case in cases)
        sizes = {"q": q_size, "k": kv_size, "v": kv_size}
        # What a tensor repeats.
        self.host = {
            name: to_bits(rng.standard_normal(min(size, DISTINCT_NUMBERS), np.float32), dtypes[name])
            for name, size in sizes.items()
        }
        self.buffers = {name: self.repeated(self.host[name], size) for name, size in sizes.items()}
        self.buffers["out"] = allocate(OUT_BYTES * q_size, stream=stream)
        self.scratch = None
        self.arrays = {}
        # Calls that append write to K and V: other numbers than the host knows, until they are written anew.
        self.written_to = {name: kv_size for name in "kv" if any(case.scores.append for case in cases)}

    def repeated(self, numbers: np.ndarray, size: int):
        """A buffer of `size` numbers that repeats these."""
        buffer = allocate(numbers.itemsize * size, stream=self.stream)
        self.write(buffer, numbers, size)
        return buffer

    def write(self, buffer, numbers: np.ndarray, size: int) -> None:
        """Fills a buffer with them: they are uploaded once, then doubled on the device."""
        nbytes, done = numbers.itemsize * size, numbers.nbytes
        upload(numbers, window_of(buffer, 0, done), stream=self.stream)
        while done < nbytes:
            more = min(done, nbytes - done)
            self.copy(buffer, done, more)
            done += more

    def copy(self, buffer, start: int, nbytes: int) -> None:
        """Queues a copy of a buffer's first bytes to its byte `start`."""
        window_of(buffer, start, nbytes).copy_from(window_of(buffer, 0, nbytes), stream=self.stream)

    def copy_much(self) -> None:
        """Queues a copy of COPIED_BYTES of random numbers, by the driver, from one place on the device to another."""
        if self.scratch is None:
            size = 2 * COPIED_BYTES // self.element_bytes
            self.scratch = self.repeated(self.host["k"][:size], size)
        self.copy(self.scratch, COPIED_BYTES, COPIED_BYTES)

    def numbers(self, name: str, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """What the device's tensor of that name holds from one number on, as the host knows it."""
        known = self.host[name]
        start, size = start % known.size, prod(shape)
        if start + size <= known.size:
            return known[start : start + size].reshape(shape)
        return np.take(known, np.arange(start, start + size), mode="wrap").reshape(shape)

    def vectors(self, name: str, rows: np.ndarray, shape: tuple[int, ...], head: int) -> np.ndarray:
        """What one head of the device's tensor [.., heads, head_dim] of that name holds in these of its rows, as the
        host knows it: [1, rows, 1, head_dim]."""
        *_, num_heads, head_dim = shape
        first = (rows.astype(np.int64) * num_heads + head) * head_dim
        return np.take(self.host[name], first[:, None] + np.arange(head_dim), mode="wrap")[None, :, None]

    def pointers(self, case: Case, kv_set: int = 0) -> dict[str, int]:
        """Addresses of q, k, v and out, of the case's index arrays, one cu_seqlens serves Q and K, and of what its
        features read."""
        shapes = {"k": case.kv_shape, "v": case.v_shape}
        found = {
            name: address(buffer, kv_set * self.element_bytes * prod(shapes[name]) if name in shapes else 0)
            for name, buffer in self.buffers.items()
        }
        for name in case.index_shapes():
            key = name, case.lengths, case.lengths_k, case.page_size, case.scores.append
            found[name] = self.placed(key, Array(lambda name=name: case.index(name)))
        heads = case.num_heads, case.num_heads_k, case.head_dim
        sizes = case.dtype, case.is_causal, case.batch_size, heads, case.seqlen_q, case.seqlen_k
        found |= {name: self.placed((name, case.scores, *sizes), array) for name, array in arrays_of(case).items()}
        return found

    def placed(self, key: tuple, array: Array) -> int:
        """The address of an array, which is made once."""
        if key not in self.arrays:
            numbers = array.make()
            is_whole = array.size <= numbers.size
            self.arrays[key] = upload(numbers, stream=self.stream) if is_whole else self.repeated(numbers, array.size)
        return address(self.arrays[key])

    def poison_out(self) -> None:
        """Every element of O becomes NaN: what a kernel leaves out shows in its error. K and V become what they were
        before any call."""
        fill(self.buffers["out"], 0xFF, stream=self.stream)
        for name, size in self.written_to.items():
            self.write(self.buffers[name], self.host[name], size)

    def params(self, case: Case, kv_set: int = 0) -> FlashAttentionParams:
        """The case as a call of `forward`."""
        return FlashAttentionParams(**call_of(case, self.pointers(case, kv_set)))

    def error_of(self, case: Case, kv_set: int = 0) -> float:
        """Relative error (norm) of O against the reference in the last rows of the first, the longest and the last
        sequence, for the first, a middle and the last head.

        The last rows alone are an attention problem of their own, with the same keys: masks are bottom-right aligned.
        """
        shape = prod(case.q_shape[:-2]), case.num_heads, case.columns_v
        out = download(self.buffers["out"], shape, self.out_type, stream=self.stream)
        lengths, before = case.lengths_k or case.lengths or (case.seqlen_k,), prod(case.kv_shape[:-2]) * kv_set
        shapes = {"k": case.kv_shape, "v": case.v_shape}
        longest = lengths.index(max(lengths))
        differences, norms = 0.0, 0.0
        for index, head in ((0, 0), (longest, case.num_heads // 2), (case.batch_size - 1, case.num_heads - 1)):
            kv_head = head // (case.num_heads // case.num_heads_k)
            rows = case.rows_of(index, case.seqlen_q)[-CHECKED_ROWS:]
            q = self.vectors("q", rows, case.q_shape, head)
            k, v = (self.vectors(name, before + case.kv_rows_of(index), shapes[name], kv_head) for name in "kv")
            exact = expected(case, index, head, q, k, v)
            differences += np.square(as_float(out[rows, head]) - exact[0, :, 0]).sum()
            norms += np.square(exact).sum()
        return float(np.sqrt(differences / norms))
