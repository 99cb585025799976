"""Reduce role: one warp adds the warpgroups' parts of dQ to global memory, one bulk reduction each."""
import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.experimental import primitives

from ...planning.backward import BackwardConfig
from ..common.tile_ring import END, read_tile
from .blocks import KeyTile, last_key_block, query_range
from .bundles import BwdParams, BwdPipelines, BwdSmem


@cute.jit
def reduce_dq(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines):
    """Per Q tile and warpgroup: its part from shared memory, added in FP32 (PTX ISA, "cp.reduce.async.bulk").

    Deterministic: the CTAs add to a block in the order of their keys, the last ones first.

    Runs on: warp 1. Synchronises: reads the tile ring; waits for the full halves of the dQ ring; empties it as soon as
    it is read.
    """
    consumer = pipes.dq.make_consumer()
    tiles = pipes.tiles.make_consumer()
    tile = read_tile(smem.sTiles[None, tiles.wait().index], KeyTile)
    while tile.n_block != END:
        queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
        per_head = queries.m_block_max - queries.m_block_min
        for i in cutlass.range(params.group * per_head, unroll=1):
            of_group = i // per_head
            m_block = queries.m_block_min + i - of_group * per_head
            block, head = tile.first_q_block + m_block, tile.kv_head * params.group + of_group
            if const_expr(cfg.is_deterministic):
                last = last_key_block(cfg, params.window, m_block, tile.seqlen_q, tile.seqlen_k)
                wait_for_turn(params.order[None, block, head], last - tile.n_block)
            for w in cutlass.range_constexpr(cfg.num_dq_wgs):
                part = consumer.wait_and_advance()
                slot = part.index if const_expr(cfg.is_dq_in_turns) else w
                add_part(cfg, params.dq_sum[None, block, head], smem.sdQ[None, slot], w)
                with cute.arch.elect_one():
                    part.release()
            if const_expr(cfg.is_deterministic):
                pass_turn(params.order[None, block, head])
        with cute.arch.elect_one():
            tiles.release()
        tiles.advance()
        tile = read_tile(smem.sTiles[None, tiles.wait().index], KeyTile)


@cute.jit
def add_part(cfg: BackwardConfig, target: cute.Tensor, source: cute.Tensor, w: int):
    """A warpgroup's part of a block of dQ; until it is read, deterministic: until it is added."""
    with cute.arch.elect_one():
        primitives.cp_reduce_async_bulk_global_shared_cta(
            (target.iterator + w * cfg.dq_part).llvm_ptr, source.iterator.llvm_ptr, 4 * cfg.dq_part,
            op=primitives.CpReduceOp.ADD, type=primitives.CpReduceType.F32)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=not cfg.is_deterministic)


@cute.jit
def wait_for_turn(count: cute.Tensor, turn: Int32):
    """Until so many CTAs have added to a block of dQ: those of later keys, which run first (order.py)."""
    with cute.arch.elect_one():
        taken = cute.arch.atomic_add(count.iterator, Int32(0), sem="acquire", scope="gpu")
        while taken != turn:
            taken = cute.arch.atomic_add(count.iterator, Int32(0), sem="acquire", scope="gpu")
    cute.arch.sync_warp()


@cute.jit
def pass_turn(count: cute.Tensor):
    """The bulk reductions are complete, not only read: what the next CTA adds comes after them."""
    with cute.arch.elect_one():
        cute.arch.fence_acq_rel_gpu()
        cute.arch.atomic_add(count.iterator, Int32(1), sem="release", scope="gpu")
