"""Pages that TMA has no boxes for: kernels that copy rows, the arrivals of their rings, and what cannot be."""

from dataclasses import replace

import pytest

from fa3_cute.planning.rings import by_name
from fa3_cute.planning.tables import DECODE, DTYPES, FORWARD, KeySource, decode_config, forward_config

SIZES = {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 12: 1, 65: 1, 1023: 1, 8: 8, 24: 8, 528: 16}  # of pages: rows copied at once


def configs(page_size: int, box_is_wide: bool = False) -> list:
    """Of every row of the tables, for pages of a size."""
    source = KeySource(True, page_size, box_is_wide)
    types = {2: DTYPES[1], 1: DTYPES[2]}
    forward = [
        forward_config(types[size][0], head_dim, mask, True, True, types[size][1], source=source)
        for size, head_dim, mask in FORWARD
    ]
    decode = [
        decode_config(types[size][0], head_dim, is_local, types[size][1], source=source)
        for size, head_dim in DECODE
        for is_local in (False, True)
    ]
    return [*forward, *decode]


@pytest.mark.parametrize("page_size, rows", SIZES.items())
def test_any_page_size_has_a_kernel(page_size, rows):
    for cfg in configs(page_size):
        assert cfg.page_box == rows and cfg.reads_rows == (rows == 1), cfg.name
        assert f"_ragged_p{rows}_" in cfg.name


@pytest.mark.parametrize("page_size, rows", SIZES.items())
def test_each_lane_arrives_that_copies_rows(page_size, rows):
    """As many arrivals fill a slot of K or V as lanes copy; nothing else of a ring depends on where rows come from."""
    for cfg, boxed in zip(configs(page_size), configs(16), strict=True):
        rings, others = by_name(cfg.rings), by_name(boxed.rings)
        for name, ring in rings.items():
            full = 32 if rows == 1 and name in ("k", "v") else others[name].full
            assert ring == others[name]._replace(full=full), (cfg.name, name)
        assert cfg.smem_bytes == boxed.smem_bytes and cfg.num_threads == boxed.num_threads


def test_rows_are_never_wide():
    """A source of wide boxes has kernels of rows as well, which have no boxes; a config that has both is refused."""
    assert not any(cfg.box_is_wide for cfg in configs(4, box_is_wide=True))
    with pytest.raises(ValueError, match="box_is_wide: only with page_box"):
        replace(configs(4)[0], box_is_wide=True)
