"""Run a forward problem on the GPU and judge the result: poisoned memory, the tolerance rule, numbers on failure."""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from cases import FP8
from images import POISON, Tensor, contiguous
from score_inputs import score_inputs, score_options, score_params
from tolerance import Rule, assert_errors, assert_lse, errors, score_errors

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin, to_bits, used_rows


DATA_TYPES = {"fp16": DataType.FP16, "bf16": DataType.BF16, FP8: DataType.FP8_E4M3, "fp32": DataType.FP32}

RULE_16_BIT = Rule(max_factor=2.0, mean_factor=1.5)
# The twin rounds P relative to the row's maximum, a kernel relative to the maximum so far or of its split: elsewhere.
# And the sums of products, of which WGMMA keeps about 14 bits if these are FP8, the twin keeps in FP32.
RULE_FP8 = Rule(max_factor=4.0, mean_factor=3.0)
LSE_TOLERANCE = 1e-4
# A sequence of as many elements of out is judged by itself; fewer are too few for the rule's statistics.
JUDGED_ALONE = 1024
# With at most as many queries, the reference takes its time to read K and V: once for all the heads that share them.
FEW_QUERIES = 16

# The reference takes most of the tests' time. NumPy lets go of the interpreter's lock in all that is long.
# As many threads as there are cores for this process; pytest-xdist runs several.
POOL = ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


@dataclass(frozen=True)
class Problem:
    """A case with its tensors on the device, dense or packed.

    q, k, v, out   [batch, rows, heads, head_dim], packed [rows, heads, head_dim]
    lse            [batch, heads, rows], packed [heads, rows]; None if the case wants none
    lengths        those of cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k that the call is given, by name
    descales       those of q_descale, k_descale, v_descale, by name: FP32 [batch, heads] of any strides
    scores         s_aux, alibi_slopes, attn_mask, rng_state, those that the case has
    q_v            [.., heads, head_dim_v] beside q, where the case has it
    exact_scores   FP8's scores need so few bits that the LSE is judged as that of 16-bit inputs
    """

    case: object
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor | None
    softmax_scale: float | None = None
    lengths: dict[str, Tensor] = field(default_factory=dict)
    descales: dict[str, Tensor] = field(default_factory=dict)
    exact_scores: bool = False
    scores: dict[str, Tensor] = field(default_factory=dict)
    q_v: Tensor | None = None

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        return self.q.array, self.k.array, self.v.array

    @property
    def options(self) -> dict:
        """The reference's options."""
        return {
            "causal": self.case.is_causal,
            "window_size": self.case.window,
            "softmax_scale": self.softmax_scale,
            **({"q_v": self.q_v.array} if self.q_v else {}),
            **{name: tensor.array for name, tensor in (self.lengths | self.descales).items()},
            **score_options(self.case, self.scores),
        }

    def options_of(self, heads: slice, kv_heads: slice) -> dict:
        """The reference's options for some of the heads."""
        columns = {name: heads if name[0] == "q" else kv_heads for name in self.descales}
        of_heads = {name: self.descales[name].array[:, part] for name, part in columns.items()}
        of_heads |= {"q_v": self.q_v.array[..., heads, :]} if self.q_v else {}
        return self.options | of_heads | score_options(self.case, self.scores, heads)

    def sequences(self, side: str) -> list[tuple]:
        """Per sequence, the index of its used rows in the tensors of a side, "q" or "k"."""
        tensor = self.q if side == "q" else self.k
        return used_rows(tensor.array, *(self.options.get(f"{name}_{side}") for name in ("cu_seqlens", "seqused")))

    def is_used(self, side: str) -> np.ndarray:
        """[batch, rows], packed [rows]: whether some sequence uses the row."""
        tensor = self.q if side == "q" else self.k
        mask = np.zeros(tensor.array.shape[:-2], bool)
        for rows in self.sequences(side):
            mask[rows] = True
        return mask

    def upload(self) -> None:
        """Bring all that is read to the device and poison the outputs."""
        inputs = (
            self.q,
            *[self.q_v] * (self.q_v is not None),
            self.k,
            self.v,
            *(self.lengths | self.descales | self.scores).values(),
        )
        for image in {id(tensor.image): tensor.image for tensor in inputs}.values():
            image.upload()
        self.poison_outputs()

    def poison_outputs(self, stream=None) -> None:
        """At once, or on `stream`."""
        for tensor in (self.out, self.lse):
            if tensor is not None:
                tensor.poison(stream)


def make_problem(case, place=contiguous, softmax_scale=None, lengths=None, descale=None) -> Problem:
    """A problem of randn inputs, seeded by the case's name, uploaded. `place(name, shape, dtype)` lays a tensor out.

    lengths   the problem's `lengths` as integers; with cu_seqlens, case.seqlen_q and seqlen_k are the packed rows and
              case.batch the sequences. Rows that no sequence uses are poisoned.
    descale   `descale(name, shape)` gives the tensor of q_descale, k_descale or v_descale, or None for ones
    """
    lengths = lengths or {}
    outer = () if "cu_seqlens_q" in lengths else (case.batch,)
    q_shape = (*outer, case.seqlen_q, case.num_heads, case.head_dim)
    k_shape = (*outer, case.seqlen_k, case.num_heads_k, case.head_dim)
    v_shape, out_shape = (*k_shape[:-1], case.dim_v), (*q_shape[:-1], case.dim_v)
    q, k, v, out = (
        place(name, shape, dtype)
        for name, shape, dtype in (
            ("q", q_shape, case.dtype),
            ("k", k_shape, case.stored),
            ("v", v_shape, case.stored),
            ("out", out_shape, case.element_out),
        )
    )
    if case.is_mla:
        v = k.image.tensor(k.array[..., : case.dim_v])
    lse = contiguous("lse", (*outer, case.num_heads, case.seqlen_q), "fp32") if case.has_lse else None
    on_device = {name: contiguous(name, (len(values),), "int32") for name, values in lengths.items()}
    for name, tensor in on_device.items():
        tensor.array[...] = lengths[name]
    descales = {
        f"{name}_descale": descale(name, (case.batch, heads))
        for name, heads in (("q", case.num_heads), ("k", case.num_heads_k), ("v", case.num_heads_k))
        if descale
    }
    descales = {name: tensor for name, tensor in descales.items() if tensor}
    scores = score_inputs(case) if case.has_score_options else {}
    q_v = place("q_v", out_shape, case.dtype) if case.has_qv else None
    problem = Problem(case, q, k, v, out, lse, softmax_scale, on_device, descales, scores=scores, q_v=q_v)
    rngs = np.random.default_rng(zlib.crc32(str(case).encode())).spawn(4)
    if q_v:
        fill(q_v.array, case.dtype, rngs[3], problem.is_used("q"))
    list(
        POOL.map(
            lambda array, dtype, rng, side: fill(array, dtype, rng, problem.is_used(side)),
            problem.inputs[: 2 if case.is_mla else 3],
            (case.dtype, case.stored, case.stored),
            rngs[:3],
            "qkk",
        )
    )
    problem.upload()
    return problem


def fill(array: np.ndarray, dtype: str, rng, is_used: np.ndarray) -> None:
    """Randn in the used rows, NaN in the others."""
    if array.flags.writeable:  # a broadcast view has its data already
        array[...] = to_bits(rng.standard_normal(array.shape, np.float32), dtype)
        array[~is_used] = poison_of(array.dtype)


def poison_of(dtype: np.dtype):
    """One poisoned element."""
    return np.frombuffer(bytes([POISON]) * dtype.itemsize, dtype)[0]


def packed_problem(family, layout, place=contiguous, used=None, descale=None, **changes) -> Problem:
    """The sequences of a Layout as a problem of a family of cases; `used`: seqused_q, seqused_k as integers."""
    case = replace(family, batch=len(layout.q), seqlen_q=layout.total_q, seqlen_k=layout.total_k, **changes)
    return make_problem(case, place, lengths={**layout.cu_seqlens, **(used or {})}, descale=descale)


def params_of(problem: Problem, **overrides) -> FlashAttentionParams:
    """The problem as a call. Strides are given only where a tensor is not C-contiguous: the defaults are used too."""
    case = problem.case
    tensors = {"q": problem.q, "k": problem.k, "v": problem.v, "out": problem.out}
    tensors |= {"q_v": problem.q_v} if problem.q_v else {}
    is_packed = problem.q.array.ndim == 3
    dims = ("row", "head") if is_packed else ("batch", "row", "head")
    strides = {
        f"{name}_{dim}_stride": stride
        for name, tensor in tensors.items()
        if not tensor.array.flags.c_contiguous
        for dim, stride in zip(dims, tensor.strides, strict=False)
    }
    for name, tensor in problem.descales.items():
        strides |= dict(zip((f"{name}_batch_stride", f"{name}_head_stride"), tensor.strides, strict=True))
    sizes = (
        {"mode": AttentionMode.VARLEN_PREFILL, "total_q": case.seqlen_q, "total_k": case.seqlen_k}
        if is_packed
        else {"seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    )
    fields = {
        **{name: tensor.address for name, tensor in (tensors | problem.lengths).items()},
        **{f"{name}_ptr": tensor.address for name, tensor in problem.descales.items()},
        "softmax_lse": problem.lse and problem.lse.address,
        "batch_size": case.batch,
        **sizes,
        "num_heads": case.num_heads,
        "num_heads_k": case.num_heads_k,
        "head_dim": case.head_dim,
        "head_dim_v": case.head_dim_v,
        "dtype": DATA_TYPES[case.dtype],
        "out_dtype": case.out_dtype and DATA_TYPES[case.out_dtype],
        "kv_dtype": DATA_TYPES[case.kv_dtype] if case.kv_dtype else None,
        "is_causal": case.is_causal,
        "softmax_scale": problem.softmax_scale,
        **dict(zip(("window_size_left", "window_size_right"), case.window, strict=True)),
        **strides,
        **score_params(case, problem.scores),
    }
    return FlashAttentionParams(**{**fields, **overrides})


def results(problem: Problem, stream) -> tuple[np.ndarray, np.ndarray | None]:
    """(out as its bits, LSE or None) after the work on `stream`, the memory around both checked."""
    return problem.out.read(stream), problem.lse and problem.lse.read(stream)


def run(problem: Problem, stream, **overrides) -> tuple[np.ndarray, np.ndarray | None]:
    """`forward` the problem on `stream`; returns `results`."""
    forward(params_of(problem, **overrides), stream).check()
    return results(problem, stream)


def check(problem: Problem, out: np.ndarray, lse: np.ndarray | None, lse_rtol: float = 0.0) -> None:
    """Judge a result by the tolerance rule against the reference and the twin of the problem's inputs.

    Given lengths, each sequence is judged by itself (the short ones together), and rows of none must still be poison.
    Of FP8 each head of each sequence, in units of its v_descale.
    """
    check_all(problem, {"": (out, lse)}, lse_rtol)


def check_all(problem: Problem, by_name: dict[str, tuple], lse_rtol: float = 0.0) -> None:
    """`check` several results, (out, LSE) each, of the same inputs; a failure says the name of the one that fails."""
    case, (q, k, v) = problem.case, problem.inputs
    group = case.num_heads // case.num_heads_k
    step = group if case.seqlen_q <= FEW_QUERIES else 1
    groups = [slice(head, head + step) for head in range(0, case.num_heads, step)]
    kv_heads = [slice(heads.start // group, heads.start // group + 1) for heads in groups]
    inputs = [
        (q[..., heads, :], k[..., kv_head, :], v[..., kv_head, :])
        for heads, kv_head in zip(groups, kv_heads, strict=True)
    ]
    options = [problem.options_of(*pair) for pair in zip(groups, kv_heads, strict=True)]
    rounding = {"out_dtype": case.out_dtype} if case.out_dtype else {}
    twins = [
        POOL.submit(low_precision_twin, *arrays, case.dtype, **own, **rounding)
        for arrays, own in zip(inputs, options, strict=True)
    ]
    unit = unit_of_out(problem)

    def judge(index: int):
        ref, ref_lse = attention_reference(*inputs[index], **options[index])
        twin, _ = twins[index].result()
        return [
            errors(as_float(out[..., groups[index], :], np.float64), ref, twin, unit[..., groups[index], :])
            for out, _ in by_name.values()
        ], ref_lse

    judged, ref_lse = zip(*POOL.map(judge, range(len(groups))), strict=True)
    ref_lse = np.concatenate(ref_lse, axis=-2)
    rule, lse_tolerance = RULE_16_BIT, LSE_TOLERANCE
    if case.dtype == FP8:
        rule, lse_tolerance = RULE_FP8, LSE_TOLERANCE + (0.0 if problem.exact_scores else score_errors(problem))
    for (name, (out, lse)), per_group in zip(by_name.items(), zip(*judged, strict=True), strict=True):
        error, twin_error = (np.concatenate(parts, axis=-2) for parts in zip(*per_group, strict=True))
        with noted(name):
            if problem.lengths:
                assert_poison_outside(problem, out, lse)
            for part, rows in judged_parts(problem):
                assert_errors(rule, error[rows], twin_error[rows], part)
            if lse is not None:
                assert_lse(lse, ref_lse, lse_tolerance, lse_rtol)


@contextmanager
def noted(note: str):
    """Add a note to the failure of an assertion within."""
    try:
        yield
    except AssertionError as error:
        if note:
            error.add_note(note)
        raise


def judged_parts(problem: Problem):
    """(name, index of it in out) of what is judged by itself: all of a dense problem, or long sequences; of FP8 their
    heads, since a descale may make one much smaller than another."""
    case, is_fp8 = problem.case, problem.case.dtype == FP8
    if not problem.lengths and not is_fp8:
        yield "", ...
        return
    heads = range(case.num_heads) if is_fp8 else [slice(None)]
    short_ones = np.zeros(problem.q.array.shape[:-2], bool)
    for b, rows in enumerate(problem.sequences("q")):
        if (rows[-1].stop - rows[-1].start) * (case.num_heads // len(heads)) * case.dim_v < JUDGED_ALONE:
            short_ones[rows] = True
        else:
            yield from ((f" of sequence {b}" + f", head {head}" * is_fp8, (*rows, head)) for head in heads)
    yield " of the short sequences", short_ones


def unit_of_out(problem: Problem) -> np.ndarray:
    """[batch, rows, heads, 1], packed [rows, heads, 1]: in what errors of out are measured, v_descale if given."""
    unit = np.ones((*problem.q.array.shape[:-1], 1), np.float32)
    if "v_descale" in problem.descales:
        per_kv_head = problem.descales["v_descale"].array
        per_kv_head = np.where(per_kv_head == 0, 1, np.abs(per_kv_head))
        per_head = np.repeat(per_kv_head, problem.case.num_heads // problem.case.num_heads_k, axis=1)
        for rows, units in zip(problem.sequences("q"), per_head, strict=True):
            unit[rows] = units[:, None]
    return unit


def assert_poison_outside(problem: Problem, out: np.ndarray, lse: np.ndarray | None) -> None:
    """Every bit of the rows of out and LSE that no sequence uses is as it was."""
    unused = ~problem.is_used("q")
    rows = {"out": out[unused]} | ({} if lse is None else {"LSE": np.moveaxis(lse, -2, -1)[unused]})
    for name, array in rows.items():
        is_written = np.ascontiguousarray(array).view(np.uint8) != POISON
        written = is_written.any(axis=tuple(range(1, is_written.ndim)))
        assert not written.any(), (
            f"{name}: {np.count_nonzero(written)} rows written that no sequence uses, the "
            f"first {np.argwhere(unused)[written][:4].tolist()}"
        )


def run_and_check(problem: Problem, stream, lse_rtol: float = 0.0) -> None:
    check(problem, *run(problem, stream), lse_rtol)


def run_each_and_check(problem: Problem, stream, variants: list[dict], lse_rtol: float = 0.0) -> None:
    """`forward` the problem with each of these overrides of its params, over poisoned outputs; judge each result."""
    by_name = {}
    for overrides in variants:
        problem.poison_outputs(stream)
        by_name[str(overrides)] = run(problem, stream, **overrides)
    check_all(problem, by_name, lse_rtol)


def assert_same_bits(got, expected) -> None:
    """Of two results, or two parts of results."""
    for a, b in zip(got, expected, strict=True):
        assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def assert_out(out: np.ndarray, ref: np.ndarray, twin: np.ndarray, rule: Rule = RULE_16_BIT) -> None:
    """The tolerance rule for an output that has no Problem."""
    assert_errors(rule, *errors(out, ref, twin))
