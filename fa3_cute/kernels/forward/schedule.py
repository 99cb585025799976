"""Schedule role: one warp takes tiles for its CTA from the launch's global order and puts them into the tile ring.

A CTA starts with the tile of its own number and then takes the next one that nobody has taken, so that CTAs with short
tiles take more of them. `tile_counter` counts what was taken beyond the first of each CTA; every tile that is worked on
is followed by one fetch, so there are as many fetches as tiles, and the last one leaves the counter at 0 for the next
launch. Launches that may run at the same time need counters of their own.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, const_expr

from ...planning.config import FwdConfig
from ..common.arithmetic import ceil_div
from ..common.ragged import RaggedBatch
from ..common.sequences import Sequences
from ..common.tile_ring import END, end_of
from ..common.tiles import Tile
from ..common.visibility import from_first_visible
from .bundles import FwdParams, FwdPipelines, FwdSmem
from .order import dense_tile, heads_per_section, tile_of_heads
from .store import OutStore
from .tile_ring import TileWriter

LANES = 32


@cute.jit
def schedule(cfg: FwdConfig, params: FwdParams, smem: FwdSmem, pipes: FwdPipelines):
    """The CTA's tiles, then END. In FP8 this warp stores O too, of each tile after the next one is published.

    Runs on: warp 2; FP8: warp 1, so that two are left to transpose V.
    Synchronises: waits for the empty halves of the tile ring; fills it; FP8: as OutStore.store.
    """
    out, unstored = OutStore.create(pipes), end_of(Tile)
    writer = TileWriter(smem.sTiles, pipes.tiles.make_producer())
    index, num_ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
    qhead_per_kvhead = params.num_heads // params.num_heads_k
    fetched = Int32(-1)
    if const_expr(cfg.is_varlen):
        search = SequenceSearch.create(cfg, params.sequences, params.num_heads)
        is_found = Boolean(True)
        while is_found:
            while search.is_behind(index):
                search.advance()
            is_found = index < search.tiles_so_far
            if is_found:
                tile = from_first_visible(cfg, params.window, search.tile(index, qhead_per_kvhead))
                writer.publish(tile)
                if const_expr(cfg.values.has_ring):
                    out, unstored = store_previous(cfg, params, smem, out, unstored), tile
                writer.wait_for_room()
                fetched = fetch(params.tile_counter)
                index = num_ctas + fetched
        num_tiles = search.tiles_so_far
    else:
        seqlen_q, seqlen_k = num_queries(cfg, params), params.k.tensor.shape[0]
        num_tiles = params.grid.num_tiles()
        while index < num_tiles:
            m_block, head, batch = dense_tile(cfg.is_causal, params.grid, index)
            kv_head = head // qhead_per_kvhead
            tile = Tile(m_block, first_of(cfg, head), kv_head, batch, Int32(0), seqlen_q, Int32(0), seqlen_k, batch)
            tile = from_first_visible(cfg, params.window, tile)
            writer.publish(tile)
            if const_expr(cfg.values.has_ring):
                out, unstored = store_previous(cfg, params, smem, out, unstored), tile
            writer.wait_for_room()       # take the next tile as late as the ring allows
            fetched = fetch(params.tile_counter)
            index = num_ctas + fetched
    writer.publish(end_of(Tile))
    if const_expr(cfg.values.has_ring):
        store_previous(cfg, params, smem, out, unstored)
    if fetched == num_tiles - 1 and cute.arch.lane_idx() == 0:
        params.tile_counter[0] = Int32(0)


def num_queries(cfg: FwdConfig, params: FwdParams) -> Int32:
    """Rows of dense queries."""
    rows = params.q.tensor.shape[0]
    return rows[1] if cfg.packs_heads else rows


def first_of(cfg: FwdConfig, head: Int32) -> Int32:
    """The head, or the first one of a group of packed heads."""
    return head * cfg.packed_heads if cfg.packs_heads else head


@cute.jit
def store_previous(cfg: FwdConfig, params: FwdParams, smem: FwdSmem, out: OutStore, tile: Tile) -> OutStore:
    """O of the tile before the one just published, if there was one. Returns the store that it advanced."""
    if tile.m_block != END:
        out.store(cfg, params, smem, tile)
    return out


@cute.jit
def fetch(counter: cute.Tensor) -> Int32:
    """The counter before it is raised by one, on every lane."""
    taken = Int32(0)
    if cute.arch.lane_idx() == 0:
        taken = cute.arch.atomic_add(counter.iterator, Int32(1), sem="relaxed", scope="gpu")
    return cute.arch.shuffle_sync(taken, 0)


@dataclass
class SequenceSearch:
    """Finds the sequence of a tile: 32 sequences at a time, one per lane, with a prefix sum over their tiles.

    Tile indices only rise, so a CTA passes over every sequence once. Per lane: its sequence's place and lengths, and
    `tiles_through`, the tiles of all sequences up to and including its own.
    """
    cfg: Constexpr
    sequences: Sequences | RaggedBatch
    num_heads: Int32
    first: Int32            # sequence of lane 0
    tiles_so_far: Int32     # tiles of all sequences up to and including lane 31's
    offset_q: Int32
    seqlen_q: Int32
    offset_k: Int32
    seqlen_k: Int32
    tiles_through: Int32

    @staticmethod
    def create(cfg: FwdConfig, sequences: Sequences | RaggedBatch, num_heads: Int32) -> "SequenceSearch":
        """At the first 32 sequences."""
        search = SequenceSearch(cfg, sequences, num_heads, Int32(-LANES), *[Int32(0)] * 6)
        search.advance()
        return search

    def is_behind(self, index: Int32):
        """Whether the tile lies beyond these 32 sequences, and there are more."""
        return (index >= self.tiles_so_far) & (self.first + LANES < self.sequences.batch_size)

    @cute.jit
    def advance(self):
        """To the next 32 sequences."""
        self.first = self.first + LANES
        lane = cute.arch.lane_idx()
        place = self.sequences.place(self.first + lane)
        self.offset_q, self.seqlen_q, self.offset_k, self.seqlen_k = place
        tiles = self.num_m_blocks(self.seqlen_q) * self.num_heads
        for i in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(tiles, 1 << i)
            tiles = tiles + (below if lane >= 1 << i else 0)
        self.tiles_through = self.tiles_so_far + tiles
        self.tiles_so_far = cute.arch.shuffle_sync(self.tiles_through, LANES - 1)

    @cute.jit
    def tile(self, index: Int32, qhead_per_kvhead: Int32) -> Tile:
        """The tile at a place of the global order that lies within these 32 sequences; the same on every lane."""
        lane = cute.arch.popc(cute.arch.vote_ballot_sync(self.tiles_through <= index))
        of_owner = lambda value: cute.arch.shuffle_sync(value, lane)
        offset_q, seqlen_q = of_owner(self.offset_q), of_owner(self.seqlen_q)
        offset_k, seqlen_k = of_owner(self.offset_k), of_owner(self.seqlen_k)
        num_m_blocks = self.num_m_blocks(seqlen_q)
        within = index - (of_owner(self.tiles_through) - num_m_blocks * self.num_heads)
        section = self.num_heads
        if const_expr(self.cfg.is_causal):
            section = heads_per_section(self.num_heads, qhead_per_kvhead, seqlen_k, self.cfg.kv_bytes_per_token)
        m_block, head = tile_of_heads(self.cfg.is_causal, within, num_m_blocks, self.num_heads, section)
        sequence = self.first + lane
        batch = self.sequences.batch_coordinate(sequence)
        if const_expr(self.cfg.is_ragged):
            sequence = self.sequences.number(sequence)
        kv_head = head // qhead_per_kvhead
        return Tile(m_block, first_of(self.cfg, head), kv_head, batch, offset_q, seqlen_q, offset_k, seqlen_k, sequence)

    def num_m_blocks(self, seqlen_q: Int32) -> Int32:
        """Q tiles of a sequence."""
        return ceil_div(seqlen_q, self.cfg.queries_per_tile)
