"""attention() and its gradient, as JAX traces them."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .. import api
from ..contract.status import Status, error_for
from . import calls, ffi, host
from .calls import LENGTHS, OPTIONAL, Choices, Program, Tensors

TARGET = "fa3_cute"

_handler = ffi.handler(calls.run)
ffi.register(TARGET, _handler, "CUDA")


def attention(q, k, v, *, return_lse=False, **options):
    """softmax(softmax_scale * q k^T, masked) v of JAX arrays, traced or not; differentiable.

    q             [batch, seqlen_q, num_heads, head_dim], or [total_q, num_heads, head_dim] with cu_seqlens_q
    k, v          [batch, seqlen_k, num_heads_k, head_dim], or [total_k, num_heads_k, head_dim] with cu_seqlens_k, or
                  [num_pages, page_size, num_heads_k, head_dim] with page_table; float16, bfloat16 or float8_e4m3fn
    causal, window_size, softmax_scale, softcap, attention_chunk, num_splits, max_seqlen_q, zero_padding
                  as of fa3_cute.attention; constants, never traced
    s_aux, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, kv_batch_idx, q_descale, k_descale, v_descale
                  arrays, as of fa3_cute.attention; lengths, tables and descales may be traced
    deterministic of the gradient: the same bits in every call, else sums of dq may differ in rounding

    Returns out, of q's dtype (FP8: bfloat16), or (out, LSE) with return_lse: float32, natural log, [batch, num_heads,
    seqlen_q] or [num_heads, total_q]. Packed rows of no sequence hold anything without zero_padding; their gradients
    are 0. Gradients of q, k, v and s_aux; no second ones, no forward mode. Under vmap the calls run one after another;
    fold the axis into the batch where that is slow. Of sharded arrays call it inside shard_map: XLA cannot split it.

    Raises FlashAttentionError, while it is traced, for what `forward` would refuse, what `backward` has no kernel for
    where a gradient is asked for, and arguments of fa3_cute.attention that are not among these; TypeError for other
    arguments and for what is no array.
    """
    named = {name: options.pop(name, None) for name in OPTIONAL}
    _require_known(options)
    calls.require_constants(options | {"return_lse": return_lse})
    tensors = calls.as_tensors({"q": q, "k": k, "v": v, **named})
    if isinstance(options.get("window_size"), list):
        options["window_size"] = tuple(options["window_size"])
    choices = Choices(**options, return_lse=return_lse)
    wants_lse = calls.described(choices, tensors).wants_lse
    calls.forward_params(choices, tensors)  # raises for values that cannot be hashed too
    found = _attend(choices, tensors)
    return found if wants_lse else found[0]


def _require_known(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in Choices.__dataclass_fields__:
            continue
        served = inspect.signature(api.attention).parameters
        if name not in served:
            raise TypeError(f"attention() got an unexpected keyword argument {name!r}")
        if value is not served[name].default:
            sentence = f"{name}: is not served by fa3_cute.jax; fa3_cute.attention takes it, of arrays outside jit"
            raise error_for(Status.FEATURE_UNSUPPORTED, sentence)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(choices: Choices, tensors: Tensors) -> tuple[jax.Array, ...]:
    """out, and the LSE if it is wanted."""
    return _forward(choices, tensors, bool(choices.return_lse))


def _attend_and_save(choices: Choices, tensors: Tensors):
    calls.backward_params(choices, tensors)
    out, lse = _forward(choices, tensors, wants_lse=True)
    return (out, lse) if choices.return_lse else (out,), (tensors, out, lse)


def _differentiate(choices: Choices, saved, cotangents) -> tuple[Tensors]:
    tensors, out, lse = saved
    given = tensors | dict(zip(("dout", "dlse"), cotangents, strict=False))
    given |= {"out": out, "softmax_lse": lse}
    found = _backward(choices, tensors, given)
    gradients = dict(zip("qkv", found, strict=False))
    if "s_aux" in tensors:
        gradients["s_aux"] = found[3].astype(tensors["s_aux"].dtype)
    return ({name: gradients.get(name) for name in tensors},)


_attend.defvjp(_attend_and_save, _differentiate)


def _forward(choices: Choices, tensors: Tensors, wants_lse: bool) -> tuple[jax.Array, ...]:
    shapes = calls.result_shapes(tensors["q"], tensors["v"])[: 1 + wants_lse]
    if not tensors["q"].size:
        return tuple(jnp.full(shape.shape, -jnp.inf * i if i else 0, shape.dtype) for i, shape in enumerate(shapes))
    program = calls.forward_program(calls.forward_params(choices, tensors), tensors, wants_lse)
    return _either(program, tensors, shapes, lambda given: host.forward(choices, given, wants_lse))


def _backward(choices: Choices, tensors: Tensors, given: Tensors) -> tuple[jax.Array, ...]:
    """dq, dk, dv, and d_s_aux if there are sinks; 0 in rows that no sequence uses."""
    gradients = [jnp.zeros(x.shape, x.dtype) for x in (tensors["q"], tensors["k"], tensors["v"])]
    if "s_aux" in tensors:
        gradients.append(jnp.zeros(tensors["s_aux"].shape, jnp.float32))
    if not (tensors["q"].size and tensors["k"].size):
        return tuple(gradients)
    has_unused = any(name in tensors for name in LENGTHS)
    zeros = gradients[:3] if has_unused else []
    program = calls.backward_program(calls.backward_params(choices, tensors), given, len(zeros))
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in gradients)
    return _either(program, given, shapes, lambda arrays: host.backward(choices, arrays), zeros)


def _either(program: Program, tensors: Tensors, shapes, on_host: Callable, zeros=()) -> tuple[jax.Array, ...]:
    """The program on a CUDA device, or the results of these shapes on the CPU.

    zeros   what the first results hold before the program runs; it may leave parts of them as they are
    """

    names = list(tensors)  # in the program's order; what JAX hands over is in that of their names

    def on_device(tensors: Tensors, zeros) -> tuple[jax.Array, ...]:
        return call_target(program, [*(tensors[name] for name in names), *zeros], len(zeros))[: len(shapes)]

    def on_cpu(tensors: Tensors, zeros) -> tuple[jax.Array, ...]:
        return jax.pure_callback(on_host, shapes, tensors, vmap_method="sequential")

    return jax.lax.platform_dependent(tensors, list(zeros), cuda=on_device, cpu=on_cpu)


def call_target(program: Program, arguments: list, num_zeros: int) -> tuple[jax.Array, ...]:
    """All results of the program; the last arguments become the first results."""
    first = len(arguments) - num_zeros
    aliases = {first + i: i for i in range(num_zeros)}
    target = jax.ffi.ffi_call(TARGET, program.results, vmap_method="sequential", input_output_aliases=aliases)
    return tuple(target(*arguments, call=program.text))
