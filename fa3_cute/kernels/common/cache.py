"""Where a cache has room for a row that ordinary stores write: rows of entries, or of pages."""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from .arithmetic import maximum
from .fp8 import descale_at
from .layout import tensor_view
from .sequences import is_present

Divisor = cute.FastDivmodDivisorV2
MAX_PAGES_OF_ROW = 1 << 30      # of the table; a sequence's used pages are fewer


@dataclass(frozen=True)
class Cache:
    """K (rows, head_dim, heads, entries), V with head_dim_v columns; rows those of an entry or of a page.

    table       (rows of the table, pages) int32, kv_batch_idx int32 [batch_size]; null if absent
    page_size   1 without pages
    num_entries   entries of a dense cache, or rows of the table
    k_descale, v_descale   (heads, sequences) FP32, null for ones, where new rows are quantised; else None
    """
    mK: cute.Tensor
    mV: cute.Tensor
    table: cute.Tensor
    kv_batch_idx: cute.Tensor
    page_size: Divisor
    num_pages: Int32
    num_entries: Int32
    k_descale: cute.Tensor | None
    v_descale: cute.Tensor | None

    @staticmethod
    def create(a, dims: tuple[Int32 | int, Int32 | int], has_descales: bool) -> "Cache":
        """From the kernel's arguments, on the host. dims: columns of K and of V; whoever writes a row stays in them."""
        # The other extents mean nothing to ordinary loads and stores: those of pages are others.
        mK, mV = (tensor_view(a, name, (a.seqlen_k, columns, a.num_heads_k, a.batch_size_k))
                  for name, columns in zip("kv", dims, strict=True))
        table = cute.make_tensor(a.page_table, cute.make_layout(
            (a.batch_size_k, MAX_PAGES_OF_ROW), stride=(a.page_table_batch_stride, 1)))
        descales = None, None
        if has_descales:
            descales = [cute.make_tensor(getattr(a, name), cute.make_layout(
                (a.num_heads_k, a.batch_size),
                stride=tuple(getattr(a, f"{name}_{dim}_stride") for dim in ("head", "batch"))))
                for name in ("k_descale", "v_descale")]
        return Cache(mK, mV, table, cute.make_tensor(a.kv_batch_idx, cute.make_layout(a.batch_size)),
                     Divisor(maximum(a.page_size, 1)), a.num_pages, a.batch_size_k, *descales)

    def descale(self, array: cute.Tensor | None, head: Int32, sequence: Int32) -> Float32 | None:
        """One of k_descale or v_descale; None where nothing is quantised."""
        return None if array is None else descale_at(array, head, sequence)

    @cute.jit
    def find(self, sequence: Int32, row: Int32, capacity: Int32) -> tuple[Int32, Int32, Boolean]:
        """(entry or page, row in it, whether that exists) of a row of a sequence. No entry of the table is read but
        that of a row that the sequence can have."""
        entry, within = sequence, row
        if is_present(self.kv_batch_idx):
            entry = self.kv_batch_idx[sequence]
        exists = row >= 0 and row < capacity and entry >= 0 and entry < self.num_entries
        if is_present(self.table):
            page, within = divmod(row, self.page_size)
            if exists:
                entry = self.table[entry, page]
            exists = exists and entry >= 0 and entry < self.num_pages
        return entry, within, exists

    @cute.jit
    def look_up(self, sequence: Int32, row: Int32, capacity: Int32) -> tuple[Int32, Int32, Boolean]:
        """`find` without waiting for what the table says: `has` tells whether the page exists."""
        entry, within = sequence, row
        if is_present(self.kv_batch_idx):
            entry = self.kv_batch_idx[sequence]
        exists = row >= 0 and row < capacity and entry >= 0 and entry < self.num_entries
        if is_present(self.table):
            page, within = divmod(row, self.page_size)
            if exists:
                entry = self.table[entry, page]
        return entry, within, exists

    @cute.jit
    def has(self, entry: Int32, exists: Boolean) -> Boolean:
        """Whether what was looked up exists, to the page."""
        if is_present(self.table):
            exists = exists and entry >= 0 and entry < self.num_pages
        return exists
