"""Why masks have a limit of rows (limits.MAX_MASKED_ROWS): up to it, all that kernels count is an int32."""

from itertools import product

import pytest

from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.contract.limits import MAX_MASKED_ROWS
from fa3_cute.kernels.common.block_range import Window, block_range, key_origin
from fa3_cute.planning.selections import all_configs, packed_configs


class Int32(int):
    """An integer of the device; one that does not fit is an error here."""


def _checked(name: str):
    def operation(self, other):
        value = getattr(int, name)(self, other)
        if not -(2**31) <= value < 2**31:
            raise OverflowError(f"{int(self)} {name} {int(other)}")
        return Int32(value)

    return operation


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv"):
    setattr(Int32, f"__{_name}__", _checked(f"__{_name}__"))


# One of each tile shape.
CONFIGS = {(cfg.tile_m, cfg.tile_n, cfg.mask, cfg.is_local): cfg for cfg in all_configs() if cfg.mask != "full"}
WINDOWS = ((UNBOUNDED_WINDOW, 0), (UNBOUNDED_WINDOW, 5), (7, UNBOUNDED_WINDOW), (2**30 - 1, 2**30 - 1))


def seen(cfg, kind: type, seqlen_q: int, seqlen_k: int, window) -> list[tuple]:
    """The tiles that the first and the last M tile visit, and of each row there the ends of what it sees, counted from
    the tile on either end (Mask.apply)."""
    found = []
    n_q, n_k = kind(seqlen_q), kind(seqlen_k)
    left, right = map(kind, window)
    for m_block in {0, (seqlen_q - 1) // cfg.tile_m}:
        blocks = block_range(cfg, Window(left, right), kind(m_block), n_q, n_k, kind(1))
        found.append((blocks.n_block_min, blocks.n_block_max, blocks.n_block_full_min, blocks.n_block_full_max))
        if blocks.n_block_max > blocks.n_block_min:
            for row, n_block in product((0, cfg.tile_m - 1), (blocks.n_block_min, blocks.n_block_max - 1)):
                diagonal, origin = kind(m_block * cfg.tile_m + row) + (n_k - n_q), kind(n_block) * cfg.tile_n
                found.append((diagonal + right + 1 - origin, diagonal - left - origin, n_k - origin))
    return found


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=lambda cfg: cfg.name)
def test_int32_holds_all_up_to_the_limit(cfg):
    for seqlen_q in (1, 200, MAX_MASKED_ROWS // 2, MAX_MASKED_ROWS - 300, MAX_MASKED_ROWS - 1):
        for window in WINDOWS:
            sizes = seqlen_q, MAX_MASKED_ROWS - seqlen_q
            assert seen(cfg, Int32, *sizes, window) == seen(cfg, int, *sizes, window)


@pytest.mark.parametrize("cfg", packed_configs(), ids=lambda cfg: cfg.name)
def test_int32_holds_the_first_keys_of_packed_heads(cfg):
    def first_keys(kind, seqlen_q, window):
        sides = Window(*map(kind, window))
        for m_block in {0, (seqlen_q - 1) // cfg.queries_per_tile}:
            yield key_origin(cfg, sides, kind(m_block), kind(seqlen_q), kind(MAX_MASKED_ROWS - seqlen_q))

    for seqlen_q, window in product((1, 200, MAX_MASKED_ROWS // 2, MAX_MASKED_ROWS - 1), WINDOWS):
        assert [*first_keys(Int32, seqlen_q, window)] == [*first_keys(int, seqlen_q, window)]


def test_int32_does_not_hold_what_is_beyond():
    cfg = next(cfg for cfg in CONFIGS.values() if cfg.is_local)
    with pytest.raises(OverflowError):
        seen(cfg, Int32, 1, 1_200_000_000, (7, UNBOUNDED_WINDOW))
