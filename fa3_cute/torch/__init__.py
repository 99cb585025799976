"""Attention of PyTorch tensors: flash-attn's functions, with FlashAttention-3's names and signatures.

`from fa3_cute.torch import flash_attn_func`. On a CUDA device they run this library's kernels on the current stream, on
the CPU the reference, slow and exact: models and their tests run on any machine. They are differentiable, and they are
operators of torch (`torch.ops.fa3_cute.forward`, `backward`, `merge_attention`), so that torch.compile, export and fake
tensors take them whole, with dynamic shapes. `register_sdpa` makes them an implementation of torch's own
scaled_dot_product_attention. Needs torch; of fa3_cute only huggingface.py imports it too.
"""

from .flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, merge_attention
from .sdpa import register_sdpa

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "merge_attention", "register_sdpa"]
