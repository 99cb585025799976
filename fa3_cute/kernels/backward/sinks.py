"""After the prepare kernel: d_s_aux, of the sums that its warps have left.

A warp adds up those of one head in the same order in every call: lanes take blocks in turn, then a tree of lanes.
"""
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ...planning.backward import SINK_WARPS, SINKS_ARGUMENTS
from ...planning.backward_kernels import SinksConfig
from ...planning.rings import WARP
from ..common.entry import flat_entry


@flat_entry(SINKS_ARGUMENTS)
class SinkGradients:
    """The one kernel. Compile `__call__`: its parameters are SINKS_ARGUMENTS, in order."""

    def __init__(self, cfg: SinksConfig):
        self.cfg = cfg

    @cute.jit
    def launch(self, a):
        """d_s_aux[head] = the sum of sink_sums[.., head]"""
        sums = cute.make_tensor(a.sink_sums, cute.make_layout(
            (SINK_WARPS, a.num_blocks, a.num_heads),
            stride=(1, Int64(SINK_WARPS), Int64(SINK_WARPS) * a.num_blocks)))
        d_s_aux = cute.make_tensor(a.d_s_aux, cute.make_layout(a.num_heads))
        self.kernel.set_name_prefix(f"fa3_cute_{self.cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(d_s_aux, sums, a.num_blocks).launch(
            grid=(a.num_heads, 1, 1), block=(WARP, 1, 1), stream=a.stream)

    @cute.kernel
    def kernel(self, d_s_aux: cute.Tensor, sums: cute.Tensor, num_blocks: Int32):
        """One head per CTA; 0 where there is no block."""
        lane, head = cute.arch.lane_idx(), cute.arch.block_idx()[0]
        total = Float32(0.0)
        for block in cutlass.range(lane, num_blocks, WARP, unroll=4):
            part = cute.make_rmem_tensor(SINK_WARPS, Float32)
            cute.autovec_copy(sums[None, block, head], part)
            total += (part[0] + part[1]) + (part[2] + part[3])
        total = cute.arch.warp_reduction_sum(total)
        if lane == 0:
            d_s_aux[head] = total
