"""Blocks of rows of a batch, padded so that a sequence starts a block: where they lie, and what a block of keys is seen
by. Plain arithmetic but for `Blocks.find` and what asks it: the CPU tests run it against brute force.

A sequence that starts r packed rows behind the first one's start has its first block at r / block_rows + sequence:
blocks of different sequences never meet, and no length has to be known on the host. There are at most
total rows / block_rows + batch_size of them; some may belong to no sequence.
"""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Uint32, const_expr

from ...planning.backward import BackwardConfig
from ..common.arithmetic import ceil_div, maximum, minimum
from ..common.block_range import Window
from ..common.layout import columns_of
from ..common.sequences import Sequences, is_present

LANES = 32


def whole_times(a: Int32 | int, b: Int32 | int) -> Int32 | int:
    """floor(a / b) for a >= 0, b > 0: on the device by an unsigned division, half the instructions of a signed one."""
    return a // b if isinstance(a, int) else Int32(Uint32(a) // Uint32(b))


@dataclass(frozen=True)
class Blocks:
    """Blocks of block_rows rows of Q or K.

    cu_seqlens   [batch_size + 1] int32, or null: dense tensors of `rows` rows
    num_blocks   of the whole batch
    """
    block_rows: Constexpr
    cu_seqlens: cute.Tensor
    rows: Int32
    batch_size: Int32
    num_blocks: Int32

    @staticmethod
    @cute.jit
    def create(block_rows: Constexpr, cu_seqlens: cute.Tensor, rows: Int32, batch_size: Int32) -> "Blocks":
        """Of packed tensors, or of dense ones."""
        packed = rows // block_rows + batch_size
        num_blocks = packed if is_present(cu_seqlens) else batch_size * ceil_div(rows, block_rows)
        return Blocks(block_rows, cu_seqlens, rows, batch_size, num_blocks)

    @cute.jit
    def first(self, sequence: Int32) -> Int32:
        """The first block of a sequence."""
        block = sequence * ceil_div(self.rows, self.block_rows)
        if is_present(self.cu_seqlens):
            block = whole_times(self.cu_seqlens[sequence] - self.cu_seqlens[0], self.block_rows) + sequence
        return block

    @cute.jit
    def find(self, block: Int32) -> Int32:
        """The last sequence that starts at or before a block. Runs on: whole warps."""
        found = whole_times(block, ceil_div(maximum(self.rows, 1), self.block_rows))
        if is_present(self.cu_seqlens):
            found, end = Int32(0), self.batch_size       # the sequence is one of [found, end)
            while found + 1 < end:                       # each lane looks at one of 32 that divide them
                step = ceil_div(end - found, LANES)
                sequence = found + cute.arch.lane_idx() * step
                is_before = Int32(0)
                if sequence < end:
                    is_before = Int32(1) if self.first(sequence) <= block else Int32(0)
                found += (cute.arch.popc(cute.arch.vote_ballot_sync(is_before != 0)) - 1) * step
                end = minimum(end, found + step)
        return found

    @cute.jit
    def locate(self, index: Int32, num_heads: Int32, is_reversed: Constexpr[bool]) -> tuple[Int32, Int32, Int32]:
        """(block of a sequence, head, sequence) at a place of the order: all of a head, then those of the next one.
        is_reversed: the last blocks come first. Runs on: whole warps."""
        head = whole_times(index, self.num_blocks)
        block = index - head * self.num_blocks
        if const_expr(is_reversed):
            block = self.num_blocks - 1 - block
        sequence = self.find(block)
        return block - self.first(sequence), head, sequence


@dataclass(frozen=True)
class Extents:
    """Shapes of a launch's tensors, on the host.

    q, do      (seqlen, columns, heads, batch), not empty: of such TMA has no descriptor
    k, v       the same
    vector     (padded rows, num_heads), of the queries' values that the prepare kernel leaves
    q_blocks   a sequence's rows of these start a block
    """
    q: tuple
    do: tuple
    k: tuple
    v: tuple
    vector: cute.Layout
    q_blocks: Blocks
    k_blocks: Blocks

    @staticmethod
    @cute.jit
    def create(cfg: BackwardConfig, a, sequences: Sequences, rows_per_q_block: Constexpr[int]) -> "Extents":
        """From a kernel's arguments."""
        batches = a.batch_size
        if const_expr(cfg.is_varlen):
            batches = Int32(1) if sequences.is_packed() else a.batch_size
        q_blocks = Blocks.create(rows_per_q_block, sequences.cu_seqlens_q, a.seqlen_q, a.batch_size)
        padded = Int64(q_blocks.num_blocks) * rows_per_q_block
        dim_qk, dim_v = columns_of(cfg, a)
        of_queries = lambda columns: (maximum(a.seqlen_q, 1), columns, a.num_heads, batches)
        of_keys = lambda columns: (maximum(a.seqlen_k, 1), columns, a.num_heads_k, batches)
        return Extents(
            of_queries(dim_qk), of_queries(dim_v), of_keys(dim_qk), of_keys(dim_v),
            cute.make_layout((padded, a.num_heads), stride=(1, padded)), q_blocks,
            Blocks.create(cfg.tile_n, sequences.cu_seqlens_k, maximum(a.seqlen_k, 1), a.batch_size))


@dataclass(frozen=True)
class KeyTile:
    """One CTA's keys, and where their sequence lies, in tokens."""
    n_block: Int32
    kv_head: Int32
    batch: Int32       # batch coordinate in the tensors; 0 if they are packed
    offset_q: Int32    # first row of the sequence in Q and dO, 0 unless packed
    seqlen_q: Int32
    offset_k: Int32
    seqlen_k: Int32
    first_q_block: Int32   # of the sequence, among those of the batch
    sequence: Int32        # index of the sequence in the batch

    is_rising = 0          # 1: the first queries pass first, see order.py


@dataclass(frozen=True)
class DirectedKeyTile(KeyTile):
    """Of kernels past whose tiles queries go in either direction."""
    is_rising: Int32 = 0


@dataclass(frozen=True)
class SharedKeyTile(KeyTile):
    """Of kernels whose last tiles CTAs share, see shares.py: a part of a tile, or a whole one."""
    begin: Int32 = 0       # Q tiles that pass
    end: Int32 = 0
    num_pieces: Int32 = 0
    part: Int32 = 0        # that its sums are; STORES: it stores them
    first_part: Int32 = 0  # those of the parts [first_part, end_part) are added to them before
    end_part: Int32 = 0


def key_tile_of(cfg: BackwardConfig) -> type[KeyTile]:
    """What the CTA's tile ring holds."""
    if cfg.shares_tiles:
        return SharedKeyTile
    return DirectedKeyTile if cfg.has_directions else KeyTile


@dataclass(frozen=True)
class QueryTile:
    """A Q tile of one head, and where its sequence lies, in tokens."""
    block: Int32       # among those of the batch
    m_block: Int32     # among those of the sequence
    head: Int32
    batch: Int32
    offset: Int32
    seqlen: Int32

    def rows_of(self, cfg: BackwardConfig, mX: cute.Tensor) -> cute.Tensor:
        """(tile_m, head_dim), of which rows may have fewer, of a tensor (seqlen_q, columns, num_heads, batch)."""
        mX = cute.domain_offset((self.offset, 0), mX[None, None, self.head, self.batch])
        return cute.local_tile(mX, (cfg.tile_m, cfg.head_dim), (self.m_block, 0))


@cute.jit
def query_tile(blocks: Blocks, sequences: Sequences, num_heads: Int32) -> QueryTile:
    """Of a CTA, one per block and head, of which all heads' come first: their rows are neighbours in memory. Its rows
    may all lie behind the sequence's last. Runs on: whole warps."""
    index = cute.arch.block_idx()[0]
    block = index // num_heads
    head = index - block * num_heads
    sequence = blocks.find(block)
    offset, seqlen, _, _ = sequences.place(sequence)
    return QueryTile(block, block - blocks.first(sequence), head, sequences.batch_coordinate(sequence), offset, seqlen)


@dataclass(frozen=True)
class QueryRange:
    """Q tiles [m_block_min, m_block_max) that hold a query which sees a key of the CTA; empty if there is none.

    Every query of those in [m_block_full_min, m_block_full_max) sees all of its keys.
    """
    m_block_min: Int32
    m_block_max: Int32
    m_block_full_min: Int32
    m_block_full_max: Int32

    def of_kind(self, kind: int) -> tuple[Int32, Int32]:
        """[begin, end): those behind the full ones (0), the full ones (1), those before them (2)."""
        if kind == 0:
            return self.m_block_full_max, self.m_block_max
        if kind == 1:
            return self.m_block_full_min, self.m_block_full_max
        return self.m_block_min, self.m_block_full_min

    def num_passes(self, group: Int32) -> Int32:
        """How many Q tiles pass the CTA: those of `group` heads."""
        return (self.m_block_max - self.m_block_min) * group

    def passing(self, i: Int32, group: Int32, is_rising: Int32 = 0) -> tuple[Int32, Int32]:
        """(m_block, head of the group) of the i-th: the last rows first, or the first, one head after the other."""
        rows = i // group
        first, direction = self.m_block_max - 1, 2 * is_rising - 1
        return first + direction * rows - is_rising * (first - self.m_block_min), i - rows * group


def query_range(cfg: BackwardConfig, window: Window, n_block: Int32, seqlen_q: Int32, seqlen_k: Int32) -> QueryRange:
    """Bottom-right aligned: query i has its diagonal at key i + seqlen_k - seqlen_q."""
    tile_m, tile_n = cfg.tile_m, cfg.tile_n
    first_key = n_block * tile_n
    last_key = minimum(first_key + tile_n, seqlen_k) - 1
    m_block_min, m_block_max = 0, ceil_div(seqlen_q, tile_m)
    full_min, full_max = 0, m_block_max
    if cfg.mask != "full":
        offset = seqlen_k - seqlen_q + (window.right if cfg.is_local else 0)
        start_of = lambda key: maximum(key - offset, 0)
        if cfg.has_chunks:
            start_of = lambda key: maximum(maximum(key - offset, window.chunk_start(key) - seqlen_k + seqlen_q), 0)
        m_block_min = start_of(first_key) // tile_m
        full_min = ceil_div(start_of(last_key), tile_m)
    if cfg.is_local:
        end_of = lambda key: maximum(key - seqlen_k + seqlen_q + window.left + 1, 0)
        if cfg.has_chunks:
            end_of = lambda key: maximum(minimum(key + window.left + 1, window.chunk_start(key) + window.chunk)
                                         - seqlen_k + seqlen_q, 0)
        m_block_max = minimum(m_block_max, ceil_div(end_of(last_key), tile_m))
        full_max = minimum(m_block_max, end_of(first_key) // tile_m)
    m_block_max = maximum(m_block_max, m_block_min)
    # Keys behind the last are hidden in every tile: their P would not be finite for every LSE.
    is_whole = minimum(maximum(seqlen_k - first_key - tile_n + 1, 0), 1)
    full_min = minimum(maximum(full_min, m_block_min) + (1 - is_whole) * m_block_max, m_block_max)
    full_max = maximum(full_min, minimum(full_max, m_block_max))
    return QueryRange(m_block_min, m_block_max, full_min, full_max)


def queries_of(cfg: BackwardConfig, window: Window, tile: KeyTile) -> QueryRange:
    """Of a tile of keys; of a part those that are its own."""
    queries = query_range(cfg, window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
    if not cfg.shares_tiles:
        return queries
    of_part = lambda m_block: minimum(maximum(m_block, tile.begin), tile.end)
    return QueryRange(tile.begin, tile.end, of_part(queries.m_block_full_min), of_part(queries.m_block_full_max))


def first_key_block(cfg: BackwardConfig, window: Window, m_block: Int32, seqlen_q: Int32, seqlen_k: Int32) -> Int32:
    """The first block of keys whose query_range holds Q tile m_block; its others are those right behind it."""
    if not cfg.is_local:
        return Int32(0)
    first_visible = window.first_key(m_block * cfg.tile_m + seqlen_k - seqlen_q)
    return maximum(first_visible, 0) // cfg.tile_n


def last_key_block(cfg: BackwardConfig, m_block: Int32, seqlen_q: Int32, seqlen_k: Int32) -> Int32:
    """And the last one, of causal queries."""
    return (minimum((m_block + 1) * cfg.tile_m + seqlen_k - seqlen_q, seqlen_k) - 1) // cfg.tile_n
