"""Attention of JAX arrays under jit and grad: `from fa3_cute.jax import attention`.

On a CUDA device a call is a foreign function of XLA that enqueues this library's kernels on XLA's own stream, chosen
from the shapes as `forward` chooses them: nothing is compiled per shape, and the kernels' cache on disk is used. On the
CPU it is the reference, slow and exact. Needs jax.
"""

from .traced import attention

__all__ = ["attention"]
