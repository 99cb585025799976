"""Attention of PyTorch tensors: flash-attn's functions, with FlashAttention-3's names and signatures.

`from fa3_cute.torch import flash_attn_func`. On a CUDA device they run this library's kernels on the current stream, on
the CPU the reference, slow and exact: models and their tests run on any machine. They are differentiable, and they are
operators of torch (`torch.ops.fa3_cute.forward`, `backward`, `merge_attention`), so that torch.compile, export and fake
tensors take them whole, with dynamic shapes. Needs torch; nothing else in fa3_cute imports it.
"""

from .flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, merge_attention

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "merge_attention"]
