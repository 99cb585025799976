"""Rings and roles of the configs (planning/rings.py) are the ones in the tables of kernels/README.md, and add up."""

import re
from pathlib import Path

import pytest

from fa3_cute.planning.backward import FLOAT_BYTES
from fa3_cute.planning.backward_kernels import kernels_of, pass_config
from fa3_cute.planning.one_side import MASKED_COLUMNS, OneSideConfig
from fa3_cute.planning.rings import WARP, by_name
from fa3_cute.planning.selections import all_configs, backward_kernels, ragged_configs
from fa3_cute.planning.tables import all_decode_configs, all_forward_configs

TEXT = (Path(__file__).resolve().parents[2] / "fa3_cute" / "kernels" / "README.md").read_text()
FORWARD_TEXT, DECODE_TEXT = TEXT.split("\n## The backward kernels\n")[0].split("\n## The decode kernel\n")
COUNT = re.compile(r"\b(1) \+ the bytes|\(([0-9n +]+)\)")


def ring_rows(text: str) -> dict[str, list[str]]:
    """{ring: [slots, full, empty]} of a table, cells as they stand; "vt, FP8 only" is vt."""
    rows = re.findall(r"^\| (q|k|v|vt|o|tiles)(?:, [^|]*)? \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE)
    return {name: cells for name, *cells in rows}


def count_in(cell: str, n: int, is_fp8: bool = False, reads_rows: bool = False) -> int | None:
    """Arrivals that a cell states for n consumer warpgroups; None where nobody arrives."""
    common, _, of_rows = cell.partition("rows:")
    common, _, special = common.partition("FP8:")
    found = COUNT.search(of_rows if reads_rows and of_rows else special if is_fp8 and special else common)
    if found is None:
        return None
    terms = (found[1] or found[2]).replace(" ", "").split("+")
    return sum(int(term.rstrip("n") or 1) * (n if term.endswith("n") else 1) for term in terms)


@pytest.mark.parametrize(
    "configs, text",
    [
        ([*all_forward_configs(), *(cfg for cfg in ragged_configs() if not cfg.packs_heads)], FORWARD_TEXT),
        ([*all_decode_configs(), *(cfg for cfg in ragged_configs() if cfg.packs_heads)], DECODE_TEXT),
    ],
    ids=["forward", "decode"],
)
def test_arrival_counts_are_the_contract_s(configs, text):
    rows = ring_rows(text)
    for cfg in configs:
        rings = {name: ring for name, ring in by_name(cfg.rings).items() if ring.full}
        assert set(rings) == {name for name in rows if name != "vt" or cfg.is_fp8}
        for name, (_, full, empty) in rows.items():
            if name in rings:
                said = [count_in(cell, cfg.num_consumer_wgs, cfg.is_fp8, cfg.reads_rows) for cell in (full, empty)]
                assert said[0] == rings[name].full and said[1] in (None, rings[name].empty), (cfg.name, name)


def test_a_wrong_count_is_found():
    assert count_in("one lane of every consumer warp (4n); FP8: of each transpose warp (2)", 3) == 12
    assert count_in("one lane of every consumer warp (4n); FP8: of each transpose warp (2)", 3, is_fp8=True) == 2
    assert count_in("of the load and store warps and of the consumers (64 + 128n)", 2) == 320
    assert count_in("load warp, 1 + the bytes of Q", 3, is_fp8=True) == 1
    assert count_in("nobody; FP8: one lane of warp 1 (1)", 3) is None
    assert count_in("load warp, 1 + the bytes of K; rows: every lane of it (32)", 3) == 1
    assert count_in("load warp, 1 + the bytes of K; rows: every lane of it (32)", 3, reads_rows=True) == 32
    assert count_in("one lane of every consumer warp (4n)", 2, reads_rows=True) == 8


def test_every_warp_has_one_role_at_most():
    for cfg in all_configs():
        warps = [warp for role in cfg.roles for warp in role.warps]
        assert len(warps) == len(set(warps)) and (max(warps) + 1) * WARP == cfg.num_threads
        assert by_name(cfg.roles)["consume"].warps[0] % 4 == 0  # setmaxnreg and WGMMA are a warpgroup's


def partly_filled(cfg) -> list[str]:
    """Of shift and delta those whose slots a bulk copy of tile_m values does not fill: consumers, whose barrier counts
    whole slots, would wait for ever."""
    rings = by_name(getattr(cfg, "rings", ()))
    found = {name: rings[name].slot_bytes for name in ("shift", "delta") if name in rings}
    return [name for name, nbytes in found.items() if nbytes not in (0, FLOAT_BYTES * cfg.tile_m)]


def test_values_of_rows_fill_their_slots():
    dropout = frozenset({("has_dropout", True)})
    fewest = [pass_config("bf16", head_dim, "full", False, False, dropout) for head_dim in MASKED_COLUMNS]
    kernels = [*backward_kernels(), *(kernel for cfg in fewest for kernel in kernels_of(cfg))]
    assert [(cfg.name, partly_filled(cfg)) for cfg in kernels if partly_filled(cfg)] == []
    assert sum(bool(getattr(cfg, "rings", ())) for cfg in kernels) > len(kernels) / 2


def test_a_slot_partly_filled_is_found():
    assert partly_filled(OneSideConfig("bf16", 64, "full", False, "dk", 16)) == ["shift", "delta"]
