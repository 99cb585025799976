"""How gradients leave: consumer warpgroups write their parts to one of two places in shared memory and go on; the watch
role, which the barriers STAGED tell, has TMA store them, and says by FREE when it has read what was there.

So consumers do not wait for their own stores, nor for `fence.proxy.async`, behind which the sums that they have on the
way (finish.py) would have to be there. Where lengths are on the device, rows of a part that is not whole leave by
ordinary stores of the warpgroup: behind them lie those of another sequence.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, Int64, const_expr

from ...planning.backward import BackwardConfig
from ...planning.config import ROWS_PER_WARPGROUP
from ...planning.rings import WARP
from ..common.barriers import sync_warpgroup
from ..common.layout import element_type, smem_ring, tensor_view, transposed
from ..common.sequences import is_present
from ..common.tiles import rows_from
from ..common.tma import TmaOperand, tma_store, tma_views
from .barriers import BarrierId
from .shares import STORES
from .store import store_used_rows, write_slot


@dataclass(frozen=True)
class Gradient:
    """A gradient in global memory, (rows, columns, heads, batch).

    tensor    for ordinary stores; a null pointer if the gradient is not wanted
    op        for TMA, by parts
    """
    tensor: cute.Tensor
    op: TmaOperand


@dataclass(frozen=True)
class Rows:
    """Where a part belongs: blocks as large as the part, of a sequence's rows and of columns, and how many rows from
    its first on the sequence has."""
    block: Int32
    column_block: Int32
    offset: Int32      # the sequence's first row
    used: Int32
    head: Int32
    batch: Int32


def key_part(cfg: BackwardConfig) -> cute.ComposedLayout:
    """(64, head_dim, 1): a warpgroup's keys of dK or dV, in shared memory; if is_split half of its columns."""
    if cfg.is_split:
        return smem_ring(element_type(cfg), cfg.tile_n // 2, ROWS_PER_WARPGROUP, 1)
    return smem_ring(element_type(cfg), ROWS_PER_WARPGROUP, cfg.head_dim, 1)


def query_part(cfg: BackwardConfig) -> cute.ComposedLayout:
    """(queries, columns, 1): what a warpgroup has of a tile of dQ."""
    rows, columns = (cfg.tile_m, ROWS_PER_WARPGROUP) if has_columns(cfg) else (ROWS_PER_WARPGROUP, cfg.head_dim)
    return smem_ring(element_type(cfg), rows, columns, 1)


def has_columns(cfg: BackwardConfig) -> bool:
    """A warpgroup has some columns of dQ."""
    return cfg.is_dq_transposed or cfg.is_split


@cute.jit
def gradient_of(a, name: str, like: str, shape: tuple, part: cute.ComposedLayout) -> Gradient:
    """From a kernel's arguments, on the host. like: a tensor that is there if the gradient is not wanted, since TMA's
    descriptor must have an address."""
    tensor, start = tensor_view(a, name, shape), getattr(a, name)
    address = Int64(start.toint()) if start.toint() != 0 else Int64(getattr(a, like).toint())
    there = cute.make_ptr(start.dtype, address, cute.AddressSpace.gmem, assumed_align=16)
    return Gradient(tensor, tma_store(cute.make_tensor(there, tensor.layout), part, cute.size(part, mode=[0])))


@cute.jit
def key_rows(cfg: BackwardConfig, tile, wg_idx: Int32 | int, half: int = 0) -> Rows:
    """Of a warpgroup's keys; none of a part that another stores (shares.py)."""
    block, column_block = tile.n_block * cfg.num_consumer_wgs + wg_idx, Int32(0)
    used = tile.seqlen_k - block * ROWS_PER_WARPGROUP
    if const_expr(cfg.is_split):
        block, column_block = 2 * tile.n_block + half, Int32(wg_idx)
        used = tile.seqlen_k - block * (cfg.tile_n // 2)
    if const_expr(cfg.shares_tiles):
        if tile.part != STORES:
            used = Int32(0)
    return Rows(block, column_block, tile.offset_k, used, tile.kv_head, tile.batch)


def has_second_half(cfg: BackwardConfig, tile) -> Boolean:
    """If is_split: there are more than half of a tile's keys. Dense calls, whose tiles but a last one are whole, send
    both halves of any."""
    return tile.seqlen_k > (tile.n_block * cfg.tile_n + cfg.tile_n // 2 if cfg.is_varlen else 0)


@cute.jit
def query_rows(cfg: BackwardConfig, duty, group: Int32, place: tuple[Int32, Int32, Int32], wg_idx: Int32) -> Rows:
    """Of a warpgroup's part of a tile of dQ; none if the place lies behind the duty's last."""
    i, m_block, of_group = place
    block, column_block, used = m_block, Int32(0), duty.seqlen - m_block * cfg.tile_m
    if const_expr(has_columns(cfg)):
        column_block = Int32(wg_idx)
    elif const_expr(not cfg.is_dq_in_turns):
        block, used = cfg.num_dq_wgs * m_block + wg_idx, used - ROWS_PER_WARPGROUP * wg_idx
    if i >= duty.num_tiles:
        used = Int32(0)
    return Rows(block, column_block, duty.offset, used, duty.kv_head * group + of_group, duty.batch)


def slot_at(cfg: BackwardConfig, smem, place: int, wg_idx: Int32 | int, part: cute.ComposedLayout) -> cute.Tensor:
    """A warpgroup's place: a stretch of dS's slots (0), or its slot of dQ (1). Both hold any part."""
    address = smem.sdS.iterator.toint() + wg_idx * 2 * ROWS_PER_WARPGROUP * cfg.head_dim
    if place == 1:
        address = smem.sdQ.iterator.toint() + wg_idx * 4 * cfg.dq_part
    if cfg.is_split:
        start = (smem.sdQ if place == 1 else smem.sdS).iterator.toint()
        address = start + wg_idx * 2 * ROWS_PER_WARPGROUP * cfg.tile_m
    element = element_type(cfg)
    ptr = cute.make_ptr(element, Int32(address), cute.AddressSpace.smem, assumed_align=1024)
    return cute.make_tensor(cute.recast_ptr(ptr, part.inner, dtype=element), part.outer)


def threads_of(cfg: BackwardConfig) -> int:
    """Of the consumers and the watch role."""
    return 128 * cfg.num_consumer_wgs + WARP


@dataclass
class Outgoing:
    """Of one consumer warpgroup. thread: in it."""
    cfg: Constexpr
    smem: object         # BwdSmem of bundles.py, which has Gradient from here
    wg_idx: Int32
    thread: Int32

    @cute.jit
    def stage(self, mma: cute.TiledMma, rX: cute.Tensor, part: Constexpr, place: Constexpr[int], gradient: Gradient,
              rows: Rows, is_transposed: Constexpr[bool]):
        """A part, rounded, of the warpgroup's GEMM -> a place that is free."""
        self.write(mma, rX, part, place, self.wg_idx, is_transposed)
        self.tell(place)
        self.store_rest(part, place, gradient, rows, self.wg_idx)

    def write(self, mma: cute.TiledMma, rX: cute.Tensor, part: cute.ComposedLayout, place: int, block: Int32 | int,
              is_transposed: bool):
        """The same, to so many-th of a place's parts; is_transposed: its rows are the GEMM's columns."""
        slot = slot_at(self.cfg, self.smem, place, block, part)[None, None, 0]
        write_slot(mma, rX, transposed(slot) if is_transposed else slot, self.thread, is_transposed)

    def tell(self, place: int):
        """The watch role, that the warpgroup's parts are in a place."""
        cute.arch.barrier_arrive(barrier_id=BarrierId.STAGED + place, number_of_threads=threads_of(self.cfg))

    @cute.jit
    def store_rest(self, part: Constexpr, place: Constexpr[int], gradient: Gradient, rows: Rows, block: Int32 | int):
        """A part that is not whole, where lengths are on the device."""
        cfg = self.cfg
        if const_expr(cfg.is_varlen):
            if rows.used < cute.size(part, mode=[0]) and is_present(gradient.tensor):
                slot = slot_at(cfg, self.smem, place, block, part)[None, None, 0]
                sync_warpgroup(self.wg_idx)
                shape = cute.size(part, mode=[0]), cute.size(part, mode=[1])
                mX = rows_from(cfg, rows.offset, gradient.tensor[None, None, rows.head, rows.batch])
                gX = cute.local_tile(mX, shape, (rows.block, rows.column_block))
                extent = gradient.tensor.shape[1] - rows.column_block * shape[1]
                store_used_rows(cfg, slot, gX, (rows.used, extent), self.thread, 128)


@cute.jit
def send(cfg: BackwardConfig, smem, place: Constexpr[int], part: Constexpr, gradient: Gradient, all_rows: tuple):
    """The parts of all warpgroups, when they are in their places, to their rows. Runs on: the watch role."""
    cute.arch.barrier(barrier_id=BarrierId.STAGED + place, number_of_threads=threads_of(cfg))
    cute.arch.fence_view_async_shared()
    shape = cute.size(part, mode=[0]), cute.size(part, mode=[1])
    for w in cutlass.range_constexpr(cfg.num_consumer_wgs):
        rows = all_rows[w]
        if rows.used >= (shape[0] if const_expr(cfg.is_varlen) else 1) and is_present(gradient.tensor):
            mX = rows_from(cfg, rows.offset, gradient.op.tensor[None, None, rows.head, rows.batch])
            gX = cute.local_tile(mX, shape, (rows.block, rows.column_block))
            tXsX, tXgX = tma_views(gradient.op, gX, slot_at(cfg, smem, place, w, part))
            cute.copy(gradient.op.atom, tXsX[None, 0], tXgX)
    cute.arch.cp_async_bulk_commit_group()


@cute.jit
def set_free(cfg: BackwardConfig, num_left: Constexpr[int]):
    """The places of all parts but the last so many, when they are read. Runs on: the watch role."""
    cute.arch.cp_async_bulk_wait_group(num_left, read=True)
    cute.arch.sync_warp()
    cute.arch.barrier_arrive(barrier_id=BarrierId.FREE, number_of_threads=threads_of(cfg))


def wait_until_free(cfg: BackwardConfig):
    """Runs on: consumers."""
    cute.arch.barrier(barrier_id=BarrierId.FREE, number_of_threads=threads_of(cfg))
