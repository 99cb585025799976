"""kernels/backward/schedule.py and duties.py on Python ints: the device's own code, with stand-ins for atomics and for
what takes a warp; and CTAs that do what it says, in any order.
"""

import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, product
from types import FunctionType, SimpleNamespace

import pytest
from device_code import as_python

from fa3_cute.kernels.backward import blocks, duties, finish, outgoing, place, schedule, shares, watch
from fa3_cute.kernels.backward.blocks import Blocks, first_key_block, last_key_block, queries_of, query_range
from fa3_cute.kernels.backward.duties import NOTHING, Duty
from fa3_cute.kernels.backward.shares import STORES, Share, Shares
from fa3_cute.kernels.backward.workspace import Sums
from fa3_cute.kernels.common import sequences
from fa3_cute.kernels.common.block_range import Window
from fa3_cute.kernels.common.sequences import Sequences
from fa3_cute.planning import sections
from fa3_cute.planning.backward import TILE_SLOTS
from fa3_cute.planning.backward_kernels import pass_config
from fa3_cute.planning.sections import main_sections, shares_of, sums_of

MODULES = (blocks, duties, finish, outgoing, place, schedule, sequences, shares, watch)
# So many sections as large problems have, in small ones.
FEW = {"CTAS": 6, "MIN_TILES": 5, "L2_BYTES": 1 << 19, "LEAST_STEPS": 1, "SHARING_STEPS": 0}
WINDOWS = {"full": (0, 0), "causal": (0, 0), "local": (150, 20)}


def find(of: Blocks, block: int) -> int:
    """Blocks.find, by looking at all: the last sequence that starts at or before a block."""
    return max(sequence for sequence in range(of.batch_size) if of.first(sequence) <= block)


class Warp(SimpleNamespace):
    """Of the schedule role, which takes one place and then those behind the last. It is cute.arch, its own ring of
    tiles, and remembers what atomics have counted."""

    block_idx, grid_dim = lambda self: (self.place,), lambda self: (1 << 30,)
    lane_idx, elect_one, index = lambda self: 0, lambda self: nullcontext(), 0
    barrier = advance = lambda self, **_: None
    make_producer = acquire = acquire_and_advance = lambda self: self
    commit = lambda self: self.given.append((self.written["tile"], self.written["duty"]))
    atomic_add = lambda self, at, number, **_: self.counts.update({at: number})
    write = lambda self, at, value: self.written.update({at: value})
    take = lambda self, params: next(self.taken)

    def run(self, cfg, params, place: int) -> list:
        """[(tile, duty)] that the role gives to the others at a place: [] where neither is there."""
        self.place, self.taken, self.given, self.written = place, iter((place, 1 << 30)), [], {"duty": None}
        slots = SimpleNamespace(sTiles={(None, 0): "tile"}, sDuties={(None, 0): "duty", (None, 1): "before"})
        schedule.schedule(cfg, params, slots, SimpleNamespace(tiles=self))
        *found, end = self.given
        assert end[0] is None
        return found


def python_roles():
    """Yields a Warp while the roles' code is Python: what it counts and sends."""
    warp = Warp(counts=Counter(), sent=[])
    loops = SimpleNamespace(range=lambda *ends, unroll: range(*ends), range_constexpr=range)
    stand_ins = {"Int32": int, "Boolean": bool, "is_present": lambda array: array is not None, "cutlass": loops}
    stand_ins |= {"set_free": lambda *_: None, "query_part": lambda cfg: None, "end_of": lambda kind: None}
    stand_ins |= {"take": warp.take, "write_tile": warp.write, "free_sums_before": lambda *_: None}
    stand_ins["send"] = lambda cfg, smem, which, part, gradient, all_rows: warp.sent.append((which, all_rows))
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            for name, value in list(vars(module).items()):
                if name in stand_ins:
                    patch.setattr(module, name, stand_ins[name])
                elif isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
                    patch.setattr(module, name, as_python(value))
        for kind in (Blocks, Duty, Sequences, Share, Shares, finish.Finisher):
            for name, value in list(vars(kind).items()):
                if hasattr(method := getattr(kind, name), "__wrapped__"):
                    written = as_python(method)
                    patch.setattr(kind, name, staticmethod(written) if isinstance(value, staticmethod) else written)
        patch.setattr(Blocks, "find", find)
        patch.setattr(schedule, "cute", SimpleNamespace(arch=warp))
        for name, value in FEW.items():
            patch.setattr(sections, name, value)
        yield warp


@dataclass(frozen=True)
class Case:
    """queries, keys: of each sequence, those that are used. What lies between packed sequences is not used either."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    lengths: str = "dense"
    mask: str = "full"
    head_dim: int = 64
    num_heads_k: int = 2
    group: int = 2
    is_deterministic: bool = False

    def __str__(self):
        kind = f"{self.lengths}-{self.mask}{'-deterministic' * self.is_deterministic}"
        return f"{kind}-{self.head_dim}-{len(self.keys)}x{max(self.queries)}x{max(self.keys)}"


class Counted(Sums):
    """Whose counts are named."""

    count = lambda self, which, unit: (which, unit)


class Launch:
    """What the host tells a kernel, and where its sequences lie: {(batch, first row): (queries, keys)}."""

    def __init__(self, case: Case):
        batch, is_packed = len(case.queries), case.lengths == "packed"
        flags = case.lengths != "dense", case.is_deterministic
        self.cfg = cfg = pass_config("bf16", case.head_dim, case.mask, *flags, is_short=max(case.queries) <= 1024)
        self.case, self.group = case, case.group
        arrays, rows = [None] * 4, [max(case.queries), max(case.keys)]
        if is_packed:
            # A row before the first sequence and some behind the last; every third has rows that are not used.
            both = [(of, 1 if any(of) else 0) for of in (case.queries, case.keys)]
            given = [[n + 7 * some * (i % 3 == 2) for i, n in enumerate(of)] for of, some in both]
            starts = [list(accumulate(of, initial=some)) for of, (_, some) in zip(given, both, strict=True)]
            arrays = [*starts, case.queries, case.keys]
            rows = [start[-1] + 300 * some for start, (_, some) in zip(starts, both, strict=True)]
        elif case.lengths == "seqused":
            arrays, rows = [None, None, case.queries, case.keys], [max(case.queries) + 130, max(case.keys) + 130]
        heads = {"num_heads": case.num_heads_k * case.group, "num_heads_k": case.num_heads_k}
        of = SimpleNamespace(batch_size=batch, seqlen_q=rows[0], seqlen_k=rows[1], is_packed=is_packed, **heads)
        found, self.sums, self.shares = (
            main_sections(cfg, of),
            sums_of(cfg, of),
            Shares(*shares_of(cfg, of), None, None),
        )
        self.params = params = SimpleNamespace(num_heads_k=case.num_heads_k, group=case.group, dq=None)
        params.tail_split = case.group if case.num_heads_k % 2 else 1  # one of what the host chooses
        params.section, params.is_rising, params.num_behind, num_slots = found
        params.shares = self.shares if cfg.shares_tiles else None
        params.sums = Counted(None, SimpleNamespace(shape=(2, self.sums.units)), num_slots)
        params.window, params.sequences = Window(*WINDOWS[case.mask], None), Sequences(*arrays, batch, *rows)
        params.q_blocks = Blocks.create(cfg.tile_m, arrays[0], rows[0], batch)
        params.k_blocks = Blocks.create(cfg.tile_n, arrays[1], max(rows[1], 1), batch)
        where = [(0, start) for start in arrays[0][:-1]] if is_packed else [(i, 0) for i in range(batch)]
        lengths = zip(where, case.queries, case.keys, strict=True)
        self.lengths = {at: (queries, keys) for at, queries, keys in lengths if queries}
        first_keys = [(0, start) for start in arrays[1][:-1]] if is_packed else where
        blocks_of_keys = [range(-(-keys // cfg.tile_n)) for keys in case.keys]
        self.key_tiles = {(*at, n) for at, own in zip(first_keys, blocks_of_keys, strict=True) for n in own}
        self.num_tiles = duties.num_tiles_of(params)
        self.num_places = schedule.num_places_of(cfg, params)
        self.pieces_of_unit = duties.pieces_of_unit(cfg, params)
        self.duties_of_unit = duties.places_of_unit(cfg, params) * case.group

    def all_tiles(self) -> Counter:
        """{(batch, first row of the sequence, head, Q tile): 1}"""
        heads, tile_m = range(self.case.num_heads_k * self.group), self.cfg.tile_m
        tiles = [(at, range(-(-queries // tile_m))) for at, (queries, _) in self.lengths.items()]
        return Counter((*at, head, m_block) for at, own in tiles for head, m_block in product(heads, own))

    def tiles_of(self, duty: Duty) -> list[tuple[int, int]]:
        """(Q tile, head of the group) in the order in which they are finished."""
        found, at = [], duty.start()
        while at[0] < duty.num_tiles:
            found.append(at[1:])
            at = duty.after(at)
        return found

    def range_of(self, n_block: int, lengths: tuple[int, int]):
        """QueryRange of a block of keys."""
        return query_range(self.cfg, self.params.window, n_block, *lengths)

    def queries_of(self, tile):
        """QueryRange of a tile of keys, or of a part."""
        return queries_of(self.cfg, self.params.window, tile)


class Grid:
    """CTAs that run at any speed, and may be few: each does what is at its places, in their order, and has taken the
    next one by then. Sums of dQ are numbers of tiles of keys that are added; those that nobody made zero are absent."""

    def __init__(self, launch: Launch, device: Warp, num_ctas: int, seed: int, waits_for_slots: bool = True):
        self.launch, self.params, self.device, self.counts = launch, launch.params, device, device.counts
        self.draw, self.waits_for_slots = random.Random(seed), waits_for_slots
        self.taken, self.turns, self.finished = 0, Counter(), Counter()
        self.left, self.stored = {}, {}  # by part, and by tile of keys
        of_unit = range(launch.sums.blocks_per_unit), range(launch.group)
        self.sums = dict.fromkeys(product(range(self.params.sums.num_slots), *of_unit), 0)
        self.counts.clear()
        self.queues = [[] for _ in range(num_ctas)]
        self.works = [self.work(queue) for queue in self.queues]
        self.waits = list(map(next, self.works))

    def run(self):
        """Until there is nothing left to do."""
        ctas = list(range(len(self.queues)))
        while self.taken < self.launch.num_places or any(self.queues):
            self.draw.shuffle(ctas)
            if not any(map(self.step, ctas)):
                raise TimeoutError("all CTAs wait")

    def step(self, cta: int) -> bool:
        """Whether the CTA has done something."""
        queue, may_take = self.queues[cta], self.taken < self.launch.num_places
        if may_take and (not queue or len(queue) < TILE_SLOTS and self.draw.random() < 0.5):
            queue += self.device.run(self.launch.cfg, self.params, self.taken)
            self.taken += 1
            return True
        if is_ready := self.waits[cta]():
            self.waits[cta] = next(self.works[cta])
        return is_ready

    def work(self, queue: list):
        """Yields what must hold before the next step."""
        while True:
            yield lambda: len(queue) > 0
            tile, duty = queue[0]
            yield from self.add(tile)
            if duty.num_tiles > 0:
                yield lambda number=duty.unit: self.counts[0, number] == self.launch.pieces_of_unit
            yield from self.share(tile)
            if duty.unit != NOTHING:
                yield from self.finish(duty)
            queue.pop(0)

    def add(self, tile):
        """What the warps do that add to dQ, each at its own speed."""
        cfg, parity = self.launch.cfg, self.draw.randrange(2)
        every = slice(0, None, 1)
        if cfg.num_reducers == 1:
            works = [self.add_parts(tile, every, cfg.num_dq_wgs)]
        elif cfg.is_dq_in_turns:
            works = [self.add_parts(tile, slice(first, None, 2), 1) for first in (parity, 1 - parity)]
        else:
            works = [self.add_parts(tile, every, 1) for _ in range(cfg.num_dq_wgs)]
        waits = {work: next(work) for work in works}
        while waits:
            yield lambda: any(wait() for wait in waits.values())
            work = self.draw.choice([work for work, wait in waits.items() if wait()])
            if (wait := next(work, None)) is None:
                del waits[work]
            else:
                waits[work] = wait

    def add_parts(self, tile, own: slice, number: int):
        """One of the warps: so many parts of each of its own Q tiles."""
        params, cfg = self.params, self.launch.cfg
        unit = duties.unit_of(cfg, params, tile.sequence, tile.kv_head)
        queries = self.launch.queries_of(tile)
        before, wanted = unit - params.sums.num_slots, self.launch.duties_of_unit
        passes = range(queries.num_passes(params.group))
        yield lambda: True
        if passes and before >= 0 and self.waits_for_slots:
            yield lambda: self.counts[1, before] == wanted
        for m_block, of_group in [queries.passing(i, params.group, tile.is_rising) for i in passes[own]]:
            where = params.sums.slot(unit), m_block + tile.first_q_block * cfg.is_varlen, of_group
            if cfg.is_deterministic:
                at, num_before = (unit, *where), cfg.num_dq_wgs * self.num_before(tile, m_block)
                yield lambda at=at, number=num_before: self.turns[at] >= number
                assert self.turns[at] < num_before + cfg.num_dq_wgs
                self.turns[at] += number
            assert where in self.sums, "not zero before the first is added"
            self.sums[where] += number
            yield lambda: True
        if tile.seqlen_k > 0:
            self.counts[0, unit] += duties.pieces_of(cfg, tile)

    def share(self, tile):
        """What the watch role and the consumers do where a tile has parts: the Q tiles that have passed."""
        if not self.launch.cfg.shares_tiles or not tile.seqlen_k:
            return
        queries = self.launch.queries_of(tile)
        passed = list(range(queries.m_block_min, queries.m_block_max))
        keys = tile.batch, tile.n_block, tile.kv_head
        parts = range(tile.first_part, tile.end_part)
        yield lambda: all(part in self.left for part in parts)
        for part in parts:
            of_keys, of_part = self.left.pop(part)
            assert of_keys == keys
            passed += of_part
        if tile.part == STORES:
            assert keys not in self.stored
            self.stored[keys] = passed
        else:
            assert not parts and tile.part not in self.left
            self.left[tile.part] = keys, passed

    def num_before(self, tile, m_block: int) -> int:
        """CTAs that add to a Q tile before this one."""
        cfg, lengths = self.launch.cfg, (tile.seqlen_q, tile.seqlen_k)
        if tile.is_rising:
            return last_key_block(cfg, m_block, *lengths) - tile.n_block
        return tile.n_block - first_key_block(cfg, self.params.window, m_block, *lengths)

    def finish(self, duty: Duty):
        """What the watch role and the consumers do, deterministic the schedule role too."""
        has_next = duty.unit + self.params.sums.num_slots < self.launch.sums.units
        for m_block, of_group in self.launch.tiles_of(duty):
            at, where = (duty.batch, duty.offset), (duty.slot, duty.first_block + m_block, of_group)
            n_blocks = range(-(-self.launch.lengths[at][1] // self.launch.cfg.tile_n))
            ranges = [self.launch.range_of(n_block, self.launch.lengths[at]) for n_block in n_blocks]
            number = sum(of.m_block_min <= m_block < of.m_block_max for of in ranges)
            assert self.sums.pop(where) == self.launch.cfg.num_dq_wgs * number
            self.finished[*at, duty.kv_head * self.params.group + of_group, m_block] += 1
            yield lambda: True
            if has_next:
                self.sums[where] = 0
        if has_next:
            self.counts[1, duty.unit] += duty.num_heads


def grid_of(case: Case, device: Warp, num_ctas: int) -> Grid:
    """A launch that has run to its end."""
    grid = Grid(Launch(case), device, num_ctas, seed=num_ctas)
    grid.run()
    return grid
