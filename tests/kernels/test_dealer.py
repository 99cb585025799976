"""kernels/decode/ragged.py on Python ints: who works on what in a ragged batch, within the grid that the host planned.

The device's own code runs here, with stand-ins for what is a warp's: values that differ between its lanes are arrays
of 32, and code that branches on them runs lane by lane.
"""

from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
from cache_calls import PACKED_CACHE, PACKED_PAGED, PAGED
from device_code import as_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rule_calls import A

from fa3_cute import AttentionMode, explain
from fa3_cute.contract.plain import plain
from fa3_cute.kernels.common import ragged as batches
from fa3_cute.kernels.common.block_range import Window, block_range
from fa3_cute.kernels.common.sequences import Sequences
from fa3_cute.kernels.decode import ragged as dealing
from fa3_cute.planning.operations import operation_of
from fa3_cute.planning.problem import ProblemShape

LANES = np.arange(32)
INT32 = 1 << 31


def checked(value):
    """An integer, or 32 of them, that the device can hold."""
    assert np.all((np.asarray(value) >= -INT32) & (np.asarray(value) < INT32)), value
    return value


def lane_by_lane(function):
    """A method of scalars that returns one or several, also of values that differ between lanes."""

    def method(self, *values):
        if not any(isinstance(value, np.ndarray) for value in values):
            return function(self, *values)
        rows = [function(self, *each) for each in zip(*(np.broadcast_to(v, 32).tolist() for v in values), strict=True)]
        return tuple(np.array(rows).T) if isinstance(rows[0], tuple) else np.array(rows)

    return remembered(method)


def remembered(method):
    """What a method of a Dealer returned is not computed again: all clusters ask for the same."""
    known = {}

    def look_up(self, *values):
        key = (id(self), *(value.tobytes() if isinstance(value, np.ndarray) else value for value in flat(values)))
        if key not in known:
            if known.get("of") is not self:
                known.clear()
                known["of"] = self
            known[key] = method(self, *values)
        return known[key]

    return look_up


def flat(values):
    for value in values:
        yield from flat(value) if isinstance(value, tuple) else (value,)


class Divisor:
    """Divides; a run-time value is one of these or an int."""

    def __init__(self, divisor):
        self.divisor = divisor

    def __rdivmod__(self, dividend):
        return divmod(dividend, self.divisor)


class Warp:
    """cute.arch of one warp. `lane` is one while code runs lane by lane."""

    lane = None

    def lane_idx(self):
        return LANES if self.lane is None else self.lane

    def shuffle_sync(self, value, lane):
        return int(np.broadcast_to(value, 32)[lane])

    def vote_ballot_sync(self, votes):
        return sum(1 << int(lane) for lane in np.flatnonzero(votes))

    def popc(self, bits):
        return bits.bit_count()

    def rcp_approx(self, value):
        with np.errstate(divide="ignore"):
            return np.nextafter(np.float32(1) / value, np.float32(self.towards))

    def all_sum(self, value):
        return value if self.lane is not None else checked(int(np.sum(value)))

    def partials_before(self, method):
        """A sum over lanes: that of each lane alone."""

        def partials_before(dealer, sequence, ones, share):
            total = 0
            for self.lane in range(32):
                total += method(dealer, sequence, tuple(int(value[self.lane]) for value in ones), share)
            self.lane = None
            return checked(total)

        return remembered(partials_before)


@pytest.fixture(scope="module")
def warp():
    """The module's code, run by one warp."""
    warp = Warp()
    warp.towards = np.inf
    with pytest.MonkeyPatch.context() as patch:
        for kind in (dealing.Dealer, dealing.RaggedGrid, batches.RaggedBatch):
            for name, method in list(vars(kind).items()):
                if hasattr(method, "__wrapped__"):
                    patch.setattr(kind, name, as_python(method))
        for name in ("sequence", "clusters"):
            patch.setattr(dealing.Dealer, name, lane_by_lane(getattr(dealing.Dealer, name)))
        patch.setattr(dealing.Dealer, "partials_before", warp.partials_before(dealing.Dealer.partials_before))
        for module in (dealing, batches):
            patch.setattr(module, "Int32", int)
        patch.setattr(dealing, "Float32", np.float32)
        patch.setattr(dealing, "cute", SimpleNamespace(arch=warp))
        patch.setattr(dealing, "cutlass", SimpleNamespace(range=lambda *ends, unroll: range(*ends)))
        patch.setattr(dealing, "all_sum", warp.all_sum)
        patch.setattr(dealing, "inclusive_sum", lambda value: checked(np.cumsum(value)))
        patch.setattr(dealing, "minimum", smaller(np.minimum, min))
        patch.setattr(dealing, "maximum", smaller(np.maximum, max))
        patch.setattr(batches, "is_present", lambda array: array is not None)
        yield warp


def smaller(of_arrays, of_scalars):
    """min or max of either."""
    return lambda a, b: (of_arrays if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else of_scalars)(a, b)


# ---- a batch -------------------------------------------------------------------------------------------------------


class Batch:
    """A call, its decode launch, and lengths that are on the device: every cluster's place."""

    def __init__(self, params, queries, keys):
        assert explain(params) == [], explain(params)
        self.shape = ProblemShape.of(plain(params))
        launch = operation_of(self.shape).launches[0]
        assert launch.config.is_ragged and launch.config.packs_heads
        self.cfg, self.plan = launch.config, launch.plan
        self.window = Window(self.shape.window_left, self.shape.window_right)
        self.queries, self.keys = queries, keys

    def dealer(self):
        shape, plan = self.shape, self.plan
        arrays = Sequences(
            list(accumulate(self.queries, initial=0)) if shape.is_packed else None,
            None,
            None if shape.is_packed else list(self.queries),
            list(self.keys),
            shape.batch_size,
            shape.seqlen_q,
            shape.seqlen_k,
        )
        batch = batches.RaggedBatch(arrays, None, shape.batch_size + plan.has_padding, 0, plan.decode_queries)
        grid = dealing.RaggedGrid.create(SimpleNamespace(**plan._asdict()))
        num_groups = shape.num_heads // plan.packed_heads
        return dealing.Dealer(self.cfg, batch, grid, Divisor(plan.packed_heads), Divisor(num_groups))

    def sequences(self):
        """{sequence: (queries, keys)} of those that the decode kernel serves, padding as the last one."""
        queries, keys = list(self.queries), [min(max(n, 0), self.shape.seqlen_k) for n in self.keys]
        if self.plan.has_padding:
            queries.append(self.shape.seqlen_q - sum(queries))
            keys.append(-1)
        served = enumerate(zip(queries, keys, strict=True))
        return {i: (q, k) for i, (q, k) in served if 0 < q <= self.plan.decode_queries}

    def places(self):
        """All that have something to do."""
        dealer = self.dealer()
        with np.errstate(over="ignore"):  # no tile at all: shares of infinity, which are then limited
            found = [dealer.find(index) for index in range(self.plan.num_clusters)]
        return [place for place in found if place.num_clusters > 0]

    def num_clusters(self, queries, keys):
        """(least, most) of an item's clusters."""
        plan, cfg = self.plan, self.cfg
        tiles = min(-(-keys // cfg.tile_n), plan.most_tiles)
        if min(queries * plan.packed_heads, self.cfg.tile_m) > plan.partial_rows:
            return 1, 1
        if plan.split_tiles:
            exactly = max(1, -(-tiles // plan.split_tiles))
            return exactly, exactly
        if not plan.has_shares:
            return plan.least_clusters, plan.least_clusters
        return 1, plan.most_clusters

    def check(self):
        """Every item's clusters once, all of its tiles by one CTA each, its partial results in a place of their own."""
        cfg, plan, items = self.cfg, self.plan, {}
        for place in self.places():
            items.setdefault((place.sequence, place.group, place.m_block), []).append(place)
        sequences = self.sequences()
        num_groups = self.shape.num_heads // plan.packed_heads
        assert sorted(items) == [
            (i, group, m_block)
            for i, (queries, _) in sequences.items()
            for group in range(num_groups)
            for m_block in range(-(-queries * plan.packed_heads // cfg.tile_m))
        ]
        taken, grid, known = [], self.dealer().grid, set()
        for (sequence, _, m_block), places in items.items():
            queries, keys = sequences[sequence]
            (count,) = {place.num_clusters for place in places}
            least, most = self.num_clusters(queries, keys)
            assert least <= count <= most
            assert sorted(place.cluster for place in places) == list(range(count))
            assert {(place.seqlen_q, place.seqlen_k) for place in places} == {(queries, keys)}
            if self.shape.is_packed:
                assert {place.offset_q for place in places} == {sum(self.queries[:sequence])}
            if count > 1:
                (first,) = {place.first for place in places}
                taken.append((first, first + count))
            if (m_block, queries, keys, count) not in known:
                known.add((m_block, queries, keys, count))
                self.check_tiles(grid, m_block, queries, keys, count)
        taken.sort()
        assert all(end <= first for (_, end), (first, _) in zip(taken, taken[1:], strict=False))
        assert not taken or taken[0][0] >= 0 and taken[-1][1] <= plan.num_partials

    def check_tiles(self, grid, m_block, queries, keys, count):
        """CTAs of an item share its tiles."""
        plan = self.plan
        tiles = block_range(self.cfg, self.window, m_block, queries, keys, plan.packed_heads)
        num_ctas = count * plan.cluster_size
        parts = [grid.part(tiles, index, num_ctas) for index in range(num_ctas)]
        found = [tile for part in parts for tile in range(part.n_block_min, part.n_block_max)]
        assert found == list(range(tiles.n_block_min, tiles.n_block_max))


def call(base=PACKED_PAGED, **changes):
    """A good call, with packed queries unless base has dense ones."""
    capacity = changes.pop("capacity", 4096)
    page = {"num_pages": 1 << 16} if base.page_table else {}
    return replace(base, **{"num_heads": 8, "num_heads_k": 2, "batch_size": 4, "seqlen_k": capacity, **page, **changes})


# ---- lengths of all kinds ------------------------------------------------------------------------------------------

SPLITS = {
    "automatic": {},
    "at most 5": {"max_num_splits": 5},
    "at most 1": {"max_num_splits": 1},
    "never": {"num_splits": 1},
    "6": {"num_splits": 6},
    "32": {"num_splits": 32},
    "of 256 keys": {"fixed_split_size": 256},
}
MASKS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window_size_left": 100, "window_size_right": 0},
    "far window": {"window_size_left": 3000, "window_size_right": 500},
}
HEADS = {"gqa": (8, 2), "mqa": (5, 1), "mha": (2, 2), "one": (1, 1), "not packed": (4, 2)}


@st.composite
def ragged_batches(draw):
    """(params, queries, keys): bounds and splits, and lengths that keep to the bounds, or not to the hint."""
    batch_size = draw(st.sampled_from((1, 2, 3, 8, 31, 32, 33, 64, 100)))
    capacity = draw(st.sampled_from((16, 1024, 16384, 1 << 20)))
    masks, splits = draw(st.sampled_from(list(MASKS.values()))), draw(st.sampled_from(list(SPLITS.values())))
    if splits.get("fixed_split_size", 0) * 256 < capacity and "fixed_split_size" in splits:
        splits = {"fixed_split_size": capacity // 256}
    name = draw(st.sampled_from(list(HEADS)))
    heads, heads_k = HEADS[name]
    fields = {**masks, **splits, "num_heads": heads, "num_heads_k": heads_k, "batch_size": batch_size}
    fields |= {"pack_gqa": False} if name == "not packed" else {}
    most = draw(st.sampled_from((1, 4, 16, 70)))
    length = st.one_of(st.just(1), st.just(0), st.integers(0, most))
    queries = draw(st.lists(length, min_size=batch_size, max_size=batch_size))
    key = st.one_of(st.integers(0, 70), st.integers(0, capacity), st.just(capacity), st.just(INT32 - 1), st.just(-5))
    keys = draw(st.lists(key, min_size=batch_size, max_size=batch_size))
    base = draw(st.sampled_from((PACKED_PAGED, PACKED_CACHE)))
    hint = draw(st.sampled_from((0, most, max(1, most // 3))))
    rest = draw(st.sampled_from((0, 1, 200)))
    fields |= {"zero_padding": draw(st.booleans()), "max_seqlen_q": hint, "total_q": sum(queries) + rest}
    return call(base, capacity=capacity, **fields), queries, keys


def serves_decode(params):
    return operation_of(ProblemShape.of(plain(params))).launches[0].config.packs_heads


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(ragged_batches(), st.sampled_from((np.inf, 0)))
def test_any_lengths_within_the_bounds(warp, batch, towards):
    """The reciprocal may be off by one unit either way."""
    params, queries, keys = batch
    warp.towards = towards
    if params.total_q and serves_decode(params):
        Batch(params, queries, keys).check()


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("count", [1, 5, 33, 140])
def test_all_alike(count, splits, warp):
    """From fewer items than SMs to more, all as long as they can be, or empty."""
    params = call(batch_size=count, total_q=count, max_seqlen_q=1, **splits)
    for length in (0, 1, 700, 4096):
        Batch(params, [1] * count, [length] * count).check()


@pytest.mark.parametrize("base", [PACKED_CACHE, PACKED_PAGED])
@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS.keys())
def test_two_launches(splits, base, warp):
    """Sequences with more queries than suit the decode kernel are not its own, wherever they stand."""
    queries = [1, 300, 16, 17, 0, 1] * 6
    params = call(base, batch_size=36, total_q=sum(queries) + 70, zero_padding=True, **splits)
    if "num_splits" in splits and splits["num_splits"] > 1:
        Batch(params, queries, [4096, 0, 77] * 12).check()  # one launch serves all
        return
    batch = Batch(params, queries, [4096, 0, 77] * 12)
    assert batch.plan.decode_queries == 16 and set(batch.sequences()) == {
        i for i, n in enumerate(queries) if 0 < n < 17
    }
    batch.check()


@pytest.mark.parametrize("queries", [[5, 5, 2, 0], [70, 1, 0, 70]])
def test_dense_queries(queries, warp):
    params = call(PAGED, seqlen_q=70, seqused_q=A + 8, mode=AttentionMode.PREFILL, pack_gqa=True)
    Batch(params, queries, [4096, 1, 2000, 0]).check()


# ---- the sense of it -----------------------------------------------------------------------------------------------


def pieces(batch):
    """K/V tiles of every CTA that has some."""
    size = batch.plan.cluster_size
    return [-(-place.seqlen_k // batch.cfg.tile_n) / (place.num_clusters * size) for place in batch.places()] * size


@pytest.mark.parametrize("where", [0, 31, 32, 63])
def test_a_long_sequence_among_short_ones_is_shared(where, warp):
    """1 x 128k beside 63 x 1k: no piece is much longer than the mean of what runs at once."""
    keys = [1024] * 64
    keys[where] = 1 << 17
    params = call(batch_size=64, total_q=64, max_seqlen_q=1, num_heads=32, num_heads_k=8, capacity=1 << 17)
    batch = Batch(params, [1] * 64, keys)
    batch.check()
    each = pieces(batch)
    slots = 132 * batch.cfg.ctas_per_sm
    assert max(each) <= 2 * max(sum(each) / slots, 1024 / batch.cfg.tile_n)


def test_many_that_are_alike_are_not_shared(warp):
    params = call(batch_size=300, total_q=300, max_seqlen_q=1, num_heads=32, num_heads_k=8)
    batch = Batch(params, [1] * 300, [4096] * 300)
    assert {place.num_clusters for place in batch.places()} == {1}


@pytest.mark.parametrize("count", [1, 4, 8])
def test_few_run_at_once(count, warp):
    """Each has its share of the whole device."""
    params = call(batch_size=count, total_q=count, max_seqlen_q=1, num_heads=8, num_heads_k=1, capacity=1 << 17)
    batch = Batch(params, [1] * count, [1 << 17] * count)
    ctas = len(batch.places()) * batch.plan.cluster_size
    assert 0.8 * 132 <= ctas <= 132 * batch.cfg.ctas_per_sm


def test_a_fixed_split_depends_on_the_sequence_alone(warp):
    """Its clusters are the same alone and in any company."""
    lengths = [4096, 0, 257, 256, 1]
    together = Batch(call(batch_size=5, total_q=5, max_seqlen_q=1, fixed_split_size=256), [1] * 5, lengths).places()
    for i, length in enumerate(lengths):
        lone = Batch(call(batch_size=1, total_q=1, max_seqlen_q=1, fixed_split_size=256), [1], [length]).places()
        assert {p.num_clusters for p in lone} == {p.num_clusters for p in together if p.sequence == i}
        assert {p.num_clusters for p in lone} == {max(1, -(-length // 256))}


def test_a_grid_that_is_too_small_is_found(warp):
    batch = Batch(call(batch_size=3, total_q=3, max_seqlen_q=1, num_splits=6), [1] * 3, [4096] * 3)
    batch.check()
    batch.plan = batch.plan._replace(num_clusters=batch.plan.num_clusters - 1)
    with pytest.raises(AssertionError):
        batch.check()
