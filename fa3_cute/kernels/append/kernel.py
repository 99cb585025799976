"""Ahead of attention: rotates q into scratch memory, rotates and writes new keys and values into the cache.

contract/append_reference.py says what comes out. A CTA has one token, of the queries, then of the new keys and values;
behind these, CTAs have a sequence per thread and write its length with the new rows. A thread has one piece of 16 bytes
of one head, of k and of v both, of which the rows of one may have fewer pieces. The other half of a pair that is not in
its piece it reads as well: each byte of q and k_new is read twice, the second time from L1, and no thread waits for
another.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from ...contract.append import APPEND_ENTRY
from ...planning.append import AppendConfig
from ..common.arithmetic import ceil_div, maximum, minimum
from ..common.cache import Cache
from ..common.copies import PIECE_BYTES
from ..common.entry import flat_entry
from ..common.layout import ELEMENT_TYPES, tensor_view
from ..common.rotary import Rotary, turn_piece
from .rows import Rows

Divisor = cute.FastDivmodDivisorV2
SATURATED = 512.0       # what E4M3, which ends at 448, has no number for


@dataclass(frozen=True)
class AppendWork:
    """Extents of a launch's work.

    num_queries, num_new   tokens, of all sequences
    num_heads, num_heads_k
    pieces                 of the longer of a row of k and one of v
    pieces_k, pieces_v     of each; a row of q has as many as one of k
    """
    num_queries: Int32
    num_new: Int32
    num_heads: Int32
    num_heads_k: Int32
    pieces: Divisor
    pieces_k: Int32
    pieces_v: Int32


@dataclass(frozen=True)
class AppendTensors:
    """(rows, head_dim, heads, batch) all but the lengths: q and what becomes of it, new rows, lengths with them."""
    mQ: cute.Tensor
    mRotatedQ: cute.Tensor
    mK_new: cute.Tensor
    mV_new: cute.Tensor
    new_lengths: cute.Tensor


@flat_entry(APPEND_ENTRY.arguments)
class AppendKeys:
    """The kernel of one config. Compile `__call__`: its parameters are APPEND_ENTRY.arguments, in order."""

    def __init__(self, cfg: AppendConfig):
        self.cfg = cfg

    # ---- host side: traced once per config, runs at every launch ------------------------------
    @cute.jit
    def launch(self, a):
        """Rotate q and the new keys, write new keys and values behind the old ones: before attention.

        Pointers, strides (in elements) and sizes as in contract/append.py.
        """
        cfg = self.cfg
        pieces_k, pieces_v = a.head_dim // self.columns, a.head_dim_v // self.columns
        pieces = maximum(pieces_k, pieces_v)
        work = AppendWork(a.num_queries, a.num_new, a.num_heads, a.num_heads_k, Divisor(pieces), pieces_k, pieces_v)
        # Extents mean nothing to ordinary loads and stores: those of packed rows are others.
        mQ = tensor_view(a, "q", (a.seqlen_q, a.head_dim, a.num_heads, a.batch_size))
        aligned = cute.assume(a.head_dim, divby=self.columns)
        row = cute.assume(cutlass.Int64(a.num_heads) * a.head_dim, divby=self.columns)
        rotated = cute.make_layout((a.seqlen_q, a.head_dim, a.num_heads, a.batch_size),
                                   stride=(row, 1, aligned, cute.assume(row * a.seqlen_q, divby=self.columns)))
        mK_new, mV_new = (tensor_view(a, name, (a.seqlen_knew, a.head_dim, a.num_heads_k, a.batch_size))
                          for name in ("k_new", "v_new"))
        t = AppendTensors(mQ, cute.make_tensor(a.rotated_q, rotated), mK_new, mV_new,
                          cute.make_tensor(a.new_lengths, cute.make_layout(a.batch_size)))
        rotary = Rotary.create(a, cfg.table_dtype) if const_expr(cfg.rotary) else None
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        length_ctas = ceil_div(a.batch_size, cfg.num_threads) if a.num_new > 0 else Int32(0)
        heads = maximum(a.num_heads if a.num_queries > 0 else Int32(0), a.num_heads_k)
        cache = Cache.create(a, (a.head_dim, a.head_dim_v), cfg.kv_dtype != "")
        self.kernel(t, Rows.create(a), cache, rotary, work).launch(
            grid=(a.num_queries + a.num_new + length_ctas,
                  ceil_div(heads * pieces, cfg.num_threads), 1),
            block=(cfg.num_threads, 1, 1), use_pdl=True, stream=a.stream)

    @property
    def columns(self) -> int:
        """Elements of a piece."""
        return 8 * PIECE_BYTES // ELEMENT_TYPES[self.cfg.dtype].width

    # ---- device side --------------------------------------------------------------------------
    @cute.kernel
    def kernel(self, t: AppendTensors, rows: Rows, cache: Cache, rotary, work: AppendWork):
        """The role of the CTA. What attention reads by TMA is written by ordinary stores: hence the fence."""
        token, thread = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
        index = cute.arch.block_idx()[1] * self.cfg.num_threads + thread
        head, piece = divmod(index, work.pieces)
        # Attention starts now, and finds its way to its own wait, which is for this launch: nothing is read before it.
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if token < work.num_queries:
            if const_expr(self.cfg.rotary):
                has_piece = head < work.num_heads and piece < work.pieces_k
                self.rotate_query(t, rows, rotary, token, head, piece, has_piece)
        elif token < work.num_queries + work.num_new:
            self.append(t, rows, cache, rotary, token - work.num_queries, head, piece, work)
        elif cute.arch.block_idx()[1] == 0:
            sequence = (token - work.num_queries - work.num_new) * self.cfg.num_threads + thread
            if sequence < rows.batch_size:
                old = rows.old_length(sequence)
                t.new_lengths[sequence] = old + minimum(rows.num_new(sequence), rows.seqlen_k - old)
        cute.arch.fence_proxy("async.global")

    @cute.jit
    def rotate_query(self, t: AppendTensors, rows: Rows, rotary: Rotary, token: Int32, head: Int32, piece: Int32,
                     has_piece):
        """One query's piece, to scratch memory; queries that are not used are not read."""
        sequence, row, place, batch = rows.query(token)
        first, num_queries = rows.query_start(sequence), rows.num_queries(sequence)
        if has_piece and row >= 0 and row < num_queries:
            position = rows.position(first + row * rotary.query_step)
            source, target = t.mQ[place, None, head, batch], t.mRotatedQ[place, None, head, batch]
            self.write_rotated(source, target, None, rotary, position, piece)

    @cute.jit
    def append(self, t: AppendTensors, rows: Rows, cache: Cache, rotary, token: Int32, head: Int32, piece: Int32,
               work: AppendWork):
        """A piece of one new key and of its value, to the cache, if there is room for it."""
        sequence, row, place, batch = rows.new_row(token)
        old = rows.old_length(sequence)
        page, within, exists = cache.find(sequence, old + row, rows.seqlen_k)
        if head < work.num_heads_k and exists and row >= 0 and row < rows.num_new(sequence):
            # The value is on its way while the key is read and turned.
            value = cute.make_rmem_tensor(self.columns, t.mV_new.element_type)
            if piece < work.pieces_v:
                cute.autovec_copy(self.piece_of(t.mV_new[place, None, head, batch], piece), value)
            if piece < work.pieces_k:
                source, target = t.mK_new[place, None, head, batch], cache.mK[within, None, head, page]
                descale = cache.descale(cache.k_descale, head, sequence)
                if const_expr(self.cfg.rotary):
                    position = rows.position(rows.key_start(sequence, old) + row)
                    self.write_rotated(source, target, descale, rotary, position, piece)
                else:
                    self.write(source, target, descale, piece)
            if piece < work.pieces_v:
                target = self.piece_of(cache.mV[within, None, head, page], piece)
                store(value, target, cache.descale(cache.v_descale, head, sequence))

    def piece_of(self, row: cute.Tensor, piece: Int32) -> cute.Tensor:
        """Its `columns` elements."""
        return cute.local_tile(row, (self.columns,), (piece,))

    @cute.jit
    def write(self, source: cute.Tensor, target: cute.Tensor, descale, piece: Int32):
        """A piece of a row as it is."""
        fragment = cute.make_rmem_tensor(self.columns, source.element_type)
        cute.autovec_copy(self.piece_of(source, piece), fragment)
        store(fragment, self.piece_of(target, piece), descale)

    @cute.jit
    def write_rotated(self, source: cute.Tensor, target: cute.Tensor, descale, rotary: Rotary, position: Int32,
                      piece: Int32):
        """A piece of a row at a position; behind rotary_dim as it is."""
        if piece * self.columns < rotary.rotary_dim:
            own = cute.make_rmem_tensor(self.columns, source.element_type)
            cute.autovec_copy(cute.local_tile(source, (self.columns,), (piece,)), own)
            turned = cute.make_rmem_tensor(self.columns, Float32)
            turn_piece(self.cfg.rotary, source, own, turned, rotary, position, piece)
            store(turned, self.piece_of(target, piece), descale)
        else:
            self.write(source, target, descale, piece)


@cute.jit
def store(fragment: cute.Tensor, target: cute.Tensor, descale):
    """A piece of 16-bit or FP32 numbers in the target's element type: as they are, rounded; with a descale FP8, of the
    quotient, saturated."""
    if const_expr(fragment.element_type is not target.element_type):
        reciprocal = Float32(1.0) / descale if const_expr(descale is not None) else None
        converted = cute.make_rmem_tensor(cute.size(fragment), target.element_type)
        for i in cutlass.range_constexpr(cute.size(fragment)):
            number = fragment[i].to(Float32)
            if const_expr(descale is not None):
                number = quotient(number, descale, reciprocal)
            converted[i] = number.to(target.element_type)
        fragment = converted
    cute.autovec_copy(fragment, target)


def quotient(number: Float32, descale: Float32, reciprocal: Float32) -> Float32:
    """number / descale, rounded as the division rounds, which has a branch: 16 of them in a row take 0.3 us longer.

    Two corrections by the remainder, each a fused product and sum (Markstein 1990). What E4M3 saturates is clipped
    before, so that no step overflows; remainders are exact for descales from 2^-90 on.
    """
    limit = SATURATED * descale
    number = cute.arch.fmin(cute.arch.fmax(number, -limit, nan=True), limit, nan=True)
    found = number * reciprocal
    for _ in range(2):
        found = found - (found * descale - number) * reciprocal
    return found
