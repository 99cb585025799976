"""Merges two partial attention results over disjoint keys (contract/merge.py has the formula): as fast as memory.

A row is one head of one query. A thread has CHUNKS times 16 bytes of it of each partial result: two, since one thread
per 16 bytes has more instructions to issue than memory takes time. The threads of a row are neighbours in one CTA.
Those that have no row, and chunks that are none, repeat the last one: the same values go to the same place once more.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...contract.merge import VECTOR_BYTES
from ...planning.merge import MergeConfig
from ..common.arithmetic import ceil_div, minimum
from ..common.entry import flat_entry
from ..common.layout import tensor_view
from ..common.sequences import is_present

Divisor = cute.FastDivmodDivisorV2
CHUNKS = 2      # of 16 bytes, per thread


@dataclass(frozen=True)
class MergeWork:
    """Extents of a launch's work. Divisors divide by multiplication: each thread starts with these divisions.

    num_rows      of all heads and batch entries
    rows_per_cta  that its threads have; the first division is the threads' of a row
    num_chunks    of a row, of 16 bytes of a partial result
    """
    num_rows: Int32
    rows_per_cta: Int32
    num_chunks: Int32
    threads_per_row: Divisor
    num_heads: Divisor
    seqlen_q: Divisor


@dataclass(frozen=True)
class MergeTensors:
    """(seqlen_q, head_dim, num_heads, batch) the outputs, (seqlen_q, num_heads, batch) the LSEs."""
    mA: cute.Tensor
    mB: cute.Tensor
    mO: cute.Tensor
    mLSE_a: cute.Tensor
    mLSE_b: cute.Tensor
    mLSE: cute.Tensor


@dataclass(frozen=True)
class LogBase:
    """Of the LSEs: log2(base) and 1 / log2(base)."""
    log2: Float32
    inverse: Float32


@flat_entry(MergeConfig.arguments)
class MergeAttention:
    """The merge kernel of one config. Compile `__call__`: its parameters are MergeConfig.arguments, in order."""

    def __init__(self, cfg: MergeConfig):
        self.cfg = cfg

    # ---- host side: traced once per config, runs at every launch ------------------------------
    @cute.jit
    def launch(self, a):
        """out = (w_a out_a + w_b out_b) / (w_a + w_b), lse = m + log(w_a + w_b); w_x = exp(lse_x - m), m the larger LSE

        Pointers and strides (in elements) as in fa3_cute.MergeParams; log2_base is that of the LSEs' logarithms.
        """
        cfg = self.cfg
        num_chunks = a.head_dim // self.columns(a.out_a.dtype)
        threads_per_row = ceil_div(num_chunks, CHUNKS)
        work = MergeWork(a.batch_size * a.seqlen_q * a.num_heads, cfg.num_threads // threads_per_row, num_chunks,
                         Divisor(threads_per_row), Divisor(a.num_heads), Divisor(a.seqlen_q))
        shape = (a.seqlen_q, a.head_dim, a.num_heads, a.batch_size)
        mA, mB, mO = (tensor_view(a, name, shape) for name in ("out_a", "out_b", "out"))
        mLSE_a, mLSE_b, mLSE = (self.lse_view(a, name) for name in ("lse_a", "lse_b", "lse"))
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        tensors, base = MergeTensors(mA, mB, mO, mLSE_a, mLSE_b, mLSE), LogBase(a.log2_base, 1.0 / a.log2_base)
        self.kernel(tensors, work, base).launch(
            grid=(ceil_div(work.num_rows, work.rows_per_cta), 1, 1), block=(cfg.num_threads, 1, 1), use_pdl=True,
            stream=a.stream)

    def columns(self, element) -> int:
        """Elements of a chunk."""
        return 8 * VECTOR_BYTES // element.width

    def lse_view(self, a, name: str) -> cute.Tensor:
        """(seqlen_q, num_heads, batch) over a pointer with its strides."""
        row, head, batch = (getattr(a, f"{name}_{of}_stride") for of in ("row", "head", "batch"))
        return cute.make_tensor(getattr(a, name), cute.make_layout(
            (a.seqlen_q, a.num_heads, a.batch_size), stride=(row, head, batch)))

    # ---- device side --------------------------------------------------------------------------
    @cute.kernel
    def kernel(self, t: MergeTensors, work: MergeWork, base: LogBase):
        """A thread's chunks of one row. All that is read of a row comes before all that is written: out and lse may be
        what they are made of."""
        slot, lane = divmod(cute.arch.thread_idx()[0], work.threads_per_row)
        index = cute.arch.block_idx()[0] * work.rows_per_cta + minimum(slot, work.rows_per_cta - 1)
        row_and_batch, head = divmod(minimum(index, work.num_rows - 1), work.num_heads)
        batch, row = divmod(row_and_batch, work.seqlen_q)
        columns, element = self.columns(t.mA.element_type), t.mA.element_type
        A, B = (cute.make_rmem_tensor((columns, CHUNKS), element) for _ in range(2))

        cute.arch.griddepcontrol_wait()
        lse_a, lse_b = t.mLSE_a[row, head, batch], t.mLSE_b[row, head, batch]
        for i in cutlass.range_constexpr(CHUNKS):
            chunk = minimum(lane + i * work.threads_per_row.divisor, work.num_chunks - 1)
            cute.autovec_copy(cute.local_tile(t.mA[row, None, head, batch], (columns,), (chunk,)), A[None, i])
            cute.autovec_copy(cute.local_tile(t.mB[row, None, head, batch], (columns,), (chunk,)), B[None, i])
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_launch_dependents()

        weight_a, weight_b, lse = weights(lse_a, lse_b, base)
        if lse_a == -Float32.inf:
            A.fill(0.0)     # its weight of 0 would not do: 0 times NaN is NaN
        if lse_b == -Float32.inf:
            B.fill(0.0)
        O = cute.make_rmem_tensor((columns, CHUNKS), t.mO.element_type)
        O.store((weight_a * A.load().to(Float32) + weight_b * B.load().to(Float32)).to(t.mO.element_type))
        for i in cutlass.range_constexpr(CHUNKS):
            chunk = minimum(lane + i * work.threads_per_row.divisor, work.num_chunks - 1)
            cute.autovec_copy(O[None, i], cute.local_tile(t.mO[row, None, head, batch], (columns,), (chunk,)))
        if is_present(t.mLSE) and lane == 0:
            t.mLSE[row, head, batch] = lse


@cute.jit
def weights(lse_a: Float32, lse_b: Float32, base: LogBase) -> tuple[Float32, Float32, Float32]:
    """(w_a / (w_a + w_b), w_b / (w_a + w_b), lse). A row that saw no key: 0, 0, -inf."""
    top = cute.arch.fmax(lse_a, lse_b)
    offset = Float32(0.0) if top == -Float32.inf else top        # -inf - -inf is NaN
    weight_a = cute.math.exp2((lse_a - offset) * base.log2, fastmath=True)
    weight_b = cute.math.exp2((lse_b - offset) * base.log2, fastmath=True)
    total = weight_a + weight_b
    inverse = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)
    return weight_a * inverse, weight_b * inverse, top + cute.math.log2(total, fastmath=True) * base.inverse
