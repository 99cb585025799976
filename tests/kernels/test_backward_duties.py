"""Duties: every Q tile of dQ is finished once, round by round by all that take part. That nobody waits forever is
test_backward_roles.py's. No GPU: the device's own code runs here (backward_order.py).
"""

from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest

pytest.importorskip("cutlass")

from backward_order import WINDOWS, Case, Launch, python_roles

from fa3_cute.kernels.backward import duties, finish, outgoing, watch
from fa3_cute.kernels.backward.duties import NOTHING, Duty, rounds_of
from fa3_cute.kernels.backward.shares import STORES


@pytest.fixture(scope="module", autouse=True)
def device():
    """The roles' code as Python: what it counts and sends."""
    yield from python_roles()


SHAPES = (
    Case((300,) * 5, (500,) * 5),
    Case((1,), (1,), num_heads_k=1, group=1),
    Case((130,), (1500,), num_heads_k=1, group=5),
    Case((700,) * 3, (1,) * 3, num_heads_k=5),
    Case((700,) * 4, (150,) * 4, num_heads_k=3, group=1),
    Case((200,) * 17, (129,) * 17, head_dim=96, num_heads_k=1, group=3),
    Case((200,) * 6, (300,) * 6, head_dim=128, num_heads_k=3, group=2),
    Case((1100,), (400,), head_dim=128, num_heads_k=11, group=1),
    Case((300, 0, 1, 128, 640, 64, 200), (260, 100, 0, 129, 513, 1, 384), "packed", num_heads_k=7),
    Case((150, 90, 1), (700, 0, 10), "packed", head_dim=96, num_heads_k=1, group=4),
    Case((0, 0, 200, 0), (100, 0, 200, 0), "packed", head_dim=128, num_heads_k=12, group=1),
    Case((100, 900), (300, 20), "packed", num_heads_k=3),  # blocks behind the last sequence
    Case((300, 0, 1, 128, 640), (0, 100, 260, 129, 640), "seqused", num_heads_k=9, group=1),
    Case((5,) * 3, (0,) * 3, "seqused", num_heads_k=3),
    Case((300, 0, 5), (0,) * 3, "packed", num_heads_k=3),
    Case((300,) * 5, (500,) * 5, head_dim=192, group=1),
    Case((700,) * 4, (150,) * 4, head_dim=192, num_heads_k=3, group=2),
    Case((300, 0, 1, 128, 640, 64, 200), (260, 100, 0, 129, 513, 1, 384), "packed", head_dim=192, num_heads_k=7),
    Case((300, 0, 1, 128, 640), (0, 100, 260, 129, 640), "seqused", head_dim=192, num_heads_k=9, group=1),
    # Of which all units are under way at once.
    Case((300, 0, 1, 128, 640, 64, 200), (260, 100, 0, 129, 513, 1, 384), "packed", group=1),
    Case((300, 0, 1, 128, 640), (0, 100, 260, 129, 640), "seqused", head_dim=96, num_heads_k=1, group=3),
    Case((60, 300, 60, 300), (300, 0, 100, 129), "packed", head_dim=128),
    Case((0, 7, 200), (0, 0, 513), "seqused", head_dim=128),
    Case((300, 0, 1, 128, 640, 64, 200), (260, 100, 0, 129, 513, 1, 384), "packed", head_dim=192, group=1),
    Case((300, 0, 1, 128, 640), (0, 100, 260, 129, 640), "seqused", head_dim=192, num_heads_k=1),
    # Of too many tiles for a list.
    Case((300, 0, 1, 128, 640, 64, 200), (260, 100, 0, 129, 1300, 1, 384), "packed", group=1),
    Case((300, 0, 1, 128, 640), (0, 100, 260, 129, 640), "seqused", head_dim=128, group=1),
    Case((300, 0, 1, 128, 640, 64, 200), (260, 100, 0, 129, 900, 1, 384), "packed", head_dim=192, group=1),
    Case((300, 0, 1, 128, 640), (0, 100, 260, 129, 640), "seqused", head_dim=192, group=1),
    Case((40, 0, 130, 5) * 9, (100, 1, 0, 200) * 9, "packed", num_heads_k=1),  # more sequences than lanes
    Case((40, 0, 130, 5) * 9, (100, 1, 0, 200) * 9, "seqused", head_dim=128, group=1),
    Case((40, 0, 130, 5) * 9, (100, 1, 0, 200) * 9, "packed", head_dim=192, num_heads_k=1, group=1),
    Case((40, 0, 130, 5) * 9, (100, 1, 0, 200) * 9, "seqused", head_dim=192, num_heads_k=1, group=1),
)
CASES = [
    Case(**vars(case) | {"mask": mask, "is_deterministic": is_deterministic})
    for case, mask, is_deterministic in product(SHAPES, WINDOWS, (False, True))
    if case.head_dim != 192 or not is_deterministic  # which has kernels of one gradient
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tile_is_finished_once_and_every_count_is_reached(device, case):
    launch = Launch(case)
    device.counts.clear()
    finished, keys, places = Counter(), Counter(), set()
    for index in range(launch.num_places):
        for tile, duty in device.run(launch.cfg, launch.params, index):
            has_duty = index >= launch.order.num_behind
            assert (duty.unit != NOTHING) == has_duty or launch.shares.num_parts and has_duty
            unit = duties.unit_of(launch.cfg, launch.params, tile.sequence, tile.kv_head)
            wanted = [] if tile.seqlen_k else [((0, duty.unit), launch.pieces_of_unit)]
            assert device.waited == wanted, "behind a duty alone, until the unit's tiles are added"
            if tile.seqlen_k:  # as those that add do
                keys[tile.batch, tile.offset_k, tile.n_block, tile.kv_head] += getattr(tile, "part", STORES) == STORES
                device.counts[0, unit] += launch.cfg.num_reducers * duties.pieces_of(launch.cfg, tile)
            else:
                assert launch.queries_of(tile).num_passes(launch.group) == 0
            if duty.unit != NOTHING:  # as those that free sums do
                device.counts[1, duty.unit] += duty.num_heads
            for m_block, of_group in launch.tiles_of(duty):
                assert launch.lengths[at := (duty.batch, duty.offset)][0] == duty.seqlen > m_block * launch.cfg.tile_m
                finished[*at, duty.kv_head * launch.group + of_group, m_block] += 1
                assert duty.slot == duty.unit % launch.params.sums.num_slots
                assert duty.first_block + m_block < launch.sums.blocks_per_unit
                places.add((duty.unit, duty.first_block + m_block, of_group))
    assert finished == launch.all_tiles() and len(places) == finished.total()
    assert not launch.num_left_out() or launch.params.sums.num_slots >= launch.sums.units, "nobody waits for duties"
    assert keys == Counter((*at, head) for at in launch.key_tiles for head in range(case.num_heads_k))
    wanted = enumerate((launch.pieces_of_unit, launch.duties_of_unit))
    assert device.counts == {(which, u): number for which, number in wanted for u in range(launch.sums.units)}


def consumers_way(launch: Launch, duty: Duty, wg_idx: int) -> list:
    """Rows of the tiles that a consumer warpgroup finishes, round by round."""
    finisher = finish.Finisher(launch.cfg, launch.params, None, None, SimpleNamespace(wg_idx=wg_idx), duty)
    at, found = finisher.start(), []
    for _ in range(rounds_of(launch.cfg, duty)):
        found.append(outgoing.query_rows(launch.cfg, duty, launch.group, at, wg_idx))
        at = finisher.after(at)
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case.mask == "full"], ids=str)
def test_consumers_and_the_watch_role_go_the_same_way(device, case):
    """Round by round, each through the same tiles, of which every row and column is stored once."""
    launch = Launch(case)
    cfg, stored = launch.cfg, Counter()
    has_columns = outgoing.has_columns(cfg)
    rows_of_part = cfg.tile_m if has_columns or cfg.is_dq_in_turns else cfg.tile_m // 2
    places = range(launch.order.num_behind, launch.num_places)
    for tile, duty in [both for index in places for both in device.run(cfg, launch.params, index)]:
        device.sent.clear()
        watch.send_finished(cfg, launch.params, None, duty, tile.seqlen_k > 0)
        sent = [of for of in device.sent if of != "free"]
        assert len(sent) == rounds_of(cfg, duty)
        ways = [consumers_way(launch, duty, w) for w in range(cfg.num_consumer_wgs)]
        assert sent == [(i % 2, "dq", all_rows) for i, all_rows in enumerate(zip(*ways, strict=True))]
        for rows in [rows for way in ways for rows in way]:
            first = rows.block * rows_of_part
            used = range(first, first + min(rows.used, rows_of_part))
            stored.update((rows.batch, rows.offset, rows.head, row, rows.column_block) for row in used)
    heads, columns = range(case.num_heads_k * case.group), range(cfg.num_consumer_wgs if has_columns else 1)
    of_each = [(at, product(heads, range(queries), columns)) for at, (queries, _) in launch.lengths.items()]
    assert stored == Counter((*at, *of) for at, own in of_each for of in own)


@pytest.mark.parametrize("mask", WINDOWS)
def test_without_queries_tiles_have_no_duties(device, mask):
    """Nor are they counted: there are no counts."""
    launch = Launch(Case((0, 0, 0), (100, 0, 300), "packed", mask))
    assert launch.params.sequences.rows_q == 0
    device.counts.clear()
    assert launch.params.num_behind == 0 and launch.order is launch.params
    places = range(launch.num_tiles)
    tiles, found = zip(*[both for i in places for both in device.run(launch.cfg, launch.params, i)], strict=True)
    where = {(tile.batch, tile.offset_k, tile.n_block) for tile in tiles if tile.seqlen_k}
    assert where == launch.key_tiles and len(where) == 4
    assert {duty.unit for duty in found} == {NOTHING} and not device.counts


def test_the_cases_have_all_kinds_of_tiles_and_duties():
    found = [Launch(case) for case in CASES]
    kinds = {(launch.cfg.tile_m, launch.cfg.is_dq_transposed, launch.cfg.is_split) for launch in found}
    assert kinds == {(128, False, False), (64, False, False), (64, True, False), (80, True, False), (64, False, True)}
    assert {launch.params.is_rising for launch in found} == {0, 1}
    assert sum(launch.params.sums.num_slots < launch.sums.units for launch in found) > 20
    assert sum(launch.params.num_behind < launch.num_tiles for launch in found) > 30
    orders = "some are left out", "more sequences than lanes", "some later", "not few"
    for is_split, flags in ((False, (False, True)), (True, (False,))):
        kinds = {of_order(launch) for launch in found if launch.cfg.is_varlen and launch.cfg.is_split == is_split}
        assert kinds >= set(product(("packed", "seqused"), orders, flags))


def of_order(launch: Launch) -> tuple[str, str, bool]:
    """(lengths, whether the launch has a list that leaves out some places, or why it has none, is_deterministic)"""
    order, case = "", launch.case
    if launch.num_left_out():
        order = "some are left out"
    elif launch.params.num_behind < launch.num_tiles:
        order = "some later"
    elif len(case.keys) > 32:
        order = "more sequences than lanes"
    elif launch.order is launch.params:
        order = "not few"
    return case.lengths, order, case.is_deterministic
