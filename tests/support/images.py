"""Blocks of device memory with an image on the host, poisoned around the tensors placed in them; and layouts."""

from dataclasses import dataclass
from math import prod

import numpy as np
from cases import FP8

from fa3_cute.arrays import memory as cuda


# All ones: a NaN in every format, and no value that a kernel computes (its NaN is 0x7FFF, 0x7FFFFFFF).
POISON = 0xFF
GUARD_BYTES = 64 << 10
STORAGE = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    FP8: np.dtype(np.uint8),
    "fp32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.uint8),
}


class Image:
    """A block of device memory, poisoned but for the tensors placed in it, and its image on the host.

    `whole` is a NumPy array over the host image, `guard` bytes from either end. Any NumPy view of it (a slice, a
    transposition, a broadcast) is a tensor of the block: `tensor(view)` gives it the same address and strides there.
    """

    def __init__(self, shape, dtype: str, guard: int = GUARD_BYTES):
        nbytes = prod(shape) * STORAGE[dtype].itemsize
        self.host = np.full(guard + nbytes + guard, POISON, np.uint8)
        self.whole = self.host[guard : guard + nbytes].view(STORAGE[dtype]).reshape(shape)
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
        assert not touched.size, (
            f"{touched.size} bytes written outside the output, the first at "
            f"{touched[0] - self.offset} bytes from its start"
        )
        return values

    def is_untouched(self, stream) -> bool:
        return bool((self.image.download(stream) == POISON).all())


# ---- layouts: place(name, shape, dtype) functions for make_problem -------------------------------------------------


def contiguous(name: str, shape, dtype: str) -> Tensor:
    """C-contiguous, between guard bands."""
    image = Image(shape, dtype)
    return image.tensor(image.whole)


def padded(name: str, shape, dtype: str) -> Tensor:
    """Gaps (poisoned) after every batch, row, head and vector; the base and rows aligned to 16 bytes and no more."""
    gaps = (1, 3, 2, 16 // STORAGE[dtype].itemsize)[-len(shape) :]
    image = Image([n + gap for n, gap in zip(shape, gaps, strict=True)], dtype, guard=GUARD_BYTES + 16)
    return image.tensor(image.whole[tuple(slice(n) for n in shape)])


def heads_before_rows(name: str, shape, dtype: str) -> Tensor:
    """[batch, head, row, head_dim] in memory, or [head, row, head_dim]."""
    *outer, rows, heads, head_dim = shape
    image = Image((*outer, heads, rows, head_dim), dtype)
    return image.tensor(image.whole.swapaxes(-3, -2))
