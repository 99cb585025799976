"""The reference over caches, in pages or in entries, with dense and packed queries, against plain dense tensors."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fa3_cute.contract.reference import attention_reference, low_precision_twin

HEADS, HEADS_K, DIM = 4, 2, 8


@dataclass(frozen=True)
class Cache:
    """K and V of some sequences as a reader meets them, and the same keys as dense tensors.

    options    seqused_k, and what says where in k and v the keys are
    dense      k and v [batch, capacity, heads, DIM]; rows that are not used hold 0
    """

    k: np.ndarray
    v: np.ndarray
    options: dict
    dense: tuple[np.ndarray, ...]

    @property
    def used(self) -> np.ndarray:
        return np.minimum(self.options["seqused_k"], self.dense[0].shape[1])


def keys(rng, *shape):
    return rng.standard_normal((2, *shape, HEADS_K, DIM))


def paged(seed: int, used, page_size: int, max_pages: int, share=False, rows=None) -> Cache:
    """Pages in any order, each once or (share) many times; NaN in all that is not used, any ids past the used ones.

    rows   the row of the table of each sequence, kv_batch_idx; None: its own
    """
    rng = np.random.default_rng(seed)
    used, capacity = np.array(used), page_size * max_pages
    entries = np.arange(len(used)) if rows is None else np.array(rows)
    table = rng.choice(np.array([-1, 2**31 - 1, -(2**31), 10**6]), (entries.max(initial=0) + 2, max_pages))
    num_pages = 1 + len(used) * max_pages
    k, v = np.full((2, num_pages, page_size, HEADS_K, DIM), np.nan)
    dense = np.zeros((2, len(used), capacity, HEADS_K, DIM))
    free = list(rng.permutation(num_pages))
    for b, (entry, n) in enumerate(zip(entries, np.minimum(used, capacity), strict=True)):
        count = -(-n // page_size)
        is_known = entry in entries[:b]  # another sequence's row of the table
        if not is_known:
            table[entry, :count] = [0 if share else free.pop() for _ in range(count)]
        for j in range(n):
            place = table[entry, j // page_size], j % page_size
            if np.isnan(k[place]).any():
                k[place], v[place] = keys(rng)
            dense[:, b, j] = k[place], v[place]
    options = {"seqused_k": used, "page_table": table}
    options |= {"page_table": table[: len(used)]} if rows is None else {"kv_batch_idx": entries}
    return Cache(k, v, options, tuple(dense))


def in_rows(seed: int, used, capacity: int, rows=None) -> Cache:
    """A dense cache of more entries than sequences, which have any of them; NaN in all that is not used."""
    rng = np.random.default_rng(seed)
    entries = np.arange(len(used)) if rows is None else np.array(rows)
    k, v = np.full((2, entries.max(initial=0) + 1, capacity, HEADS_K, DIM), np.nan)
    dense = np.zeros((2, len(used), capacity, HEADS_K, DIM))
    for b, (entry, n) in enumerate(zip(entries, np.minimum(used, capacity), strict=True)):
        for j in range(n):
            if np.isnan(k[entry, j]).any():
                k[entry, j], v[entry, j] = keys(rng)
            dense[:, b, j] = k[entry, j], v[entry, j]
    options = {"seqused_k": np.array(used)} | ({} if rows is None else {"kv_batch_idx": entries})
    return Cache(k, v, options, tuple(dense))


MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (3, 1)}, "left": {"window_size": (2, -1)}}
CACHES = {
    "page size 1": lambda: paged(0, [5, 0, 9], 1, 9),
    "page size 4": lambda: paged(1, [5, 0, 12], 4, 3),
    "page size 16": lambda: paged(2, [16, 17, 1], 16, 2),
    "one page for all": lambda: paged(3, [5, 3, 12], 4, 3, share=True),
    "rows of the table": lambda: paged(4, [5, 3, 12], 4, 3, rows=[4, 0, 2]),
    "rows twice": lambda: paged(5, [9, 9, 4], 4, 3, rows=[1, 1, 0]),
    "beyond the table": lambda: paged(6, [2**31 - 1, 13, 12], 4, 3),
    "entries": lambda: in_rows(7, [5, 0, 9], 11, rows=[6, 2, 0]),
    "entries twice": lambda: in_rows(8, [5, 5, 11], 11, rows=[3, 3, 1]),
    "beyond the entry": lambda: in_rows(9, [12, 2**31 - 1, 11], 11, rows=[0, 1, 2]),
}


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())
def test_a_cache_is_the_dense_keys(cache, mask):
    """The same bits, though all that is not used is NaN and past the used pages the table is garbage."""
    cache = cache()
    q = np.random.default_rng(1).standard_normal((3, 4, HEADS, DIM))
    wanted = attention_reference(q, *cache.dense, seqused_k=cache.used, **mask)
    assert np.isfinite(wanted[0]).all()
    same(attention_reference(q, cache.k, cache.v, **cache.options, **mask), wanted)
    for dtype in ("bf16", "fp8_e4m3"):
        twin = low_precision_twin(q, *cache.dense, dtype, seqused_k=cache.used, **mask)
        same(low_precision_twin(q, cache.k, cache.v, dtype, **cache.options, **mask), twin)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("cache", [*CACHES.values(), lambda: in_rows(10, [5, 0, 9], 11)])
def test_packed_queries_over_a_cache(cache, mask):
    """Each sequence as if it were alone with its dense keys; queries of no sequence are untouched."""
    cache, lengths = cache(), np.array([4, 3, 1])
    offsets = 1 + np.cumsum([0, *lengths])
    q = np.random.default_rng(2).standard_normal((offsets[-1] + 2, HEADS, DIM))
    out, lse = attention_reference(q, cache.k, cache.v, cu_seqlens_q=offsets, **cache.options, **mask)
    for b, (start, n) in enumerate(zip(offsets, lengths, strict=False)):
        rows, used = slice(start, start + n), slice(cache.used[b])
        alone = attention_reference(q[None, rows], *(x[b : b + 1, used] for x in cache.dense), **mask)
        np.testing.assert_allclose(out[rows], alone[0][0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(lse[:, rows], alone[1][0], rtol=1e-12)
    assert np.isnan(out[[0, -2, -1]]).all() and np.isnan(lse[:, [0, -2, -1]]).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pages_are_the_dense_keys(data):
    page_size, max_pages = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    used = data.draw(st.lists(st.integers(0, page_size * max_pages + 3), min_size=1, max_size=4))
    rows = data.draw(st.none() | st.permutations(range(len(used))))
    cache = paged(data.draw(st.integers(0, 2**32)), used, page_size, max_pages, data.draw(st.booleans()), rows)
    mask = data.draw(st.sampled_from(list(MASKS.values())))
    q = np.random.default_rng(3).standard_normal((len(used), 3, HEADS, DIM))
    wanted = attention_reference(q, *cache.dense, seqused_k=cache.used, **mask)
    same(attention_reference(q, cache.k, cache.v, **cache.options, **mask), wanted)


def test_nan_left_of_a_window_is_not_met():
    """Whole pages there hold NaN: freed, and used again by others."""
    cache = paged(11, [12, 12], 4, 3)
    q = np.random.default_rng(4).standard_normal((2, 1, HEADS, DIM))
    wanted = attention_reference(q, *cache.dense, seqused_k=cache.used, window_size=(3, 0))
    for b in range(2):
        cache.k[cache.options["page_table"][b, :2]] = cache.v[cache.options["page_table"][b, :2]] = np.nan
    same(attention_reference(q, cache.k, cache.v, **cache.options, window_size=(3, 0)), wanted)
    poisoned, _ = attention_reference(q, cache.k, cache.v, **cache.options, window_size=(4, 0))
    assert np.isnan(poisoned).all()


def test_zero_padding():
    """Rows behind the last sequence alone: not those before the first, nor those past a used length."""
    cache = in_rows(12, [5, 3], 6)
    q = np.random.default_rng(5).standard_normal((9, HEADS, DIM))
    options = cache.options | {"cu_seqlens_q": [1, 4, 6], "seqused_q": [2, 2]}
    out, lse = attention_reference(q, cache.k, cache.v, **options)
    padded, padded_lse = attention_reference(q, cache.k, cache.v, zero_padding=True, **options)
    same((padded[:6], padded_lse[:, :6]), (out[:6], lse[:, :6]))
    assert np.isnan(padded[[0, 3]]).all() and np.isnan(out[6:]).all()
    assert (padded[6:] == 0).all() and (padded_lse[:, 6:] == -np.inf).all()


Q, PACKED_Q, POOL, ENTRIES = (np.zeros(s) for s in ((2, 3, 4, 8), (6, 4, 8), (5, 4, 2, 8), (2, 12, 2, 8)))
TABLE = {"page_table": [[0, 1], [2, 3]], "seqused_k": [8, 1]}
REFUSED = {
    "no lengths": (Q, POOL, TABLE | {"seqused_k": None}, "page_table: needs seqused_k"),
    "packed keys": (PACKED_Q, ENTRIES[0], TABLE | {"cu_seqlens_q": [0, 6], "cu_seqlens_k": [0, 6]}, "not a cache"),
    "packed rows": (
        PACKED_Q,
        ENTRIES[0],
        {"cu_seqlens_q": [0, 6], "cu_seqlens_k": [0, 6], "kv_batch_idx": [0]},
        "not a cache",
    ),
    "a used page below 0": (
        Q,
        POOL,
        TABLE | {"page_table": [[0, -1], [2, 3]]},
        r"page_table\[0\] \[0, -1\]: .* 0 to 4",
    ),
    "a used page past the pool": (Q, POOL, TABLE | {"page_table": [[0, 1], [5, 3]]}, r"page_table\[1\] \[5\]"),
    "table of other sequences": (Q, POOL, TABLE | {"page_table": [[0, 1]]}, "row for each of 2 sequences"),
    "table in one dimension": (Q, POOL, TABLE | {"page_table": [0, 1]}, "integers in 2 dimensions"),
    "table of floats": (Q, POOL, TABLE | {"page_table": [[0.0, 1], [2, 3]]}, "page_table is float64"),
    "negative lengths": (Q, POOL, TABLE | {"seqused_k": [8, -1]}, r"seqused_k \[8, -1\]: .* at least 0"),
    "a length": (Q, POOL, TABLE | {"seqused_k": [8]}, r"seqused_k \[8\]: .* one entry for each of 2"),
    "an entry past the cache": (Q, ENTRIES, {"kv_batch_idx": [0, 2]}, r"kv_batch_idx \[0, 2\]: .* 0 to 1, a row of k"),
    "an entry below 0": (Q, ENTRIES, {"kv_batch_idx": [0, -1]}, r"kv_batch_idx \[0, -1\]"),
    "an entry past the table": (Q, POOL, TABLE | {"kv_batch_idx": [0, 2]}, "a row of page_table"),
    "entries of other sequences": (Q, ENTRIES, {"kv_batch_idx": [0]}, r"kv_batch_idx \[0\]: .* each of 2 sequences"),
    "cache of other sequences": (
        PACKED_Q,
        ENTRIES,
        {"cu_seqlens_q": [0, 6], "seqused_k": [1]},
        r"k.shape=\(2, .* row for each of 1 sequences, or kv_batch_idx",
    ),
    "padding of dense queries": (Q, ENTRIES, {"zero_padding": True}, "zero_padding: needs cu_seqlens_q"),
    "a packed pool": (PACKED_Q, POOL[0], TABLE | {"cu_seqlens_q": [0, 3, 6]}, "k and v must have 4 dimensions"),
}


@pytest.mark.parametrize("q, k, options, words", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_name_the_problem(q, k, options, words):
    with pytest.raises(ValueError, match=words):
        attention_reference(q, k, k, **options)


@pytest.mark.parametrize("cache", [paged(13, [9, 12, 5], 4, 3), in_rows(14, [9, 12, 5], 12)], ids=["pages", "entries"])
def test_one_other_value_is_found(cache):
    """The comparisons above can fail."""
    q = np.random.default_rng(6).standard_normal((3, 2, HEADS, DIM))
    cache.dense[1][1, 11] += 1
    options = {"kv_batch_idx": [0, 1, 2]} | cache.options
    with pytest.raises(AssertionError):
        same(
            attention_reference(q, cache.k, cache.v, **options),
            attention_reference(q, *cache.dense, seqused_k=cache.used),
        )
