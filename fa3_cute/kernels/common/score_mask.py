"""attn_mask: a number per score that is added to it, or a byte that hides it, read from global memory.

A thread reads what belongs to its own scores, two keys at a time, before it waits for them: the loads are in flight
beside the GEMM that makes the scores. Of a tile's columns a warp reads 8 rows x 16 or 32 bytes at once, whole sectors
of 32 bytes with the next columns, which find them in L1.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Constexpr, Float16, Float32, Int32, Int64, Uint8

from ...planning.config import KernelConfig
from .block_range import first_key
from .layout import as_rows_cols, col_offset
from .tiles import Place

MASK_TYPES = {"bool": Uint8, "fp16": Float16, "bf16": BFloat16, "fp32": Float32}


@dataclass(frozen=True)
class ScoreMask:
    """(batch, head, query, key) of a launch; strides in elements.

    is_paired, is_aligned   every row starts at a multiple of two elements, of 16 bytes
    """
    address: Int64
    batch_stride: Int64
    head_stride: Int64
    row_stride: Int64
    is_paired: Boolean
    is_aligned: Boolean

    @staticmethod
    def create(cfg: KernelConfig, a) -> "ScoreMask":
        """From a kernel's arguments, on the host."""
        strides = tuple(getattr(a, f"attn_mask_{of}_stride") for of in ("batch", "head", "row"))
        address, element_bytes = Int64(a.attn_mask.toint()), MASK_TYPES[cfg.attn_mask].width // 8
        all_bits = address | (strides[0] | strides[1] | strides[2]) * element_bytes
        return ScoreMask(address, *strides, all_bits % (2 * element_bytes) == 0, all_bits % 16 == 0)

    def row(self, cfg: KernelConfig, sequence: Int32, head: Int32, query: Int32) -> Int64:
        """The address of a row's first key."""
        offset = self.batch_stride * sequence + self.head_stride * head + self.row_stride * query
        return self.address + offset * (MASK_TYPES[cfg.attn_mask].width // 8)


@dataclass(frozen=True)
class RowMask:
    """Of one thread's rows.

    rows   addresses of their first keys, set for each tile of O
    """
    cfg: Constexpr
    rows: cute.Tensor
    is_paired: Boolean

    @cute.jit
    def fetch(self, acc_S: cute.Tensor, place: Place, n_block: Int32) -> cute.Tensor:
        """What belongs to the scores of one K/V tile, (rows, cols); 0 behind the last key."""
        element, S = MASK_TYPES[self.cfg.attn_mask], as_rows_cols(acc_S)
        num_rows, num_cols = cute.size(S, mode=[0]), cute.size(S, mode=[1])
        values = cute.make_rmem_tensor(cute.make_layout((num_rows, num_cols), stride=(num_cols, 1)), element)
        is_whole = first_key(self.cfg, n_block + 1) <= place.tile.seqlen_k
        if self.is_paired and is_whole:
            self.fetch_pairs(values, place)
        else:
            self.fetch_visible(values, place)
        return values

    @cute.jit
    def fetch_pairs(self, values: cute.Tensor, place: Place):
        """Two keys per load, of a tile that has all its keys."""
        element, num_cols = values.element_type, cute.size(values, mode=[1])
        for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
            for c in cutlass.range_constexpr(0, num_cols, 2):
                source = self.pointer(r, place.first_key, col_offset(c), 2 * element.width // 8)
                pair = cute.make_tensor(values.iterator + (r * num_cols + c), cute.make_layout(2))
                cute.autovec_copy(cute.make_tensor(source, cute.make_layout(2)), pair)

    @cute.jit
    def fetch_visible(self, values: cute.Tensor, place: Place):
        """Key by key, none behind the last."""
        element = values.element_type
        for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(values, mode=[1])):
                values[r, c] = element(0)
                if place.first_key + col_offset(c) < place.tile.seqlen_k:
                    source = self.pointer(r, place.first_key, col_offset(c), element.width // 8)
                    values[r, c] = cute.make_tensor(source, cute.make_layout(1))[0]

    def pointer(self, r: int, first_key: Int32, offset: int, alignment: int) -> cute.Pointer:
        """To the element of a key of the r-th row."""
        element = MASK_TYPES[self.cfg.attn_mask]
        start = self.rows[r] + Int64(first_key) * (element.width // 8)
        return cute.make_ptr(element, start, cute.AddressSpace.gmem, assumed_align=alignment) + offset

    @cute.jit
    def hide(self, acc_S: cute.Tensor, values: cute.Tensor):
        """-inf where a byte is 0."""
        S = as_rows_cols(acc_S)
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, c] = S[r, c] if values[r, c] != Uint8(0) else -Float32.inf
