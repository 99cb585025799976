"""Before the main kernel: what S and dP start at, and dq_sum = 0.

    start_s[i]  = -LSE[i] / softmax_scale     so that exp(scale (S + start_s)) is P
    start_dp[i] = dLSE[i] - rowsum(dO[i] O[i])

A row that sees no key (LSE = -inf, or +inf as others write it) starts at 0: all its scores are masked. Rows behind the
sequence's last start at -inf: P = 0. Both are padded to whole Q tiles, which bulk copies can read.
"""
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ...planning.backward import PREPARE_ARGUMENTS, PREPARE_THREADS, BackwardConfig
from ..common.copies import row_copy, threads_per_row
from ..common.entry import flat_entry
from ..common.layout import element_type, lse_view, tensor_view
from ..common.sequences import Sequences, is_present
from ..common.tiles import rows_from
from .blocks import Blocks


@flat_entry(PREPARE_ARGUMENTS)
class PrepareBackward:
    """The kernel of one config. Compile `__call__`: its parameters are PREPARE_ARGUMENTS, in order."""

    def __init__(self, cfg: BackwardConfig):
        self.cfg = cfg

    @cute.jit
    def launch(self, a):
        """start_s = -LSE / softmax_scale, start_dp = dLSE - rowsum(dO O), dq_sum = 0"""
        cfg, sequences = self.cfg, Sequences.create(a)
        batches = Int32(1) if sequences.is_packed() else a.batch_size
        shape = (a.seqlen_q, cfg.head_dim, a.num_heads, batches)
        blocks = Blocks.create(cfg.tile_m, sequences.cu_seqlens_q, a.seqlen_q, a.batch_size)
        lse = lse_view(a, batches)
        self.kernel.set_name_prefix(f"fa3_cute_bwd_prepare_{cfg.name}", remove_cutlass_symbol=True,
                                    keep_mangled_name=False)
        self.kernel(tensor_view(a, "out", shape), tensor_view(a, "dout", shape), lse,
                    cute.make_tensor(a.dlse, lse.layout), a.start_s, a.start_dp, a.dq_sum, blocks, sequences,
                    a.softmax_scale).launch(
            grid=(blocks.num_blocks, a.num_heads, 1), block=(PREPARE_THREADS, 1, 1), stream=a.stream)

    @cute.kernel
    def kernel(self, mO: cute.Tensor, mdO: cute.Tensor, mLSE: cute.Tensor, mdLSE: cute.Tensor, start_s: cute.Pointer,
               start_dp: cute.Pointer, dq_sum: cute.Pointer, blocks: Blocks, sequences: Sequences, scale: Float32):
        """A Q tile of one head per CTA."""
        cfg = self.cfg
        block, head, _ = cute.arch.block_idx()
        thread = cute.arch.thread_idx()[0]
        sequence = blocks.find(block)
        offset, seqlen, _, _ = sequences.place(sequence)
        m_block, batch = block - blocks.first(sequence), sequences.batch_coordinate(sequence)
        copy, first_row, rows_per_step = row_copy(cfg.head_dim, element_type(cfg), thread, PREPARE_THREADS)
        tile = lambda mX: copy.partition_S(cute.local_tile(
            cute.domain_offset((offset, 0), mX[None, None, head, batch]), (cfg.tile_m, cfg.head_dim), (m_block, 0)))
        gO, gdO = tile(mO), tile(mdO)
        place = (Int64(head) * blocks.num_blocks + block) * cfg.tile_m
        zeros = cute.make_rmem_tensor(4, Float32)
        zeros.fill(0.0)
        for i in cutlass.range_constexpr(cfg.tile_m * cfg.head_dim // 4 // PREPARE_THREADS):
            target = dq_sum + place * cfg.head_dim + 4 * (thread + i * PREPARE_THREADS)
            cute.autovec_copy(zeros, cute.make_tensor(target.align(16), cute.make_layout(4)))
        per_row = threads_per_row(cfg.head_dim, element_type(cfg))
        for step in cutlass.range_constexpr(-(-cfg.tile_m // rows_per_step)):
            row = step * rows_per_step + first_row
            query = m_block * cfg.tile_m + row
            is_used = (query < seqlen) & (row < cfg.tile_m)
            rO, rdO = (cute.make_rmem_tensor_like(gX[None, 0, None]) for gX in (gO, gdO))
            rO.fill(0.0)
            rdO.fill(0.0)
            if is_used:
                cute.autovec_copy(gO[None, step, None], rO)
                cute.autovec_copy(gdO[None, step, None], rdO)
            delta = Float32(0.0)
            for i in cutlass.range_constexpr(cute.size(rO)):
                delta += rO[i].to(Float32) * rdO[i].to(Float32)
            for i in cutlass.range_constexpr(per_row.bit_length() - 1):
                delta += cute.arch.shuffle_sync_bfly(delta, 1 << i)
            if thread % per_row == 0 and row < cfg.tile_m:
                start_S, start_dP = -Float32.inf, Float32(0.0)
                if is_used:
                    lse = mLSE[offset + query, head, batch]
                    start_S = -lse / scale
                    if lse == Float32.inf or lse == -Float32.inf:
                        start_S = Float32(0.0)
                    start_dP = -delta
                    if is_present(mdLSE):
                        start_dP += mdLSE[offset + query, head, batch]
                start_s[place + row] = start_S
                start_dp[place + row] = start_dP
