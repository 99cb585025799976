"""Roles of the backward main kernel's CTAs: whatever their speeds all end, each Q tile of dQ is finished once from sums
that are whole, nothing in shared memory is overwritten before it is read, and deterministic sums are added in order.
No GPU: the roles are models (backward_roles.py), of what the device's own code schedules.
"""

from functools import partial
from itertools import product

import pytest

pytest.importorskip("cutlass")

import backward_order
from backward_order import WINDOWS, Case, Counted, Launch, python_roles
from backward_roles import NOW, Cta
from backward_split import SplitConsumer, SplitCta, run_all
from test_backward_duties import CASES

from fa3_cute.kernels.backward import duties, schedule
from fa3_cute.kernels.backward.listed import are_few


@pytest.fixture(scope="module", autouse=True)
def device():
    """The schedule role's code as Python."""
    yield from python_roles()


LENGTHS = (300, 0, 1, 128, 640, 64, 200)
# Of more units than slots of sums, which are few enough that CTAs wait for them.
MANY_UNITS = (
    Case((300,) * 12, (500,) * 12),
    Case((700,) * 9, (700,) * 9, group=3),
    Case((640,) * 10, (300,) * 10, head_dim=96, num_heads_k=1, group=3),
    Case((640,) * 10, (1000,) * 10, head_dim=96, group=1),
    Case((900,) * 8, (900,) * 8, head_dim=128, num_heads_k=3, group=1),
    Case(LENGTHS, (260, 100, 0, 129, 513, 1, 384), "packed", head_dim=96, num_heads_k=9, group=1),
    Case(LENGTHS, (260, 0, 0, 129, 513, 1, 384), "seqused", head_dim=128, num_heads_k=13, group=1),
)


def in_order(case: Case, mask: str) -> Case:
    """The case with that mask, deterministic."""
    return Case(**vars(case) | {"mask": mask, "is_deterministic": True})


def of_kernel(case: Case, mask: str) -> Case:
    """The same, if its kernel has an order."""
    return Case(**vars(case) | {"mask": mask}) if case.head_dim == 192 else in_order(case, mask)


IN_ORDER = [case for case in CASES if case.is_deterministic]
IN_ORDER += [in_order(case, mask) for case, mask in product(MANY_UNITS, WINDOWS)]
SPLIT_UNITS = (
    Case((640,) * 10, (1000,) * 10, head_dim=192, group=1),
    Case((900,) * 8, (900,) * 8, head_dim=192, num_heads_k=3, group=3),
    Case(LENGTHS, (260, 0, 0, 129, 513, 1, 384), "packed", head_dim=192, num_heads_k=13, group=1),
)
# Of which all units are under way, so that there is a list.
LISTED = (
    Case(LENGTHS, (260, 100, 0, 129, 513, 1, 384), "packed", group=1),
    Case((300, 0, 1, 128, 640), (0, 100, 260, 129, 640), "seqused", head_dim=96, num_heads_k=1, group=3),
    Case((0, 7, 200), (0, 0, 513), "seqused", head_dim=128),
)
LISTED_SPLIT = (Case(LENGTHS, (260, 100, 0, 129, 513, 1, 384), "packed", head_dim=192, group=1),)
AS_THEY_COME = [case for case in CASES if not case.is_deterministic]
AS_THEY_COME += [Case(**vars(case) | {"mask": mask}) for case, mask in product(SPLIT_UNITS, WINDOWS)]


@pytest.mark.parametrize("num_ctas", [1, 3, 40])
@pytest.mark.parametrize("case", IN_ORDER, ids=str)
def test_in_order(device, case, num_ctas):
    """To each element blocks of keys are added one after the other, the first or the last ones first."""
    grid = run_all(Launch(case), device, num_ctas)
    assert all(order in (sorted(order), sorted(order, reverse=True)) for order in grid.order.values())


@pytest.mark.parametrize("num_ctas", [1, 3, 40])
@pytest.mark.parametrize("case", AS_THEY_COME, ids=str)
def test_as_they_come(device, case, num_ctas):
    """One warp adds the parts of all warpgroups, and the watch role frees the sums."""
    run_all(Launch(case), device, num_ctas)


@pytest.mark.parametrize("num_ctas", [1, 3, 40])
@pytest.mark.parametrize("case", [case for case in CASES if case.head_dim == 128], ids=str)
def test_dq_of_its_own_q_tile(device, case, num_ctas, monkeypatch):
    """As calls with ALiBi have it at 128 columns."""
    featured = partial(backward_order.pass_config, features=frozenset({("has_alibi", True)}))
    monkeypatch.setattr(backward_order, "pass_config", featured)
    assert not (launch := Launch(case)).cfg.is_dq_behind
    run_all(launch, device, num_ctas)


def test_the_cases_have_all_kinds(device):
    """Of kernels, of directions, and of launches with fewer slots than units."""
    ordered, others = (list(map(Launch, cases)) for cases in (IN_ORDER, AS_THEY_COME))
    kinds = set(product(((128, False), (64, False), (64, True)), (False, True))) | {((80, True), False)}
    whole = [of for of in others if not of.cfg.is_split]
    for found in (ordered, whole):
        assert {((of.cfg.tile_m, of.cfg.is_dq_transposed), of.cfg.is_varlen) for of in found} == kinds
    split = [of for of in others if of.cfg.is_split]
    assert {(of.case.mask, of.cfg.is_varlen) for of in split} == set(product(WINDOWS, (False, True)))
    for found in (ordered, whole, split):
        assert {(of.cfg.is_varlen, are_few(of.params)) for of in found} == set(product((False, True), repeat=2))
        assert sum(of.params.sums.num_slots < of.sums.units for of in found) > 10
    assert {of.params.is_rising for of in ordered if of.cfg.is_varlen} == {0, 1}
    assert {of.params.is_rising for of in ordered if not of.cfg.is_varlen} == {0, 1}


class OtherParity(Cta):
    """Adds dQ in the phases in which it is not there."""

    def parity_of_dq(self, turn: int, step: int) -> int:
        """The other."""
        return super().parity_of_dq(turn, step) ^ 1


class SameFirstPass(Cta):
    """As if an even number of Q tiles had passed the CTA before each tile of keys."""

    def first_pass(self, turn: int, w: int) -> int:
        """The same in each tile of keys."""
        return w


class KeepsSums(Cta):
    """Frees no sums."""

    def free_sums(self, duty):
        """Nothing."""
        yield NOW


class FreesSumsLate(Cta):
    """When the new tile is loaded: for that it may have to wait for these sums."""

    def after_giving(self, turn: int):
        """First the load role."""
        yield self.loaded.arrive("schedule")
        yield from self.free_sums_before(turn)


class FreesSumsEarly(Cta):
    """When the next entry is given, not when all have left this one."""

    def free_sums_before(self, turn: int):
        """Without waiting."""
        yield from self.free_sums(self.tiles.content[turn % 2].duty)


class FreesPlacesEarly(Cta):
    """Those of parts that are sent and not read."""

    def set_free(self, num_left: int):
        """One more."""
        super().set_free(num_left + 1)


class FreesTwice(Cta):
    """Places before the first round of a duty without keys, which are free."""

    def is_behind(self, tile, i: int) -> bool:
        """Each round."""
        return True


class FreesSplitTwice(SplitCta, FreesTwice):
    """The same, of halves."""


class LoadsOneMore(Cta):
    """Takes the next place, where CTAs have few tiles, when a Q tile more is read than pass."""

    def tell_of_loads(self, is_only: bool):
        """As if another had passed."""
        if self.grid.has_few_tiles:
            yield self.q.emptied(self.num_loaded[1] + 2)
        self.loaded.arrive("load")


class CountsNoneLeftOut(Cta):
    """Places that the list has not are counted by nobody."""

    def found_at(self, place: int) -> list:
        """Also at the first."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(schedule, "count_left_out", lambda *_: None)
            return super().found_at(place)


class CountsLeftOutByAll(Cta):
    """By each CTA, not by the one with the first place alone."""

    def schedule(self):
        """Once more before what it does."""
        yield NOW
        schedule.count_left_out(self.cfg, self.launch.params, self.launch.order)
        yield from super().schedule()


class SendsSecondHalf(SplitCta):
    """Of all tiles."""

    def has_second_half(self, tile) -> bool:
        """Any."""
        return tile.seqlen_k > 0


class LeavesSecondHalf(SplitConsumer):
    """Of all tiles."""

    has_second_half = SendsSecondHalf.has_second_half


class LeavesMore(SplitCta):
    """Whose consumers do."""

    consumer = LeavesSecondHalf


class WaitsBeforeFreeing(Cta):
    """The schedule role frees sums when the duty behind them can be done."""

    def after_giving(self, turn: int):
        """For that a tile may wait for these sums."""
        duty = self.tiles.content[(turn - 1) % self.tiles.number].duty
        if duty.num_tiles:
            yield lambda: self.grid.counts[0, duty.unit] == self.launch.pieces_of_unit
        yield from super().after_giving(turn)


class FreesSplitPlacesEarly(SplitCta, FreesPlacesEarly):
    """The same, of halves."""


class OneSlotOfDq(SplitCta):
    """The reduce warp releases a part when it has sent it, not when it is read."""

    def empty_dq(self, slot: int, content: tuple):
        """The one after it, too."""
        super().empty_dq(slot, content)
        self.dq.empty[slot ^ 1].arrive()


class ForgetsProducts(SplitConsumer):
    """Writes P before the products role has read the one before."""

    def place_of_p(self):
        """Without waiting for it."""
        return NOW


class ForgetsLeaving(SplitConsumer):
    """Begins a tile of keys before what leaves of the last one is read."""

    def sync(self, barrier):
        """Arrives on FREE, and waits for nobody."""
        wait = super().sync(barrier)
        return NOW if barrier is self.cta.free else wait


class Hasty(SplitCta):
    """Whose consumers forget the products role."""

    consumer = ForgetsProducts


class Careless(SplitCta):
    """Whose consumers forget what leaves."""

    consumer = ForgetsLeaving


OF_OTHERS, WAITING = (AssertionError, "another part of dQ"), (TimeoutError, "waiting: ")
OF_HALVES = (AssertionError, TimeoutError), "where what leaves is not sent|were not read|waiting: "
WRONG = (
    (OtherParity, OF_OTHERS, MANY_UNITS, (1, 40)),
    (SameFirstPass, OF_OTHERS, MANY_UNITS[5:6], (1, 3, 40)),
    (KeepsSums, WAITING, MANY_UNITS[3:5], (1, 40)),
    (FreesSumsLate, WAITING, MANY_UNITS[:2] + MANY_UNITS[4:5], (40,)),
    (FreesSumsEarly, (AssertionError, "zeros where the sums were not read"), MANY_UNITS[3:], (1, 40)),
    (FreesPlacesEarly, (AssertionError, "not sent"), MANY_UNITS, (1, 40)),
    (FreesTwice, (AssertionError, "arrives twice|not sent"), MANY_UNITS, (1, 3)),
    (FreesSplitTwice, (AssertionError, "arrives twice|not sent"), SPLIT_UNITS, (1, 3)),
    (LoadsOneMore, WAITING, MANY_UNITS[2:3], (40,)),
    (WaitsBeforeFreeing, WAITING, MANY_UNITS[1:2], (40,)),
    (FreesSplitPlacesEarly, (AssertionError, "not sent"), SPLIT_UNITS, (1, 40)),
    (OneSlotOfDq, (AssertionError, "dQ where another is not added"), SPLIT_UNITS, (1, 40)),
    (Hasty, (AssertionError, "where the one before is not read"), SPLIT_UNITS, (1, 40)),
    (Careless, (AssertionError, "not sent"), SPLIT_UNITS, (1, 40)),
    (CountsNoneLeftOut, WAITING, LISTED, (1, 3, 40)),
    (CountsLeftOutByAll, WAITING, LISTED, (1, 3, 40)),
    (SendsSecondHalf, OF_HALVES, SPLIT_UNITS[2:] + LISTED_SPLIT, (1, 40)),
    (LeavesMore, OF_HALVES, SPLIT_UNITS[2:] + LISTED_SPLIT, (1, 40)),
)


@pytest.mark.parametrize("kind, found, cases, numbers", WRONG, ids=[kind.__name__ for kind, *_ in WRONG])
def test_what_is_wrong_is_found(device, kind, found, cases, numbers):
    """With every mask, in every case."""
    error, message = found
    for case, mask, num_ctas in product(cases, WINDOWS, numbers):
        with pytest.raises(error, match=message):
            run_all(Launch(of_kernel(case, mask)), device, num_ctas, kind)


@pytest.mark.parametrize("case", LISTED + LISTED_SPLIT, ids=str)
@pytest.mark.parametrize("mask", WINDOWS)
def test_a_list_without_sequences_of_no_keys_is_found(device, case, mask, monkeypatch):
    """Nobody would finish their dQ."""
    monkeypatch.setattr(backward_order, "blocks_of", lambda cfg, keys: -(-keys // cfg.tile_n))
    with pytest.raises(AssertionError, match="finished never"):
        run_all(Launch(of_kernel(case, mask)), device, 3)


def test_the_lists_leave_out_places(device):
    """Of all these; or those counts were right."""
    assert all(Launch(case).num_left_out() > 0 for case in LISTED + LISTED_SPLIT)


class WaitsForNoSlot(Cta):
    """Adds to sums of the unit before."""

    def wait_for_slot(self, entry):
        """Not at all."""
        yield NOW
        return duties.unit_of(self.cfg, self.launch.params, entry.tile.sequence, entry.tile.kv_head)


@pytest.mark.parametrize("mask, is_deterministic", list(product(WINDOWS, (False, True))))
def test_what_would_wait_forever_is_found(device, mask, is_deterministic):
    """Tiles before the duties whose slot they take, and duties before the last tile of their unit."""
    launch = Launch(Case((300,) * 30, (300,) * 30, mask=mask, is_deterministic=is_deterministic))
    params, sums = launch.params, launch.params.sums
    assert sums.num_slots < launch.sums.units
    params.sums = Counted(None, sums.progress, params.num_behind // duties.places_of_unit(launch.cfg, params))
    with pytest.raises(TimeoutError):
        run_all(launch, device, 1)
    with pytest.raises(AssertionError):  # sums of two units
        run_all(launch, device, 7, WaitsForNoSlot)
    params.sums, params.num_behind = sums, 1
    launch.num_places = launch.num_tiles + params.num_behind * launch.group
    with pytest.raises(TimeoutError):
        run_all(launch, device, 1)
