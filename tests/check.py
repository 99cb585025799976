"""Run a forward problem on the GPU and judge the result: poisoned memory, the tolerance rule, numbers on failure."""
import zlib
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from fa3_cute import DataType, FlashAttentionParams, forward
from fa3_cute import device as cuda
from fa3_cute.reference import as_float, attention_reference, low_precision_twin, to_bits

# All ones: a NaN in FP16, BF16 and FP32, and no value that a kernel computes (its NaN is 0x7FFF, 0x7FFFFFFF).
POISON = 0xFF
GUARD_BYTES = 64 << 10
STORAGE = {"fp16": np.dtype(np.float16), "bf16": np.dtype(np.uint16), "fp32": np.dtype(np.float32)}
DATA_TYPES = {"fp16": DataType.FP16, "bf16": DataType.BF16}

MAX_FACTOR, MAX_SLACK = 2.0, 1e-5
MEAN_FACTOR, MEAN_SLACK = 1.5, 1e-6
LSE_TOLERANCE = 1e-4


# ---- device memory -------------------------------------------------------------------------------------------------

class Image:
    """A block of device memory, poisoned but for the tensors placed in it, and its image on the host.

    `whole` is a NumPy array over the host image, `guard` bytes from either end. Any NumPy view of it (a slice, a
    transposition, a broadcast) is a tensor of the block: `tensor(view)` gives it the same address and strides there.
    """

    def __init__(self, shape, dtype: str, guard: int = GUARD_BYTES):
        nbytes = prod(shape) * STORAGE[dtype].itemsize
        self.host = np.full(guard + nbytes + guard, POISON, np.uint8)
        self.whole = self.host[guard:guard + nbytes].view(STORAGE[dtype]).reshape(shape)
        self.buffer = cuda.allocate(self.host.size)

    def tensor(self, view: np.ndarray) -> "Tensor":
        return Tensor(self, view)

    def upload(self) -> None:
        cuda.upload(self.host, self.buffer)

    def download(self, stream) -> np.ndarray:
        return cuda.download(self.buffer, self.host.shape, np.uint8, stream=stream)


@dataclass(frozen=True)
class Tensor:
    """A view of an image's host array, standing for the same bytes on the device."""
    image: Image
    array: np.ndarray

    @property
    def offset(self) -> int:
        return self.array.__array_interface__["data"][0] - self.image.host.__array_interface__["data"][0]

    @property
    def address(self) -> int:
        return cuda.address(self.image.buffer, self.offset)

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements."""
        return tuple(stride // self.array.itemsize for stride in self.array.strides)

    def poison(self, stream=None) -> None:
        """Fill the whole block (at once, or on `stream`): what the kernel has not written afterwards is NaN."""
        cuda.fill(self.image.buffer, POISON, stream=stream)

    def read(self, stream) -> np.ndarray:
        """The tensor on the device after the work on `stream`; asserts that all bytes around it are still poison."""
        after = self.image.download(stream)
        view = np.ndarray(self.array.shape, self.array.dtype, after, self.offset, self.array.strides)
        values = view.copy()
        view.view(np.uint8)[...] = POISON
        touched = np.flatnonzero(after != POISON)
        assert not touched.size, (f"{touched.size} bytes written outside the output, the first at "
                                  f"{touched[0] - self.offset} bytes from its start")
        return values

    def is_untouched(self, stream) -> bool:
        return bool((self.image.download(stream) == POISON).all())


def contiguous(name: str, shape, dtype: str) -> Tensor:
    """A C-contiguous tensor between guard bands."""
    image = Image(shape, dtype)
    return image.tensor(image.whole)


# ---- problems ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Problem:
    """A case with its tensors on the device. `lse` is None if the case wants none."""
    case: object
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor | None
    softmax_scale: float | None = None

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        return self.q.array, self.k.array, self.v.array

    @property
    def options(self) -> dict:
        """The reference's options."""
        return {"causal": self.case.is_causal, "softmax_scale": self.softmax_scale}

    def upload(self) -> None:
        """Bring the inputs to the device and poison the outputs."""
        for image in {id(t.image): t.image for t in (self.q, self.k, self.v)}.values():
            image.upload()
        for tensor in (self.out, self.lse):
            if tensor is not None:
                tensor.poison()


def make_problem(case, place=contiguous, softmax_scale=None) -> Problem:
    """A problem of randn inputs, seeded by the case's name, uploaded. `place(name, shape, dtype)` lays a tensor out."""
    q_shape = (case.batch, case.seqlen_q, case.num_heads, case.head_dim)
    k_shape = (case.batch, case.seqlen_k, case.num_heads_k, case.head_dim)
    q, k, v, out = (place(name, shape, case.dtype) for name, shape in
                    (("q", q_shape), ("k", k_shape), ("v", k_shape), ("out", q_shape)))
    lse = contiguous("lse", (case.batch, case.num_heads, case.seqlen_q), "fp32") if case.has_lse else None
    problem = Problem(case, q, k, v, out, lse, softmax_scale)
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    for array in problem.inputs:
        if array.flags.writeable:  # a broadcast view has its data already
            array[...] = to_bits(rng.standard_normal(array.shape, np.float32), case.dtype)
    problem.upload()
    return problem


def params_of(problem: Problem, **overrides) -> FlashAttentionParams:
    """The problem as a call. Strides are given only where a tensor is not C-contiguous: the defaults are used too."""
    case = problem.case
    tensors = {"q": problem.q, "k": problem.k, "v": problem.v, "out": problem.out}
    strides = {f"{name}_{dim}_stride": stride for name, tensor in tensors.items() if not tensor.array.flags.c_contiguous
               for dim, stride in zip(("batch", "row", "head"), tensor.strides, strict=False)}
    fields = {
        **{name: tensor.address for name, tensor in tensors.items()},
        "softmax_lse": problem.lse and problem.lse.address,
        "batch_size": case.batch, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k,
        "num_heads": case.num_heads, "num_heads_k": case.num_heads_k, "head_dim": case.head_dim,
        "dtype": DATA_TYPES[case.dtype], "is_causal": case.is_causal, "softmax_scale": problem.softmax_scale,
        **strides,
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
    """Judge a result by the tolerance rule against the reference and the twin of the problem's inputs."""
    ref, ref_lse = attention_reference(*problem.inputs, **problem.options)
    twin, _ = low_precision_twin(*problem.inputs, problem.case.dtype, **problem.options)
    assert_out(as_float(out, np.float64), ref, twin)
    if lse is not None:
        assert_lse(lse, ref_lse, lse_rtol)


def run_and_check(problem: Problem, stream, lse_rtol: float = 0.0) -> None:
    check(problem, *run(problem, stream), lse_rtol)


def with_lse(case, has_lse: bool):
    """The same case with or without LSE."""
    return replace(case, has_lse=has_lse)


# ---- the tolerance rule --------------------------------------------------------------------------------------------

def assert_out(out: np.ndarray, ref: np.ndarray, twin: np.ndarray) -> None:
    """max|out-ref| <= 2 max|twin-ref| + 1e-5, mean|out-ref| <= 1.5 mean|twin-ref| + 1e-6; NaN exactly where ref is."""
    _assert_same_places("NaN", np.isnan(out), np.isnan(ref))
    known = ~np.isnan(ref)
    if not known.any():
        return
    error, twin_error = np.abs(out - ref), np.abs(twin - ref)[known]
    limit = MAX_FACTOR * twin_error.max() + MAX_SLACK
    mean_limit = MEAN_FACTOR * twin_error.mean() + MEAN_SLACK
    worst = np.unravel_index(np.argmax(np.where(known, error, -1)), error.shape)
    bad_rows = np.unique(np.argwhere(known & (error > limit))[:, :-1], axis=0)
    assert error[worst] <= limit and error[known].mean() <= mean_limit, (
        f"out: max error {error[worst]:.3e} (limit {limit:.3e}, twin {twin_error.max():.3e}), "
        f"mean error {error[known].mean():.3e} (limit {mean_limit:.3e}, twin {twin_error.mean():.3e}); worst at "
        f"{tuple(int(i) for i in worst)}: {out[worst]:.6g}, expected {ref[worst]:.6g}; "
        f"{len(bad_rows)} rows [batch, row, head] beyond the limit, first {bad_rows[:4].tolist()}")


def assert_lse(lse: np.ndarray, ref: np.ndarray, rtol: float = 0.0) -> None:
    """|lse-ref| <= 1e-4 + rtol |ref|; NaN exactly where ref is NaN, -inf exactly where ref is -inf."""
    _assert_same_places("LSE NaN", np.isnan(lse), np.isnan(ref))
    _assert_same_places("LSE -inf", lse == -np.inf, ref == -np.inf)
    with np.errstate(invalid="ignore"):
        excess = np.where(np.isfinite(ref), np.abs(lse - ref) - rtol * np.abs(ref), 0)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= LSE_TOLERANCE, (
        f"LSE at {tuple(int(i) for i in worst)} [batch, head, row]: {lse[worst]:.7g}, expected {ref[worst]:.7g}; "
        f"{np.count_nonzero(excess > LSE_TOLERANCE)} of {excess.size} beyond {LSE_TOLERANCE}")


def _assert_same_places(what: str, got: np.ndarray, expected: np.ndarray) -> None:
    differ = np.argwhere(got != expected)
    assert not len(differ), (
        f"{what}: {np.count_nonzero(got)} places, expected {np.count_nonzero(expected)}; "
        f"{len(differ)} differ, first {differ[:4].tolist()}")
