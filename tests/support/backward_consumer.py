"""A consumer warpgroup of the backward main kernel, of which it waits for others (backward_roles.py)."""

from dataclasses import dataclass

from barriers import NamedBarrier, Slots

from fa3_cute.kernels.backward.duties import Duty, rounds_of
from fa3_cute.kernels.backward.shares import STORES
from fa3_cute.planning.rings import WARP, WARPS_PER_WARPGROUP

WARPGROUP = WARP * WARPS_PER_WARPGROUP


@dataclass(frozen=True, eq=False)
class Entry:
    """Of the ring of tiles. No tile: there are no more."""

    tile: object
    duty: Duty
    passes: tuple[tuple[int, int], ...] = ()  # (Q tile, head of the group)


class Consumer:
    """A consumer warpgroup. turn: Q tiles so far."""

    def __init__(self, cta, w: int):
        """Warpgroup w gets the first turn from the other if it is the first."""
        self.cta, self.cfg, self.w, self.name = cta, cta.cfg, w, f"consumer {w}"
        self.grid, self.launch = cta.grid, cta.launch
        self.turn = self.num_keys = 0
        if self.cfg.use_pingpong and w == 1:
            cta.turns[0].arrive(self.name, WARPGROUP)

    def work(self):
        """All entries, until what has left is read."""
        yield from self.cta.follow(self.consume, WARPS_PER_WARPGROUP)
        yield self.sync(self.cta.free)

    def sync(self, barrier: NamedBarrier):
        """Arrives; returns what the warpgroup waits for if it does."""
        return barrier.arrive(self.name, WARPGROUP)

    def release(self, slots: Slots, turn: int):
        """A slot that the warpgroup has read."""
        slots.empty[turn % slots.number].arrive(WARPS_PER_WARPGROUP)

    def consume(self, entry: Entry):
        """A tile of keys."""
        has_keys = not self.cfg.is_varlen or entry.tile.seqlen_k > 0
        if has_keys:
            yield self.cta.k.filled(self.num_keys)
        if not (self.cfg.is_dq_behind and entry.passes):
            yield self.sync(self.cta.free)
        for i in range(len(entry.passes)):
            yield self.cta.q.filled(self.turn)
            assert self.cta.q.content[self.turn % 2] == (entry, entry.passes[i])
            yield from (self.step_behind if self.cfg.is_dq_behind else self.step)(entry, i)
            self.release(self.cta.q, self.turn)
            self.turn += 1
        if self.cfg.is_dq_behind and entry.passes and self.has_turn(self.turn - 1):
            yield self.cta.ds.filled(self.turn - 1)
            yield from self.send_dq(self.turn - 1, entry, -1)
        if has_keys:
            self.release(self.cta.k, self.num_keys)
            self.num_keys += 1
        yield from self.leave(entry)

    def step(self, entry: Entry, i: int):
        """The i-th Q tile that passes."""
        yield from self.write_ds()
        yield self.cta.ds.filled(self.turn)
        yield from self.send_dq(self.turn, entry, i)

    def step_behind(self, entry: Entry, i: int):
        """The same, with dQ of the one before."""
        has_dq = i > 0 and self.has_turn(self.turn - 1)
        if self.cfg.use_pingpong:
            yield self.sync(self.cta.turns[self.w])
        if has_dq:
            yield self.cta.ds.filled(self.turn - 1)
        if self.cfg.use_pingpong:
            self.sync(self.cta.turns[1 - self.w])
        if has_dq:
            yield from self.send_dq(self.turn - 1, entry, i - 1)
        if i == 0:
            yield self.sync(self.cta.free)
        yield from self.write_ds()

    def has_turn(self, turn: int) -> bool:
        """Whether the warpgroup computes dQ of the Q tile of that turn, or a part of it."""
        return not self.cfg.is_dq_in_turns or turn % 2 == self.w

    def write_ds(self):
        """The warpgroup's, for all that compute dQ."""
        yield self.cta.ds.emptied(self.turn)
        assert not any(self.cta.leaving[0]), "dS where dV or dQ is not sent"
        self.cta.num_ds_readers[self.turn % 2] = self.cfg.num_dq_wgs
        self.cta.ds.full[self.turn % 2].arrive(WARPS_PER_WARPGROUP)

    def dq_place(self, turn: int):
        """What the warpgroup waits for before it writes to its slot in that turn."""
        return self.cta.dq.emptied(turn) if self.cfg.is_dq_in_turns else self.cta.dq.empty[self.w].passed(turn % 2 ^ 1)

    def send_dq(self, turn: int, entry: Entry, i: int):
        """Of the i-th Q tile that passes, whose dS is there."""
        self.cta.num_ds_readers[turn % 2] -= 1
        self.release(self.cta.ds, turn)
        yield self.dq_place(turn)
        assert self.cta.dq.content[self.w] is None, "dQ where another is not added"
        assert not self.cta.leaving[1][self.w], "dQ where what leaves is not sent"
        self.cta.dq.content[self.w] = turn, entry, entry.passes[i]
        self.cta.dq.full[self.w].arrive(WARPS_PER_WARPGROUP)

    def leave(self, entry: Entry):
        """dV, dK and the duty's dQ, whose sums are read two rounds ahead."""
        yield self.sync(self.cta.sums)
        if self.cfg.shares_tiles and entry.tile.seqlen_k > 0:
            self.share(entry.tile)
        has_keys = entry.tile.seqlen_k > 0
        self.read(entry.duty, 0)
        if has_keys:
            self.stage(0)
        self.read(entry.duty, 1)
        if has_keys:
            yield self.dq_place(self.turn if self.has_turn(self.turn) else self.turn + 1)
            self.stage(1)
        for i in range(rounds_of(self.cfg, entry.duty)):
            self.read(entry.duty, i + 2)
            if has_keys or i > 0:
                yield self.sync(self.cta.free)
            self.stage(i % 2)

    def stage(self, place: int):
        """The warpgroup's part of what leaves, in a place where nothing else is."""
        cta = self.cta
        assert not cta.leaving[place][self.w], "what was there is not sent"
        assert not (any(cta.num_ds_readers) if place == 0 else cta.dq.content[self.w]), "what was there is not read"
        cta.leaving[place][self.w] = True
        self.sync(cta.staged[place])

    def share(self, tile):
        """The Q tiles that have passed a part: left to another, or with those of others stored."""
        queries, keys = self.launch.queries_of(tile), (tile.batch, tile.n_block, tile.kv_head)
        passed = list(range(queries.m_block_min, queries.m_block_max))
        if tile.part != STORES:
            self.grid.parts[tile.part, self.w] = keys, passed
            return
        for part in range(tile.first_part, tile.end_part):
            of_keys, of_part = self.grid.parts.pop((part, self.w))
            assert of_keys == keys
            passed += of_part
        assert (*keys, self.w) not in self.grid.stored
        self.grid.stored[*keys, self.w] = passed

    def read(self, duty: Duty, number: int):
        """The sums of the warpgroup's tile of that round, if it has one, to finish them."""
        launch, is_in_turns = self.launch, self.cfg.is_dq_in_turns
        own = launch.tiles_of(duty)[self.w :: 2] if is_in_turns else launch.tiles_of(duty)
        if number >= len(own):
            return
        (m_block, of_group), part = own[number], 0 if is_in_turns else self.w
        at = duty.batch, duty.offset
        ranges = [launch.range_of(n, launch.lengths[at]) for n in range(-(-launch.lengths[at][1] // self.cfg.tile_n))]
        wanted = sum(of.m_block_min <= m_block < of.m_block_max for of in ranges)
        assert self.grid.sums.pop((duty.slot, duty.first_block + m_block, of_group, part)) == wanted
        self.grid.finished[*at, duty.kv_head * launch.group + of_group, m_block, part] += 1
