"""torch's scaled_dot_product_attention by this library's kernels: an entry in torch's registry of flash attentions.

Once activated, torch's own operators on CUDA run here, in both passes; torch decides which calls are theirs (no
attn_mask, float16 or bfloat16). Results have the strides that torch's meta functions promise: those of q, k and v.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract.status import Status, error_for
from . import ops
from .calls import BackwardCall, ForwardCall
from .flash_attn import _options
from .head_dims import columns, padded

NAME = "FA3_CUTE"


def register_sdpa() -> None:
    """Make "FA3_CUTE" an implementation that torch.nn.attention.activate_flash_attention_impl knows.

    Nothing else changes until that is called; restore_flash_attention_impl() takes it back. Raises FlashAttentionError
    where torch has no such registry.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as error:
        sentence = f"torch {torch.__version__}: must have torch.nn.attention.register_flash_attention_impl, as 2.13 has"
        raise error_for(Status.FEATURE_UNSUPPORTED, sentence) from error
    register_flash_attention_impl(NAME, register_fn=Registration)


class Registration:
    """The operators, replaced until remove()."""

    def __init__(self, key: str = "CUDA"):
        self._library: Any = torch.library.Library("aten", "IMPL", key)
        for name, function in _OPERATORS.items():
            if hasattr(torch.ops.aten, name):
                self._library.impl(name, function, key)

    def remove(self) -> None:
        """Torch's own operators are back."""
        if self._library is not None:
            self._library._destroy()
            self._library = None


class _Forward(NamedTuple):
    """Arguments of aten::_flash_attention_forward; those from scale on are keywords there."""

    query: Tensor
    key: Tensor
    value: Tensor
    cum_seq_q: Tensor | None
    cum_seq_k: Tensor | None
    max_q: int
    max_k: int
    dropout_p: float
    is_causal: bool
    return_debug_mask: bool = False
    scale: float | None = None
    window_size_left: int | None = None
    window_size_right: int | None = None
    seqused_k: Tensor | None = None
    alibi_slopes: Tensor | None = None
    block_table: Tensor | None = None
    num_splits: int | None = None


class _Backward(NamedTuple):
    """Arguments of aten::_flash_attention_backward; those from scale on are keywords there."""

    grad_out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    logsumexp: Tensor
    cum_seq_q: Tensor | None
    cum_seq_k: Tensor | None
    max_q: int
    max_k: int
    dropout_p: float
    is_causal: bool
    rng_state: Tensor
    unused: Tensor
    scale: float | None = None
    window_size_left: int | None = None
    window_size_right: int | None = None


def _refuse(dropout_p: float = 0.0, **arguments) -> None:
    if dropout_p:
        sentence = f"dropout_p={dropout_p}: must be 0, dropout has no gradient here"
        raise error_for(Status.FEATURE_UNSUPPORTED, sentence)
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise error_for(Status.FEATURE_UNSUPPORTED, f"{name}: must be absent")


# ---- [batch, heads, seqlen, head_dim] --------------------------------------------------------------------------------


def _sdpa(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """aten::_scaled_dot_product_flash_attention."""
    sizes = query.shape[2], key.shape[2]
    if is_causal and sizes[0] != sizes[1]:  # torch means the top left corner
        sentence = f"is_causal=True with {sizes[0]} queries and {sizes[1]} keys: must be as many"
        raise error_for(Status.FEATURE_UNSUPPORTED, sentence)
    tensors = [x.transpose(1, 2) for x in (query, key, value)]
    out, lse, *others = _flash(*tensors, None, None, *sizes, dropout_p, is_causal, return_debug_mask, scale=scale)
    return out.transpose(1, 2), lse, None, None, *sizes, *others


def _sdpa_backward(*arguments, scale=None):
    """aten::_scaled_dot_product_flash_attention_backward."""
    tensors = [x.transpose(1, 2) for x in arguments[:5]]
    gradients = _flash_backward(*tensors, arguments[5], None, None, *arguments[8:], scale=scale)
    return tuple(x.transpose(1, 2) for x in gradients)


# ---- [batch, seqlen, heads, head_dim], packed [total, heads, head_dim] -----------------------------------------------


def _flash(*arguments, **options):
    """aten::_flash_attention_forward. What else it returns nobody reads."""
    query = arguments[0]
    out = torch.empty_like(query)
    lse = _flash_into(out, *arguments, **options)
    seed, offset = (torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))
    return out, lse, seed, offset, torch.empty(0, dtype=query.dtype, device=query.device)


def _flash_into(out, *arguments, **options):
    """aten::_flash_attention_forward_no_dropout_inplace: the LSE."""
    given = _Forward(*arguments, **options)
    _refuse(given.dropout_p, return_debug_mask=given.return_debug_mask, alibi_slopes=given.alibi_slopes)
    is_packed, is_paged = given.cum_seq_q is not None, given.block_table is not None
    call = _forward_call(given, given.num_splits or 0)._replace(
        seqused_k=given.seqused_k, page_table=given.block_table, max_seqlen_q=given.max_q if is_packed else 0
    )
    if is_paged:
        call = call._replace(cu_seqlens_k=None)
    wide = _room(out)
    _, lse = ops._implementation(out).forward(call, True, None, wide)
    _cut(out, wide)
    return lse


def _flash_backward(*arguments, **options):
    """aten::_flash_attention_backward: gradients of query, key and value."""
    given = _Backward(*arguments, **options)
    _refuse(given.dropout_p)
    forward = _forward_call(given, 0)._replace(is_deterministic=torch.are_deterministic_algorithms_enabled())
    found = {"dout": _padded(given.grad_out), "out": _padded(given.out), "softmax_lse": given.logsumexp}
    call = BackwardCall.of(forward, **found)
    gradients = [torch.empty_like(x) for x in (given.query, given.key, given.value)]
    wide = tuple(_room(x) for x in gradients)
    ops._implementation(given.query).backward(call, wide)
    for gradient, room in zip(gradients, wide, strict=True):
        _cut(gradient, room)
    return tuple(gradients)


def _forward_call(given: _Forward | _Backward, num_splits: int) -> ForwardCall:
    """What both passes have of it. Without a scale it is that of the true head_dim."""
    window = tuple(-1 if bound is None else bound for bound in (given.window_size_left, given.window_size_right))
    scale = given.query.shape[-1] ** -0.5 if given.scale is None else given.scale
    options = _options(scale, given.is_causal, window, 0, 0.0, num_splits, None, 0)
    q, k, v = (_padded(x) for x in (given.query, given.key, given.value))
    return ForwardCall(q, k, v, cu_seqlens_q=given.cum_seq_q, cu_seqlens_k=given.cum_seq_k, **options)


# ---- head dims that kernels do not have ------------------------------------------------------------------------------


def _padded(x: Tensor) -> Tensor:
    return padded(x, columns(x.shape[-1]))


def _room(x: Tensor) -> Tensor:
    """Where a kernel can write what is to be x: x itself if it can."""
    wide = columns(x.shape[-1])
    return x if wide == x.shape[-1] and x.stride(-1) == 1 else x.new_empty(*x.shape[:-1], wide)


def _cut(x: Tensor, room: Tensor) -> None:
    if room is not x:
        x.copy_(room[..., : x.shape[-1]])


_OPERATORS = {
    "_scaled_dot_product_flash_attention": _sdpa,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _flash,
    "_flash_attention_forward_no_dropout_inplace": _flash_into,
    "_flash_attention_backward": _flash_backward,
}
