"""The roles of the backward main kernel's CTAs, of which each waits for others: mbarriers, named barriers and counts in
global memory, over what the device's own code schedules (backward_order.py).

A role is a generator (barriers.py); so is a warpgroup, whose warps run together. K stands for V too, Q for dO: their
rings turn together. Slots and places of shared memory know what is in them.
"""

from collections import Counter, defaultdict
from itertools import count, product
from random import Random

from backward_consumer import WARPGROUP, Consumer, Entry
from backward_order import Launch, Warp
from barriers import NOW, NamedBarrier, Role, Slots, run

from fa3_cute.kernels.backward import duties
from fa3_cute.kernels.backward.duties import NOTHING, Duty, no_duty, pieces_of, rounds_of
from fa3_cute.kernels.backward.listed import are_few
from fa3_cute.kernels.backward.outgoing import threads_of
from fa3_cute.kernels.backward.shares import STORES
from fa3_cute.planning.rings import WARP, by_name


class Cta:
    """Shared memory and barriers of a CTA, and the roles of one warp. w: which warpgroup's dQ a warp adds."""

    consumer = Consumer

    def __init__(self, grid: "Grid"):
        """Before it has begun."""
        self.grid, self.launch = grid, grid.launch
        self.cfg = cfg = grid.launch.cfg
        rings = {name: ring._replace(name="", slot_bytes=0, label="") for name, ring in by_name(cfg.rings).items()}
        assert rings["k"] == rings["v"] and (cfg.is_split or rings["q"] == rings["do"]), "one stands for both"
        self.tiles, self.k, self.q, self.ds, self.dq = (Slots(rings[name]) for name in ("tiles", "k", "q", "ds", "dq"))
        self.tiles.content = [Entry(None, no_duty())] * self.tiles.number
        self.free, self.sums, *self.staged = (NamedBarrier(threads_of(cfg)) for _ in range(4))
        self.loaded, *self.turns = NamedBarrier(2 * WARP), NamedBarrier(2 * WARPGROUP), NamedBarrier(2 * WARPGROUP)
        self.num_added, self.num_loaded, self.sent = [0, 0], [0, 0], []  # Q tiles; tiles of keys and of Q; places
        self.leaving = [[False] * cfg.num_consumer_wgs for _ in range(2)]  # what is at a place, by warpgroup
        self.num_ds_readers = [0] * self.ds.number  # who have not read what is in a slot of dS

    def roles(self) -> dict:
        """All that run."""
        watch = self.follow(self.watch)
        self.set_free(0)
        warps = {"schedule": self.schedule(), "load": self.follow(self.load), "reduce": self.follow(self.reduce)}
        consumers = {f"consumer {w}": self.consumer(self, w).work() for w in range(self.cfg.num_consumer_wgs)}
        return warps | {"watch": watch} | consumers

    def follow(self, work, num_warps: int = 1):
        """A role that reads the ring of tiles: does its work for each entry."""
        for turn in count():
            yield self.tiles.filled(turn)
            entry = self.tiles.content[turn % self.tiles.number]
            if entry.tile is None:
                return
            yield from work(entry)
            assert entry is self.tiles.content[turn % self.tiles.number]
            self.tiles.empty[turn % self.tiles.number].arrive(num_warps)

    def schedule(self):
        """Takes places, of which each has at most two tiles; what is written there and not given, nobody may read."""
        yield NOW
        place, turn = self.grid.take(), 0
        while place < self.launch.num_places:
            yield self.tiles.emptied(turn)
            self.tiles.content[turn % self.tiles.number] = None
            for tile, duty in self.found_at(place):
                yield self.tiles.emptied(turn)
                self.give(turn, Entry(tile, duty, self.passes_of(tile)))
                turn += 1
                yield from self.after_giving(turn)
                if tile.seqlen_k == 0:
                    yield lambda duty=duty: self.grid.counts[0, duty.unit] == self.launch.pieces_of_unit
            yield NOW
            place = self.grid.take()
        yield self.tiles.emptied(turn)
        self.give(turn, Entry(None, no_duty()))
        if self.cfg.is_deterministic:
            yield from self.free_sums_before(turn + 1)

    def found_at(self, place: int) -> list:
        """What the device's own code finds at a place of the order: [(tile, duty)]."""
        return self.grid.device.run(self.cfg, self.launch.params, place)

    def passes_of(self, tile) -> tuple[tuple[int, int], ...]:
        """The Q tiles and heads that pass a tile of keys, in their order."""
        queries, group = self.launch.queries_of(tile), self.launch.group
        return tuple(queries.passing(i, group, tile.is_rising) for i in range(queries.num_passes(group)))

    def give(self, turn: int, entry: Entry):
        """To all other roles."""
        self.tiles.content[turn % self.tiles.number] = entry
        self.tiles.full[turn % self.tiles.number].arrive(WARP)

    def after_giving(self, turn: int):
        """turn: of the next entry."""
        if self.cfg.is_deterministic:
            yield from self.free_sums_before(turn)
        yield self.loaded.arrive("schedule")

    def free_sums_before(self, turn: int):
        """Those of the entry whose slot the one of this turn takes."""
        yield self.tiles.emptied(turn)
        yield from self.free_sums(self.tiles.content[turn % self.tiles.number].duty)

    def free_sums(self, duty: Duty):
        """That a duty has read, if a later unit has their slot."""
        params = self.launch.params
        if duty.unit == NOTHING or duty.unit + params.sums.num_slots >= self.launch.sums.units:
            return
        for (m_block, of_group), part in product(self.launch.tiles_of(duty), range(self.cfg.num_dq_wgs)):
            where = duty.slot, duty.first_block + m_block, of_group, part
            assert where not in self.grid.sums, "zeros where the sums were not read"
            self.grid.sums[where] = 0
            yield NOW
        self.grid.counts[1, duty.unit] += duty.num_heads

    def load(self, entry: Entry):
        """K and V, if any, then Q and dO."""
        if not self.cfg.is_varlen or entry.tile.seqlen_k > 0:
            yield self.k.emptied(self.num_loaded[0])
            self.k.full[0].arrive()
            self.num_loaded[0] += 1
        for passing in entry.passes:
            turn = self.num_loaded[1]
            yield self.q.emptied(turn)
            self.q.content[turn % 2] = entry, passing
            self.q.full[turn % 2].arrive()
            self.num_loaded[1] += 1
        yield from self.tell_of_loads(len(entry.passes) == 1)

    def tell_of_loads(self, is_only: bool):
        """The schedule role, late where CTAs have few tiles. is_only: of a single Q tile."""
        turn = self.num_loaded[1]
        if self.grid.has_few_tiles:
            yield self.ds.filled(turn - 1) if is_only else self.q.emptied(turn)
        self.loaded.arrive("load")

    def reduce(self, entry: Entry):
        """Adds dQ, if deterministic of one warpgroup."""
        return self.add_in_order(entry, 0) if self.cfg.is_deterministic else self.add_all(entry)

    def wait_for_slot(self, entry: Entry):
        """Until the sums of the tile's unit are zeros; for it, if there is anything to add."""
        unit = duties.unit_of(self.cfg, self.launch.params, entry.tile.sequence, entry.tile.kv_head)
        before = unit - self.launch.params.sums.num_slots
        if entry.passes and before >= 0:
            yield lambda: self.grid.counts[1, before] == self.launch.duties_of_unit
        return unit

    def place_of_sums(self, entry: Entry, unit: int, passing: tuple[int, int], part: int) -> tuple:
        """Of a part of a Q tile: there must be zeros or sums of the unit."""
        first = entry.tile.first_q_block if self.cfg.is_varlen else 0
        where = self.launch.params.sums.slot(unit), first + passing[0], passing[1], part
        assert where in self.grid.sums, "not zero before the first is added"
        return where

    def count_as_added(self, entry: Entry, unit: int):
        """Of a tile's pieces those that it has."""
        if entry.tile.seqlen_k > 0:
            self.grid.counts[0, unit] += pieces_of(self.cfg, entry.tile)

    def add_all(self, entry: Entry):
        """One warp adds the parts of all warpgroups; they are there when it says so."""
        unit, added = (yield from self.wait_for_slot(entry)), []
        for passing, part in product(entry.passes, range(self.cfg.num_dq_wgs)):
            turn = self.num_added[0]
            yield self.dq.filled(turn)
            added.append(self.place_of_sums(entry, unit, passing, part))
            self.empty_dq(turn % 2, (turn // self.cfg.num_dq_wgs, entry, passing))
            self.num_added[0] += 1
        yield NOW
        for where in added:
            self.grid.sums[where] += 1
        self.count_as_added(entry, unit)

    def empty_dq(self, slot: int, content: tuple):
        """Which must be there."""
        assert self.dq.content[slot] == content, "another part of dQ"
        self.dq.content[slot] = None
        self.dq.empty[slot].arrive()

    def first_pass(self, turn: int, w: int) -> int:
        """Of a tile of keys, the first Q tile whose dQ the warpgroup computes: every other one."""
        return (turn + w) % 2

    def parity_of_dq(self, turn: int, step: int) -> int:
        """Of the phase in which a warpgroup fills its slot of dQ."""
        return turn // step % 2

    def add_in_order(self, entry: Entry, w: int):
        """What warpgroup w has computed, when the CTAs of the keys before have added theirs."""
        cfg, turns = self.cfg, self.grid.turns
        turn, part, first, step = self.num_added[w], w, 0, 1
        if cfg.is_dq_in_turns:
            part, first, step = 0, self.first_pass(turn, w), 2
        unit = yield from self.wait_for_slot(entry)
        for i in range(first, len(entry.passes), step):
            m_block, of_group = passing = entry.passes[i]
            at = entry.tile.first_q_block + m_block, entry.tile.kv_head * self.launch.group + of_group
            number = cfg.num_dq_wgs * self.launch.num_before(entry.tile, m_block)
            yield lambda at=at, number=number: turns[at] >= number
            assert turns[at] < number + cfg.num_dq_wgs, "CTAs of later keys have added"
            yield self.dq.full[w].passed(self.parity_of_dq(turn + i, step))
            where = self.place_of_sums(entry, unit, passing, part)
            self.empty_dq(w, (turn + i, entry, passing))
            yield NOW
            self.grid.sums[where] += 1
            self.grid.order[*at, part].append(entry.tile.n_block)
            turns[at] += 1
        self.count_as_added(entry, unit)
        self.num_added[w] += len(entry.passes)

    def watch(self, entry: Entry):
        """Waits for sums, of a duty and of parts of the tile, then sends what consumers leave."""
        cfg, tile, duty = self.cfg, entry.tile, entry.duty
        if cfg.is_deterministic:
            yield from self.add_in_order(entry, 1)
        if duty.num_tiles > 0:
            yield lambda: self.grid.counts[0, duty.unit] == self.launch.pieces_of_unit
        if cfg.shares_tiles:
            yield lambda: all(part in self.grid.left for part in range(tile.first_part, tile.end_part))
        self.sums.arrive("watch")
        if tile.seqlen_k > 0:
            yield from self.send_keys(tile)
        for i in range(rounds_of(cfg, duty)):
            if self.is_behind(tile, i):
                self.set_free(1)
            yield from self.send(i % 2)
        self.set_free(0)
        if not cfg.is_deterministic:
            yield from self.free_sums(duty)

    def is_behind(self, tile, i: int) -> bool:
        """Something is sent before that round of a duty."""
        return tile.seqlen_k > 0 or i > 0

    def send_keys(self, tile):
        """dV and dK."""
        yield from self.send(0)
        self.tell_of_part(tile)
        yield from self.send(1)

    def tell_of_part(self, tile):
        """That its sums are there, if another stores them."""
        if self.cfg.shares_tiles and tile.part != STORES:
            self.grid.left[tile.part] = True

    def send(self, place: int):
        """What all warpgroups have left there."""
        yield self.staged[place].arrive("watch")
        assert all(self.leaving[place])
        self.sent.append(place)

    def set_free(self, num_left: int):
        """Once all that was sent is read, but the last so many."""
        while len(self.sent) > num_left:
            self.leaving[self.sent.pop(0)] = [False] * self.cfg.num_consumer_wgs
        self.free.arrive("watch")


class Grid:
    """CTAs of roles, each at its own speed.

    counts   those of Sums.progress
    turns    {(Q block, head): parts of dQ that are added in order}
    sums     {(slot, Q block, head of the group, part): tiles of keys that are added}; what nobody made zero is absent
    order    {(Q block, head, part): blocks of keys in the order in which they were added}
    parts    {(part of a tile, warpgroup): (keys, Q tiles that have passed)}; left: those that may be read
    stored   {(keys, warpgroup): Q tiles that have passed}
    """

    def __init__(self, launch: Launch, device: Warp, num_ctas: int, seed: int, kind: type[Cta] = Cta):
        """CTAs of that kind."""
        self.launch, self.params, self.device, self.counts = launch, launch.params, device, device.counts
        self.draw, self.taken, self.turns, self.finished = Random(seed), 0, Counter(), Counter()
        self.order, self.parts, self.left, self.stored = defaultdict(list), {}, {}, {}
        places = range(self.params.sums.num_slots), range(launch.sums.blocks_per_unit), range(launch.group)
        self.sums = dict.fromkeys(product(*places, range(launch.cfg.num_dq_wgs)), 0)
        self.counts.clear()
        self.has_few_tiles = are_few(launch.params)
        ctas = [(i, name, work) for i in range(num_ctas) for name, work in kind(self).roles().items()]
        self.roles = [Role(f"{name} of CTA {i}", work, self.draw.uniform(0.02, 1.0)) for i, name, work in ctas]

    def take(self) -> int:
        """The next place of the order."""
        self.taken += 1
        return self.taken - 1

    def run(self):
        """Until all roles have ended."""
        run(self.roles, self.draw)


def run_all(launch: Launch, device: Warp, num_ctas: int, kind: type[Cta] = Cta) -> Grid:
    """A launch that has run to its end: every Q tile is finished once, and every count is reached."""
    grid = Grid(launch, device, num_ctas, num_ctas, kind)
    grid.run()
    parts = range(launch.cfg.num_dq_wgs)
    wanted = Counter((*tile, part) for tile in launch.all_tiles() for part in parts)
    assert grid.finished == wanted, "Q tiles that are finished never or twice"
    assert grid.taken == launch.num_places + num_ctas
    units = range(launch.sums.units)
    assert all(device.counts[0, unit] == launch.pieces_of_unit for unit in units)
    with_next = {unit for unit in units if device.counts[1, unit] == launch.duties_of_unit}
    assert with_next == set(units[: -launch.params.sums.num_slots])
    return grid
