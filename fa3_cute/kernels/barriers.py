"""Named-barrier ids (16 per CTA; id 0 is __syncthreads) and the ping-pong turnstile.

id    name        threads  who                                       protects
1..3  EPILOGUE+i  128      warpgroup i syncs                         its rows of Q, until its four warps have read them
4..6  TURN+i      256      warpgroup i syncs, warpgroup i-1 arrives  the tensor core: one warpgroup issues at a time
"""
import enum

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ..config import FwdConfig


class BarrierId(enum.IntEnum):
    """First id of each family; add the consumer warpgroup's index."""
    EPILOGUE = 1
    TURN = 4


@cute.jit
def open_turnstile(cfg: FwdConfig, wg_idx: Int32):
    """Give warpgroup 0 the first turn. Call once, before the first wait_turn."""
    if const_expr(cfg.use_pingpong):
        if wg_idx == cfg.num_consumer_wgs - 1:
            pass_turn(cfg, wg_idx)


@cute.jit
def wait_turn(cfg: FwdConfig, wg_idx: Int32):
    """Block until the previous warpgroup has issued its GEMMs."""
    if const_expr(cfg.use_pingpong and cfg.is_fp8):
        for i in cutlass.range_constexpr(cfg.num_consumer_wgs):
            if wg_idx == i:
                cute.arch.barrier(barrier_id=BarrierId.TURN + i, number_of_threads=256)
    elif const_expr(cfg.use_pingpong):
        cute.arch.barrier(barrier_id=BarrierId.TURN + wg_idx, number_of_threads=256)


@cute.jit
def pass_turn(cfg: FwdConfig, wg_idx: Int32):
    """Let the next warpgroup issue its GEMMs."""
    if const_expr(cfg.use_pingpong and cfg.is_fp8):
        for i in cutlass.range_constexpr(cfg.num_consumer_wgs):
            if wg_idx == i:
                next_turn = BarrierId.TURN + (i + 1) % cfg.num_consumer_wgs
                cute.arch.barrier_arrive(barrier_id=next_turn, number_of_threads=256)
    elif const_expr(cfg.use_pingpong):
        next_wg = wg_idx + 1 if wg_idx < cfg.num_consumer_wgs - 1 else 0
        cute.arch.barrier_arrive(barrier_id=BarrierId.TURN + next_wg, number_of_threads=256)


@cute.jit
def sync_warpgroup(wg_idx: Int32):
    """Wait for the other three warps of this consumer warpgroup."""
    cute.arch.barrier(barrier_id=BarrierId.EPILOGUE + wg_idx, number_of_threads=128)
