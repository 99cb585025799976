"""Sections of units, how far behind its keys a unit's dQ is finished, and whose sums have room, against brute force.

A unit's sums are whole when its last tile is added, and free when its last duty is done. Whoever waits for either must
wait for places before its own in the order: those are with CTAs that run, or done.
"""

import random
from dataclasses import replace

import pytest
from test_backward_launch import GOOD, A

from fa3_cute import AttentionMode
from fa3_cute.contract.backward_params import plain_backward
from fa3_cute.planning import sections
from fa3_cute.planning.backward_kernels import MainConfig
from fa3_cute.planning.backward_launch import BackwardShape, pass_of
from fa3_cute.planning.sections import main_sections, side_section, sums_of

MASKS = {"full": {}, "causal": {"is_causal": True}, "local": {"window_size_left": 200, "window_size_right": 0}}
LENGTHS = ("dense", "packed", "seqused")
# Sizes of small problems: as many sections as large ones have, where a wave has few CTAs and L2 has room for few rows.
SMALL = {"CTAS": 6, "MIN_TILES": 5, "L2_BYTES": 1 << 19}


def shape_of(mask="full", lengths="dense", is_deterministic=False, **sizes) -> BackwardShape:
    """Of a call like GOOD; a packed one has the rows of that many sequences together."""
    call = replace(GOOD, deterministic=is_deterministic, **MASKS[mask], **sizes)
    if lengths == "seqused":
        call = replace(call, seqused_k=A + 64)
    if lengths == "packed":
        rows = {f"total_{x}": getattr(call, f"seqlen_{x}") * call.batch_size for x in ("q", "k")}
        call = replace(call, mode=AttentionMode.VARLEN_PREFILL, cu_seqlens_q=A + 64, cu_seqlens_k=A + 128, **rows)
    return BackwardShape.of(plain_backward(call))


def units_of(shape: BackwardShape) -> tuple[int, int]:
    """(units, places of each): blocks of 128 keys; of packed sequences as many as there may be."""
    of = shape.forward
    blocks = max(-(-of.seqlen_k // 128), 1)
    if not shape.config.is_varlen:
        return of.batch_size * of.num_heads_k, blocks
    return of.num_heads_k, of.seqlen_k // 128 + of.batch_size if of.is_packed else blocks * of.batch_size


def order_of(shape: BackwardShape, heads: int) -> list[int]:
    """The unit at each place that has tiles: one after the other, or side by side in sections."""
    units, places = units_of(shape)
    cfg = shape.config
    if cfg.is_varlen or not (cfg.is_causal or cfg.is_deterministic):
        return [unit for unit in range(units) for _ in range(places)]
    starts = range(0, units, heads)
    return [unit for start in starts for _ in range(places) for unit in range(start, min(start + heads, units))]


def faults(order: list[int], num_behind: int, num_slots: int) -> list[str]:
    """Waits for a place that is not before the one that waits."""
    last_tile = {unit: place for place, unit in enumerate(order)}
    found = []
    for place, unit in enumerate(order):
        if place >= num_behind and last_tile[order[place - num_behind]] >= place:
            found.append(f"duty of {place}: tiles of unit {order[place - num_behind]} come later")
        # Behind the tiles there are duties too, at places that are before none of these.
        if unit >= num_slots and last_tile[unit - num_slots] + num_behind >= place:
            found.append(f"tile of {place}: duties of unit {unit - num_slots} come later")
    return found


def random_shapes(number: int, seed: int, most_tiles: int) -> list[BackwardShape]:
    """Of all kinds of calls whose order has not too many places."""
    draw, found = random.Random(seed), []
    while len(found) < number:
        heads_k, group = draw.choice((1, 2, 3, 8, 16)), draw.choice((1, 1, 2, 5, 8))
        shape = shape_of(
            draw.choice(list(MASKS)),
            draw.choice(LENGTHS),
            draw.random() < 0.6,
            batch_size=draw.choice((1, 2, 3, 8, 40)),
            seqlen_q=draw.choice((1, 64, 300, 1000, 2048, 4096, 16384)),
            seqlen_k=draw.choice((1, 100, 128, 129, 640, 2000, 4096, 16384)),
            num_heads=heads_k * group,
            num_heads_k=heads_k,
            head_dim=draw.choice((64, 96, 128)),
        )
        units, places = units_of(shape)
        if units * places <= most_tiles:
            found.append(shape)
    return found


def check(shape: BackwardShape):
    """What must hold whatever the numbers are."""
    cfg, of = shape.config, shape.forward
    (units, places), found = units_of(shape), main_sections(cfg, of)
    assert 1 <= found.heads <= units and 1 <= found.num_slots <= units
    assert places <= found.num_behind <= units * places and found.num_behind % places == 0
    assert found.is_rising in (0, 1) and found.is_rising <= (cfg.is_deterministic and cfg.has_directions)
    assert faults(order_of(shape, found.heads), found.num_behind, found.num_slots) == []
    # A place behind the last tile has duties of one head: nobody may count on `group` of them at once.
    order = order_of(shape, found.heads)
    assert all(unit + found.num_slots >= units for unit in order[len(order) - found.num_behind :])
    sums, group, q_blocks = sums_of(cfg, of), of.num_heads // of.num_heads_k, -(-of.seqlen_q // cfg.tile_m)
    if cfg.is_varlen:
        q_blocks = of.seqlen_q // cfg.tile_m + of.batch_size if of.is_packed else q_blocks * of.batch_size
    expected = units, q_blocks, found.num_slots, found.num_slots * q_blocks * group
    assert sums == expected


def test_nobody_waits_for_a_later_place():
    for shape in random_shapes(400, seed=1, most_tiles=10000):
        check(shape)


@pytest.mark.parametrize("seed", range(4))
def test_nobody_waits_for_a_later_place_in_many_small_sections(monkeypatch, seed):
    for name, value in SMALL.items():
        monkeypatch.setattr(sections, name, value)
    shapes = random_shapes(300, seed, most_tiles=1000)
    for shape in shapes:
        check(shape)
    some = [(main_sections(shape.config, shape.forward), *units_of(shape)) for shape in shapes]
    assert sum(found.num_slots < units and found.heads > 1 for found, units, _ in some) > 5
    assert sum(found.num_behind < units * places for found, units, places in some) > 30
    assert {found.is_rising for found, *_ in some} == {0, 1}


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_fewer_places_or_slots_are_found(mask, is_deterministic):
    """What check looks for is there to be found."""
    shape = shape_of(mask, is_deterministic=is_deterministic, batch_size=64, seqlen_q=4096, seqlen_k=4096)
    units, places = units_of(shape)
    found = main_sections(shape.config, shape.forward)
    order = order_of(shape, found.heads)
    assert found.heads > 1 and found.num_slots < units and not faults(order, found.num_behind, found.num_slots)
    assert any(fault.startswith("duty") for fault in faults(order, places - 1, units))
    as_many_as_behind = found.num_behind // places
    assert any(fault.startswith("tile") for fault in faults(order, found.num_behind, as_many_as_behind))


DENSE = {"batch_size": 16, "seqlen_q": 4096, "seqlen_k": 4096, "num_heads": 16, "num_heads_k": 16, "head_dim": 128}
LONG = DENSE | {"batch_size": 1, "seqlen_q": 16384, "seqlen_k": 16384}
SHORT = DENSE | {"batch_size": 32, "seqlen_q": 512, "seqlen_k": 512}
GROUPS = DENSE | {"batch_size": 4, "num_heads": 64, "num_heads_k": 8}
ONE_HEAD = DENSE | {"batch_size": 1, "num_heads": 32, "num_heads_k": 1}


@pytest.mark.parametrize(
    "sizes, mask, lengths, is_deterministic, expected",
    [
        # 4 units of 32 tiles are a wave: duties a section behind, and sums of three.
        (DENSE, "full", "dense", False, (4, 0, 4 * 32, 12)),
        (DENSE, "causal", "dense", False, (4, 0, 4 * 32, 12)),
        (LONG, "full", "dense", False, (1, 0, 128, 3)),
        (SHORT, "causal", "dense", False, (32, 0, 32 * 4, 96)),
        (GROUPS, "causal", "dense", False, (4, 0, 4 * 32, 12)),
        (ONE_HEAD, "full", "dense", False, (1, 0, 32, 1)),
        # Of 96 keys 171 tiles: with a mask three units fill four waves, of 86 tiles three two waves.
        (LONG | {"head_dim": 192, "num_heads": 12, "num_heads_k": 12}, "full", "dense", False, (1, 0, 171, 3)),
        (LONG | {"head_dim": 192, "num_heads": 12, "num_heads_k": 12}, "causal", "dense", False, (3, 0, 3 * 171, 9)),
        (LONG | {"head_dim": 192, "seqlen_q": 8192, "seqlen_k": 8192}, "causal", "dense", False, (3, 0, 3 * 86, 9)),
        (DENSE | {"head_dim": 192}, "causal", "dense", False, (3, 0, 3 * 43, 9)),
        # Deterministic: those of a section that shares L2 start together, others one after the other.
        (SHORT, "causal", "dense", True, (32, 1, 2 * 32 * 4, 128)),
        (DENSE, "causal", "dense", True, (4, 1, 2 * 4 * 32, 16)),
        (DENSE | {"batch_size": 1, "seqlen_q": 65536, "seqlen_k": 65536}, "causal", "dense", True, (1, 0, 512, 3)),
        (DENSE, "local", "dense", True, (8, 0, 8 * 32, 24)),
        (DENSE, "full", "dense", True, (8, 0, 8 * 32, 24)),
        (LONG, "full", "dense", True, (3, 0, 3 * 128, 9)),
        (SHORT, "full", "dense", True, (32, 0, 4 * 32 * 4, 256)),
        (GROUPS, "causal", "dense", True, (4, 0, 4 * 32, 12)),
        # A KV head of all sequences, each of which has a place more if they are packed.
        (GROUPS, "full", "seqused", False, (1, 0, 2 * 4 * 32, 5)),
        (GROUPS, "full", "packed", True, (1, 0, 4 * (4 * 32 + 4), 8)),
        (DENSE, "causal", "packed", False, (1, 0, 2 * (16 * 32 + 16), 5)),
        (ONE_HEAD, "causal", "seqused", True, (1, 1, 32, 1)),
    ],
)
def test_main_sections(sizes, mask, lengths, is_deterministic, expected):
    shape = shape_of(mask, lengths, is_deterministic, **sizes)
    assert main_sections(shape.config, shape.forward) == expected


def test_sums_of_long_problems_take_little_room():
    """Of 16 x 4096 tokens of 16 heads 12 of 256 heads' sums."""
    shape = shape_of(**DENSE)
    assert shape.config.tile_m == 80
    assert sums_of(shape.config, shape.forward) == (256, 52, 12, 12 * 52)


@pytest.mark.parametrize(
    "rows, launched, num_behind",
    [({"total_q": 700, "total_k": 0}, 2, 3 * 2), ({"total_q": 0, "total_k": 700}, 1, 0)],
)
def test_without_keys_or_queries(rows, launched, num_behind):
    """Duties write zeros to dq where there is no key. Where there is no query there are none, and no counts."""
    call = replace(GOOD, mode=AttentionMode.VARLEN_PREFILL, cu_seqlens_q=A + 64, cu_seqlens_k=A + 128, **rows)
    shape = BackwardShape.of(plain_backward(call))
    found = pass_of(shape)
    assert len(found.stages) == launched and isinstance(found.stages[-1].config, MainConfig)
    names = [name for name, kind in found.stages[-1].config.arguments if kind == "int32" and name != "num_sms"]
    told = dict(zip(names, found.stages[-1].sizes, strict=True))
    assert told["num_behind"] == num_behind and told["section"] >= 1 and told["num_sum_slots"] >= 1
    assert bool(found.workspace_bytes) == (rows["total_q"] > 0)


@pytest.mark.parametrize(
    "sizes, side, expected",
    [
        # L2 has room for 21845 rows of 192 columns: 5 heads of 4096, in equal parts 4.
        ({"batch_size": 2, "seqlen_q": 4096, "seqlen_k": 4096, "num_heads": 8, "num_heads_k": 8}, "dq", 4),
        ({"batch_size": 2, "seqlen_q": 4096, "seqlen_k": 4096, "num_heads": 8, "num_heads_k": 8}, "dk", 4),
        # Query heads of a group read the same keys, but each has tiles of its own.
        ({"batch_size": 4, "seqlen_q": 4096, "seqlen_k": 512, "num_heads": 32, "num_heads_k": 4}, "dq", 4),
        ({"batch_size": 4, "seqlen_q": 4096, "seqlen_k": 512, "num_heads": 32, "num_heads_k": 4}, "dk", 16),
        # Of few rows as many heads as give every CTA a tile, of 64 keys or of 128 queries.
        ({"batch_size": 64, "seqlen_q": 16384, "seqlen_k": 128, "num_heads": 8, "num_heads_k": 8}, "dk", 64),
        ({"batch_size": 64, "seqlen_q": 16384, "seqlen_k": 128, "num_heads": 8, "num_heads_k": 8}, "dq", 1),
        ({"batch_size": 1, "seqlen_q": 1, "seqlen_k": 1, "num_heads": 1, "num_heads_k": 1}, "dk", 1),
    ],
)
def test_side_section(sizes, side, expected):
    """Heads of the side whose rows CTAs have."""
    shape = shape_of("causal", head_dim=192, is_deterministic=True, **sizes)
    cfg = shape.config
    configs = {side.side: side for side in cfg.sides} | ({"dk": cfg.pair} if cfg.pair else {})
    assert side_section(configs[side], shape.forward) == expected
