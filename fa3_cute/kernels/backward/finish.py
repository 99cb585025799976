"""What consumers do for a duty: dQ = softmax_scale times the sums, rounded, rows of the sequence alone."""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, const_expr
from cutlass.cute.nvgpu import CopyG2ROp, MemoryOrder, MemoryScope

from ...planning.backward import BackwardConfig
from ..common.layout import element_type, rounded
from .bundles import BwdParams
from .duties import Duty, rounds_of
from .outgoing import Outgoing, query_part, query_rows, wait_until_free
from .workspace import first_quad, in_thread_order, quads_of


@dataclass
class Finisher:
    """Of one consumer warpgroup. Where one warpgroup computes dQ of a tile, it finishes every other tile; else its part
    of each. Two tiles are on their way at a time.

    mma    of a warpgroup's part of dQ
    accs   what the thread has of the next and of the one after it, as the GEMM left them
    """
    cfg: Constexpr
    params: BwdParams
    mma: cute.TiledMma
    accs: tuple[cute.Tensor, cute.Tensor]
    out: Outgoing
    duty: Duty

    @cute.jit
    def start(self) -> tuple[Int32, Int32, Int32]:
        """The warpgroup's first tile."""
        place = self.duty.start()
        if const_expr(self.cfg.is_dq_in_turns):
            if self.out.wg_idx == 1:
                place = self.duty.after(place)
        return place

    @cute.jit
    def after(self, place: tuple[Int32, Int32, Int32]) -> tuple[Int32, Int32, Int32]:
        """The warpgroup's next tile."""
        for _ in cutlass.range_constexpr(self.cfg.num_consumer_wgs // self.cfg.num_dq_wgs):
            place = self.duty.after(place)
        return place

    @cute.jit
    def read(self, which: Constexpr[int], place: tuple[Int32, Int32, Int32]):
        """The thread's sums of a tile, from L2; zeros if there is none, or they would be live from one tile of keys to
        the next."""
        cfg, out, (i, m_block, of_group) = self.cfg, self.out, place
        self.accs[which].fill(0.0)
        if i < self.duty.num_tiles:
            block = self.params.sums.parts[None, self.duty.first_block + m_block, of_group, self.duty.slot]
            part = Int32(0) if const_expr(cfg.is_dq_in_turns) else out.wg_idx
            start = first_quad(cute.local_tile(block, (cfg.dq_part,), (part,)).iterator, out.thread)
            atom = cute.make_copy_atom(CopyG2ROp(), Float32, num_bits_per_copy=128, memory_order=MemoryOrder.RELAXED,
                                       memory_scope=MemoryScope.GPU)
            cute.copy(atom, in_thread_order(start, cfg.dq_part)[None, None, 0], quads_of(self.accs[which]))

    @cute.jit
    def finish(self, which: Constexpr[int], place: tuple[Int32, Int32, Int32], ahead: tuple[Int32, Int32, Int32],
               is_behind: Boolean):
        """One tile, while the one after the next is read. is_behind: something was sent before."""
        cfg, acc = self.cfg, self.accs[which]
        for j in cutlass.range_constexpr(cute.size(acc)):
            acc[j] = self.params.scale * acc[j]
        rdQ = rounded(acc, element_type(cfg))
        self.read(which, ahead)
        if is_behind:
            wait_until_free(cfg)
        rows = query_rows(cfg, self.duty, self.params.group, place, self.out.wg_idx)
        self.out.stage(self.mma, rdQ, query_part(cfg), which, self.params.dq, rows, cfg.is_dq_transposed)


@cute.jit
def finish_all(finisher: Finisher, has_keys: Boolean):
    """All tiles of the warpgroup, of which the first two are read; in rounds, of a tile each or of one for each
    warpgroup. has_keys: dV and dK of some were sent before."""
    place = finisher.start()
    ahead, num_rounds = finisher.after(finisher.after(place)), rounds_of(finisher.cfg, finisher.duty)
    for i in cutlass.range(0, num_rounds, 2, unroll=1):
        for which in cutlass.range_constexpr(2):
            if i + which < num_rounds:
                finisher.finish(which, place, ahead, has_keys | (i + which > 0))
            place, ahead = finisher.after(place), finisher.after(ahead)


def make_finisher(cfg: BackwardConfig, params: BwdParams, mma: cute.TiledMma, out: Outgoing, duty: Duty) -> Finisher:
    """Of a consumer thread."""
    shape = cute.size(query_part(cfg), mode=[0]), cute.size(query_part(cfg), mode=[1])
    shape = shape[::-1] if cfg.is_dq_transposed else shape
    accs = tuple(cute.make_rmem_tensor(mma.partition_shape_C(shape), Float32) for _ in range(2))
    return Finisher(cfg, params, mma, accs, out, duty)
