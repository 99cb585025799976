"""Head dims that kernels do not have: filled up with zeros to the next one, which changes no product."""

from torch import Tensor
from torch.nn import functional

from ..contract.formats import DIM_STEP


def columns(head_dim: int) -> int:
    """The next head_dim that kernels have, if any does."""
    return -(-head_dim // DIM_STEP) * DIM_STEP


def padded(x: Tensor, head_dim: int) -> Tensor:
    """With zeros behind the last dimension, up to head_dim; the same tensor where that is its own."""
    more = head_dim - x.shape[-1]
    return functional.pad(x, (0, more)) if more > 0 else x
