"""attn_mask of 16-bit elements by way of shared memory: each warp of the forward kernel brings its own 16 rows, a K/V
tile ahead.

From global memory a thread would read what belongs to its scores in 4-byte pieces, 8 rows at once: so many requests
take longer than the rest of a tile. cp.async copies 16 bytes per lane, 64 of each row at once; ldmatrix then gives
every thread the pairs that belong to its scores. Nobody else writes or reads a warp's rows: no barrier is needed.
Rows are 16 bytes more than their elements apart: 8 rows of ldmatrix then lie in 8 different groups of banks.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int16, Int32, Int64, Uint16, Uint32
from cutlass.experimental import primitives

from ...planning.config import KernelConfig
from .arithmetic import maximum, minimum
from .block_range import first_key
from .score_mask import MASK_TYPES, ScoreMask
from .tiles import Tile

PIECE_KEYS, PIECE_BYTES = 8, 16        # of a cp.async
LANES_PER_ROW = 4


@dataclass(frozen=True)
class StagedMask:
    """Of one warp.

    rows         addresses of the first keys of the thread's two rows (layout.fragment_row), set for each tile of O
    is_aligned   every row starts at a multiple of 16 bytes
    first_byte   shared-memory address of the warp's rows
    """
    cfg: Constexpr
    rows: cute.Tensor
    is_aligned: Boolean
    first_byte: Int32

    @staticmethod
    def create(cfg: KernelConfig, mask: ScoreMask, sMask: cute.Tensor, wg_idx: Int32) -> "StagedMask":
        """Of the calling thread's warp, in consumer warpgroup wg_idx."""
        warp = cute.arch.warp_idx() % 4 + 4 * wg_idx
        start = Int32(sMask.iterator.toint()) + warp * cfg.mask_slot_bytes
        return StagedMask(cfg, cute.make_rmem_tensor(2, Int64), mask.is_aligned, start)

    @cute.jit
    def start(self, tile: Tile, n_block: Int32):
        """Bring the first K/V tile of a tile of O."""
        self.drain()
        cute.arch.sync_warp()
        self.bring(tile, n_block)

    def drain(self):
        """Wait for the tile that was brought last, which nobody takes: no copy outlives the kernel."""
        cute.arch.cp_async_wait_group(0)

    @cute.jit
    def take(self) -> cute.Tensor:
        """(rows, columns) of the K/V tile that was brought; the warp's rows may then be filled with the next one."""
        num_blocks, lane = self.cfg.tile_n // 8, cute.arch.lane_idx()
        values = cute.make_rmem_tensor(cute.make_layout((2, 2 * num_blocks), stride=(2 * num_blocks, 1)),
                                       MASK_TYPES[self.cfg.attn_mask])
        pairs = cute.recast_tensor(cute.make_tensor(values.iterator, cute.make_layout(4 * num_blocks)), Uint32)
        source = self.first_byte + lane % 16 * self.cfg.mask_row_bytes + lane // 16 * PIECE_BYTES
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_warp()
        for i in cutlass.range_constexpr(0, num_blocks, 2):
            place = cute.make_ptr(Uint16, source + i * PIECE_BYTES, cute.AddressSpace.smem, assumed_align=PIECE_BYTES)
            x = primitives.ldmatrix(place.llvm_ptr, 4, primitives.MMALayout.ROW)
            for block in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(2):
                    pairs[r * num_blocks + i + block] = Uint32(x[2 * block + r])
        cute.arch.sync_warp()
        return values

    @cute.jit
    def bring(self, tile: Tile, n_block: Int32):
        """Start to copy the warp's rows of a K/V tile; zeros behind the last key, and of a tile before the first."""
        lane, key = cute.arch.lane_idx(), first_key(self.cfg, n_block)
        column = lane % LANES_PER_ROW * PIECE_KEYS
        target = self.first_byte + lane // LANES_PER_ROW * self.cfg.mask_row_bytes + 2 * column
        num_keys = tile.seqlen_k - key - column if key >= 0 else Int32(0)
        offset = 2 * Int64(key + column)
        if self.is_aligned:
            for r in cutlass.range_constexpr(2):
                for step in cutlass.range_constexpr(0, self.cfg.tile_n, LANES_PER_ROW * PIECE_KEYS):
                    self.copy_piece(target + 8 * r * self.cfg.mask_row_bytes + 2 * step,
                                    self.rows[r] + offset + 2 * step, num_keys - step)
        else:
            for r in cutlass.range_constexpr(2):
                for step in cutlass.range(0, self.cfg.tile_n, LANES_PER_ROW * PIECE_KEYS, unroll=1):
                    self.copy_keys(target + 8 * r * self.cfg.mask_row_bytes + 2 * step,
                                   self.rows[r] + offset + 2 * step, num_keys - step)
        cute.arch.cp_async_commit_group()

    def copy_piece(self, target: Int32, address: Int64, num_keys: Int32):
        """The first num_keys of 8 keys, and zeros."""
        num_bytes = 2 * minimum(maximum(num_keys, 0), PIECE_KEYS)
        place = cute.make_ptr(Uint16, target, cute.AddressSpace.smem, assumed_align=PIECE_BYTES)
        source = cute.make_ptr(Uint16, address, cute.AddressSpace.gmem, assumed_align=PIECE_BYTES)
        primitives.cp_async_shared_global(place.llvm_ptr, source.llvm_ptr, PIECE_BYTES, "cg", cp_size=num_bytes)

    @cute.jit
    def copy_keys(self, target: Int32, address: Int64, num_keys: Int32):
        """`copy_piece` key by key, from any address."""
        for i in cutlass.range(PIECE_KEYS, unroll=1):
            value = Int16(0)
            if i < num_keys:
                value = self.key_at(address, i, cute.AddressSpace.gmem)[0]
            self.key_at(target, i, cute.AddressSpace.smem)[0] = value

    def key_at(self, start: Int64, i: Int32, space: cute.AddressSpace) -> cute.Tensor:
        """One element, as its bits."""
        return cute.make_tensor(cute.make_ptr(Int16, start + 2 * i, space, assumed_align=2), cute.make_layout(1))
