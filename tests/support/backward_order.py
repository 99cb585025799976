"""kernels/backward/schedule.py and duties.py on Python ints: the device's own code, with stand-ins for atomics and for
what takes a warp, which test_backward_listed.py compares with the device's. backward_roles.py has the CTAs that do what
it says.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, product
from types import FunctionType, SimpleNamespace

import pytest
from device_code import as_python

from fa3_cute.kernels.backward import blocks, duties, finish, listed, outgoing, place, schedule, shares, watch
from fa3_cute.kernels.backward.blocks import Blocks, first_key_block, last_key_block, queries_of, query_range
from fa3_cute.kernels.backward.duties import Duty
from fa3_cute.kernels.backward.listed import ListedBlocks
from fa3_cute.kernels.backward.schedule import First
from fa3_cute.kernels.backward.shares import Share, Shares
from fa3_cute.kernels.backward.workspace import Sums
from fa3_cute.kernels.common import sequences
from fa3_cute.kernels.common.block_range import Window
from fa3_cute.kernels.common.sequences import Sequences
from fa3_cute.planning import sections
from fa3_cute.planning.backward_kernels import pass_config
from fa3_cute.planning.sections import main_sections, shares_of, sums_of

MODULES = (blocks, duties, finish, listed, outgoing, place, schedule, sequences, shares, watch)
KINDS = (Blocks, Duty, ListedBlocks, Sequences, Share, Shares, finish.Finisher)
# So many sections as large problems have, in small ones.
FEW = {"CTAS": 6, "MIN_TILES": 5, "L2_BYTES": 1 << 19, "LEAST_STEPS": 1, "SHARING_STEPS": 0}
FEW_CTAS = 24  # of listed.py, so that tiles of some launches are not few
WINDOWS = {"full": (0, 0), "causal": (0, 0), "local": (150, 20)}


def find(of: Blocks, block: int) -> int:
    """Blocks.find, by looking at all: the last sequence that starts at or before a block."""
    return max(sequence for sequence in range(of.batch_size) if of.first(sequence) <= block)


@dataclass(frozen=True)
class Listed(Blocks):
    """ListedBlocks of a launch that has a list. places: (block, sequence) of each."""

    places: list

    def locate(self, index: int, num_heads: int, is_reversed: bool) -> tuple[int, int, int]:
        """One head after the other of each."""
        block, sequence = self.places[index // num_heads]
        return block, index % num_heads, sequence


def blocks_of(cfg, keys: int) -> int:
    """Of a sequence of the list: one at least, which has the duty."""
    return max(-(-keys // cfg.tile_n), 1)


def in_listed_order(cfg, params, _=None):
    """listed.in_listed_order, by sorting; the launch's own params if it has no list."""
    blocks, sequences = params.k_blocks, params.sequences
    has_list = sequences.batch_size <= 32 and params.num_behind == blocks.num_blocks * params.num_heads_k
    if not (has_list and listed.are_few(params)):
        return params
    lengths = [sequences.place(i)[1::2] for i in range(sequences.batch_size)]
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i][0])
    places = [(block, i) for i in longest for block in range(blocks_of(cfg, lengths[i][1]))]
    of = Listed(blocks.block_rows, blocks.cu_seqlens, blocks.rows, blocks.batch_size, len(places), places)
    return replaced(params, k_blocks=of, num_behind=len(places) * params.num_heads_k)


def replaced(of: SimpleNamespace, **new) -> SimpleNamespace:
    """dataclasses.replace of a launch's params."""
    return SimpleNamespace(**vars(of) | new)


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
    wait_for_count = lambda self, at, wanted: self.waited.append((at, wanted))
    take, shuffle_sync = lambda self, params: next(self.taken), lambda self, value, lane: value

    def run(self, cfg, params, place: int) -> list:
        """[(tile, duty)] that the role gives to the others at a place: [] where neither is there. waited: for which
        counts it waits behind it, and what for."""
        self.waited = []
        self.place, self.taken, self.given, self.written = place, iter((1 << 30,)), [], {"duty": None}
        slots = SimpleNamespace(sTiles={(None, 0): "tile"}, sDuties={(None, 0): "duty", (None, 1): "before"})
        schedule.schedule(cfg, params, slots, SimpleNamespace(tiles=self), First(place, None))
        *found, end = self.given
        assert end[0] is None
        return found


def python_roles():
    """Yields a Warp while the roles' code is Python: what it counts and sends. Of one lane: WARP is 1 there."""
    warp = Warp(counts=Counter(), sent=[])
    loops = SimpleNamespace(range=lambda *ends, unroll: range(*ends), range_constexpr=range)
    stand_ins = {"Int32": int, "Boolean": bool, "is_present": lambda array: array is not None, "cutlass": loops}
    stand_ins |= {"set_free": lambda cfg, num_left: warp.sent.append("free"), "end_of": lambda kind: None}
    stand_ins |= dict.fromkeys(("query_part", "key_part"), lambda cfg: None)
    stand_ins |= {"take": warp.take, "write_tile": warp.write, "replace": replaced}
    stand_ins |= {"free_sums_before": lambda *_: None, "wait_for_count": warp.wait_for_count}
    stand_ins["send"] = lambda _, __, place, part, gradient, rows: warp.sent.append((place, gradient, rows))
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            write_as_python(patch, module, stand_ins)
        for kind in KINDS:
            for name, value in list(vars(kind).items()):
                if hasattr(method := getattr(kind, name), "__wrapped__"):
                    written = as_python(method)
                    patch.setattr(kind, name, staticmethod(written) if isinstance(value, staticmethod) else written)
        patch.setattr(Blocks, "find", find)
        for name, value in {"cute": SimpleNamespace(arch=warp), "WARP": 1, "in_listed_order": in_listed_order}.items():
            patch.setattr(schedule, name, value)
        patch.setattr(listed, "CTAS", FEW_CTAS)
        for name, value in FEW.items():
            patch.setattr(sections, name, value)
        yield warp


def write_as_python(patch: pytest.MonkeyPatch, module, stand_ins: dict):
    """A module's device code, with those of the stand-ins that it has names of."""
    for name, value in list(vars(module).items()):
        if name in stand_ins:
            patch.setattr(module, name, stand_ins[name])
        elif isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
            patch.setattr(module, name, as_python(value))


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
    """What the host tells a kernel, and where its sequences lie: {(batch, first row): (queries, keys)}. order: what the
    schedule role makes of params."""

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
        self.params = params = SimpleNamespace(num_heads_k=case.num_heads_k, group=case.group)
        params.dq, params.dk, params.dv = "dq", "dk", "dv"
        params.tail_split = case.group if case.num_heads_k % 2 else 1  # one of what the host chooses
        params.section, params.is_rising, params.num_behind, num_slots = found
        params.num_behind *= rows[0] > 0
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
        self.order = in_listed_order(cfg, params) if cfg.is_varlen else params
        self.num_tiles = duties.num_tiles_of(params)
        self.num_places = schedule.num_places_of(cfg, self.order)
        self.pieces_of_unit = duties.pieces_of_unit(cfg, params)
        self.duties_of_unit = duties.places_of_unit(cfg, self.order) * case.group

    def num_left_out(self) -> int:
        """Blocks of each KV head, if the launch has a list."""
        return self.params.k_blocks.num_blocks - self.order.k_blocks.num_blocks

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

    def num_before(self, tile, m_block: int) -> int:
        """CTAs that add to a Q tile before that of a tile of keys, deterministic."""
        lengths = tile.seqlen_q, tile.seqlen_k
        if tile.is_rising:
            return last_key_block(self.cfg, m_block, *lengths) - tile.n_block
        return tile.n_block - first_key_block(self.cfg, self.params.window, m_block, *lengths)
