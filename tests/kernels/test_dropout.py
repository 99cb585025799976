"""The device's dropout is the reference's, whatever tile, split and kernel, on the fragments of each thread. No GPU."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
import numpy as np
import pytest
from cutlass import Float32, Uint32, Uint64
from cutlass.cute.runtime import make_ptr

from fa3_cute.contract.dropout import counter_of, key_of, num_dropped, philox, word
from fa3_cute.contract.philox import keep_mask
from fa3_cute.kernels.common import dropout
from fa3_cute.kernels.common.block_range import Window
from fa3_cute.kernels.common.dropout import Dropout, RowDropout
from fa3_cute.kernels.common.layout import as_operand_a, as_rows_cols, fragment_row
from fa3_cute.kernels.common.tiles import Tile
from fa3_cute.kernels.common.visibility import Visibility
from fa3_cute.planning.selections import all_configs

SEED, OFFSET, P_DROPOUT = 0xFEDCBA9876543210, 0x8000000180000003, 0.3
# One of each kind of fragment and tile, without features, of which chunks need another window; where the forward kernel
# packs heads, tiles start anywhere and nothing drops.
CONFIGS = {
    (cfg.tile_n, cfg.is_fp8, cfg.packs_heads): cfg
    for cfg in all_configs()
    if not cfg.feature_names and (not cfg.packs_heads or cfg.kernel.endswith("Decode"))
}


@pytest.fixture(autouse=True)
def registers_are_ints(monkeypatch):
    def prmt(low: int, high: int, selection: int) -> int:
        """PTX ISA, prmt in its default mode."""
        found = 0
        for i in range(4):
            select = selection >> 4 * i & 0xF
            byte = (high << 32 | low) >> 8 * (select & 7) & 0xFF
            found |= ((0xFF if byte & 0x80 else 0) if select & 8 else byte) << 8 * i
        return found

    monkeypatch.setattr(dropout, "Uint32", word)
    monkeypatch.setattr(dropout, "Uint64", int)
    monkeypatch.setattr(cute.arch, "prmt", prmt)


def dropped_of_tile(cfg, tile: Tile, n_block: int, packed_heads: int) -> np.ndarray:
    """bool [tile_m, tile_n]: what the threads of a tile drop, by PTX ISA's fragments of wgmma's A operand."""
    found = np.zeros((cfg.tile_m, cfg.tile_n), bool)
    for tidx in range(2 * cfg.tile_m):
        mask = Visibility(cfg, Window(0, 0), tile, packed_heads).of_thread(tidx)
        first_row = fragment_row(tidx)
        rows = [tile.m_block * cfg.tile_m + first_row + 8 * r for r in range(2)]
        heads = [tile.head + row % packed_heads for row in rows]
        state = RowDropout(cfg, *key_of(SEED, OFFSET), num_dropped(P_DROPOUT) * 0x01010101, 1.0, heads)
        words = [0xFFFFFFFF] * (cfg.tile_n // 16 * (2 if cfg.is_fp8 else 4))
        for group, flags in enumerate(state.flags(mask.place(n_block), 0)):
            for r in range(2):
                state.drop(words, group, r, flags[r])
        masks = np.array(words, "<u4").view(np.uint8 if cfg.is_fp8 else np.uint16)
        assert set(np.unique(masks)) <= {0, masks.dtype.type(-1 % (1 << 8 * masks.itemsize))}
        for place, value in enumerate(masks):
            row, column = (fp8_place if cfg.is_fp8 else place_of_16_bit)(place, tidx % 4)
            found[first_row + row, column] = value == 0
    return found


def place_of_16_bit(i: int, quad: int) -> tuple[int, int]:
    """Row, from the thread's first, and column of its i-th element of A: m64k16 after m64k16."""
    step, i = divmod(i, 8)
    return 8 * (i // 2 % 2), 16 * step + 8 * (i // 4) + 2 * quad + i % 2


def fp8_place(i: int, quad: int) -> tuple[int, int]:
    """The same of m64k32; 4 neighbours there are the keys that the accumulator has 2 and 2 of, 8 apart."""
    step, i = divmod(i, 16)
    return 8 * (i // 4 % 2), 32 * step + 16 * (i // 8) + 8 * (i // 2 % 2) + 2 * quad + i % 2


@pytest.mark.parametrize(
    ("cfg", "packed_heads"),
    [(cfg, heads) for cfg in CONFIGS.values() for heads in ((1, 3, 8) if cfg.packs_heads else (1,))],
    ids=lambda value: getattr(value, "name", value),
)
def test_fragments_drop_what_the_reference_drops(cfg, packed_heads):
    tile = Tile(5, 11, 1, 2, 0, 4 * cfg.tile_m, 0, 1777, 2)
    m_rows = tile.m_block * cfg.tile_m + np.arange(cfg.tile_m)
    for n_block in (0, 1, 6):
        keys = n_block * cfg.tile_n + np.arange(cfg.tile_n)
        expected = np.empty((cfg.tile_m, cfg.tile_n), bool)
        for head in range(packed_heads):
            rows = m_rows % packed_heads == head
            queries = m_rows[rows] // packed_heads
            expected[rows] = ~keep_mask(P_DROPOUT, SEED, OFFSET, tile.sequence, 11 + head, queries, keys)
        assert (dropped_of_tile(cfg, tile, n_block, packed_heads) == expected).all()


def test_configs_have_all_fragments():
    assert {(cfg.tile_n % 32 == 0, cfg.is_fp8, cfg.packs_heads) for cfg in CONFIGS.values()} == {
        (True, False, False),
        (False, False, False),
        (True, True, False),
        (True, False, True),
        (True, True, True),
    }


def test_flags_of_all_bytes():
    """A byte is dropped if it is at least 256 - n, beside any others."""
    for n in (1, 2, 26, 127, 128, 129, 200, 255):
        state = RowDropout(None, 0, 0, n * 0x01010101, 1.0, None)
        for byte in range(256):
            for others in (0, 0xFF):
                flags = state.dropped(byte << 16 | others * 0x01000101)
                assert (flags >> 23 & 1) == (byte >= 256 - n)
                assert {flags >> i & 1 for i in (7, 15, 31)} == {int(others >= 256 - n)}


@cute.jit
def on_the_device_types(out: cute.Pointer, state: cute.Pointer, p: Float32, query: Uint32, key: Uint32):
    """What Dropout.create and Philox make of the DSL's numbers, compiled for this machine."""
    found = cute.make_tensor(out, cute.make_layout(9))
    made = Dropout.create(SimpleNamespace(has_dropout=True), SimpleNamespace(p_dropout=p, rng_state=state))
    found[0] = made.num_dropped
    found[1] = made.keep_factor.bitcast(Uint32)
    halves = key_of(made.rng_state[0], made.rng_state[1], Uint32, Uint64)
    first, second = counter_of(query, key)
    words = philox((first, second, Uint32(3), Uint32(5)), halves, Uint32, Uint64)
    for i in cutlass.range_constexpr(2):
        found[2 + i] = halves[i]
    for i in cutlass.range_constexpr(4):
        found[4 + i] = words[i]
    found[8] = RowDropout(None, *halves, made.num_dropped, made.keep_factor, None).dropped(words[0])


def test_numbers_of_the_dsl(monkeypatch):
    monkeypatch.undo()
    state, found = np.array([SEED, OFFSET], np.uint64), np.zeros(9, np.uint32)
    at = lambda array, kind: make_ptr(kind, array.ctypes.data, cute.AddressSpace.generic, assumed_align=8)
    compiled = None
    for p in (1e-9, 0.1, 0.3, 0.5 / 256, 1.4999999 / 256, 1.5 / 256, 2.5 / 256, 0.5, 0.999):
        arguments = at(found, Uint32), at(state, Uint64), Float32(p), Uint32(2**31 - 3), Uint32(2**31 - 77)
        compiled = compiled or cute.compile(on_the_device_types, *arguments)
        compiled(*arguments)
        n, key = num_dropped(p), key_of(SEED, OFFSET)
        words = philox((*counter_of(2**31 - 3, 2**31 - 77), 3, 5), key)
        flags = RowDropout(None, *key, n * 0x01010101, 1.0, None).dropped(words[0])
        factor = np.float32(256 / (256 - n)).view(np.uint32)
        assert found.tolist() == [n * 0x01010101, factor, *key, *words, flags], p


@cute.jit
def order_of_fragments(out: cute.Pointer, is_fp8: cutlass.Constexpr, tile_n: cutlass.Constexpr):
    """(row, column) of the thread's scores, in the order in which `convert` takes them."""
    acc = cute.make_rmem_tensor(cute.make_layout(((2, 2, tile_n // 8), 1, 1)), Float32)
    S = as_rows_cols(acc)
    for r in cutlass.range_constexpr(2):
        for c in cutlass.range_constexpr(tile_n // 4):
            S[r, c] = Float32(1000 * r + c)
    operand = as_operand_a(SimpleNamespace(is_fp8=is_fp8), acc)
    found = cute.make_tensor(out, cute.make_layout(tile_n // 2))
    for i in cutlass.range_constexpr(tile_n // 2):
        found[i] = operand[i]


@pytest.mark.parametrize("is_fp8", [False, True])
def test_order_in_which_scores_become_an_operand(is_fp8, monkeypatch):
    """The places that this module and dropout.py count on are those of as_operand_a."""
    monkeypatch.undo()
    found = np.zeros(32, np.float32)
    order_of_fragments(make_ptr(Float32, found.ctypes.data, cute.AddressSpace.generic, assumed_align=16), is_fp8, 64)
    expected = []
    for i in range(32):
        row, column = (fp8_place if is_fp8 else place_of_16_bit)(i, 0)
        expected.append(1000 * (row // 8) + column // 8 * 2 + column % 2)
    assert found.tolist() == expected
