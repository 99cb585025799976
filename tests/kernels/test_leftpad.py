"""Left padding as the device code counts it, on Python ints against brute force: where a sequence's keys begin, and
which of them the tiles of a Q tile hold; the configs that have it."""

from dataclasses import replace

import pytest
from device_code import as_python

from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.contract.head_scores import HeadScores
from fa3_cute.kernels.common import ragged as module
from fa3_cute.kernels.common.block_range import Window, block_range, first_key, split_range
from fa3_cute.kernels.common.sequences import Sequences
from fa3_cute.planning.tables import KeySource, decode_config, forward_config

SOURCE = KeySource(True, has_leftpad=True)
CONFIGS = {
    "full": forward_config("bf16", 128, "full", True, True, source=SOURCE),
    "causal": forward_config("bf16", 128, "causal", True, True, source=SOURCE),
    "window": forward_config("bf16", 128, "local", True, True, source=SOURCE),
    "chunks": forward_config("bf16", 128, "local", True, True, None, frozenset({("has_chunks", True)}), SOURCE),
    "decode": decode_config("bf16", 128, True, None, source=SOURCE),
}
WINDOWS = {"window": (70, 0), "chunks": (99, 0), "decode": (UNBOUNDED_WINDOW, 0)}
CHUNK = 100
# (queries, used keys, padding).
LENGTHS = (
    (1, 700, 65),
    (1, 700, 0),
    (1, 64, 64),
    (130, 700, 300),
    (130, 400, 399),
    (300, 310, 200),
    (5, 129, 128),
)


@pytest.fixture
def place(monkeypatch):
    """(offset_q, seqlen_q, offset_k, seqlen_k) of a sequence of a cache of 700 rows, or of packed keys from row 1000
    on."""
    monkeypatch.setattr(module, "Int32", int)
    monkeypatch.setattr(module, "is_present", lambda array: array is not None)
    method = as_python(module.RaggedBatch.place)

    def place(queries, used, pad, is_packed=False):
        ends = ([0, queries], [1000, 1000 + used]) if is_packed else ([0, queries], None)
        arrays = Sequences(*ends, None, None if is_packed else [used], 1, queries, 2000 if is_packed else 700)
        batch = module.RaggedBatch(arrays, None, 1, 0, module.UNLIMITED, None if pad is None else [pad])
        return method(batch, 0)

    return place


@pytest.mark.parametrize("is_packed", [False, True], ids=["cache", "packed"])
@pytest.mark.parametrize("used, pad", [(700, 3), (700, 0), (64, 64), (10, 11), (10, 2**31 - 1), (10, -5), (0, 1)])
def test_a_sequence_begins_behind_its_padding(place, used, pad, is_packed):
    """Whatever the array says, within the rows that it uses."""
    offset_q, seqlen_q, first, number = place(3, used, pad, is_packed)
    start = 1000 if is_packed else 0
    assert list(range(first, first + number)) == [start + row for row in range(used) if row >= pad]
    assert start <= first <= start + used and (offset_q, seqlen_q) == (0, 3)
    assert place(3, used, None, is_packed) == (0, 3, start, used)


@pytest.mark.parametrize("queries, used, pad", LENGTHS)
@pytest.mark.parametrize("mask", CONFIGS)
def test_tiles_hold_what_rows_see(mask, queries, used, pad, place):
    """Each row of the cache that the definition shows to some query lies in a tile that is visited, of one split; full
    tiles are seen by all queries; no tile reaches a row of the padding."""
    cfg = CONFIGS[mask]
    left, right = WINDOWS.get(mask, (UNBOUNDED_WINDOW, 0 if mask == "causal" else UNBOUNDED_WINDOW))
    chunk = CHUNK if mask == "chunks" else 0
    window = Window(left, right, chunk or None)
    bounds = tuple(-1 if side == UNBOUNDED_WINDOW else side for side in (left, right))
    head = HeadScores((0, 0), queries, used, bounds, leftpad=pad, attention_chunk=chunk)
    _, _, offset, seqlen_k = place(queries, used, pad)
    for m_block in range(-(-queries // cfg.tile_m)):
        rows = range(m_block * cfg.tile_m, min((m_block + 1) * cfg.tile_m, queries))
        seen = [set(), set(range(used))]
        for row in rows:
            of_row, keys = head.seen_keys(slice(row, row + 1))
            found = {key for i, key in enumerate(range(used)[keys]) if of_row is None or of_row[0, i]}
            seen = [seen[0] | found, seen[1] & found]
        blocks = block_range(cfg, window, m_block, queries, seqlen_k)
        parts = [split_range(blocks, split, 3) for split in range(3)]
        visited = [n for part in parts for n in range(part.n_block_min, part.n_block_max)]
        assert visited == list(range(blocks.n_block_min, max(blocks.n_block_max, blocks.n_block_min)))
        held = {offset + first_key(cfg, n) + i for n in visited for i in range(cfg.tile_n)}
        assert seen[0] <= held and (not held or min(held) >= pad)
        full = range(max(blocks.n_block_full_min, blocks.n_block_min), blocks.n_block_full_max)
        for n_block in full if len(rows) == cfg.tile_m else ():
            first = offset + first_key(cfg, n_block)
            assert set(range(first, first + cfg.tile_n)) <= seen[1]


def test_configs():
    """They have a name, an entry and a kernel of their own; pages are read row by row, whatever their size."""
    for cfg in CONFIGS.values():
        assert "_ragged_leftpad" in cfg.name and ("leftpad_k", "pointer") in cfg.arguments
        assert cfg.kernel.endswith("WithLeftpad")
        others = [name for name, _ in replace(cfg, has_leftpad=False).arguments]
        assert [name for name, _ in cfg.arguments if name != "leftpad_k"] == others
    for page_size in (1, 12, 16, 64, 528):
        source = KeySource(True, page_size, has_leftpad=True)
        assert decode_config("bf16", 128, False, source=source).page_box == 1
        assert "_ragged_p1_leftpad" in forward_config("fp8_e4m3", 64, "causal", True, True, "bf16", source=source).name


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"is_ragged": False}, "has_leftpad: only with is_ragged"),
        ({"page_box": 32}, "has_leftpad: in pages only row by row"),
        ({"has_dropout": True}, "has_leftpad: not with attn_mask, score_mod, mask_mod, has_dropout"),
        ({"attn_mask": "bool"}, "has_leftpad: not with"),
    ],
)
def test_configs_that_do_not_exist(changes, problem):
    with pytest.raises(ValueError, match=problem):
        replace(CONFIGS["full"], **changes)
