"""The operators on a CUDA device: calls of `forward`, `backward` and `merge_attention` on torch's current stream.

All memory is torch's. What is allocated and used on one stream needs no events; in a capture of a CUDA graph it comes
from the graph's own pool, so that each graph has its own workspaces and counters.
"""

import threading
from typing import Any

import torch
from torch import Tensor

from .. import api
from ..arrays.call import ANY_ADDRESS
from ..arrays.words import refusal
from ..contract.merge import MergeParams
from ..contract.plain import plain
from ..contract.status import Problem
from ..planning.operations import checked, operation_of
from .calls import (
    FIELDS,
    NUM_TENSORS,
    OUT_DTYPE,
    BackwardCall,
    ForwardCall,
    MergeCall,
    Update,
    backward_params,
    forward_params,
    key_of,
    lse_shape,
    merge_params,
    new_merged,
    out_shape,
    require_tensors,
)

MAX_PLANS = 512  # that a thread remembers; the next one starts anew
BYTES_PER_COUNTER = 32  # of split-KV's workspace, which goes with an eighth of its bytes of tile_counter
TMA_BYTES = 16
READ_BY_TMA = 5  # of a BackwardCall: dout, q, k, v and out
_NOTHING = (None, None)


class Plan:
    """A call that was checked: what it needs, and its params, of which only addresses change.

    optional   (place in the call, field) of the tensors that not every call has; updates, those of the Update
    is_idle    nothing is to be done: there are no queries, and nothing is appended
    out, lse   (shape, strides) of the results: torch.empty_strided is quicker than torch.empty
    """

    __slots__ = "params", "optional", "updates", "is_idle", "out", "out_dtype", "lse", "workspace_bytes", "num_counters"

    def __init__(self, call: ForwardCall, update: Update | None = None, out: Tensor | None = None):
        self.params = forward_params(call, update) if out is None else forward_params(call, update, out=out)
        shape = checked(plain(self.params))
        if isinstance(shape, Problem):
            raise refusal(shape)
        self.optional = tuple((place, name) for place, name in _places(call) if place >= len("qkv"))
        self.updates = () if update is None else _places(update)
        self.is_idle = not call.q.numel() and (update is None or update.k_new is None)
        self.out, self.lse = _contiguous(out_shape(call.q, call.v)), _contiguous(lse_shape(call.q))
        self.out_dtype = OUT_DTYPE.get(call.q.dtype, call.q.dtype)
        self.workspace_bytes = 0 if self.is_idle else operation_of(shape).workspace_bytes
        self.num_counters = max(1, -(-self.workspace_bytes // BYTES_PER_COUNTER))


def _contiguous(shape: tuple) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, strides)."""
    return tuple(shape), torch.empty(shape, device="meta").stride()


def _places(call: Any) -> tuple[tuple[int, str], ...]:
    """(place in the call, field of the params) of the tensors that are given."""
    names: tuple[str, ...] = type(call)._fields[: NUM_TENSORS[type(call)]]
    return tuple((place, FIELDS.get(name, name)) for place, name in enumerate(names) if call[place] is not None)


class BackwardPlan:
    """As Plan, of a backward pass into these gradients; without any, `gradients` are those of new ones."""

    __slots__ = "params", "optional", "workspace_bytes", "gradients", "has_unused_rows"

    def __init__(self, call: BackwardCall, *gradients: Tensor):
        self.params = backward_params(call, *gradients)
        self.workspace_bytes = api.backward_workspace_size(self.params)
        self.optional = _places(call)
        self.gradients = [_contiguous(x.shape) for x in (call.q, call.k, call.v)]
        self.has_unused_rows = any(x is not None for x in (call.cu_seqlens_q, call.seqused_q, call.seqused_k))


class _Thread(threading.local):
    """A thread's plans, whose params are filled in and used at once; by key_of their calls."""

    def __init__(self):
        self.plans: dict[tuple, Plan] = {}
        self.backward_plans: dict[tuple, BackwardPlan] = {}


_thread = _Thread()


def forward(
    call: ForwardCall, wants_lse: bool = True, update: Update | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(out, LSE) of `fa3_cute::forward`, or of `update_forward`, which writes to k and v; None for an LSE that is not
    wanted.

    out   where the result goes, of any strides; None: a new contiguous tensor
    """
    plan: Plan | None = _known_plan(_thread.plans, call, update, out)
    if plan is None:
        call, update = _with_unit_strides(call, update)
        plan = _plan_of(call, Plan, _thread.plans, update, out)
    q, k, v, *_ = call
    device = q.device
    to: Tensor = torch.empty_strided(*plan.out, dtype=plan.out_dtype, device=device) if out is None else out
    lse = torch.empty_strided(*plan.lse, dtype=torch.float32, device=device) if wants_lse else None
    if plan.is_idle:
        return to, lse
    params = plan.params
    params.q, params.k, params.v, params.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), to.data_ptr()
    params.softmax_lse = None if lse is None else lse.data_ptr()
    _set_addresses(params, plan.optional, call)
    if update is not None:
        _set_addresses(params, plan.updates, update)
        if not to.numel():
            params.q = params.out = ANY_ADDRESS
    _launch(q, _forward, plan)
    return to, lse


def _with_unit_strides(call: ForwardCall, update: Update | None) -> tuple[ForwardCall, Update | None]:
    """The same; tensors whose last dimension is not contiguous are copied, but for those that are written."""
    if call.q_v is not None:
        call = call._replace(q_v=_with_unit_stride(call.q_v))
    if update is not None:
        q, new_k, new_v = call.q, update.k_new, update.v_new
        if all(x is None or x.stride(-1) == 1 for x in (q, new_k, new_v)):
            return call, update
        new_k, new_v = (x if x is None else _with_unit_stride(x) for x in (new_k, new_v))
        return call._replace(q=_with_unit_stride(q)), update._replace(k_new=new_k, v_new=new_v)
    q, k, v, *_ = call
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        call = call._replace(q=_with_unit_stride(q), k=_with_unit_stride(k), v=_with_unit_stride(v))
    return call, update


def _forward(plan: Plan, device: torch.device, stream: int) -> None:
    params = plan.params
    workspace = counters = None
    if plan.workspace_bytes:
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
        params.workspace, params.workspace_bytes = workspace.data_ptr(), plan.workspace_bytes
    if torch.cuda.is_current_stream_capturing():  # else the library's, of the stream
        counters = torch.zeros(plan.num_counters, dtype=torch.int32, device=device)
    params.tile_counter = None if counters is None else counters.data_ptr()
    status = api.forward(params, stream)
    if status:
        status.check()


def backward(call: BackwardCall, gradients: tuple[Tensor, ...] | None = None) -> tuple[Tensor | None, ...]:
    """dq, dk and dv of `fa3_cute::backward`, 0 in rows that no sequence uses; and d_s_aux, None without s_aux.

    gradients   where dq, dk and dv go, of any strides; None: new contiguous tensors
    """
    given = gradients or ()
    plan: BackwardPlan | None = _known_plan(_thread.backward_plans, call, *given)
    if plan is None or any(x.data_ptr() % TMA_BYTES for x in call[:READ_BY_TMA]):
        call = call._replace(
            **{name: _for_tma(getattr(call, name)) for name in BackwardCall._fields[:READ_BY_TMA]},
            softmax_lse=call.softmax_lse.contiguous(),
            dlse=None if call.dlse is None else call.dlse.contiguous(),
        )
        plan = _plan_of(call, BackwardPlan, _thread.backward_plans, *given)
    if gradients is None:
        q = call.q
        gradients = tuple([torch.empty_strided(*layout, dtype=q.dtype, device=q.device) for layout in plan.gradients])
    has_queries = call.q.numel() > 0
    if not has_queries or plan.has_unused_rows:
        for gradient in gradients:
            gradient.zero_()
    params = plan.params
    _set_addresses(params, plan.optional, call)
    params.dq, params.dk, params.dv = [x.data_ptr() for x in gradients]
    s_aux, d_s_aux = call.s_aux, None
    if s_aux is not None:  # in float32 at first; without queries it is 0
        d_s_aux = torch.zeros(s_aux.shape, dtype=torch.float32, device=s_aux.device)
        params.d_s_aux = d_s_aux.data_ptr()
    if has_queries:
        _launch(call.q, _backward, plan)
    if s_aux is not None and d_s_aux is not None:
        d_s_aux = d_s_aux.to(s_aux.dtype)
    return *gradients, d_s_aux


def _backward(plan: BackwardPlan, device: torch.device, stream: int) -> None:
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
    plan.params.workspace, plan.params.workspace_bytes = workspace.data_ptr() or None, plan.workspace_bytes
    api.backward(plan.params, stream).check()


def merge(call: MergeCall) -> tuple[Tensor, Tensor]:
    """(out, LSE) of `fa3_cute::merge_attention`."""
    call = call._replace(out_a=_for_tma(call.out_a), out_b=_for_tma(call.out_b))
    params = merge_params(call)
    out, lse = new_merged(call)
    params.out_a, params.lse_a, params.out_b, params.lse_b = [x.data_ptr() for x in call]
    params.out, params.lse = out.data_ptr(), lse.data_ptr()
    if out.numel():
        _launch(out, _merge, params)
    return out, lse


def _merge(params: MergeParams, device: torch.device, stream: int) -> None:
    api.merge_attention(params, stream).check()


# ---- tensors, devices, plans -----------------------------------------------------------------------------------------


def _launch(x: Tensor, call, what) -> None:
    """call(what, device, stream) with the tensor's device made current, and its current stream: the handle of a default
    stream does not say which device is meant."""
    device = x.device
    if device.index == _current_device():
        call(what, device, _current_stream(device.index))
        return
    with torch.cuda.device(device):
        call(what, device, _current_stream(device.index))


# As torch.cuda.current_device() and current_stream(index).cuda_stream; its compiled code calls these two as well.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)  # a torch without CUDA has neither
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _set_addresses(params: Any, places: tuple[tuple[int, str], ...], call: Any) -> None:
    for place, field in places:
        setattr(params, field, call[place].data_ptr())


def _plan_of(call, kind: type, plans: dict, *more: Any):
    """The plan of such calls; raises what is wrong with this one.

    more   an Update, and tensors that are written, or None
    """
    try:
        key = _key(call, more)
        found = plans.get(key)
    except (AttributeError, TypeError):  # no tensor, or a value that cannot be hashed: the rules put it into words
        for part in (call, *(x for x in more if isinstance(x, Update))):
            require_tensors(part)
        return kind(call, *more)
    if found is None:
        found = kind(call, *more)
        if len(plans) >= MAX_PLANS:
            plans.clear()
        plans[key] = found
    return found


def _known_plan(plans: dict, call, *more: Any):
    """As _plan_of, if there is one; None for a call that has something wrong, too."""
    try:
        return plans.get(_key(call, more))
    except (AttributeError, TypeError):
        return None


def _key(call, more: tuple) -> tuple:
    if not more or more == _NOTHING:
        return key_of(call)
    return key_of(call), *(x if x is None else key_of(x) if isinstance(x, Update) else _facts(x) for x in more)


def _facts(x: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, x.device


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _for_tma(x: Tensor) -> Tensor:
    """The tensor, copied if TMA cannot read it: autograd hands over gradients of any strides, expanded ones too."""
    *strides, last = x.stride()
    multiple = TMA_BYTES // x.element_size()
    can_be_read = last == 1 and x.data_ptr() % TMA_BYTES == 0
    if can_be_read and all(stride > 0 and stride % multiple == 0 for stride in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)
