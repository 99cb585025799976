"""Tiles of keys that CTAs share: every Q tile passes each of them once, what parts leave is added once by the part that
stores, and nobody waits for a place behind its own. No GPU: models of the roles run (backward_roles.py), of what
the device's own code schedules.
"""

import random
from itertools import product
from types import SimpleNamespace

import pytest

pytest.importorskip("cutlass")

from backward_order import Case, Launch, python_roles
from backward_split import run_all

from fa3_cute.kernels.backward.shares import QUADS_AT_ONCE, STORES
from fa3_cute.kernels.backward.workspace import QUAD
from fa3_cute.planning import sections
from fa3_cute.planning.backward import BackwardConfig
from fa3_cute.planning.backward_kernels import pass_config
from fa3_cute.planning.sections import floats_of_shares, shares_of


@pytest.fixture(scope="module", autouse=True)
def device():
    """The roles' code as Python: what it counts and sends."""
    yield from python_roles()


def random_case(draw: random.Random) -> Case:
    """Of few tiles, which do not come out even."""
    batch, head_dim = draw.randint(1, 4), draw.choice((64, 96, 128, 192))
    queries, keys = draw.randint(1, 1500), draw.randint(1, 900)
    heads = {"num_heads_k": draw.randint(1, 4), "group": draw.choice((1, 1, 2, 3))}
    return Case((queries,) * batch, (keys,) * batch, head_dim=head_dim, **heads)


CASES = [random_case(random.Random(seed)) for seed in range(60)]


@pytest.mark.parametrize("num_ctas", [1, 4, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_q_tile_passes_every_tile_of_keys_once(device, case, num_ctas):
    """And a warpgroup stores its keys once others' sums are there."""
    grid = run_all(launch := Launch(case), device, num_ctas)
    q_tiles, blocks = -(-case.queries[0] // launch.cfg.tile_m), range(-(-case.keys[0] // launch.cfg.tile_n))
    warpgroups = range(launch.cfg.num_consumer_wgs)
    assert set(grid.stored) == set(product(range(len(case.keys)), blocks, range(case.num_heads_k), warpgroups))
    assert all(sorted(passed) == list(range(q_tiles)) for passed in grid.stored.values()) and not grid.parts


def test_parts_are_of_equal_length(device):
    """But for whole Q tiles; one more or less for each of two tiles."""
    for case in CASES:
        launch = Launch(case)
        if not launch.shares.num_parts:
            continue
        q_tiles = -(-case.queries[0] // launch.cfg.tile_m)
        first = launch.num_tiles - launch.shares.num_shared
        lengths = []
        for index in range(first, first + launch.shares.num_parts):
            tiles = [tile for tile, _ in device.run(launch.cfg, launch.params, index)]
            assert len(tiles) in (1, 2) and [tile.part for tile in tiles[:-1]] == [index - first] * (len(tiles) - 1)
            lengths.append(sum(tile.end - tile.begin for tile in tiles))
        expected = launch.shares.num_shared * q_tiles / launch.shares.num_parts
        assert all(abs(length - expected) < 2 for length in lengths)


def test_the_cases_have_all_kinds_of_parts(device):
    kinds = set()
    for launch in map(Launch, CASES):
        for index in range(launch.num_tiles - launch.shares.num_shared, launch.num_places):
            for tile, _ in device.run(launch.cfg, launch.params, index):
                kinds.add((tile.part == STORES, min(tile.end_part - tile.first_part, 2), tile.begin > 0))
    # Those that leave: the first and a middle part; those that store: whole tiles, the last of two and of more.
    assert kinds >= {(False, 0, False), (False, 0, True), (True, 0, False), (True, 1, True), (True, 2, True)}


def test_a_part_that_computed_the_end_of_a_tile_first_would_wait_for_longer(device):
    """The start of the next tile comes first: others have what it leaves before its CTA waits."""
    launch = Launch(Case((700,) * 2, (500,) * 2, num_heads_k=2, group=1))
    first, seconds = launch.num_tiles - launch.shares.num_shared, 0
    for index in range(first, first + launch.shares.num_parts):
        tiles = [tile for tile, _ in device.run(launch.cfg, launch.params, index)]
        assert all(tile.part != STORES and tile.begin == 0 for tile in tiles[:-1])
        seconds += len(tiles) - 1
    assert seconds > 0


def of(num_heads=16, batch_size=1, queries=16384, keys=16384, group=1) -> SimpleNamespace:
    """Sizes of a problem."""
    sizes = {"num_heads": num_heads, "num_heads_k": num_heads // group, "seqlen_q": queries, "seqlen_k": keys}
    return SimpleNamespace(batch_size=batch_size, is_packed=False, **sizes)


def config(head_dim=128, mask="full", is_varlen=False, is_deterministic=False) -> BackwardConfig:
    return pass_config("bf16", head_dim, mask, is_varlen, is_deterministic)


@pytest.mark.parametrize(
    "cfg, sizes, expected",
    [
        (config(), of(), (68, 132)),  # 2048 tiles: 15 for each of 132 CTAs, and 68
        (config(64), of(32), (4, 32)),  # 4096: 31, and 4, of 8 parts at most
        (config(64), of(32, 4, 4096, 4096), (4, 32)),
        (config(64), of(32, 8, 2048, 2048), (4, 16)),  # of 16 Q tiles, 4 at least in a part
        (config(64), of(32, 32, 512, 512), (0, 0)),  # of 4 a part would save nothing
        (config(128), of(4, 1, 2048, 2048), (64, 104)),  # less than one for each; counts of 4 heads of 26 Q tiles
        (config(128), of(132, 1, 2048, 128), (0, 0)),  # one for each
        (config(128), of(64, 4, 4096, 4096, group=8), (100, 132)),
        (config(128), of(131, 1, 16384, 128), (0, 0)),  # all but one
        (config(128, "causal"), of(), (0, 0)),
        (config(128, is_deterministic=True), of(), (0, 0)),
        (config(128, is_varlen=True), of(), (0, 0)),
        (config(128), of(queries=0), (0, 0)),
        (config(128), of(keys=0), (0, 0)),
        (config(128), of(queries=1 << 24), (0, 0)),
    ],
)
def test_shares_of(monkeypatch, cfg, sizes, expected):
    for name, value in {"CTAS": 132, "LEAST_STEPS": 4, "SHARING_STEPS": 4}.items():
        monkeypatch.setattr(sections, name, value)
    assert shares_of(cfg, sizes) == expected
    num_left = max(expected[1] - 1, 0)  # the last part leaves nothing
    assert floats_of_shares(cfg, sizes) == num_left * 2 * 128 * cfg.head_dim


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_sums_are_added_some_at_a_time(head_dim):
    """Quads of a thread, of 128 that have 64 keys."""
    assert config(head_dim).shares_tiles and 64 * head_dim // 128 // QUAD % QUADS_AT_ONCE == 0
