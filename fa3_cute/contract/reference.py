"""NumPy attention that defines what every option means, and its low-precision twin. No GPU; NumPy only.

For query head h (KV head h // (num_heads / num_heads_k)), query row i and key row j of one sequence:

    S[i, j] = softmax_scale * (q_descale * q[i]) . (k_descale * k[j])      for the keys j that row i sees
    LSE[i]  = log sum_j exp S[i, j]                                        natural logarithm
    O[i]    = sum_j exp(S[i, j] - LSE[i]) * v_descale * v[j]

Which keys a row sees. Let n_q and n_k be the used lengths of the sequence (`seqused_*` if given, else its whole length)
and d = j - (i + n_k - n_q), the distance from the diagonal that ends in the bottom-right corner. Row i sees key j iff
0 <= j < n_k and all of these that are asked for hold:

    causal            d <= 0
    window (l, r)     -l <= d <= r, both bounds inclusive; a negative bound is no bound
    attention_chunk   j // c == (i + n_k - n_q) // c, rounded down: both are of one chunk of c keys
    attn_mask         a boolean one is True, one that is added is not -inf
    mask_mod          mask_mod(batch, h, i, j, (n_q, n_k)) is True

What becomes of the scores, in this order, each step if it is asked for:

    softcap c         S = c tanh(S / c)
    attn_mask         S = S + attn_mask[batch, h, i, j]
    alibi_slopes      S = S - slope[h] |d|, or slope[batch, h]
    score_mod         S = score_mod(S, batch, h, i, j, (n_q, n_k))

An attention sink is one more key of every row, of logit s_aux[h] and value 0: nothing masks it or changes its logit,
LSE[i] = log(exp s_aux[h] + sum_j exp S[i, j]), and so O[i] becomes less. One of -inf is none.

Dropout comes last and leaves the LSE as it is: what multiplies v[j] is 0 where it drops, else divided by 1 - p.
philox.py says what is dropped; p is p_dropout to the nearest 1 / 256.

Rows that see no key: O = 0, LSE = -inf, or the sink's logit. A row that sees keys but whose every score is -inf (an Inf
in Q or K) reads the same here; the kernels may give NaN for it. A NaN in a row of Q, or in a key or value that the row
sees, gives NaN. Keys and values that a row does not see contribute nothing to it, NaN or not; the kernels promise that
for those at or past the used length and those outside the tensor. Query rows that no sequence uses are untouched, but
for those that zero_padding asks for: they hold NaN in the arrays returned here.

leftpad_k: the first keys of a sequence do not exist, j < leftpad_k: no row sees them. They count in j and n_k as ever,
and chunks begin behind them.

New rows k_new, v_new are written to k and v before, behind seqused_k, which n_k then includes; rotary_cos and
rotary_sin rotate q and k_new before that: see append_reference.py.

Keys in pages: key j of sequence b is row j % page_size of page page_table[b, j // page_size], which others may share.

Arrays hold what number_formats.py says: BF16 and FP8 of ml_dtypes, or their bits as uint16 and uint8.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .append_reference import updated
from .head_scores import HeadScores, heads_of
from .number_formats import (
    ROUND,
    as_float,
    bf16_bits,
    e4m3_bits,
    round_bf16,
    round_e4m3,
    round_fp16,
    round_to,
    to_bits,
)
from .rows import are_offsets, cached_rows, descales_of, used_rows

__all__ = [
    "EXACT",
    "TWINS",
    "Arithmetic",
    "Options",
    "as_float",
    "attention_reference",
    "bf16_bits",
    "e4m3_bits",
    "low_precision_twin",
    "round_to",
    "to_bits",
    "update_cache",
    "used_rows",
]

# Scores computed at a time: float64 rows of them then stay in the L2 cache of a CPU core.
SCORES_PER_CHUNK = 1 << 17
# FP8 P is rounded as P * 2^8: the row maximum, 1, lands at 256 of e4m3's 448 and small P keep their bits (FA3 does so).
FP8_P_SCALE = 256.0
# Options that are integers, and their dimensions.
VECTORS = "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "kv_batch_idx"
NEW_VECTORS = "cu_seqlens_k_new", "seqlens_rotary", "leftpad_k"
DIMENSIONS = dict.fromkeys((*VECTORS, *NEW_VECTORS), 1) | {"page_table": 2}


# ---- what is computed, and where it is rounded ----------------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """Precision of one evaluation: `accumulate` is the dtype of products and sums; the hooks round inputs, P and O."""

    accumulate: type
    round_input: Callable = lambda x: x
    round_p: Callable = lambda p: p
    round_out: Callable = lambda o: o


EXACT = Arithmetic(np.float64)
TWINS = {
    "fp16": Arithmetic(np.float32, round_fp16, round_fp16, round_fp16),
    "bf16": Arithmetic(np.float32, round_bf16, round_bf16, round_bf16),
    "fp8_e4m3": Arithmetic(np.float32, round_e4m3, lambda p: round_e4m3(p * FP8_P_SCALE) / FP8_P_SCALE, round_bf16),
}


@dataclass(frozen=True)
class Options:
    """What attention is asked for besides Q, K and V: the keyword arguments of both functions below.

    causal             bottom-right aligned causal mask
    window_size        (left, right) in keys, negative = unbounded; not together with causal
    softmax_scale      natural units; None: 1 / sqrt(head_dim), with q_v 1 / sqrt(head_dim + head_dim_v)
    softcap            of scores; 0: none
    s_aux              [heads] logits of attention sinks
    alibi_slopes       [heads] or [batch, heads]
    attn_mask          what broadcasts to [batch, heads, seqlen_q, seqlen_k], of dense queries; bool or uint8, False and
                       0 hide; or numbers that are added. In a cache seqlen_k is the capacity
    attention_chunk    keys of a chunk; 0: none
    score_mod          a function (scores, batch, head, query, key, info) -> scores of arrays that broadcast to
                       [queries, keys]; info has n_q and n_k. Of keys that a row does not see it may get anything
    mask_mod           a function (batch, head, query, key, info) -> bools
    p_dropout          the probability to drop, from 0 to below 1; with rng_state, the seed and the offset
    first_head         number of the first query head, where q, k and v are a part of the heads
    cu_seqlens_q, _k   [batch + 1] first rows of the packed sequences, then their end; None: dense. Packed queries go
                       with packed keys, or with a cache and seqused_k
    seqused_q, _k      [batch] rows really used of each sequence, counted from its first; None: all. In a cache of
                       fewer rows those
    page_table         [batch, max_pages] pages of each sequence, one after the other; those past seqused_k may be
                       anything
    kv_batch_idx       [batch] entry of k and v, or row of page_table, of each sequence; None: its own
    leftpad_k          [batch] first rows of each sequence that do not exist, at most its used length
    k_new, v_new       as k and v, [batch, rows, heads, columns], or [rows, heads, columns] with cu_seqlens_k_new
                       [batch + 1]: behind the seqused_k of each sequence; needs a cache, of which copies are written;
                       of FP8 k and v they may have more bits, and are quantised
    rotary_cos, _sin   [positions, rotary_dim / 2]; with rotary_interleaved pairs are neighbours
    seqlens_rotary     [batch] the position of the first new key
    zero_padding       packed rows behind the last sequence are O = 0, LSE = -inf
    q_v                as q, with the columns of v: q[i] . k[j] + q_v[i] . v[j] takes the place of q[i] . k[j]
    q_, k_, v_descale  scalar, [heads], [batch, 1] or [batch, heads]: real value = stored value * descale; heads are
                       query heads for q, KV heads for k and v; None: 1
    """

    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    s_aux: Any = None
    alibi_slopes: Any = None
    attn_mask: Any = None
    attention_chunk: int = 0
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    p_dropout: float = 0.0
    rng_state: Any = None
    first_head: int = 0
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    seqused_q: Any = None
    seqused_k: Any = None
    page_table: Any = None
    kv_batch_idx: Any = None
    leftpad_k: Any = None
    k_new: Any = None
    v_new: Any = None
    cu_seqlens_k_new: Any = None
    rotary_cos: Any = None
    rotary_sin: Any = None
    rotary_interleaved: bool = False
    seqlens_rotary: Any = None
    zero_padding: bool = False
    q_v: Any = None
    q_descale: Any = None
    k_descale: Any = None
    v_descale: Any = None


def attention_reference(q, k, v, **options) -> tuple[np.ndarray, np.ndarray]:
    """O and LSE of attention in float64, as the module's docstring defines them.

    q        [batch, seqlen_q, num_heads, head_dim];     with cu_seqlens_q [total_q, num_heads, head_dim]
    k, v     [batch, seqlen_k, num_heads_k, head_dim];   with cu_seqlens_k [total_k, num_heads_k, head_dim];
             with page_table [num_pages, page_size, num_heads_k, head_dim]; v, and O, may have other columns, head_dim_v
             any float dtype and strides; uint16 = BF16 bits, uint8 = FP8 E4M3 bits
    options  the fields of `Options`

    Returns (O float64 of q's shape with v's columns, LSE float64 [batch, num_heads, seqlen_q] or [num_heads, total_q]);
    rows that the kernels leave untouched hold NaN in both. Raises ValueError for what does not fit together.
    """
    return _attention(EXACT, q, k, v, Options(**options))


def low_precision_twin(q, k, v, dtype: str, *, out_dtype=None, **options) -> tuple[np.ndarray, np.ndarray]:
    """The same attention, rounded where a kernel of `dtype` ("fp16", "bf16", "fp8_e4m3") must round, and nowhere else.

    Inputs in `dtype`; S, the row sums and P V accumulated in FP32; P relative to its row maximum rounded to `dtype`
    before P V (FP8: 2^8 times it); division by the row sum in FP32; O rounded to `out_dtype`, "fp16", "bf16" or
    "fp32", None: `dtype`, "bf16" for FP8. Its distance from `attention_reference` is the error that the number formats
    alone explain: the tolerance rule's yardstick. Arguments and returns as `attention_reference`; the returned float64
    values are the rounded ones.
    """
    twin = TWINS[dtype]
    if out_dtype is not None:
        twin = replace(twin, round_out=ROUND[out_dtype])
    return _attention(twin, q, k, v, Options(**options))


def _attention(arithmetic: Arithmetic, q, k, v, options: Options):
    q, k, v = (np.asarray(tensor) for tensor in (q, k, v))
    options = replace(options, **_lengths(options))
    _check(q, k, v, options)
    if is_updating(options):
        k, v = k.copy(), v.copy()
        q, seqused_k = updated(q, k, v, options)
        options = replace(options, seqused_k=seqused_k)
    q_v = q[..., :0] if options.q_v is None else np.asarray(options.q_v)
    columns = q.shape[-1] + q_v.shape[-1]
    softmax_scale = columns**-0.5 if options.softmax_scale is None else options.softmax_scale
    num_heads, num_heads_k = q.shape[-2], k.shape[-2]
    group = num_heads // num_heads_k

    out = np.full((*q.shape[:-1], v.shape[-1]), np.nan)
    lse = np.full((*q.shape[:-3], num_heads, q.shape[-3]), np.nan)
    if options.zero_padding:
        padding = slice(options.cu_seqlens_q[-1], None)
        out[padding], lse[:, padding] = 0, -np.inf
    q_rows = used_rows(q, options.cu_seqlens_q, options.seqused_q)
    batch = len(q_rows)
    if _has_cache(options):
        k_rows = cached_rows(k, batch, options.seqused_k, options.page_table, options.kv_batch_idx)
    else:
        k_rows = used_rows(k, options.cu_seqlens_k, options.seqused_k, "seqused_k")
    q_descale = descales_of("q", options.q_descale, batch, num_heads)
    k_descale = descales_of("k", options.k_descale, batch, num_heads_k)
    v_descale = descales_of("v", options.v_descale, batch, num_heads_k)
    # Of packed queries no sequence has a mask of its own.
    rows_k = k.shape[1] * (1 if options.page_table is None else options.page_table.shape[1])
    scores_of = heads_of(options, (batch, num_heads, q.shape[-3], rows_k))

    def operand(tensor, rows, head):
        return arithmetic.round_input(as_float(tensor[*rows, head], arithmetic.accumulate))

    leftpad = np.zeros(batch, int) if options.leftpad_k is None else options.leftpad_k
    if leftpad.shape != (batch,) or (leftpad < 0).any():
        raise ValueError(f"leftpad_k {leftpad.tolist()}: must be one entry for each of {batch} sequences, at least 0")

    for b, kv_head in np.ndindex(batch, num_heads_k):
        k_head, v_head = operand(k, k_rows[b], kv_head), operand(v, k_rows[b], kv_head)
        *outer, rows = q_rows[b]
        n_q, n_k = rows.stop - rows.start, len(k_head)
        k_head = np.concatenate([k_head, v_head[:, : q_v.shape[-1]]], axis=1)
        for head in range(kv_head * group, (kv_head + 1) * group):
            scale = softmax_scale * q_descale[b, head] * k_descale[b, kv_head]
            out[*outer, rows, head], lse[*outer, head, rows] = _one_head(
                arithmetic,
                np.concatenate([operand(part, q_rows[b], head) for part in (q, q_v)], axis=1),
                k_head,
                v_head,
                scores_of(b, head, n_q, n_k, int(leftpad[b])),
                scale,
                v_descale[b, kv_head],
            )
    return out, lse


def update_cache(q, k, v, **options) -> tuple[np.ndarray, np.ndarray | None]:
    """What attention does ahead: new rows are written to k and v, in place. Returns q, rotated if it is asked for, and
    the seqused_k that attention then has.

    Arguments as `attention_reference`; `attention_reference(q, k, v, ...)` of what this returns, without the options of
    new rows and rotary, is what the call would be.
    """
    given = Options(**options)
    given = replace(given, **_lengths(given))
    _check(q, k, v, given)
    return updated(q, k, v, given) if is_updating(given) else (q, given.seqused_k)


def is_updating(options: Options) -> bool:
    """There is something to do before attention."""
    names = "k_new", "v_new", "cu_seqlens_k_new", "rotary_cos", "rotary_sin", "seqlens_rotary"
    return any(getattr(options, name) is not None for name in names)


def _lengths(options: Options) -> dict[str, np.ndarray]:
    """The lengths, offsets and tables that are given, as int64: differences are negative where unsigned ones wrap."""
    found = {}
    for name, dims in DIMENSIONS.items():
        if (value := getattr(options, name)) is not None:
            array = np.asarray(value)
            if array.ndim != dims or array.size and array.dtype.kind not in "iu":
                stated = f"{name} is {array.dtype}{list(array.shape)}"
                raise ValueError(f"{stated}: must be integers in {dims} dimension{'s' * (dims > 1)}")
            found[name] = array.astype(np.int64)
    return found


def _has_cache(options: Options) -> bool:
    """K and V lie in pages, or in entries of a cache that sequences are given: not dense beside q, not packed."""
    is_lone = options.cu_seqlens_q is not None and options.cu_seqlens_k is None
    return is_lone or options.page_table is not None or options.kv_batch_idx is not None


def _one_head(arithmetic, q, k, v, head: HeadScores, scale, v_scale):
    """O [n_q, head_dim_v] and LSE [n_q] of one head of one sequence; all operands in the accumulation dtype."""
    out, lse = np.empty((len(q), v.shape[1])), np.empty(len(q))
    scale, v_scale = arithmetic.accumulate(scale), arithmetic.accumulate(v_scale)
    poisoned = np.flatnonzero(~np.isfinite(v).all(axis=1))
    finite_v = v
    if poisoned.size:
        finite_v = v.copy()
        finite_v[poisoned] = 0
    step = max(1, SCORES_PER_CHUNK // max(1, len(k)))
    for first in range(0, len(q), step):
        rows = slice(first, min(first + step, len(q)))
        seen, keys = head.seen_keys(rows)
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf and the like must give NaN, quietly
            scores = head.transformed((q[rows] @ k[keys].T) * scale, rows, keys)
            p, row_sum, lse_of_keys = _softmax(scores, seen)
            lse[rows], share = head.with_sink(lse_of_keys)
            p, factor = head.dropped_out(arithmetic.round_p(p), rows, keys)
            o = p @ finite_v[keys]
            for j in poisoned[(poisoned >= keys.start) & (poisoned < keys.stop)] - keys.start:
                reached = slice(None) if seen is None else seen[:, j]  # 0 * NaN must reach only the rows that see key j
                o[reached] += p[reached, j, None] * v[keys.start + j]
            out[rows] = arithmetic.round_out(o * (v_scale * factor * share / row_sum)[:, None])
    return out, lse


def _softmax(scores: np.ndarray, seen: np.ndarray | None):
    """(P relative to the row maximum, its row sums, LSE); empty rows get P = 0, row sum 1 and LSE = -inf. In place."""
    if seen is not None:
        np.copyto(scores, -np.inf, where=~seen)
    row_max = np.max(scores, axis=1, initial=-np.inf)
    empty = row_max == -np.inf
    row_max = np.where(empty, scores.dtype.type(0), row_max)
    scores -= row_max[:, None]
    p = np.exp(scores, out=scores)
    row_sum = np.where(empty, scores.dtype.type(1), p.sum(axis=1))
    return p, row_sum, np.where(empty, -np.inf, row_max + np.log(row_sum))


def _check(q, k, v, options: Options) -> None:
    """Raise ValueError for the first rule that the shapes and options break."""
    offsets_q, offsets_k, window = options.cu_seqlens_q, options.cu_seqlens_k, tuple(options.window_size)
    packed, packed_k = offsets_q is not None, offsets_k is not None
    in_cache, is_used = _has_cache(options), options.seqused_k is not None
    rank, rank_k = 3 if packed else 4, 3 if packed_k else 4
    shapes, second = f"q {q.shape}, k {k.shape}, v {v.shape}", None if options.q_v is None else np.shape(options.q_v)
    rules = (  # functions: a rule may be asked only when those before it hold
        (lambda: packed or not packed_k, "cu_seqlens_k without cu_seqlens_q: packed keys need packed queries"),
        (lambda: packed_k or is_used or not packed, "cu_seqlens_q: needs cu_seqlens_k, or seqused_k with a cache"),
        (lambda: is_used or options.page_table is None, "page_table: needs seqused_k"),
        (lambda: not (packed_k and in_cache), "cu_seqlens_k with page_table or kv_batch_idx: packed, not a cache"),
        (lambda: packed or not options.zero_padding, "zero_padding: needs cu_seqlens_q"),
        (lambda: options.attn_mask is None or not packed, "attn_mask: needs dense queries, not cu_seqlens_q"),
        (lambda: bool(options.p_dropout) == (options.rng_state is not None), "p_dropout, rng_state: come together"),
        (lambda: q.ndim == rank, f"{shapes}: q must have {rank} dimensions"),
        (lambda: k.ndim == v.ndim == rank_k, f"{shapes}: k and v must have {rank_k} dimensions each"),
        (
            lambda: k.shape[:-1] == v.shape[:-1] and q.shape[-1] == k.shape[-1] and (v.shape[-1] or not k.shape[-1]),
            f"{shapes}: k and v alike but for their columns, q and k of one head_dim",
        ),
        (lambda: second in (None, (*q.shape[:-1], v.shape[-1])), f"{shapes}: q_v must be as q, with v's columns"),
        (lambda: k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0, f"{shapes}: num_heads a multiple of num_heads_k"),
        (lambda: packed or in_cache or len(q) == len(k), f"{shapes}: q and k must have the same batch size"),
        (lambda: not packed_k or len(offsets_q) == len(offsets_k), "cu_seqlens_q, cu_seqlens_k: lengths differ"),
        (
            lambda: not packed or are_offsets(offsets_q, len(q)),
            f"cu_seqlens_q must never fall and stay within the {len(q)} packed rows",
        ),
        (
            lambda: not packed_k or are_offsets(offsets_k, len(k)),
            f"cu_seqlens_k must never fall and stay within the {len(k)} packed rows",
        ),
        (lambda: len(window) == 2, f"window_size {window}: must be (left, right)"),
        (lambda: not options.causal or max(window) < 0, f"window_size {window} together with causal"),
    )
    for holds, sentence in rules:
        if not holds():
            raise ValueError(sentence)
