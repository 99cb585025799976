"""What the kernels' contract says of the backward main kernel whose warpgroups have roles: these, rings, shared memory,
and what leaves."""

import re

import pytest
from documents import CONTRACT
from test_docs_backward import ROLES, rings

from fa3_cute.planning.backward_kernels import pass_config
from fa3_cute.planning.backward_tables import TABLE
from fa3_cute.planning.rings import by_name

CONFIGS = [pass_config("bf16", *row, False, False) for row in TABLE if TABLE[row].is_split]

every_config = pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.name)


def contract() -> str:
    return CONTRACT.read_text().partition(ROLES)[2].partition("\n## ")[0]


def test_the_section_is_its_own_and_there_are_such_configs():
    assert CONFIGS and CONTRACT.read_text().count(ROLES) == 1
    assert "\n### " not in contract()  # it is the last of the main kernel's


# ---- roles -----------------------------------------------------------------------------------------------------------


def roles_in(text: str) -> list[tuple[str, int, int, int]]:
    """(role, first warp, last warp, registers) of the table."""
    rows = re.findall(r"^\| (\w+) \| (\d+) \.\. (\d+) \| (\d+) \| [^|]+ \|$", text, re.MULTILINE)
    return [(name, *map(int, numbers)) for name, *numbers in rows]


def roles(cfg) -> list[tuple[str, int, int, int]]:
    """Of the consumers: all but those of the producer warpgroup."""
    return [(role.name, role.warps[0], role.warps[-1], role.registers) for role in cfg.roles if role.warps[0] >= 4]


def sum_of_registers(cfg) -> str:
    """Of a thread of each warpgroup, as the contract has it."""
    numbers = [cfg.registers[0], *(role[-1] for role in roles(cfg))]
    threads, at_launch = cfg.num_threads, 65536 // cfg.num_threads
    assert sum(numbers) == len(numbers) * at_launch and len(numbers) * 128 == threads
    return f"{' + '.join(map(str, numbers))} = {len(numbers)} * {at_launch}, what the {threads} threads start with"


@every_config
def test_the_table_of_roles_is_the_config(cfg):
    assert roles_in(contract()) == roles(cfg)
    assert sum_of_registers(cfg) in contract()


@pytest.mark.parametrize(
    "old, new",
    [("| queries | 12", "| query | 12"), ("| 8 .. 11 |", "| 8 .. 12 |"), ("| 176 |", "| 168 |"), ("| scores |", "| |")],
)
def test_a_wrong_table_of_roles_is_found(old, new):
    assert old in contract() and roles_in(contract().replace(old, new)) != roles(CONFIGS[0])


# ---- rings -----------------------------------------------------------------------------------------------------------


def rings_in(text: str, cfg) -> list[tuple[str, int, int, int]]:
    """(ring, slots, full, empty) of the table."""
    value = lambda word: int(word) if word.isdigit() else getattr(cfg, word)
    rows = re.findall(r"^\| (\w+) \| (\w+) \| [^|]*\((\d+)\)[^|]*\| [^|]*\((\d+)\) \| [^|]+ \|$", text, re.MULTILINE)
    return [(name, *map(value, counts)) for name, *counts in rows]


@every_config
def test_the_table_of_rings_is_the_config(cfg):
    assert rings_in(contract(), cfg) == rings(cfg)


@pytest.mark.parametrize(
    "old, new",
    [
        ("| p | 1 |", "| p | 2 |"),
        ("products (8) |", "products (12) |"),
        ("scores (4), after", "scores (1), after"),
        ("| ds |", "| dS |"),
        ("(15)", "(11)"),
        ("| dq | 2 |", "| dq | 3 |"),
        ("reduce warp (1)", "reduce warp (32)"),
    ],
)
def test_a_wrong_table_of_rings_is_found(old, new):
    assert old in contract() and rings_in(contract().replace(old, new), CONFIGS[0]) != rings(CONFIGS[0])


# ---- shared memory, and what leaves from it --------------------------------------------------------------------------


def memory_in(text: str) -> set[tuple[str, ...]]:
    rows = re.findall(r"^\| (\d+) \| ([a-z, ]+) \| (\d+x\d+)" + r" \| ([\dx ]+)" * 7 + r" \|$", text, re.MULTILINE)
    return {(head_dim, mask, *rest) for head_dim, masks, *rest in rows for mask in masks.split(", ")}


def memory() -> set[tuple[str, ...]]:
    """(head_dim, mask, tile, K or V, Q or dO, P, dS, dQ, shift or delta, all) of every config."""
    found = set()
    for cfg in CONFIGS:
        ring = by_name(cfg.rings)
        assert [ring[a][1:3] == ring[b][1:3] for a, b in (("k", "v"), ("q", "do"), ("shift", "delta"))] == [True] * 3
        shown = [ring[name] for name in ("k", "q", "p", "ds", "dq", "shift")]
        sizes = [f"{a.slots} x {a.slot_bytes}".removeprefix("1 x ") for a in shown]
        found.add((str(cfg.head_dim), cfg.mask, f"{cfg.tile_m}x{cfg.tile_n}", *sizes, str(cfg.smem_bytes)))
    return found


def test_the_table_of_shared_memory_is_the_configs():
    assert memory_in(contract()) == memory()


@pytest.mark.parametrize(
    "old, new",
    [
        ("| 231424 |", "| 231425 |"),
        ("| full, causal, local | 64x96", "| full, causal | 64x96"),
        ("| 12288 | 12288 |", "| 12288 | 2 x 12288 |"),
        ("2 x 24576", "24576"),
    ],
)
def test_a_wrong_table_of_shared_memory_is_found(old, new):
    assert old in contract() and memory_in(contract().replace(old, new)) != memory()


def wrong_places(text: str, cfg) -> list[str]:
    """Of what leaves: which of the numbers that the text has are not the config's."""
    half, columns = cfg.tile_n // 2, cfg.head_dim // cfg.num_consumer_wgs
    ring, part = by_name(cfg.rings), 2 * cfg.tile_m * columns
    places = ring["p"].nbytes + ring["ds"].nbytes, ring["dq"].nbytes
    assert all(cfg.num_consumer_wgs * part <= place for place in places) and half <= cfg.tile_m
    sentences = (
        f"| keys 0 to {half - 1} | keys {half} to {cfg.tile_n - 1} |",
        f"three parts, {part} bytes apart, of the columns {columns} * w to {columns} * w + {columns - 1}",
        f"of dV and dK {half} keys, of dQ the {cfg.tile_m}\nqueries",
    )
    return [sentence for sentence in sentences if sentence not in text]


@every_config
def test_what_leaves_is_the_config(cfg):
    assert not wrong_places(contract(), cfg)


@pytest.mark.parametrize("old, new", [("to 47", "to 48"), ("8192 bytes", "6144 bytes"), ("dK 48 keys", "dK 96 keys")])
def test_wrong_places_of_what_leaves_are_found(old, new):
    assert old in contract() and wrong_places(contract().replace(old, new), CONFIGS[0])
