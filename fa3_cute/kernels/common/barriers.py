"""Named-barrier ids (16 per CTA; id 0 is __syncthreads) and the ping-pong turnstile.

id    name        threads  who                                       protects
1..3  EPILOGUE+i  128      warpgroup i syncs                         its rows of Q, until its four warps have read them
4..6  TURN+i      256      warpgroup i syncs, warpgroup i-1 arrives  the tensor core: one warpgroup issues at a time
7..9  VOTE+i      128      warpgroup i votes                         nothing: its four warps branch the same way
10    CONSUMERS   256      two warpgroups sync                       what they read or write together
11    P_FULL      256      warpgroup 0 arrives, warpgroup 1 syncs    P and factors in shared memory, until written (mla)
12    P_EMPTY     256      warpgroup 1 arrives, warpgroup 0 syncs    the same, until read

The main backward kernel has EPILOGUE and TURN of these; from 7 on its ids are those of backward/barriers.py.
"""
import enum

import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.experimental import primitives

from ...planning.config import KernelConfig


class BarrierId(enum.IntEnum):
    """First id of each family; add the consumer warpgroup's index."""
    EPILOGUE = 1
    TURN = 4
    VOTE = 7
    CONSUMERS = 10
    P_FULL = 11
    P_EMPTY = 12


@cute.jit
def open_turnstile(cfg: KernelConfig, wg_idx: Int32):
    """Give warpgroup 0 the first turn. Call once, before the first wait_turn."""
    if const_expr(cfg.use_pingpong):
        if wg_idx == cfg.num_consumer_wgs - 1:
            pass_turn(cfg, wg_idx)


@cute.jit
def wait_turn(cfg: KernelConfig, wg_idx: Int32):
    """Block until the previous warpgroup has passed its turn on: when its GEMMs are issued, backward when its S is
    complete."""
    if const_expr(cfg.use_pingpong):
        cute.arch.barrier(barrier_id=BarrierId.TURN + wg_idx, number_of_threads=256)


@cute.jit
def pass_turn(cfg: KernelConfig, wg_idx: Int32):
    """Let the next warpgroup issue its GEMMs."""
    if const_expr(cfg.use_pingpong):
        next_wg = wg_idx + 1 if wg_idx < cfg.num_consumer_wgs - 1 else 0
        cute.arch.barrier_arrive(barrier_id=BarrierId.TURN + next_wg, number_of_threads=256)


@cute.jit
def sync_warpgroup(wg_idx: Int32):
    """Wait for the other three warps of this consumer warpgroup."""
    cute.arch.barrier(barrier_id=BarrierId.EPILOGUE + wg_idx, number_of_threads=128)


@cute.jit
def sync_consumers(cfg: KernelConfig):
    """Wait for all warps of the consumer warpgroups, which are one or two."""
    if const_expr(cfg.num_consumer_wgs == 1):
        sync_warpgroup(0)
    else:
        cute.arch.barrier(barrier_id=BarrierId.CONSUMERS, number_of_threads=256)


def all_agree(wg_idx: Int32, agrees: Boolean) -> Boolean:
    """Whether all threads of this consumer warpgroup agree: WGMMA wants its four warps at the same instruction."""
    votes = primitives.barrier_cta_red_aligned(agrees, BarrierId.VOTE + wg_idx, "popc", thread_count=128)
    return cute.arch.make_warp_uniform(votes) == 128      # the same in all lanes, which the compiler may know
