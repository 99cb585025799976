"""NumPy gradients of attention that define what `backward` computes, and their low-precision twin. NumPy only.

Names as in reference.py. Let F be a number that depends on O and LSE, dO[i] = dF/dO[i] and dLSE[i] = dF/dLSE[i]. With

    R[i, j] = softmax_scale * q[i] . k[j]         of the keys j that row i sees
    S[i, j]                                       R after softcap, attn_mask and ALiBi: R itself without them
    P[i, j] = exp(S[i, j] - LSE[i])
    Z[i, j]                                       what dropout multiplies P with: 0 or 1 / (1 - p), 1 without it
    O[i]    = sum_j Z[i, j] P[i, j] v[j]

v[j] is in O alone, and a change of S[i, j] changes O[i] by P[i, j] (Z[i, j] v[j] - O[i]), since P[i] and the sink's
share of the row sum to 1, and LSE[i] by P[i, j]. Hence

    dV[j]    = sum_i Z[i, j] P[i, j] dO[i]
    dP[i, j] = Z[i, j] dO[i] . v[j]
    D[i]     = dO[i] . O[i]
    dS[i, j] = dF/dS[i, j] = P[i, j] (dP[i, j] - D[i] + dLSE[i])
    dR[i, j] = dS[i, j] (1 - tanh(R[i, j] / c)^2)     with a softcap c, else dS
    dQ[i]    = softmax_scale * sum_j dR[i, j] k[j]
    dK[j]    = softmax_scale * sum_i dR[i, j] q[i]

where dK and dV of a KV head sum over the query heads of its group (FlashAttention-2, arXiv:2307.08691, algorithm 2,
without dLSE and what becomes of scores). A sink is a key of value 0, and an attn_mask is added behind the softcap:

    d_s_aux  = sum_i exp(s_aux - LSE[i]) (dLSE[i] - D[i])     of a head, over the rows of all sequences
    d_bias   = dS                                             summed along what attn_mask is broadcast along

Where O and LSE are those of more keys than are given here, P is a part of all of theirs: the result is what these keys
add to dQ, and their dK, dV and d_bias; d_s_aux is then that of all keys.

Rows that see no key: dQ = 0; they add nothing to dK, dV and d_bias. Without a sink their LSE may be either infinity,
their dLSE anything; with one LSE = s_aux, and they add dLSE to d_s_aux. A sink of -inf has the gradient 0. Keys that no
row sees: dK = dV = 0. d_bias is 0 where a key is hidden and where no sequence uses the row or the key. Rows that no
sequence uses have no gradient: they hold NaN in dQ, dK and dV as returned here, and nothing in them is looked at. What
else is not finite makes NaN of what it meets, behind a mask or not.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple

import numpy as np

from .head_scores import HeadScores, heads_of
from .number_formats import ROUND, as_float
from .reference import EXACT, SCORES_PER_CHUNK, TWINS, Arithmetic, Options, attention_reference, low_precision_twin
from .rows import used_rows

# The options of reference.py that have gradients here. Of the others dS would be another one, or K and V not be rows
# of their own. A function of scores has none: nothing says what its derivative is.
OPTIONS = frozenset(
    (
        *("causal", "window_size", "softmax_scale", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"),
        *("softcap", "s_aux", "alibi_slopes", "attn_mask", "attention_chunk", "mask_mod", "p_dropout", "rng_state"),
        "first_head",
    )
)


class _OfTensors(NamedTuple):
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


class Gradients(_OfTensors):
    """A tuple of those of q, k and v, in their shapes; float64. Beside them, None where there is no such input:

    d_s_aux   [num_heads], of s_aux
    d_bias    of an attn_mask that is added, in the shape that it was given in
    """

    d_s_aux: np.ndarray | None = None
    d_bias: np.ndarray | None = None


@dataclass(frozen=True)
class Saved:
    """What a backward pass is given besides q, k, v and dout. Where out and softmax_lse are None it takes them from the
    forward pass of its own arithmetic.

    out           as dout
    softmax_lse   [batch, num_heads, seqlen_q], packed [num_heads, total_q]
    dlse          as softmax_lse; None: zeros
    dk, dv        as k and v: what is there before, and is added to (accumulate_dkv); None: zeros
    """

    out: Any = None
    softmax_lse: Any = None
    dlse: Any = None
    dk: Any = None
    dv: Any = None


def backward_reference(q, k, v, dout, saved: Saved | None = None, **options) -> Gradients:
    """Gradients in float64, as the module's docstring defines them.

    q, k, v    as in attention_reference
    dout       as forward's out
    saved      forward's results, the gradient of the LSE, what is added to
    options    of attention_reference, those in OPTIONS

    Raises ValueError for shapes and options that do not fit together.
    """
    forward = attention_reference(q, k, v, **_checked(options))
    return _gradients(EXACT, (q, k, v, dout), _completed(saved, (dout, *forward), (k, v)), Options(**options))


def backward_twin(q, k, v, dout, dtype: str, saved: Saved | None = None, *, grad_dtype=None, **options) -> Gradients:
    """The same gradients, rounded where a kernel of `dtype`, "fp16" or "bf16", must round, and nowhere else.

    Inputs and O in `dtype`; LSE, S, P, dP, D (from the rounded O), dS and dR in FP32; P and dR rounded to `dtype` as
    operands of the products with dO, q and k, which are summed up in FP32, as are the heads of a group and, if dK and
    dV are added to, what is there before; dQ, dK and dV rounded once, to `grad_dtype`, "fp16", "bf16" or "fp32", None:
    `dtype`. Dropout's factor is of the sums, not of P. d_s_aux and d_bias are sums in FP32 of FP32 numbers. Other
    arguments and returns as backward_reference; the returned values are the rounded ones.
    """
    if dtype not in ("fp16", "bf16"):
        raise ValueError(f"dtype {dtype!r}: must be 'fp16' or 'bf16'")
    forward = low_precision_twin(q, k, v, dtype, **_checked(options))
    twin = replace(TWINS[dtype], round_out=ROUND[grad_dtype or dtype])
    return _gradients(twin, (q, k, v, dout), _completed(saved, (dout, *forward), (k, v)), Options(**options))


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise ValueError(f"{unknown[0]}: has no gradient here; those that have: {', '.join(sorted(OPTIONS))}")
    return options


def _completed(saved: Saved | None, made: tuple, keys: tuple) -> Saved:
    """With what forward makes where nothing is given. Raises ValueError for arrays that have not the shapes of theirs.

    made   dout, and out and LSE of forward
    keys   k, v
    """
    saved = saved or Saved()
    dout, out, lse = made
    if np.shape(dout) != out.shape:
        raise ValueError(f"dout.shape={np.shape(dout)}: must be that of out, {out.shape}")
    found = {}
    for name, own in (("out", out), ("softmax_lse", lse), ("dlse", np.zeros(lse.shape))):
        found[name] = _shaped(name, getattr(saved, name), own)
    for name, tensor in zip(("dk", "dv"), keys, strict=True):
        found[name] = _shaped(name, getattr(saved, name), np.zeros(np.shape(tensor)))
    return Saved(**found)


def _shaped(name: str, given: Any, own: np.ndarray) -> np.ndarray:
    """What is given, which must have this shape, or None."""
    array = own if given is None else np.asarray(given)
    if array.shape != own.shape:
        raise ValueError(f"{name}.shape={array.shape}: must be {own.shape}")
    return array


def _gradients(arithmetic: Arithmetic, tensors: tuple, saved: Saved, options: Options) -> Gradients:
    q, k, v, dout = (np.asarray(tensor) for tensor in tensors)
    scale = arithmetic.accumulate(q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale)
    q_rows = used_rows(q, options.cu_seqlens_q, options.seqused_q)
    k_rows = used_rows(k, options.cu_seqlens_k, options.seqused_k, "seqused_k")
    num_heads, num_heads_k = q.shape[-2], k.shape[-2]
    sizes = len(q_rows), num_heads, q.shape[-3], k.shape[-3]
    scores_of = heads_of(options, sizes)
    found = Gradients(*(np.full(tensor.shape, np.nan) for tensor in (q, k, v)))
    d_s_aux = np.zeros(num_heads, arithmetic.accumulate)
    d_bias = np.zeros(sizes, arithmetic.accumulate) if _is_added(options.attn_mask) else None

    def vectors(tensor, rows, head):
        return as_float(tensor[*rows, head], arithmetic.accumulate)

    def operand(tensor, rows, head):
        return arithmetic.round_input(vectors(tensor, rows, head))

    def numbers(tensor, rows, head):
        *outer, within = rows
        return as_float(tensor[*outer, head, within], arithmetic.accumulate)

    for b, kv_head in np.ndindex(len(q_rows), num_heads_k):
        of_q, of_k = q_rows[b], k_rows[b]
        of_keys = operand(k, of_k, kv_head), operand(v, of_k, kv_head)
        keys = _Keys(*of_keys, *(np.zeros(tensor.shape, arithmetic.accumulate) for tensor in of_keys))
        group = num_heads // num_heads_k
        for head in range(kv_head * group, (kv_head + 1) * group):
            of_head = [operand(tensor, of_q, head) for tensor in (q, dout, saved.out)]
            rows = _Rows.of(*of_head, *(numbers(tensor, of_q, head) for tensor in (saved.softmax_lse, saved.dlse)))
            scores = scores_of(b, head, len(rows.q), len(keys.k))
            ds = None if d_bias is None else d_bias[b, head, : scores.n_q, : scores.n_k]
            found.dq[*of_q, head] = arithmetic.round_out(
                _one_head(arithmetic.round_p, rows, keys, scores, scale, ds) * scale
            )
            d_s_aux[head] += _of_sink(rows, scores.sink)
        dk, dv = keys.dk * scale + vectors(saved.dk, of_k, kv_head), keys.dv + vectors(saved.dv, of_k, kv_head)
        found.dk[*of_k, kv_head], found.dv[*of_k, kv_head] = arithmetic.round_out(dk), arithmetic.round_out(dv)
    found.d_s_aux = None if options.s_aux is None else d_s_aux.astype(np.float64)
    found.d_bias = None if d_bias is None else _summed(d_bias, np.shape(options.attn_mask)).astype(np.float64)
    return found


def _is_added(mask: Any) -> bool:
    """It is numbers, and not what hides keys."""
    return mask is not None and np.asarray(mask).dtype not in (np.bool_, np.uint8)


def _summed(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sums of an array along what `shape` is broadcast along to the array's."""
    aligned = (1,) * (array.ndim - len(shape)) + shape
    return array.sum(axis=tuple(dim for dim, size in enumerate(aligned) if size == 1)).reshape(shape)


class _Rows(NamedTuple):
    """Of one query head of one sequence; shift is D - dLSE."""

    q: np.ndarray
    dout: np.ndarray
    lse: np.ndarray
    shift: np.ndarray

    @staticmethod
    def of(q, dout, out, lse, dlse) -> "_Rows":
        with np.errstate(invalid="ignore", over="ignore"):
            return _Rows(q, dout, lse, (dout * out).sum(axis=1) - dlse)


class _Keys(NamedTuple):
    """Of one KV head of one sequence, and the sums of their gradients."""

    k: np.ndarray
    v: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def _one_head(round_p: Callable, rows: _Rows, keys: _Keys, head: HeadScores, scale, d_scores) -> np.ndarray:
    """dQ [n_q, head_dim] of a query head; what it adds to dK and dV is added there. dQ and dK without the scale. dS is
    written to d_scores [n_q, n_k], which may be None."""
    dq = np.zeros_like(rows.q)
    step = max(1, SCORES_PER_CHUNK // max(1, len(keys.k)))
    for first in range(0, len(dq), step):
        of = slice(first, min(first + step, len(dq)))
        seen, columns = head.seen_keys(of)
        k, v = keys.k[columns], keys.v[columns]
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf and the like must give NaN, quietly
            products = rows.q[of] @ k.T * scale
            p = np.exp(head.transformed(products, of, columns) - rows.lse[of, None])
            kept, factor = head.dropped_out(np.ones_like(p), of, columns)
            ds = p * (kept * factor * (rows.dout[of] @ v.T) - rows.shift[of, None])
            dr = ds * _slope(head.softcap, products)
            if seen is not None:
                p, ds, dr = (np.where(seen, values, 0) for values in (p, ds, dr))
            if d_scores is not None:
                d_scores[of, columns] = ds
            p, dr = round_p(p) * kept, round_p(dr)
            keys.dv[columns] += p.T @ rows.dout[of] * factor
            keys.dk[columns] += dr.T @ rows.q[of]
            dq[of] = dr @ k
    return dq


def _slope(softcap: float, products: np.ndarray) -> np.ndarray | int:
    """The derivative of softcap tanh(product / softcap)."""
    return 1 - np.tanh(products / products.dtype.type(softcap)) ** 2 if softcap else 1


def _of_sink(rows: _Rows, sink: float | None):
    """What the rows add to the gradient of their head's sink."""
    if sink is None or sink == -inf:
        return 0
    with np.errstate(invalid="ignore", over="ignore"):
        p = np.where(rows.lse == sink, 1, np.exp(sink - rows.lse))  # where they are the same, they may be inf
        return -(p * rows.shift).sum()
