"""What leaves at the end of a tile of keys, where warpgroups have roles: consumers and the watch role go the same way,
and every key of dV and dK is stored once. No GPU: the device's own code of both runs on Python ints
(backward_order.py).
"""

from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("cutlass")

from backward_order import Case, Launch, python_roles, write_as_python

from fa3_cute.kernels.backward import split_consume, watch
from fa3_cute.kernels.backward.duties import no_duty
from fa3_cute.kernels.backward.shares import Shares
from fa3_cute.kernels.backward.split import BLOCKS_OF_DV


@pytest.fixture(scope="module", autouse=True)
def device():
    """The roles' code as Python: what the watch role sends and frees. It tells nobody of parts of tiles."""
    for warp in python_roles():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watch, "cute", SimpleNamespace(arch=warp))
            patch.setattr(Shares, "tell", lambda self, tile: None)
            yield warp


class Leaving:
    """A warpgroup's Outgoing, and its wait for places that are free. way: "free" where it waits, and (place, {block:
    (gradient, rows)}) where it tells of its parts in a place."""

    def __init__(self):
        """Before anything has left."""
        self.way, self.written = [], []

    def write(self, mma, half, part, place: int, block: int, is_transposed: bool):
        """half: of which gradient, and which."""
        self.written.append((place, block, half))

    def tell(self, place: int):
        """Of what is written there since."""
        assert all(at == place for at, *_ in self.written)
        self.way.append((place, {}))

    def store_rest(self, part, place: int, gradient: str, rows, block: int):
        """Also of whole parts: rows say where they belong."""
        half = ("dv", "dk").index(gradient), rows.block % 2
        assert (place, block, half) == self.written.pop(0) and self.way[-1][0] == place
        self.way[-1][1][block] = gradient, rows


def way_of(launch: Launch, role: int, tile) -> list:
    """Of a warpgroup, at the end of the tile."""
    out, nothing = Leaving(), lambda *_: None
    finisher = SimpleNamespace(start=nothing, read=nothing, after=nothing)
    stand_ins = {"Outgoing": lambda *_: out, "wait_until_free": lambda cfg: out.way.append("free"), "Int32": int}
    stand_ins |= {"make_finisher": lambda *_: finisher, "read_tile": lambda slot, kind: slot}
    stand_ins |= {"rounded": lambda acc, _: acc, "half_of": lambda which, half: (which, half)}
    stand_ins |= dict.fromkeys(("finish_all", "wait_for_sums", "share_sums", "key_part"), nothing)
    stand_ins |= {"cute": SimpleNamespace(size=lambda _: 0), "unhoisted": lambda thread: thread}
    stand_ins |= {"cutlass": SimpleNamespace(range_constexpr=range)}
    columns = SimpleNamespace(cfg=launch.cfg, role=role, tidx=0, mmas=SimpleNamespace(dkv_part=None, dq_part=None))
    columns.accs_dV, columns.acc_dK, columns.wait_for_dQ_places = [0] * len(BLOCKS_OF_DV[role]), 1, nothing
    smem = SimpleNamespace(sTiles={(None, 0): tile}, sDuties={(None, 0): no_duty()})
    with pytest.MonkeyPatch.context() as patch:
        write_as_python(patch, split_consume, stand_ins)
        split_consume.leave(columns, launch.params, smem, 0, 0)
    assert not out.written
    return out.way


def way_of_all(launch: Launch, tile) -> list:
    """As one of all warpgroups, whose waits are the same: (place, [(gradient, rows) of each part])."""
    ways = [way_of(launch, role, tile) for role in range(launch.cfg.num_consumer_wgs)]
    found = []
    for steps in zip(*ways, strict=True):
        if "free" in steps:
            assert set(steps) == {"free"}
            found.append("free")
            continue
        assert len({place for place, _ in steps}) == 1
        parts = Counter(block for _, own in steps for block in own)
        assert parts == Counter(range(launch.cfg.num_consumer_wgs)), "a part that no warpgroup or more than one leaves"
        of_block = {block: part for _, own in steps for block, part in own.items()}
        found.append((steps[0][0], [of_block[w] for w in sorted(of_block)]))
    return found


def way_of_watch(device, launch: Launch, tile) -> list:
    """The watch role's."""
    device.sent.clear()
    watch.send_gradients(launch.cfg, launch.params, None, tile)
    together = lambda place, gradient, all_rows: (place, [(gradient, rows) for rows in all_rows])
    return [step if step == "free" else together(*step) for step in device.sent]


CASES = (
    Case((200, 0, 64, 7, 100), (96, 48, 49, 0, 193), "packed", head_dim=192, group=1),
    Case((5, 5, 64, 7), (95, 144, 145, 1), "seqused", head_dim=192, num_heads_k=3, group=1),
    Case((300,) * 2, (500,) * 2, head_dim=192, num_heads_k=3, group=1),
    Case((300,) * 2, (130,) * 2, head_dim=192, group=2),
)
SHORT, WHOLE = 2, 6  # steps of a tile that leaves its first half alone, and of one that leaves both


def steps_of_all(device, case: Case) -> Counter:
    """{(steps of a tile, has more keys than half): tiles}, of which all roles go the same way."""
    launch = Launch(case)
    found, stored, half = Counter(), Counter(), launch.cfg.tile_n // 2
    given = [device.run(launch.cfg, launch.params, index) for index in range(launch.num_places)]
    for tile in [tile for both in given for tile, _ in both if tile.seqlen_k]:
        way = way_of_all(launch, tile)
        assert way == way_of_watch(device, launch, tile), "they go other ways"
        found[len(way), tile.seqlen_k - tile.n_block * 2 * half > half] += 1
        for gradient, rows in [part for step in way if step != "free" for part in step[1]]:
            used = range(rows.block * half, rows.block * half + min(rows.used, half))
            stored.update((gradient, rows.batch, rows.offset, rows.head, rows.column_block, row) for row in used)
    assert set(stored.values()) == {1}, "keys that are stored twice"
    assert len(stored) == 2 * sum(case.keys) * case.num_heads_k * launch.cfg.num_consumer_wgs, "not all keys"
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_consumers_and_the_watch_role_go_the_same_way(device, case):
    """Half a tile's keys or fewer in two steps, where lengths are on the device."""
    found = steps_of_all(device, case)
    shown = {(SHORT, False), (WHOLE, True)} if case.lengths != "dense" else {(WHOLE, False), (WHOLE, True)}
    assert set(found) == shown


@pytest.mark.parametrize("case", [case for case in CASES if case.lengths != "dense"], ids=str)
@pytest.mark.parametrize("module", [split_consume, watch], ids=["consumers", "watch"])
def test_one_of_them_that_leaves_both_halves_of_all_is_found(device, case, module, monkeypatch):
    monkeypatch.setattr(module, "has_second_half", lambda cfg, tile: tile.seqlen_k > 0)
    with pytest.raises(AssertionError, match="other ways"):
        steps_of_all(device, case)


@pytest.mark.parametrize("more", [-1, 1])
def test_halves_of_another_length_are_found(device, more, monkeypatch):
    """Of a key more some keys are not stored, of a key fewer some tiles take more steps."""
    half = lambda cfg, tile: tile.seqlen_k > tile.n_block * cfg.tile_n + cfg.tile_n // 2 + more
    for module in (split_consume, watch):
        monkeypatch.setattr(module, "has_second_half", half)
    if more > 0:
        with pytest.raises(AssertionError, match="not all keys"):
            steps_of_all(device, CASES[0])
    else:
        assert (WHOLE, False) in steps_of_all(device, CASES[0])


def test_the_cases_have_shared_tiles(device):
    assert {bool(Launch(case).shares.num_parts) for case in CASES if case.lengths == "dense"} == {False, True}
