"""The order of launches of few sequences (kernels/backward/listed.py): the device's own code, run by 32 lanes
(backward_lanes.py), against brute force and against the stand-ins by which the roles' model goes. No GPU.
"""

from collections import Counter
from dataclasses import replace
from itertools import product
from random import Random

import pytest

pytest.importorskip("cutlass")

from backward_lanes import located, orders_of, python_lanes
from backward_order import Case, Launch, find, python_roles

from fa3_cute.kernels.backward import listed, schedule


@pytest.fixture(scope="module", autouse=True)
def device():
    """The roles' code as Python."""
    yield from python_roles()


@pytest.fixture
def lanes(device):
    """Who run it."""
    yield from python_lanes()


def random_case(batch: int, lengths: str, num_heads_k: int = 2) -> Case:
    """Of few different lengths, so that some are the same; of which some are 0."""
    draw = Random(batch)
    of = [draw.choice((0, 1, 130, 300)) for _ in range(3)], [draw.choice((0, 1, 128, 129, 500)) for _ in range(4)]
    queries, keys = ([draw.choice((0, *some)) for _ in range(batch)] for some in of)
    return Case((max(queries[0], 5), *queries[1:]), tuple(keys), lengths, num_heads_k=num_heads_k, group=1)


CASES = [
    random_case(batch, lengths, 1 + (batch < 24)) for batch, lengths in product(range(1, 33), ("packed", "seqused"))
]
CASES += [
    Case((300,) * 32, (128,) * 32, "packed"),
    Case((1, 2, 3), (500, 0, 128), "seqused", head_dim=96, num_heads_k=1),
    Case((5, 0, 5), (0,) * 3, "packed", head_dim=192),
    Case((0,) * 31 + (9,), (0,) * 31 + (97,), "seqused", head_dim=192),
]


def by_brute_force(launch: Launch) -> list[tuple[int, int, int]]:
    """(block, head, sequence) in the order: those of a sequence of no keys are one, which has none."""
    case, tile_n, heads = launch.case, launch.cfg.tile_n, range(launch.case.num_heads_k)
    found = []
    for seqlen_q in sorted(set(case.queries), reverse=True):
        for sequence in [i for i, queries in enumerate(case.queries) if queries == seqlen_q]:
            first_keys = range(0, max(case.keys[sequence], 1), tile_n)
            found += [(key // tile_n, head, sequence) for key, head in product(first_keys, heads)]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_list_has_what_there_is_the_longest_first(lanes, case):
    """Each block of each head once, and as many places, also for duties; the roles' model goes by the same list."""
    launch = Launch(case)
    wanted, orders = by_brute_force(launch), orders_of(lanes, launch)
    assert len(set(wanted)) == len(wanted)
    assert {order.num_behind for order in orders} == {len(wanted)} == {launch.order.num_behind}
    assert {order.k_blocks.num_blocks * case.num_heads_k for order in orders} == {len(wanted)}
    assert [located(lanes, orders, index) for index in range(len(wanted))] == wanted
    heads = case.num_heads_k
    assert [launch.order.k_blocks.locate(index, heads, False) for index in range(len(wanted))] == wanted


UNLISTED = (
    random_case(33, "packed", 1),
    random_case(33, "seqused", 1),
    random_case(100, "packed"),
    random_case(9, "packed", 7),  # not all units are under way
    random_case(32, "seqused", 9),
    Case((0, 0, 0), (100, 0, 300), "packed"),  # nor is one, of no queries
    Case((300,) * 27, (500,) * 27, "seqused"),  # not few
)


@pytest.mark.parametrize("case", UNLISTED, ids=str)
def test_launches_without_a_list_have_all_places(lanes, case):
    """One head after the other, blocks as they lie: the last sequence that starts at or before one."""
    launch = Launch(case)
    params, num_blocks = launch.params, launch.params.k_blocks.num_blocks
    assert launch.order is params
    orders = orders_of(lanes, launch)
    assert {(of.num_behind, of.k_blocks.num_blocks) for of in orders} == {(params.num_behind, num_blocks)}
    for index in range(0, num_blocks * case.num_heads_k, 3):
        sequence = find(params.k_blocks, index % num_blocks)
        block = index % num_blocks - params.k_blocks.first(sequence)
        assert located(lanes, orders, index) == (block, index // num_blocks, sequence)


def test_lengths_that_are_not_valid_make_no_more_places(lanes):
    """Of more keys than tensors have: counts would not come to the launch's places, and duties wait forever."""
    launch = Launch(Case((300, 7), (500, 129), "seqused"))
    params = launch.params
    params.sequences = replace(params.sequences, seqused_k=(5000, 7000))
    orders, num_blocks = orders_of(lanes, launch), params.k_blocks.num_blocks
    assert {order.k_blocks.num_blocks for order in orders} == {num_blocks}
    assert len({located(lanes, orders, index) for index in range(2 * num_blocks)}) == 2 * num_blocks


@pytest.mark.parametrize("case", [CASES[0], CASES[13], CASES[63], UNLISTED[0]], ids=str)
def test_a_lane_knows_the_sequence_of_its_number(lanes, case):
    params = Launch(case).params
    both = [*zip(case.queries, case.keys, strict=True), *[(0, 0)] * 32][:32]
    assert lanes.run(lambda: listed.lengths_of_lane(params)) == both


@pytest.mark.parametrize("num_heads_k", [1, 2, 31, 32, 33, 70])
def test_places_that_are_left_out_are_counted_once_for_each_unit(lanes, num_heads_k):
    launch = Launch(Case((300, 7), (500, 0), "seqused", num_heads_k=2))
    params, order = launch.params, launch.order
    params.sums.progress.shape = 2, num_heads_k
    left_out = params.k_blocks.num_blocks - order.k_blocks.num_blocks
    assert left_out == 5
    lanes.run(lambda: schedule.count_left_out(launch.cfg, params, order))
    assert lanes.counts == Counter({(0, unit): left_out * launch.cfg.num_reducers for unit in range(num_heads_k)})
    lanes.run(lambda: schedule.count_left_out(launch.cfg, params, params))
    assert not lanes.counts


def no_maximum(a: int, b: int) -> int:
    """The first."""
    return a


@pytest.mark.parametrize("case", [CASES[-3], CASES[-2], CASES[-1]], ids=str)
def test_a_list_without_sequences_of_no_keys_is_found(lanes, case, monkeypatch):
    monkeypatch.setattr(listed, "maximum", no_maximum)
    with pytest.raises(AssertionError):
        test_the_list_has_what_there_is_the_longest_first(lanes, case)


def test_other_orders_are_found(lanes, monkeypatch):
    """Of lengths that are another lane's, and of keys in the place of queries."""
    of_lane = listed.lengths_of_lane
    for wrong in (lambda params: of_lane(params)[::-1], lambda params: (0, of_lane(params)[1])):
        monkeypatch.setattr(listed, "lengths_of_lane", wrong)
        with pytest.raises(AssertionError):
            test_the_list_has_what_there_is_the_longest_first(lanes, CASES[-3])


def test_lanes_that_part_are_found(lanes):
    """Some exchange what others do not wait for."""
    with pytest.raises(AssertionError, match="part"):
        lanes.run(lambda: lanes.lane and lanes.shuffle_sync(1, 0))
    with pytest.raises(AssertionError, match="part"):
        lanes.run(lambda: lanes.shuffle_sync(1, 0) if lanes.lane else lanes.vote_ballot_sync(True))


def test_the_cases_have_all_kinds(lanes):
    """Sequences of the same length, and of no keys or queries; places that are left out."""
    found = [Launch(case) for case in CASES]
    assert {len(case.keys) for case in CASES} == set(range(1, 33))
    assert all(launch.order is not launch.params for launch in found)
    for lengths in ("packed", "seqused"):
        own = [case for case in CASES if case.lengths == lengths]
        assert sum(0 in case.queries for case in own) > 10 and sum(0 in case.keys for case in own) > 10
        assert sum(len(set(case.queries)) < len(case.queries) for case in own) > 10
        assert sum(launch.num_left_out() > 0 for launch in found if launch.case.lengths == lengths) > 10
