"""d_bias = 0, before what writes the rest of it: one CTA per row."""
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...planning.backward import CLEAR_ARGUMENTS
from ...planning.backward_kernels import CLEAR_THREADS, ClearConfig
from ..common.entry import flat_entry


@flat_entry(CLEAR_ARGUMENTS)
class ClearBias:
    """The one kernel. Compile `__call__`: its parameters are CLEAR_ARGUMENTS, in order."""

    def __init__(self, cfg: ClearConfig):
        self.cfg = cfg

    @cute.jit
    def launch(self, a):
        """d_bias = 0, along a stride of 0 once"""
        strides = a.attn_mask_row_stride, a.attn_mask_head_stride, a.attn_mask_batch_stride
        rows = Int32(1) if strides[0] == 0 else a.seqlen_q
        heads = Int32(1) if strides[1] == 0 else a.num_heads
        batches = Int32(1) if strides[2] == 0 else a.batch_size
        d_bias = cute.make_tensor(a.d_bias, cute.make_layout(
            (a.seqlen_k, (rows, heads, batches)), stride=(1, strides)))
        self.kernel.set_name_prefix(f"fa3_cute_{self.cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(d_bias, a.seqlen_k).launch(
            grid=(rows * heads * batches, 1, 1), block=(CLEAR_THREADS, 1, 1), stream=a.stream)

    @cute.kernel
    def kernel(self, d_bias: cute.Tensor, seqlen_k: Int32):
        """A row per CTA."""
        row = d_bias[None, cute.arch.block_idx()[0]]
        for key in cutlass.range(cute.arch.thread_idx()[0], seqlen_k, CLEAR_THREADS, unroll=4):
            row[key] = Float32(0.0)
