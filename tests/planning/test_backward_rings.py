"""Rings, roles and registers of the main kernel of a backward pass are those that its roles count on."""

import pytest

from fa3_cute.planning import split
from fa3_cute.planning.backward import CONSUMER_WGS
from fa3_cute.planning.config import REGISTERS_PER_SM
from fa3_cute.planning.rings import HEAD_BYTES, WARP, WARPS_PER_WARPGROUP, by_name
from fa3_cute.planning.selections import backward_configs

WITH_SUMS = [cfg for cfg in backward_configs() if cfg.has_sums]
CONFIGS, SPLIT = ([cfg for cfg in WITH_SUMS if cfg.is_split == is_split] for is_split in (False, True))
TILE_BYTES = 48  # of an entry of the tile ring, in whole words of 16 bytes


def test_registers_are_all_that_a_cta_starts_with():
    """setmaxnreg waits for registers that are not there: what its CTA did not start with, no other warp gives back."""
    per_thread = REGISTERS_PER_SM // 384 // 8 * 8
    assert per_thread == 168
    for cfg in CONFIGS:
        producer, consumer = cfg.registers
        assert cfg.num_threads == 384 and CONSUMER_WGS == 2
        assert 128 * (producer + CONSUMER_WGS * consumer) == cfg.num_threads * per_thread
        assert {role.registers for role in cfg.roles if role.name != "consume"} == {producer}


def test_registers_of_roles():
    """Likewise; the queries role gives some back, too."""
    assert REGISTERS_PER_SM // 512 == 128 and len(SPLIT) > 6
    for cfg in SPLIT:
        per_warp = [role.registers for role in cfg.roles for _ in role.warps]
        assert cfg.num_threads == 512 and len(per_warp) == 16 and sum(per_warp) == 16 * 128
        assert [role.registers for role in cfg.roles] == [split.REGISTERS[0]] * 4 + list(split.REGISTERS[1:])


@pytest.mark.parametrize("cfg", WITH_SUMS, ids=lambda cfg: cfg.name)
def test_the_tile_ring_is_of_all_roles(cfg):
    """Filled by every lane of the warp that schedules; each other warp copies an entry and gives it back."""
    ring, roles = by_name(cfg.rings)["tiles"], by_name(cfg.roles)
    assert len(roles["schedule"].warps) == 1
    readers = [warp for name, role in roles.items() if name != "schedule" for warp in role.warps]
    assert (ring.full, ring.empty) == (WARP, len(readers)) and len(readers) == len(set(readers))
    assert len(readers) == 3 + WARPS_PER_WARPGROUP * cfg.num_consumer_wgs
    assert ring.slots == 2, "one is read while the next tile is found"


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.name)
def test_rings_that_turn_together(cfg):
    """One count of Q tiles places all of them, in two slots each; dQ has one of each warpgroup."""
    ring = by_name(cfg.rings)
    consumers = len(by_name(cfg.roles)["consume"].warps)
    assert {name: ring[name].slots for name in ("q", "do", "ds")} == dict.fromkeys(("q", "do", "ds"), 2)
    readers = consumers // CONSUMER_WGS if cfg.is_dq_in_turns else consumers
    assert (ring["ds"].full, ring["ds"].empty) == (consumers, readers)
    assert {ring[name].empty for name in ("k", "v", "q", "do")} == {consumers}
    assert (ring["dq"].slots, ring["dq"].full, ring["dq"].empty) == (CONSUMER_WGS, consumers // CONSUMER_WGS, 1)


@pytest.mark.parametrize("cfg", SPLIT, ids=lambda cfg: cfg.name)
def test_rings_of_roles(cfg):
    """Who reads P and dS and has not written it; Q and dO have two slots, as dQ has of 64 columns each."""
    ring, wg = by_name(cfg.rings), WARPS_PER_WARPGROUP
    slots = {name: ring[name].slots for name in ("k", "v", "q", "do", "p", "ds", "dq")}
    assert slots == {"k": 1, "v": 1, "q": 2, "do": 2, "p": 1, "ds": 1, "dq": 2}
    assert {name: ring[name].empty for name in ("k", "v", "q")} == dict.fromkeys(("k", "v", "q"), 3 * wg)
    assert {name: ring[name].empty for name in ("do", "p", "ds", "dq")} == {
        "do": 2 * wg,
        "p": 2 * wg,
        "ds": 2 * wg,
        "dq": 1,
    }
    assert {ring[name].full for name in ("p", "ds", "dq")} == {wg}
    assert ring["dq"].slot_bytes == 4 * 64 * cfg.tile_m and cfg.num_dq_wgs * 64 == cfg.head_dim


@pytest.mark.parametrize("cfg", WITH_SUMS, ids=lambda cfg: cfg.name)
def test_what_lies_over_something_else_fits(cfg):
    """dK and dV leave through the slots of dS; mbarriers and entries of tiles lie before the first slot."""
    ring = by_name(cfg.rings)
    if cfg.is_split:  # half the keys at a time, or dQ, over P and dS, and over dQ
        of_part = 64 * max(cfg.tile_n // 2, cfg.tile_m) * 2 * cfg.num_consumer_wgs
        assert of_part <= min(ring["p"].nbytes + ring["ds"].nbytes, ring["dq"].nbytes)
        assert ring["p"].nbytes % 1024 == 0, "one lies behind the other"
    else:
        assert cfg.tile_n * cfg.head_dim * 2 <= ring["ds"].nbytes
    barriers = sum(2 * 8 * own.slots for own in cfg.rings if own.full)
    assert barriers + ring["tiles"].slots * TILE_BYTES <= HEAD_BYTES
