"""NumPy gradients of attention that define what `backward` computes, and their low-precision twin. NumPy only.

Names as in reference.py. Let F be a number that depends on O and LSE, dO[i] = dF/dO[i] and dLSE[i] = dF/dLSE[i]. With

    S[i, j] = softmax_scale * q[i] . k[j]         of the keys j that row i sees
    P[i, j] = exp(S[i, j] - LSE[i])               so that O[i] = sum_j P[i, j] v[j]

v[j] is in O alone, and a change of S[i, j] changes O[i] by P[i, j] (v[j] - O[i]), since P[i] sums to 1, and LSE[i] by
P[i, j]. Hence

    dV[j]    = sum_i P[i, j] dO[i]
    dP[i, j] = dO[i] . v[j]
    D[i]     = dO[i] . O[i]
    dS[i, j] = dF/dS[i, j] = P[i, j] (dP[i, j] - D[i] + dLSE[i])
    dQ[i]    = softmax_scale * sum_j dS[i, j] k[j]
    dK[j]    = softmax_scale * sum_i dS[i, j] q[i]

where dK and dV of a KV head sum over the query heads of its group (FlashAttention-2, arXiv:2307.08691, algorithm 2,
without dLSE). Where O and LSE are those of more keys than are given here, P is a part of all of theirs: the result is
what these keys add to dQ, and their dK and dV.

Rows that see no key: dQ = 0; they add nothing to dK and dV, and their LSE may be either infinity, their dLSE anything.
Keys that no row sees: dK = dV = 0. Rows that no sequence uses have no gradient: they hold NaN in the arrays returned
here, and nothing in them is looked at. What else is not finite makes NaN of what it meets, behind a mask or not.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .head_scores import HeadScores, heads_of
from .number_formats import ROUND, as_float
from .reference import EXACT, SCORES_PER_CHUNK, TWINS, Arithmetic, Options, attention_reference, low_precision_twin
from .rows import used_rows

# The options of reference.py that have gradients here. Of the others dS would be another one, or K and V not be rows
# of their own.
OPTIONS = frozenset(
    ("causal", "window_size", "softmax_scale", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "first_head")
)


class Gradients(NamedTuple):
    """Of q, k and v, in their shapes; float64."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


@dataclass(frozen=True)
class Saved:
    """What a backward pass is given besides q, k, v and dout; what is None it takes from the forward pass of its own
    arithmetic.

    out           as q
    softmax_lse   [batch, num_heads, seqlen_q], packed [num_heads, total_q]
    dlse          as softmax_lse; None: zeros
    """

    out: Any = None
    softmax_lse: Any = None
    dlse: Any = None


def backward_reference(q, k, v, dout, saved: Saved | None = None, **options) -> Gradients:
    """dQ, dK and dV in float64, as the module's docstring defines them.

    q, k, v    as in attention_reference
    dout       as q
    saved      forward's results and the gradient of the LSE
    options    of attention_reference, those in OPTIONS

    Raises ValueError for shapes and options that do not fit together.
    """
    forward = attention_reference(q, k, v, **_checked(options))
    return _gradients(EXACT, (q, k, v, dout), _completed(saved, *forward), Options(**options))


def backward_twin(q, k, v, dout, dtype: str, saved: Saved | None = None, *, grad_dtype=None, **options) -> Gradients:
    """The same gradients, rounded where a kernel of `dtype`, "fp16" or "bf16", must round, and nowhere else.

    Inputs and O in `dtype`; LSE, S, P, dP, D (from the rounded O) and dS in FP32; P and dS rounded to `dtype` as
    operands of the products with dO, q and k, which are summed up in FP32, as are the heads of a group; dQ, dK and dV
    rounded once, to `grad_dtype`, "fp16", "bf16" or "fp32", None: `dtype`. Other arguments and returns as
    backward_reference; the returned values are the rounded ones.
    """
    if dtype not in ("fp16", "bf16"):
        raise ValueError(f"dtype {dtype!r}: must be 'fp16' or 'bf16'")
    forward = low_precision_twin(q, k, v, dtype, **_checked(options))
    twin = replace(TWINS[dtype], round_out=ROUND[grad_dtype or dtype])
    return _gradients(twin, (q, k, v, dout), _completed(saved, *forward), Options(**options))


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise ValueError(f"{unknown[0]}: has no gradient here; those that have: {', '.join(sorted(OPTIONS))}")
    return options


def _completed(saved: Saved | None, out: np.ndarray, lse: np.ndarray) -> Saved:
    """With what forward makes where nothing is given. Raises ValueError for arrays of other shapes than it makes."""
    saved = saved or Saved()
    found = {}
    for name, own in (("out", out), ("softmax_lse", lse), ("dlse", np.zeros(lse.shape))):
        given = getattr(saved, name)
        found[name] = array = own if given is None else np.asarray(given)
        if array.shape != own.shape:
            raise ValueError(f"{name}.shape={array.shape}: must be {own.shape}")
    return Saved(**found)


def _gradients(arithmetic: Arithmetic, tensors: tuple, saved: Saved, options: Options) -> Gradients:
    q, k, v, dout = (np.asarray(tensor) for tensor in tensors)
    if dout.shape != q.shape:
        raise ValueError(f"dout.shape={dout.shape}: must be that of q, {q.shape}")
    scale = arithmetic.accumulate(q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale)
    q_rows = used_rows(q, options.cu_seqlens_q, options.seqused_q)
    k_rows = used_rows(k, options.cu_seqlens_k, options.seqused_k, "seqused_k")
    num_heads, num_heads_k = q.shape[-2], k.shape[-2]
    scores_of = heads_of(options, (len(q_rows), num_heads, q.shape[-3], k.shape[-3]))
    found = Gradients(*(np.full(tensor.shape, np.nan) for tensor in (q, k, v)))

    def operand(tensor, rows, head):
        return arithmetic.round_input(as_float(tensor[*rows, head], arithmetic.accumulate))

    def vector(tensor, rows, head):
        *outer, within = rows
        return as_float(tensor[*outer, head, within], arithmetic.accumulate)

    for b, kv_head in np.ndindex(len(q_rows), num_heads_k):
        of_q, of_k = q_rows[b], k_rows[b]
        keys = operand(k, of_k, kv_head), operand(v, of_k, kv_head)
        dk, dv = (np.zeros(tensor.shape, arithmetic.accumulate) for tensor in keys)
        group = num_heads // num_heads_k
        for head in range(kv_head * group, (kv_head + 1) * group):
            of_head = [operand(tensor, of_q, head) for tensor in (q, dout, saved.out)]
            row_values = [vector(tensor, of_q, head) for tensor in (saved.softmax_lse, saved.dlse)]
            rows = _Rows(*of_head, *row_values)
            dq = _one_head(
                arithmetic.round_p, rows, _Keys(*keys, dk, dv), scores_of(b, head, len(rows.q), len(dk)), scale
            )
            found.dq[*of_q, head] = arithmetic.round_out(dq * scale)
        found.dk[*of_k, kv_head] = arithmetic.round_out(dk * scale)
        found.dv[*of_k, kv_head] = arithmetic.round_out(dv)
    return found


class _Rows(NamedTuple):
    """Of one query head of one sequence."""

    q: np.ndarray
    dout: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    dlse: np.ndarray


class _Keys(NamedTuple):
    """Of one KV head of one sequence, and the sums of their gradients."""

    k: np.ndarray
    v: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def _one_head(round_p: Callable, rows: _Rows, keys: _Keys, head: HeadScores, scale) -> np.ndarray:
    """dQ [n_q, head_dim] of a query head; what it adds to dK and dV is added there. dQ and dK without the scale."""
    dq = np.zeros_like(rows.q)
    shift = (rows.dout * rows.out).sum(axis=1) - rows.dlse
    step = max(1, SCORES_PER_CHUNK // max(1, len(keys.k)))
    for first in range(0, len(dq), step):
        of = slice(first, min(first + step, len(dq)))
        seen, columns = head.seen_keys(of)
        k, v = keys.k[columns], keys.v[columns]
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf and the like must give NaN, quietly
            p = np.exp(rows.q[of] @ k.T * scale - rows.lse[of, None])
            ds = p * (rows.dout[of] @ v.T - shift[of, None])
            if seen is not None:
                p, ds = np.where(seen, p, 0), np.where(seen, ds, 0)
            p, ds = round_p(p), round_p(ds)
            keys.dv[columns] += p.T @ rows.dout[of]
            keys.dk[columns] += ds.T @ rows.q[of]
            dq[of] = ds @ k
    return dq
