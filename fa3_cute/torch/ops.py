"""The operators `fa3_cute::forward`, `backward` and `merge_attention` of torch, and how eager calls spare them.

The dispatcher costs a call of so many arguments about as much as all else, and has words of its own for what is wrong:
tensors that nobody watches go past it. In graphs, under modes and for other tensors the operator stands.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..contract.formats import HEAD_DIMS
from ..contract.status import Status, error_for
from . import device, host
from .calls import OUT_DTYPE, BackwardCall, ForwardCall, MergeCall, Update, lse_shape, new_merged, out_shape, schema

_library = torch.library.Library("fa3_cute", "DEF")


def _define(name: str, kind, results: int, on_host, on_device, fake) -> None:
    """One operator; implementations take a call of this kind."""
    _library.define(name + schema(kind, results=results), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, lambda *args, **options: on_host(kind(*args, **options)), "CPU")
    _library.impl(name, lambda *args, **options: on_device(kind(*args, **options)), "CUDA")
    torch.library.register_fake(
        f"fa3_cute::{name}", lambda *args, **options: fake(kind(*args, **options)), lib=_library
    )


def _new_results(call: ForwardCall) -> tuple[Tensor, Tensor]:
    q = call.q
    out = torch.empty(out_shape(q, call.v), dtype=OUT_DTYPE.get(q.dtype, q.dtype), device=q.device)
    return out, torch.empty(lse_shape(q), dtype=torch.float32, device=q.device)


def _new_gradients(call: BackwardCall) -> tuple[Tensor | None, ...]:
    tensors = call.q, call.k, call.v, call.s_aux
    return tuple(x if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)


def _with_all_results(backward):
    """An operator has as many results in every call: that of sinks which are not given is empty."""

    def run(call: BackwardCall) -> tuple[Tensor, ...]:
        *gradients, d_s_aux = backward(call)
        return *gradients, call.q.new_empty(0) if d_s_aux is None else d_s_aux

    return run


def _define_update() -> None:
    """`fa3_cute::update_forward`: the arguments of forward, then those of an Update; it writes to k and v."""
    _library.define(
        "update_forward" + schema(ForwardCall, Update, results=2, written=("k", "v")),
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    count = len(ForwardCall._fields)

    def split(args, options) -> tuple[ForwardCall, Update]:
        new = {name: options.pop(name) for name in Update._fields if name in options}
        return ForwardCall(*args[:count], **options), Update(*args[count:], **new)

    def implementation(forward):
        def run(*args, **options):
            call, update = split(args, options)
            return forward(call, True, update)

        return run

    _library.impl("update_forward", implementation(host.forward), "CPU")
    _library.impl("update_forward", implementation(device.forward), "CUDA")
    torch.library.register_fake(
        "fa3_cute::update_forward", implementation(lambda call, *_: _new_results(call)), lib=_library
    )


_define("forward", ForwardCall, 2, host.forward, device.forward, _new_results)
_define("backward", BackwardCall, 4, *map(_with_all_results, (host.backward, device.backward, _new_gradients)))
_define("merge_attention", MergeCall, 2, host.merge, device.merge, new_merged)
_define_update()


# ---- autograd --------------------------------------------------------------------------------------------------------

# What backward does not differentiate (contract/backward_rules.py).
_NOT_DIFFERENTIATED = ("page_table", "kv_batch_idx", "leftpad_k", "q_v")
_DIFFERENTIATED = (torch.float16, torch.bfloat16)


def require_differentiable(call: ForwardCall) -> None:
    """Raise where backward would, before forward has run: a sentence that names the argument."""
    q, k = call.q, call.k
    if not (call.page_table is call.kv_batch_idx is call.leftpad_k is call.q_v is None):
        name = next(name for name in _NOT_DIFFERENTIATED if getattr(call, name) is not None)
        _refuse(f"{_ARGUMENTS.get(name, name)}: must be None where a gradient is asked for")
    if q.dtype not in _DIFFERENTIATED:
        _refuse(f"q is {q.dtype}: must be float16 or bfloat16 where a gradient is asked for")
    if k.dtype != q.dtype:
        _refuse(f"k is {k.dtype}: must be {q.dtype}, as q is, where a gradient is asked for")
    if q.shape[-1] > HEAD_DIMS[-1]:
        _refuse(f"head_dim={q.shape[-1]}: must be at most {HEAD_DIMS[-1]} where a gradient is asked for")
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is None:
        _refuse("cu_seqlens_k=None: must be given with cu_seqlens_q where a gradient is asked for")


def _refuse(what: str) -> None:
    sentence = f"{what}: backward has no kernel for it yet; or call under torch.no_grad()"
    raise error_for(Status.FEATURE_UNSUPPORTED, sentence)


def _save(ctx: Any, call: ForwardCall, results: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*call[:7], call.s_aux, *results)
    bounds = call.window_size_left, call.window_size_right, call.attention_chunk
    ctx.options = call.softmax_scale, call.is_causal, *bounds, call.softcap, call.is_deterministic


def _backward_call(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> BackwardCall:
    q, k, v, *others, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return BackwardCall._make((dout, q, k, v, out, lse, dlse, *others, *ctx.options))


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    call = _backward_call(ctx, dout, dlse)
    *gradients, d_s_aux = torch.ops.fa3_cute.backward(*call)
    found = dict(zip("qkv", gradients, strict=True)) | ({} if call.s_aux is None else {"s_aux": d_s_aux})
    return tuple(found.get(name) for name in ForwardCall._fields)


def _set_up(ctx: Any, inputs: tuple, output: tuple) -> None:
    call = ForwardCall(*inputs)
    require_differentiable(call)
    _save(ctx, call, output)


torch.library.register_autograd("fa3_cute::forward", _differentiate, setup_context=_set_up, lib=_library)


class Attention(torch.autograd.Function):
    """`fa3_cute::forward` and its gradient, past the dispatcher. Few arguments: each costs about a microsecond."""

    @staticmethod
    def forward(ctx, q, k, v, call, wants_lse, *sinks):  # type: ignore[override]
        """out of the call, whose q, k and v these are, and whose s_aux if it has one; (out, LSE) if that is wanted."""
        require_differentiable(call)
        results = _implementation(q).forward(call)
        _save(ctx, call, results)
        return results if wants_lse else results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse=None):  # type: ignore[override]
        """The gradients of q, k, v and s_aux; where there is none, autograd drops its None."""
        call = _backward_call(ctx, dout, dlse)
        dq, dk, dv, d_s_aux = _implementation(call.q).backward(call)
        return dq, dk, dv, None, None, d_s_aux


# Function.apply first looks for transforms, and for tensors of those that are over; attend has, and found none.
_record = super(torch.autograd.Function, Attention).apply


def _has_no_gradient(name: str, instead: str) -> None:
    """Of an operator whose results are not differentiated, which must not be for want of a formula, in silence."""

    def save(ctx, inputs, output):
        raise error_for(Status.FEATURE_UNSUPPORTED, f"{name}: has no gradient; {instead}")

    torch.library.register_autograd(f"fa3_cute::{name}", lambda ctx, *grads: None, setup_context=save, lib=_library)


_has_no_gradient("backward", "attention is differentiated once")
_has_no_gradient("merge_attention", "call it under torch.no_grad()")


# ---- calls -----------------------------------------------------------------------------------------------------------


def attend(call: ForwardCall, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out, LSE); an LSE that is not wanted may be None. Raises TypeError where q, k or v is no tensor."""
    q, k, v, *_ = call
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        kinds = ", ".join(type(x).__name__ for x in (q, k, v))
        raise TypeError(f"q, k and v must be torch tensors, not {kinds}")
    if torch.compiler.is_compiling() or not is_plain(q, k, v):
        return torch.ops.fa3_cute.forward(*call)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or _trains_other(call)):
        sinks = (call.s_aux,) if isinstance(call.s_aux, Tensor) else ()
        if _is_wrapped(q) or _is_wrapped(k) or _is_wrapped(v) or (sinks and _is_wrapped(*sinks)):
            return torch.ops.fa3_cute.forward(*call)
        found: Any = _record(q, k, v, call, wants_lse, *sinks)
        return found if wants_lse else (found, None)
    return _implementation(q).forward(call, wants_lse)


def _trains_other(call: ForwardCall) -> bool:
    """Sinks, or the second part of q, may be all that is."""
    s_aux, q_v = call.s_aux, call.q_v
    return isinstance(s_aux, Tensor) and s_aux.requires_grad or isinstance(q_v, Tensor) and q_v.requires_grad


def attend_updated(call: ForwardCall, update: Update, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """As attend, of a call that appends to k and v or rotates q, which has no gradient."""
    tensors = call.q, call.k, call.v, call.q_v, call.s_aux, update.k_new, update.v_new
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        name = next(name for name, value in zip(update._fields, update, strict=True) if value is not None)
        _refuse(f"{_ARGUMENTS.get(name, name)}: must be None where a gradient is asked for")
    if torch.compiler.is_compiling() or not is_plain(call.q):
        return torch.ops.fa3_cute.update_forward(*call, *update)
    results = _implementation(call.q).forward(call, wants_lse, update)
    if update.k_new is not None:
        _has_changed(call.k, call.v)
    return results


def attend_into(out: Tensor, call: ForwardCall, wants_lse: bool, update: Update | None) -> tuple[Tensor, Tensor | None]:
    """As attend, and as attend_updated with an update, but into a tensor that is there; it has no gradient."""
    tensors = (
        call.q,
        call.k,
        call.v,
        call.q_v,
        call.s_aux,
        out,
        *(() if update is None else (update.k_new, update.v_new)),
    )
    for x in (out, call.q):
        if not isinstance(x, Tensor):
            raise TypeError(f"out and q must be torch tensors, not {type(x).__name__}")
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        _refuse("out: must be None where a gradient is asked for")
    if torch.compiler.is_compiling() or not is_plain(call.q):
        raise error_for(Status.FEATURE_UNSUPPORTED, "out: must be None in a compiled function: it has a new one")
    results = _implementation(call.q).forward(call, wants_lse, update, out)
    _has_changed(out, *(() if update is None or update.k_new is None else (call.k, call.v)))
    return results


def _has_changed(*tensors: Tensor) -> None:
    """Tell autograd."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


# What flash-attn calls otherwise.
_ARGUMENTS = {"q_v": "qv", "k_new": "k", "v_new": "v", "seqlens_rotary": "rotary_seqlens"}


def is_plain(x: Tensor, *others: Tensor) -> bool:
    """A tensor with memory, of which, as of the others, no mode, subclass or transform wants to know what is done."""
    for other in others:
        if type(other) not in _PLAIN:
            return False
    return (
        (x.is_cuda or x.is_cpu)
        and type(x) in _PLAIN
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


_PLAIN = (Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by a transform, which may be over


def _implementation(x: Tensor):
    return device if x.is_cuda else host
