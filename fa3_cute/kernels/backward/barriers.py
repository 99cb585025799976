"""Named-barrier ids of the main kernel, besides those of common/barriers.py, and the turns in which warpgroups issue S.
"all": the consumers and the watch role.

id    name      threads  who                             protects
4..5  STAGED+i  all      consumers arrive, watch syncs   place i of what leaves, until it is written
6     FREE      all      watch arrives, consumers sync   the place before the last, and at the end both, until read
7     SUMS      all      watch arrives, consumers sync   sums of dQ, until they are whole; and slots of dS, until read
8     LOADED    64       load arrives, schedule syncs    the order, of which no place is taken before one is loaded
9..10 TURN+i    256      warpgroup i syncs, the other    the tensor core: one warpgroup's S at a time
                         arrives
"""
import enum

import cutlass.cute as cute
from cutlass import Int32, const_expr

from ...planning.backward import BackwardConfig


class BarrierId(enum.IntEnum):
    """First id of each."""
    STAGED = 4
    FREE = 6
    SUMS = 7
    LOADED = 8
    TURN = 9


@cute.jit
def open_turns(cfg: BackwardConfig, wg_idx: Int32):
    """Give warpgroup 0 the first turn."""
    if const_expr(cfg.use_pingpong):
        if wg_idx == 1:
            pass_turn(cfg, wg_idx)


@cute.jit
def wait_turn(cfg: BackwardConfig, wg_idx: Int32):
    """Until S of the other warpgroup is complete."""
    if const_expr(cfg.use_pingpong):
        cute.arch.barrier(barrier_id=BarrierId.TURN + wg_idx, number_of_threads=2 * 128)


@cute.jit
def pass_turn(cfg: BackwardConfig, wg_idx: Int32):
    """Let the other warpgroup issue its S."""
    if const_expr(cfg.use_pingpong):
        cute.arch.barrier_arrive(barrier_id=BarrierId.TURN + 1 - wg_idx, number_of_threads=2 * 128)
