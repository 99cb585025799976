"""Descales in memory: `descale(name, shape)` functions for make_problem, which return a Tensor of [batch, heads]."""

import zlib

import numpy as np
from images import Image, Tensor

# Real values of Q and K that make scores of a few units, and of V whose heads differ by orders of magnitude.
RANGES = {"q": (0.5, 2.0), "k": (0.5, 2.0), "v": (1 / 16, 16.0)}


def spread(name: str, shape) -> np.ndarray:
    """FP32 values, evenly spread over the logarithms of a tensor's range and shuffled: no two alike."""
    low, high = np.log(RANGES[name])
    steps = np.linspace(low, high, max(2, int(np.prod(shape))))
    order = np.random.default_rng(zlib.crc32(f"{name}{shape}".encode())).permutation(len(steps))
    return np.exp(steps[order][: int(np.prod(shape))]).astype(np.float32).reshape(shape)


def _placed(name: str, shape, image: Image, part: np.ndarray) -> Tensor:
    """A part of an image, filled, as a tensor of a shape that it broadcasts to; what it leaves of the image is NaN."""
    part[...] = spread(name, part.shape)
    return image.tensor(part if part.shape == shape else np.broadcast_to(part, shape))


def per_batch_and_head(name, shape) -> Tensor:
    """Contiguous."""
    image = Image(shape, "fp32")
    return _placed(name, shape, image, image.whole)


def per_head(name, shape) -> Tensor:
    """Batch stride 0."""
    image = Image((1, shape[1]), "fp32")
    return _placed(name, shape, image, image.whole)


def per_batch(name, shape) -> Tensor:
    """Head stride 0."""
    image = Image((shape[0], 1), "fp32")
    return _placed(name, shape, image, image.whole)


def for_all(name, shape) -> Tensor:
    """Strides 0 and 0."""
    image = Image((1, 1), "fp32")
    return _placed(name, shape, image, image.whole)


def heads_first(name, shape) -> Tensor:
    """[head, batch] in memory."""
    image = Image(shape[::-1], "fp32")
    return _placed(name, shape, image, image.whole.T)


def spaced(name, shape) -> Tensor:
    """Every third row and every fifth column of a larger array, aligned to 4 bytes and no more."""
    image = Image((3 * shape[0], 5 * shape[1] + 1), "fp32")
    return _placed(name, shape, image, image.whole[1::3, 1::5])


def spaced_heads(name, shape) -> Tensor:
    """A head stride of 7, the batch stride 0."""
    image = Image((1, 7 * shape[1]), "fp32")
    return _placed(name, shape, image, image.whole[:, ::7])


def different(name, shape) -> Tensor:
    """Of a kind of its own for each of q, k and v."""
    return {"q": per_head, "k": heads_first, "v": per_batch}[name](name, shape)


def fixed(**values: float):
    """Given values of q, k and v, for all sequences and heads."""

    def descale(name, shape) -> Tensor:
        tensor = for_all(name, shape)
        tensor.image.whole[...] = values[name]
        return tensor

    return descale


def only(name: str):
    """Descales of one tensor: the others have none."""
    return lambda tensor, shape: per_batch_and_head(tensor, shape) if tensor == name else None


LAYOUTS = {
    "for all": for_all,
    "per head": per_head,
    "per batch": per_batch,
    "per batch and head": per_batch_and_head,
    "heads first": heads_first,
    "spaced": spaced,
    "spaced heads": spaced_heads,
    "different": different,
    "only q": only("q"),
    "only k": only("k"),
    "only v": only("v"),
}
