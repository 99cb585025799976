"""Backward problems as data, their inputs on the host, what they must give, and the rule that judges it. NumPy only."""

import math
import zlib
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from backward_scores import check_score_gradients, score_arrays
from cases import HEADS, LONG_LENGTHS, Case, Layout
from tolerance import Rule, assert_errors, errors

from fa3_cute.contract.backward_reference import Gradients, Saved, backward_reference, backward_twin
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin, to_bits, used_rows

RULE = Rule(max_factor=2.0, mean_factor=1.5)
POISON = 0xFF  # every byte of rows that nobody uses: a NaN in every format
NAMES = ("dq", "dk", "dv")
OF_QUERIES = ("q", "out", "dout", "dq")

# (seqlen_q, seqlen_k). What each is for:
LENGTHS = (
    (1, 1),  # the smallest problem
    (1, 333),  # one query row over many key tiles
    (64, 128),  # whole tiles only
    (128, 64),  # the reverse
    (63, 65),  # one row off a tile of 64 in each direction
    (65, 63),
    (79, 81),  # and of one of 80
    (81, 79),
    (127, 129),  # and of one of 128
    (129, 127),
    (160, 256),  # whole tiles of 80
    (239, 1),  # one key; causal: 238 rows without any
    (330, 3),  # causal: whole query tiles without a key
    (200, 421),  # neither length a multiple of anything, the diagonal far from tile corners
    (512, 256),  # causal: half of the rows without a key
)
# (mask, seqlen_q, seqlen_k) of windows: what they hide is whole tiles, parts of them, or next to nothing.
WINDOWS = tuple(
    (window, *lengths)
    for window, lengths in (
        ((0, 0), (200, 200)),
        ((0, 0), (70, 300)),  # keys left of every window: their gradients are 0
        ((33, 0), (64, 512)),
        ((64, 0), (300, 300)),
        ((100, 17), (257, 385)),
        ((31, 7), (385, 130)),  # rows above every key
        ((-1, 40), (150, 300)),
        ((-1, 40), (300, 150)),
        ((40, -1), (150, 300)),
        ((40, -1), (300, 150)),
        ((5, 130), (301, 299)),
        ((1000, 1000), (190, 210)),  # hides nothing
    )
)
LAYOUTS = {
    "gaps": Layout((113, 0, 1, 200), (203, 64, 0, 128), before=3, after=5),
    "empty ends": Layout((0, 64, 129, 0), (0, 65, 1, 77)),
    "no queries": Layout((0, 0, 0), (5, 0, 70), after=2),
    "no keys": Layout((7, 0, 133), (0, 0, 0), after=2),
    # As many as the lanes of a warp, which list them (kernels/backward/listed.py).
    # First: keys about half of a tile of 96.
    "of lanes": Layout(
        (70, 40, 65, 130, 20, *(37 * i % 150 for i in range(27))),
        (48, 49, 96, 144, 145, *(53 * i % 210 for i in range(27))),
        before=1,
    ),
    # More than 32: a block's sequence is searched for among 32 at a time.
    "short ones": Layout(tuple(7 * i % 9 for i in range(75)), tuple(11 * i % 13 for i in range(75)), after=1),
    "long one": Layout((1, 700, 64), (3, 650, 128), before=230),
}
# Of a dense batch: (seqlen_q, seqlen_k), used ones; and of the layout "gaps".
USED = ((200, 260), {"seqused_q": (0, 1, 130, 200, 77), "seqused_k": (260, 77, 0, 129, 1)})
USED_OF_GAPS = {"seqused_q": (100, 0, 1, 128), "seqused_k": (203, 64, 0, 65)}


@dataclass(frozen=True)
class BackwardCase:
    """One backward problem. `str(case)` is its test id and seeds its random inputs.

    forward    the call that is differentiated; of packed sequences seqlen_q and seqlen_k are the rows of the tensors
    layout     of LAYOUTS: packed sequences; "": dense
    used       seqused_q, seqused_k as integers
    has_dlse   the LSE has a gradient too
    grad_dtype   of dq, dk and dv: None is that of q, or "fp32"
    accumulates  dk and dv are added to what they hold
    """

    forward: Case
    layout: str = ""
    used: dict[str, tuple[int, ...]] = field(default_factory=dict)
    has_dlse: bool = False
    grad_dtype: str | None = None
    accumulates: bool = False

    @property
    def lengths(self) -> dict[str, Any]:
        """Of cu_seqlens_q, cu_seqlens_k, seqused_q and seqused_k those that the call is given."""
        return {**(LAYOUTS[self.layout].cu_seqlens if self.layout else {}), **self.used}

    @property
    def options(self) -> dict[str, Any]:
        """The reference's options, but for arrays (options_of)."""
        forward = self.forward
        scores = {name: getattr(forward, name) for name in ("softcap", "attention_chunk", "p_dropout")}
        return {"causal": forward.is_causal, "window_size": forward.window, **self.lengths, **scores}

    @property
    def element_of_gradients(self) -> str:
        """The dtype of dq, dk and dv."""
        return self.grad_dtype or self.forward.dtype

    def shape_of(self, tensor: str) -> tuple[int, ...]:
        """Of q, k, v, out, dout or a gradient of q, k and v."""
        of, outer = self.forward, () if self.layout else (self.forward.batch,)
        rows = (of.seqlen_q, of.num_heads) if tensor in OF_QUERIES else (of.seqlen_k, of.num_heads_k)
        return (*outer, *rows, of.head_dim if tensor in ("q", "k", "dq", "dk") else of.dim_v)

    def is_used(self, side: str) -> np.ndarray:
        """[batch, rows], packed [rows], of a side, "q" or "k": whether some sequence uses the row."""
        mask, lengths = np.zeros(self.shape_of(side)[:-2], bool), self.lengths
        for rows in used_rows(mask, lengths.get(f"cu_seqlens_{side}"), lengths.get(f"seqused_{side}")):
            mask[rows] = True
        return mask

    def __str__(self) -> str:
        parts = str(self.forward), self.layout.replace(" ", "_"), "used" * bool(self.used), "dlse" * self.has_dlse
        gradients = f"grad_{self.grad_dtype}" if self.grad_dtype else "", "accumulates" * self.accumulates
        return "-".join(filter(None, parts + gradients))


def backward_cases(head_dim: int) -> list[BackwardCase]:
    """Every mask with every length, layout and used lengths of a head_dim; dtypes, head ratios and dlse in turn, every
    combination of them with each kind of mask."""
    turns = list(product(("bf16", "fp16"), HEADS.values(), (False, True)))
    cases: list[BackwardCase] = []

    def add(mask, seqlen_q: int, seqlen_k: int, batch: int, turn=None, **facts) -> None:
        dtype, (heads, heads_k), has_dlse = turn or turns[7 * len(cases) % len(turns)]
        forward = Case(dtype, head_dim, mask == "causal", heads, heads_k, seqlen_q, seqlen_k, batch)
        if not isinstance(mask, str):
            forward = replace(forward, window=mask)
        cases.append(BackwardCase(forward, has_dlse=has_dlse, **facts))

    for mask in ("full", "causal"):
        for lengths in LENGTHS + LONG_LENGTHS:
            add(mask, *lengths, batch=1 if lengths in LONG_LENGTHS else 2)
    for window, *lengths in WINDOWS:
        add(window, *lengths, batch=2)
    for mask in ("full", "causal", (50, 20)):
        for name, layout in LAYOUTS.items():
            add(mask, layout.total_q, layout.total_k, len(layout.q), layout=name)
        gaps = LAYOUTS["gaps"]
        add(mask, gaps.total_q, gaps.total_k, len(gaps.q), layout="gaps", used=USED_OF_GAPS)
        add(mask, *USED[0], batch=len(USED[1]["seqused_q"]), used=USED[1])
    of_windows = [case for case in cases if case.forward.window != (-1, -1)]
    had = {(case.forward.dtype, case.forward.num_heads, case.has_dlse) for case in of_windows}
    for turn in turns:
        if (turn[0], turn[1][0], turn[2]) not in had:
            add((50, 20), gaps.total_q, gaps.total_k, len(gaps.q), turn, layout="gaps")
    return cases


# What scores are changed with, beyond masks of positions, and what can go wrong with it.
FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 30.0},  # hardly bends the scores of randn
    "flat softcap": {"softcap": 0.5},  # most slopes are next to 0
    "sinks": {"sinks": (0.0, 2.5, -3.0, 5.0, -math.inf)},
    "sinks that take all": {"sinks": (60.0, 1e4, 0.0), "sink_dtype": "bf16"},
    "alibi": {"alibi": "heads"},
    "alibi of sequences": {"alibi": "sequences"},
    "chunks": {"attention_chunk": 100},  # their ends lie within tiles
    "whole chunks": {"attention_chunk": 64},
    "dropout": {"p_dropout": 0.1},
    "heavy dropout": {"p_dropout": 0.6},
    "all but masks": {"softcap": 5.0, "sinks": (1.0,), "alibi": "heads", "attention_chunk": 130, "p_dropout": 0.25},
}
# Masks of dense calls alone: of bytes; added, with every pattern of dimensions that a gradient is summed along.
MASKED: dict[str, dict[str, Any]] = {
    "boolean": {"attn_mask": "bool"},
    "boolean of keys": {"attn_mask": "bool", "mask_dims": "bk", "mask_gap": 3},
    "bias": {"attn_mask": "fp32"},
    "bias of heads": {"attn_mask": "bf16", "mask_dims": "hqk"},
    "bias of sequences": {"attn_mask": "fp16", "mask_dims": "bqk", "mask_gap": 5},
    "bias of scores": {"attn_mask": "fp32", "mask_dims": "qk"},
    "bias of keys": {"attn_mask": "bf16", "mask_dims": "bk"},
    "all": {"softcap": 5.0, "sinks": (1.0, -2.0), "attn_mask": "bf16", "mask_dims": "hqk", "p_dropout": 0.25},
}
FEATURE_LENGTHS = ((200, 200), (130, 289), (257, 90))


def feature_cases(head_dim: int) -> list[BackwardCase]:
    """Every feature with every kind of mask of positions, packed where it may be, with used lengths; lengths, dtypes,
    head ratios and dlse in turn. Then gradients in FP32, and those that are added to, with and without a feature."""
    turns = list(product(("bf16", "fp16"), HEADS.values(), (False, True)))
    cases: list[BackwardCase] = []

    def add(mask, facts: dict, lengths=None, batch: int = 2, **more) -> None:
        dtype, (heads, heads_k), has_dlse = turns[7 * len(cases) % len(turns)]
        lengths = lengths or FEATURE_LENGTHS[len(cases) % len(FEATURE_LENGTHS)]
        forward = Case(dtype, head_dim, mask == "causal", heads, heads_k, *lengths, batch, **facts)
        if not isinstance(mask, str):
            forward = replace(forward, window=mask)
        cases.append(BackwardCase(forward, has_dlse=has_dlse, **more))

    gaps = LAYOUTS["gaps"]
    in_gaps = {"lengths": (gaps.total_q, gaps.total_k), "batch": len(gaps.q), "layout": "gaps"}
    partly = {"lengths": USED[0], "batch": len(USED[1]["seqused_q"]), "used": USED[1]}
    masks = ("full", "causal", (50, 20))
    for number, facts in enumerate((FEATURES | MASKED).values()):
        for mask in masks:
            add(mask, facts)
        add(masks[number % 3], facts, **partly)
    for number, facts in enumerate(FEATURES.values()):
        add(masks[number % 3], facts, **in_gaps)
    for mask in masks:
        add(mask, {}, grad_dtype="fp32")
        for grad_dtype in (None, "fp32"):
            add(mask, {}, accumulates=True, grad_dtype=grad_dtype)
            add(mask, {}, accumulates=True, grad_dtype=grad_dtype, **in_gaps)
    add("causal", MASKED["all"], accumulates=True, grad_dtype="fp32")
    return cases


# Dims that the tables do not have: (dtype, head_dim, head_dim_v, mask, layout or used lengths, seqlen_q, seqlen_k).
# Each pass of selections.backward_dim_configs has two or three, the least columns and the most that a tile may lack.
DIMS = (
    ("bf16", 32, 0, "full", "", 200, 421),
    ("bf16", 64, 32, "full", "", 65, 300),
    ("bf16", 8, 0, "full", "", 129, 127),
    ("fp16", 40, 0, "causal", "gaps", 0, 0),
    ("fp16", 24, 56, "causal", "used", 0, 0),
    ("fp16", 80, 0, "causal", "gaps", 0, 0),
    ("fp16", 72, 88, "causal", "used", 0, 0),
    ("bf16", 112, 0, (50, 20), "", 257, 385),
    ("bf16", 128, 64, (50, 20), "", 300, 150),
    ("bf16", 104, 0, "causal", "gaps", 0, 0),
    ("bf16", 128, 8, "causal", "used", 0, 0),
    ("fp16", 160, 0, "full", "gaps", 0, 0),
    ("fp16", 136, 184, "full", "used", 0, 0),
    ("bf16", 224, 0, "causal", "", 330, 200),
    ("bf16", 64, 256, "causal", "", 127, 129),
    ("bf16", 192, 128, "causal", "", 257, 385),
    ("bf16", 192, 128, "causal", "", 160, 96),
    ("fp16", 160, 96, (50, 20), "gaps", 0, 0),
)


def dim_cases() -> list[BackwardCase]:
    """Of DIMS; head ratios and dlse in turn."""
    turns, cases = list(product(HEADS.values(), (False, True))), []
    for number, (dtype, head_dim, head_dim_v, mask, rows, *lengths) in enumerate(DIMS):
        (heads, heads_k), has_dlse = turns[number % len(turns)]
        facts, batch = {}, 2
        if rows == "gaps":
            gaps = facts["layout"] = rows
            lengths, batch = (LAYOUTS[gaps].total_q, LAYOUTS[gaps].total_k), len(LAYOUTS[gaps].q)
        if rows == "used":
            (lengths, facts["used"]), batch = USED, len(USED[1]["seqused_q"])
        window = {} if isinstance(mask, str) else {"window": mask}
        forward = Case(
            dtype, head_dim, mask == "causal", heads, heads_k, *lengths, batch, head_dim_v=head_dim_v, **window
        )
        cases.append(BackwardCase(forward, has_dlse=has_dlse, **facts))
    return cases


class Inputs(NamedTuple):
    """What `backward` is given, as buffers hold it; rows that no sequence uses are poison.

    q, k, v, dout   of the case's dtype, randn
    out             of the case's dtype: what the forward twin makes
    lse, dlse       float32 [batch, heads, rows], packed [heads, rows]; dlse randn, or None
    scores          s_aux, alibi_slopes, attn_mask and rng_state, those that the case has
    dk, dv          what dk and dv hold before, where they are added to, or None
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    dlse: np.ndarray | None
    scores: dict[str, np.ndarray]
    dk: np.ndarray | None
    dv: np.ndarray | None


def options_of(case: BackwardCase, inputs: Inputs) -> dict[str, Any]:
    """The reference's options."""
    return case.options | inputs.scores


def inputs_of(case: BackwardCase, scale_of_q: float = 1.0, mean_of_v: float = 0.0) -> Inputs:
    """Randn of the case; peaky rows with a larger q, a D that cancels with a mean of v."""
    rng, dtype = np.random.default_rng(zlib.crc32(str(case).encode())), case.forward.dtype
    used_q, used_k = case.is_used("q"), case.is_used("k")

    def randn(shape, is_used, scale=1.0, mean=0.0):
        return _poisoned(to_bits(mean + scale * rng.standard_normal(shape, np.float32), dtype), ~is_used)

    q, dout = randn(case.shape_of("q"), used_q, scale_of_q), randn(case.shape_of("dout"), used_q)
    k, v = randn(case.shape_of("k"), used_k), randn(case.shape_of("v"), used_k, mean=mean_of_v)
    scores = score_arrays(case.forward, rng)
    out, lse = low_precision_twin(q, k, v, dtype, **case.options, **scores)
    lse = lse.astype(np.float32)
    unused = np.broadcast_to(~used_q[..., None, :], lse.shape)
    dlse = _poisoned(rng.standard_normal(lse.shape, np.float32), unused) if case.has_dlse else None
    out, before = _poisoned(to_bits(out, dtype), ~used_q), [None, None]
    if case.accumulates:
        held = [rng.standard_normal(case.shape_of(name), np.float32) for name in ("dk", "dv")]
        before = [_poisoned(to_bits(array, case.element_of_gradients), ~used_k) for array in held]
    return Inputs(q, k, v, dout, out, _poisoned(lse, unused), dlse, scores, *before)


def _poisoned(array: np.ndarray, where: np.ndarray) -> np.ndarray:
    array[where] = np.frombuffer(bytes([POISON]) * array.itemsize, array.dtype)[0]
    return array


def expected_of(case: BackwardCase, inputs: Inputs) -> tuple[Gradients, Gradients]:
    """(reference, twin) of what the inputs hold; the twin from their out and LSE."""
    tensors, dtype = (inputs.q, inputs.k, inputs.v, inputs.dout), case.forward.dtype
    added = Saved(dlse=inputs.dlse, dk=inputs.dk, dv=inputs.dv)
    saved, options = replace(added, out=inputs.out, softmax_lse=inputs.lse), options_of(case, inputs)
    reference = backward_reference(*tensors, added, **options)
    return reference, backward_twin(*tensors, dtype, saved, grad_dtype=case.grad_dtype, **options)


def check_gradients(dq, dk, dv, reference: Gradients, twin: Gradients, rule: Rule = RULE) -> None:
    """Judge gradients, as buffers hold them (BF16 as bits); None: not wanted. For each of them

        max|got - reference| <= 2 max|twin - reference| + 1e-5    and of the means 1.5 and 1e-6,

    NaN exactly where the reference has it: in rows that no sequence uses. Keys that no row sees get exactly 0.
    """
    for name, got, exact, rounded in zip(NAMES, (dq, dk, dv), reference, twin, strict=True):
        if got is None:
            continue
        values = as_float(got, np.float64)
        assert_errors(rule, *errors(values, exact, rounded), f" ({name})")
        if name != "dq":
            # Dropout may drop all that sees a key: its dv alone is then 0.
            assert_zeros(name, values, (reference.dv == 0).all(axis=-1) & (reference.dk == 0).all(axis=-1))


def check_case(case: BackwardCase, inputs: Inputs, dq, dk, dv, expected=None, d_s_aux=None, d_bias=None) -> None:
    """Judge the gradients of a case, likewise; and rows that see no key get a dq of exactly 0. `expected` is that of
    expected_of, if it is known."""
    expected = expected or expected_of(case, inputs)
    check_gradients(dq, dk, dv, *expected)
    check_score_gradients(inputs.scores, d_s_aux, d_bias, *expected, RULE)
    if dq is not None:
        sees_none = np.isinf(_lse_of_keys(case, inputs)).swapaxes(-1, -2) & case.is_used("q")[..., None]
        assert_zeros("dq", as_float(dq, np.float64), sees_none)


def _lse_of_keys(case: BackwardCase, inputs: Inputs) -> np.ndarray:
    """The LSE without sinks: infinite of rows that see no key."""
    if "s_aux" not in inputs.scores:
        return inputs.lse
    return attention_reference(*inputs[:3], **options_of(case, inputs) | {"s_aux": None})[1]


def assert_zeros(name: str, values: np.ndarray, where: np.ndarray) -> None:
    """[.., row, head]: these vectors are 0."""
    wrong = np.argwhere(where & (values != 0).any(axis=-1))
    assert not len(wrong), (
        f"{name}: {len(wrong)} rows [.., row, head] should be 0 and are not, first {wrong[:4].tolist()}"
    )
