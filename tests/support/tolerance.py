"""The tolerance rule: how far from float64 a result may lie, in terms of the distance of the low-precision twin."""

from dataclasses import dataclass

import numpy as np

from fa3_cute.contract.reference import as_float

# What the scores of an FP8 row, and so its LSE, may be off, times the largest |q| |k|. WGMMA adds 32 products and the
# sum so far, each cut to 13 bits below the largest of them. The cuts are towards zero: those of positive and negative
# products cancel but for about two units, 2^-13 of the largest; it takes two to four steps; and the largest is mostly
# far below |q| |k|. Computed that way in NumPy, the LSE of randn comes to 0.7 of this. For scores of a few units, where
# |q| |k| is about 12, it is 0.003, for scores of 30 about 0.02. A product that outweighs the rest may cost more.
FP8_SCORE_ERROR = 2.0**-12


@dataclass(frozen=True)
class Rule:
    """max|out-ref| <= max_factor max|twin-ref| + max_slack, and the same of the means."""

    max_factor: float
    mean_factor: float
    max_slack: float = 1e-5
    mean_slack: float = 1e-6


def errors(out: np.ndarray, ref: np.ndarray, twin: np.ndarray, unit=1.0) -> tuple[np.ndarray, np.ndarray]:
    """|out - ref| and |twin - ref| in a unit, as float32.

    NaN where ref is, as it should be; +inf where only out is NaN (or is infinite), -inf where only ref is.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        error, twin_error = ((np.abs(x - ref) / unit).astype(np.float32) for x in (out, twin))
    is_nan, should_be = np.isnan(out), np.isnan(ref)
    error[is_nan & ~should_be] = np.inf
    error[should_be & ~is_nan] = -np.inf
    return error, twin_error


def assert_errors(rule: Rule, error: np.ndarray, twin_error: np.ndarray, part: str = "") -> None:
    """The rule for what `errors` returned, and NaN exactly where ref is NaN; `part` names a part of the output."""
    known = ~np.isnan(error)
    if not known.any():
        return
    wrong_kind = np.argwhere(np.isinf(error))
    assert not len(wrong_kind), (
        f"out{part}: {np.count_nonzero(error == np.inf)} elements are NaN or infinite and should not be, "
        f"{np.count_nonzero(error == -np.inf)} should be NaN and are not, first {wrong_kind[:4].tolist()}"
    )
    twin_max, twin_mean = twin_error[known].max(), twin_error[known].mean(dtype=np.float64)
    limit, mean_limit = rule.max_factor * twin_max + rule.max_slack, rule.mean_factor * twin_mean + rule.mean_slack
    worst = np.unravel_index(np.nanargmax(error), error.shape)
    mean = error[known].mean(dtype=np.float64)
    assert error[worst] <= limit and mean <= mean_limit, (
        f"out{part}: max error {error[worst]:.3e} (limit {limit:.3e}, twin {twin_max:.3e}), mean error {mean:.3e} "
        f"(limit {mean_limit:.3e}, twin {twin_mean:.3e}); worst at {tuple(int(i) for i in worst)}; "
        f"rows [.., row, head] beyond the limit: {np.unique(np.argwhere(error > limit)[:, :-1], axis=0)[:4].tolist()}"
    )


def assert_lse(lse: np.ndarray, ref: np.ndarray, tolerance, rtol: float = 0.0) -> None:
    """|lse-ref| <= tolerance (a number, or one per row) + rtol |ref|; NaN and -inf exactly where ref is."""
    _assert_same_places("LSE NaN", np.isnan(lse), np.isnan(ref))
    _assert_same_places("LSE -inf", lse == -np.inf, ref == -np.inf)
    tolerance = np.broadcast_to(tolerance, ref.shape)
    with np.errstate(invalid="ignore"):
        excess = np.where(np.isfinite(ref), np.abs(lse - ref) - rtol * np.abs(ref) - tolerance, -np.inf)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, (
        f"LSE at {tuple(int(i) for i in worst)} [batch, head, row]: {lse[worst]:.7g}, expected {ref[worst]:.7g}; "
        f"{np.count_nonzero(excess > 0)} of {excess.size} beyond {tolerance[worst]:.3g}"
    )


def _assert_same_places(what: str, got: np.ndarray, expected: np.ndarray) -> None:
    differ = np.argwhere(got != expected)
    assert not len(differ), (
        f"{what}: {np.count_nonzero(got)} places, expected {np.count_nonzero(expected)}; "
        f"{len(differ)} differ, first {differ[:4].tolist()}"
    )


def score_errors(problem) -> np.ndarray:
    """[batch, heads, rows], packed [heads, rows]: what the scores and the LSE of an FP8 problem's rows may be off."""
    case = problem.case
    q_rows, k_rows = problem.sequences("q"), problem.sequences("k")
    q_descale, k_descale = (
        problem.descales[name].array if name in problem.descales else np.ones((len(q_rows), 1))
        for name in ("q_descale", "k_descale")
    )
    factor = FP8_SCORE_ERROR * (case.head_dim**-0.5 if problem.softmax_scale is None else problem.softmax_scale)
    most = np.zeros(problem.q.array.shape[:-1])
    for b, (q, k) in enumerate(zip(q_rows, k_rows, strict=True)):
        q_norm = np.linalg.norm(as_float(problem.q.array[q]), axis=-1) * q_descale[b]
        k_norm = np.linalg.norm(as_float(problem.k.array[k]), axis=-1) * k_descale[b]
        k_norm = np.max(k_norm, axis=0, initial=0, where=~np.isnan(k_norm))
        most[q] = factor * q_norm * np.repeat(k_norm, case.num_heads // case.num_heads_k)
    return most.swapaxes(-1, -2)
