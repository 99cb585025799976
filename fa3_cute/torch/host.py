"""The operators on the CPU: the reference, rounded once; what a device would refuse is refused here too. By NumPy."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..api import backward_workspace_size
from ..arrays.append import updated_on_host
from ..arrays.host import OTHER_ADDRESS
from ..arrays.words import refusal
from ..contract.backward_reference import OPTIONS, Saved, backward_reference
from ..contract.merge_reference import merge_reference
from ..contract.plain import plain
from ..contract.reference import attention_reference
from ..contract.rows import used_rows
from ..contract.status import Problem
from ..planning.operations import checked
from .calls import NUM_TENSORS, OUT_DTYPE, BackwardCall, ForwardCall, MergeCall, Update, backward_params
from .calls import forward_params, lse_shape, merge_params, out_shape, require_tensors

BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}  # of what NumPy does not have
# Arguments that the reference does not have: they choose kernels, or are of the other pass.
_CHOICES = ("max_seqlen_q", "num_splits", "pack_gqa", "sm_margin", "is_deterministic")


def forward(
    call: ForwardCall, wants_lse: bool = True, update: Update | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, LSE) of `fa3_cute::forward` or `update_forward`, always both; NaN in rows that no sequence uses.

    out   where the result goes; None: a new tensor
    """
    require_tensors(call)
    call = call._replace(
        **{name: _with_unit_stride(getattr(call, name)) for name in ("qkv" if update is None else "q")},
        q_v=None if call.q_v is None else _with_unit_stride(call.q_v),
    )
    if update is not None:
        require_tensors(update)
    params = forward_params(call, update, **({} if out is None else {"out": out}))
    if call.k.numel() and call.v.data_ptr() != call.k.data_ptr():
        params.v = OTHER_ADDRESS
    found = checked(plain(params))
    if isinstance(found, Problem):
        raise refusal(found)
    q, k, v = map(_numbers, call[:3])
    options = _options(call)
    if update is not None:
        q, options = updated_on_host((q, k, v), options | _options(update))
    dtype = OUT_DTYPE.get(call.q.dtype, call.q.dtype)
    to: Tensor = torch.empty(out_shape(call.q, call.v), dtype=dtype) if out is None else out
    if not q.size:
        return to, call.q.new_empty(lse_shape(call.q), dtype=torch.float32)
    exact, lse = attention_reference(q, k, v, **options)
    return to.copy_(torch.from_numpy(exact)), torch.from_numpy(lse).float()


def backward(call: BackwardCall, gradients: tuple[Tensor, ...] | None = None) -> tuple[Tensor | None, ...]:
    """dq, dk and dv of `fa3_cute::backward`, 0 in rows that no sequence uses; and d_s_aux, None without s_aux.

    gradients   where dq, dk and dv go; None: new tensors
    """
    call = call._replace(**{name: _with_unit_stride(getattr(call, name)) for name in ("dout", "q", "k", "v", "out")})
    q, k, v = call.q, call.k, call.v
    called = backward_params(call._replace(dout=call.dout.contiguous()), *(gradients or ()))
    backward_workspace_size(called)  # raises what a device would
    if gradients is None:
        gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for gradient in gradients:
        gradient.zero_()
    d_s_aux = None if call.s_aux is None else torch.zeros_like(call.s_aux)
    if not q.numel():
        return *gradients, d_s_aux
    options = _options(call.differentiated)
    dlse = None if call.dlse is None else _numbers(call.dlse)
    saved = Saved(_numbers(call.out), _numbers(call.softmax_lse), dlse)
    given = {name: options[name] for name in OPTIONS if name in options}
    exact = backward_reference(_numbers(q), _numbers(k), _numbers(v), _numbers(call.dout), saved, **given)
    for gradient, wide, of in zip(gradients, exact, "qkk", strict=True):
        lengths = (options.get(f"cu_seqlens_{of}"), options.get(f"seqused_{of}"))
        for rows in used_rows(wide, *lengths):
            gradient[rows] = torch.from_numpy(wide[rows]).to(gradient.dtype)
    return *gradients, d_s_aux if d_s_aux is None else d_s_aux.copy_(torch.from_numpy(exact.d_s_aux))


def merge(call: MergeCall) -> tuple[Tensor, Tensor]:
    """(out, LSE) of `fa3_cute::merge_attention`."""
    merge_params(call)
    out, lse = merge_reference(*map(_numbers, call))
    return torch.from_numpy(out).to(call.out_a.dtype), torch.from_numpy(lse).float()


def _options(call: ForwardCall | Update) -> dict[str, Any]:
    """Of the reference: what is given."""
    given = {name: value for name, value in call._asdict().items() if value is not None and name not in _CHOICES}
    for name in call._fields[: NUM_TENSORS[type(call)]]:
        if name in given:
            given[name] = _numbers(given[name])
    if isinstance(call, Update):
        return given
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
