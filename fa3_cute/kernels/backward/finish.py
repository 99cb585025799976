"""After the main kernel: dQ = softmax_scale dq_sum, rounded, rows of the sequences alone."""
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...planning.backward import FINISH_ARGUMENTS, BackwardConfig
from ..common.entry import flat_entry
from ..common.layout import element_type, rounded, smem_ring, tensor_view, transposed
from ..common.sequences import Sequences
from .blocks import Blocks, query_tile
from .kernel import make_dq_mma
from .store import store_used_rows, write_slot
from .workspace import first_quad, in_thread_order, per_block, quads_of


@flat_entry(FINISH_ARGUMENTS)
class FinishBackward:
    """The kernel of one config. Compile `__call__`: its parameters are FINISH_ARGUMENTS, in order."""

    def __init__(self, cfg: BackwardConfig):
        self.cfg = cfg

    @cute.jit
    def launch(self, a):
        """dQ = softmax_scale dq_sum"""
        cfg, sequences = self.cfg, Sequences.create(a)
        batches = Int32(1) if sequences.is_packed() else a.batch_size
        blocks = Blocks.create(cfg.tile_m, sequences.cu_seqlens_q, a.seqlen_q, a.batch_size)
        dq_sum = per_block(a.dq_sum, cfg.tile_m * cfg.head_dim, blocks, a.num_heads)
        columns = a.head_dim if cfg.is_padded else cfg.head_dim
        mdQ = tensor_view(a, "dq", (a.seqlen_q, columns, a.num_heads, batches))
        sdQ = smem_ring(element_type(cfg), cfg.tile_m, cfg.head_dim, 1)
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(mdQ, dq_sum, sdQ, make_dq_mma(cfg), blocks, sequences, a.softmax_scale).launch(
            grid=(blocks.num_blocks * a.num_heads, 1, 1), block=(cfg.num_threads, 1, 1),
            use_pdl=True, stream=a.stream)

    @cute.kernel
    def kernel(self, mdQ: cute.Tensor, dq_sum: cute.Tensor, layout: cute.ComposedLayout, mma: cute.TiledMma,
               blocks: Blocks, sequences: Sequences, scale: Float32):
        """A Q tile of one head per CTA: its threads take what the consumers of the main kernel held."""
        cute.arch.griddepcontrol_wait()      # for the main kernel
        cfg, tile, thread = self.cfg, query_tile(blocks, sequences), cute.arch.thread_idx()[0]
        allocator = cutlass.memory.SmemAllocator()
        sdQ = allocator.allocate_tensor(element_type(cfg), layout.outer, byte_alignment=1024, swizzle=layout.inner)
        shape = (cfg.head_dim, cfg.tile_m) if cfg.is_dq_transposed else (cfg.tile_m, cfg.head_dim)
        acc = cute.make_rmem_tensor(mma.partition_shape_C(shape), Float32)
        part = cute.local_tile(dq_sum[None, tile.block, tile.head], (cfg.dq_part,), (thread // 128,))
        source = in_thread_order(first_quad(part.iterator, thread % 128), cfg.dq_part)
        cute.autovec_copy(source[None, None, 0], quads_of(acc))
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = scale * acc[i]
        rdQ = rounded(acc, element_type(cfg))
        slot = transposed(sdQ)[None, None, 0] if cfg.is_dq_transposed else sdQ[None, None, 0]
        write_slot(mma, rdQ, slot, thread, cfg.is_dq_transposed)
        cute.arch.sync_threads()
        num_rows = tile.seqlen - tile.m_block * cfg.tile_m
        store_used_rows(cfg, sdQ[None, None, 0], tile.rows_of(cfg, mdQ), (num_rows, mdQ.shape[1]), thread,
                        cfg.num_threads)
