"""The operators on the CPU: the reference, rounded once; what a device would refuse is refused here too. By NumPy."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..api import backward_workspace_size
from ..arrays.call import refusal
from ..contract.backward_reference import Saved, backward_reference
from ..contract.merge_reference import merge_reference
from ..contract.plain import plain
from ..contract.reference import attention_reference
from ..contract.rows import used_rows
from ..contract.status import Problem
from ..planning.operations import checked
from .calls import NUM_TENSORS, OUT_DTYPE, BackwardCall, ForwardCall, MergeCall, backward_params, forward_params
from .calls import lse_shape, merge_params, out_shape, require_tensors

BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}  # of what NumPy does not have
# Arguments that the reference does not have: they choose kernels, or are of the other pass.
_CHOICES = ("max_seqlen_q", "num_splits", "pack_gqa", "sm_margin", "is_deterministic")


def forward(call: ForwardCall, wants_lse: bool = True) -> tuple[Tensor, Tensor]:
    """(out, LSE) of `fa3_cute::forward`, always both; NaN in rows that no sequence uses."""
    require_tensors(call)
    call = call._replace(**{name: _with_unit_stride(getattr(call, name)) for name in "qkv"})
    found = checked(plain(forward_params(call)))
    if isinstance(found, Problem):
        raise refusal(found)
    q = call.q
    dtype = OUT_DTYPE.get(q.dtype, q.dtype)
    if not q.numel():
        return q.new_empty(out_shape(q, call.v), dtype=dtype), q.new_empty(lse_shape(q), dtype=torch.float32)
    out, lse = attention_reference(*map(_numbers, call[:3]), **_options(call))
    return torch.from_numpy(out).to(dtype), torch.from_numpy(lse).float()


def backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of `fa3_cute::backward`; 0 in rows that no sequence uses."""
    call = call._replace(**{name: _with_unit_stride(getattr(call, name)) for name in ("dout", "q", "k", "v", "out")})
    q, k, v = call.q, call.k, call.v
    backward_workspace_size(backward_params(call._replace(dout=call.dout.contiguous())))  # raises what a device would
    zeros = [torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v)]
    if not (q.numel() and k.numel()):
        return zeros[0], zeros[1], zeros[2]
    options = _options(call.differentiated)
    dlse = None if call.dlse is None else _numbers(call.dlse)
    saved = Saved(_numbers(call.out), _numbers(call.softmax_lse), dlse)
    wanted = ("causal", "window_size", "softmax_scale", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    given = {name: options[name] for name in wanted if name in options}
    gradients = backward_reference(_numbers(q), _numbers(k), _numbers(v), _numbers(call.dout), saved, **given)
    for zero, gradient, of in zip(zeros, gradients, "qkk", strict=True):
        lengths = (options.get(f"cu_seqlens_{of}"), options.get(f"seqused_{of}"))
        for rows in used_rows(gradient, *lengths):
            zero[rows] = torch.from_numpy(gradient[rows]).to(zero.dtype)
    return zeros[0], zeros[1], zeros[2]


def merge(call: MergeCall) -> tuple[Tensor, Tensor]:
    """(out, LSE) of `fa3_cute::merge_attention`."""
    merge_params(call)
    out, lse = merge_reference(*map(_numbers, call))
    return torch.from_numpy(out).to(call.out_a.dtype), torch.from_numpy(lse).float()


def _options(call: ForwardCall) -> dict[str, Any]:
    """Of the reference: what is given."""
    given = {name: value for name, value in call._asdict().items() if value is not None and name not in _CHOICES}
    for name in ForwardCall._fields[: NUM_TENSORS[ForwardCall]]:
        if name in given:
            given[name] = _numbers(given[name])
    window_size = given.pop("window_size_left"), given.pop("window_size_right")
    given |= {"causal": given.pop("is_causal"), "window_size": window_size}
    return {name: value for name, value in given.items() if name not in "qkv"}


def _numbers(x: Tensor) -> np.ndarray:
    """The tensor as number_formats.py reads arrays: of BF16 and FP8 their bits."""
    x = x.detach()
    bits = BITS.get(x.dtype)
    if bits is None:
        return x.numpy()
    array = x.view(bits).numpy()
    return array.view(np.uint16) if bits is torch.int16 else array


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
