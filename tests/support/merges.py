"""Problems of merge_attention on the GPU: tensors in any layout amid poison, what comes out of them, what should."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from fa3_cute import DataType, MergeParams, merge_attention
from fa3_cute.arrays import memory as cuda
from fa3_cute.contract.merge_reference import merge_reference
from fa3_cute.contract.reference import as_float, to_bits

STORED = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32}
# Of a rounded result, relative to it: half a unit in the last place.
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24}
# Of what the weights are off, by the arithmetic of exponents of a few units in FP32, times values of a few units.
SLACK, LSE_SLACK, LSE_ROUNDING = 2e-5, 1e-5, 2.0**-22
DIMS = ("batch", "row", "head")


class Strided:
    """An array on the device, its rows where its strides (batch, row, head) put them, NaN between them.

    image   what lies on the device, one dimension; `array` shows its elements as (batch, rows, heads, ...)
    """

    def __init__(self, values, strides, dtype: str, stream):
        shape = values.shape
        extent = shape[3] if len(shape) == 4 else 1
        size = extent + sum((n - 1) * stride for n, stride in zip(shape[:3], strides, strict=True))
        self.strides, self.dtype, self.stream = strides, dtype, stream
        self.image = np.full(size * np.dtype(STORED[dtype]).itemsize, 0xFF, np.uint8).view(STORED[dtype])
        self.array = self.shown(self.image, shape)
        self.array[...] = values if dtype == "fp32" else to_bits(values, dtype)
        self.buffer = cuda.upload(self.image, stream=stream)

    def shown(self, image, shape):
        """The elements of an image."""
        itemsize = image.itemsize
        inner = (itemsize,) if len(shape) == 4 else ()
        return as_strided(image, shape, (*(stride * itemsize for stride in self.strides), *inner))

    def upload(self) -> None:
        """What the image is now."""
        cuda.upload(self.image, self.buffer, stream=self.stream)

    def poison(self) -> None:
        """NaN in every byte on the device."""
        cuda.fill(self.buffer, 0xFF, stream=self.stream)

    def result(self) -> np.ndarray:
        """Its elements on the device, which must lie amid what was there before."""
        image = cuda.download(self.buffer, self.image.shape, self.image.dtype, stream=self.stream)
        is_own = np.zeros(image.shape, bool)
        self.shown(is_own, self.array.shape)[...] = True
        before = self.image[~is_own].view(np.uint8)
        assert np.array_equal(image[~is_own].view(np.uint8), before), "written outside of the rows"
        return self.shown(image, self.array.shape).copy()

    def fields(self, name: str) -> dict:
        """Of MergeParams."""
        strides = {f"{name}_{dim}_stride": stride for dim, stride in zip(DIMS, self.strides, strict=True)}
        return {name: int(self.buffer.handle), **strides}


@dataclass
class MergeProblem:
    """Inputs and outputs of one call; the arrays of LSEs are (batch, rows, heads), wherever they lie."""

    out_a: Strided
    lse_a: Strided
    out_b: Strided
    lse_b: Strided
    out: Strided
    lse: Strided
    lse_base: float = math.e

    def params(self, **changes) -> MergeParams:
        """The call."""
        batch, rows, heads, head_dim = self.out.array.shape
        tensors: dict[str, Any] = {}
        for name in ("out_a", "lse_a", "out_b", "lse_b", "out", "lse"):
            tensors |= getattr(self, name).fields(name)
        sizes = {"batch_size": batch, "seqlen_q": rows, "num_heads": heads, "head_dim": head_dim}
        types = {"dtype": DataType[self.out_a.dtype.upper()], "out_dtype": DataType[self.out.dtype.upper()]}
        return MergeParams(**tensors | sizes | types | {"lse_base": self.lse_base} | changes)

    def run(self, **changes) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) as they lie in memory."""
        merge_attention(self.params(**changes), self.out.stream).check()
        return self.out.result(), self.lse.result()

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) by the reference, of what the arrays hold now."""
        lses = (self.lse_a.array.swapaxes(1, 2), self.lse_b.array.swapaxes(1, 2))
        out, lse = merge_reference(self.out_a.array, lses[0], self.out_b.array, lses[1], lse_base=self.lse_base)
        return out, lse.swapaxes(1, 2)


def rows_of_all(shape, axis_order: str, pad: int = 0) -> tuple[int, ...]:
    """Strides (batch, row, head) of a tensor (batch, rows, heads, ...) whose dimensions lie in memory in an order like
    "brh", the last one innermost, `pad` elements behind each of its entries."""
    reach = (shape[3] if len(shape) == 4 else 1) + pad
    strides = {}
    for dim in reversed(axis_order):
        strides[dim] = reach
        reach *= shape["brh".index(dim)]
    return tuple(strides[dim] for dim in "brh")


def make_merge(shape, dtypes, stream, orders=("brh", "bhr"), pad=0, seed=0, **options) -> MergeProblem:
    """Random partial results (batch, rows, heads, head_dim) of types (of the parts, of the result).

    orders   of the dimensions of outputs and of LSEs in memory
    Of the rows, 0 saw no key in a, 1 none in b, 2 none at all, and their outputs there are NaN; LSEs of row 3 are far
    apart, those of row 4 large. A problem has as many of these as it has rows.
    """
    rng = np.random.default_rng(seed)
    dtype, out_dtype = dtypes
    parts, lses = rng.standard_normal((2, *shape)).astype(np.float32), rng.standard_normal((2, *shape[:3])) * 4
    lses = lses.astype(np.float32)
    for part, rows in ((0, (0, 2)), (1, (1, 2))):
        for row in rows:
            parts[part, :, row : row + 1] = np.nan
            lses[part, :, row : row + 1] = -np.inf
    lses[0, :, 3:4] += 200
    lses[:, :, 4:5] += 1000
    out_strides, lse_strides = rows_of_all(shape, orders[0], pad), rows_of_all(shape[:3], orders[1])
    tensors = []
    for part, lse in zip(parts, lses, strict=True):
        tensors += [Strided(part, out_strides, dtype, stream), Strided(lse, lse_strides, "fp32", stream)]
    nothing, no_lse = np.full(shape, np.nan, np.float32), np.full(shape[:3], np.nan, np.float32)
    results = Strided(nothing, out_strides, out_dtype, stream), Strided(no_lse, lse_strides, "fp32", stream)
    return MergeProblem(*tensors, *results, **options)


def assert_merged(found, expected, dtype: str) -> None:
    """Results within what FP32 weights and the rounding of the result explain."""
    (out, lse), (right_out, right_lse) = found, expected
    error = np.abs(as_float(out).astype(np.float64) - right_out)
    allowed = ROUNDING[dtype] * np.abs(right_out) + SLACK
    assert (error <= allowed).all(), (
        f"out: {np.count_nonzero(~(error <= allowed))} wrong, first {first(error > allowed)}"
    )
    is_empty = right_lse == -np.inf
    assert np.array_equal(lse == -np.inf, is_empty), "LSE: -inf elsewhere"
    lse_error = np.abs(np.where(is_empty, 0, lse) - np.where(is_empty, 0, right_lse))
    allowed = LSE_ROUNDING * np.where(is_empty, 0, np.abs(right_lse)) + LSE_SLACK
    assert (lse_error <= allowed).all(), f"LSE: worst {np.nanmax(lse_error)}, first {first(lse_error > allowed)}"


def first(is_wrong: np.ndarray) -> list:
    """(batch, row, head, ...) of the first elements that are."""
    return np.argwhere(is_wrong)[:4].tolist()
