"""attention() of NumPy arrays: the reference, rounded; what forward refuses is refused here too. NumPy only."""

from numbers import Real
from typing import Any

from ..contract.params import DataType, FlashAttentionParams
from ..contract.plain import plain
from ..contract.rules import contract_problems
from ..contract.status import Status, error_for, shown
from .mods import host_mods, mod_arrays, mod_fields, require_mod_arrays
from .append import UPDATES, require_update_numbers, require_update_shapes, updated_on_host
from .scores import SCORES, require_score_numbers, require_score_shapes
from .call import ANY_ADDRESS, DESCALES, DEVICE_DTYPES, FP8, INTEGERS, OTHERS, AttentionCall, out_dtypes, refusal

# float32 and float64 exist on the host only; there they follow the rules of FP16.
CHOICES = ("attention_chunk", "zero_padding", "rotary_interleaved")
OTHER_ADDRESS = 2 * ANY_ADDRESS  # not the same memory as what has ANY_ADDRESS
HOST_DTYPES = DEVICE_DTYPES | {"float32": DataType.FP16, "float64": DataType.FP16}


def attention_on_host(call: AttentionCall):
    """attention() of NumPy arrays."""
    from ..contract.reference import attention_reference

    q, k, v, out = call.q, call.k, call.v, call.out
    mod_fields(call)
    _require_numpy(call)
    if call.stream is not None:
        raise error_for(Status.INVALID_ARGUMENT, f"stream={shown(call.stream)}: must be None with NumPy arrays")
    element, stored = call.element_types(q.dtype.name, k.dtype.name, v.dtype.name, HOST_DTYPES)
    params = _checked_params(call, element, stored)
    _require_numbers(call)
    out_dtype, wants_lse = _out_dtype(call, element), call.wants_lse
    options = {name: getattr(call, name) for name in (*OTHERS, *DESCALES)}
    options |= {name: getattr(params, name) for name in (*call.numbers, *CHOICES)}
    options |= host_mods(call)
    options |= {"causal": params.is_causal, "window_size": (params.window_size_left, params.window_size_right)}
    try:
        q, options = updated_on_host((q, k, v), options)
        exact, lse = attention_reference(q, k, v, **options)
    except ValueError as error:
        raise error_for(Status.INVALID_SHAPE, str(error)) from error
    # Packed rows outside every sequence are not the call's to write.
    used = slice(None)
    if call.is_packed:
        end = None if params.zero_padding else int(call.cu_seqlens_q[-1])
        used = slice(int(call.cu_seqlens_q[0]), end)
    if out is None:
        out = exact.astype(out_dtype)
    else:
        out[used] = exact[used].astype(out_dtype)
    return (out, lse.astype("float32")) if wants_lse else out


def _require_numpy(call: AttentionCall) -> None:
    from numpy import ma, ndarray

    arrays = {"q": call.q, "k": call.k, "v": call.v, **call.given("out", *OTHERS)}
    arrays |= {name: value for name, value in call.given(*DESCALES).items() if not isinstance(value, Real)}
    arrays |= mod_arrays(call)
    for name, array in arrays.items():
        kind = type(array)
        if isinstance(array, ma.MaskedArray):  # what its mask hides would be computed with
            raise error_for(
                Status.INVALID_ARGUMENT, f"{name} is a {kind.__module__}.{kind.__qualname__}: must have no mask"
            )
        if isinstance(array, ndarray):
            continue
        if hasattr(kind, "__dlpack__") or hasattr(kind, "__cuda_array_interface__"):
            raise error_for(
                Status.INVALID_ARGUMENT,
                f"{name} is a {kind.__module__}.{kind.__qualname__}: must be a "
                "NumPy array, as q is; or all arrays on one CUDA device",
            )
        raise TypeError(f"{name} must be a NumPy array, as q is, not {kind.__name__}")


def _require_numbers(call: AttentionCall) -> None:
    """Raise for lengths and tables that are no integers, and for what else is no number."""
    from numpy import asarray

    for name, array in call.given(*INTEGERS).items():
        if array.dtype.kind not in "iu":
            raise error_for(Status.INVALID_ARGUMENT, f"{name} is {array.dtype.name}: must be integers")
    require_score_numbers(call.given(*SCORES))
    require_update_numbers(call.given(*UPDATES), call.q, call.k, call.v)
    for name, value in call.given(*DESCALES).items():
        dtype = asarray(value).dtype
        if dtype.kind not in "iuf":
            raise error_for(Status.INVALID_ARGUMENT, f"{name} is {dtype.name}: must be real numbers, as float32")


def _checked_params(call: AttentionCall, element: str, stored: str) -> FlashAttentionParams:
    """The call as plain params without addresses; raises what `forward` would say to it, apart from addresses and from
    what has no kernel yet."""
    shapes = {name: array.shape for name, array in call.given("q", "k", "v", *OTHERS).items()}
    call.require_dims(shapes)
    pointers: dict[str, Any] = dict.fromkeys(("q", "k", "v", "out", *call.given(*OTHERS)), ANY_ADDRESS)
    if not _begins(call.v, call.k):
        pointers["v"] = OTHER_ADDRESS
    pointers |= {f"{name}_ptr": ANY_ADDRESS for name in call.given(*DESCALES)}
    if call.cu_seqlens_q is not None and call.cu_seqlens_q.size < 2:
        raise error_for(
            Status.INVALID_SHAPE,
            f"cu_seqlens_q.shape={call.cu_seqlens_q.shape}: must be (sequences + 1,), at least (2,)",
        )
    dtypes = {"dtype": HOST_DTYPES[element], "kv_dtype": HOST_DTYPES[stored]}
    if call.k_new is not None and call.k_new.dtype != call.k.dtype:
        dtypes["kv_new_dtype"] = dtypes["dtype"]
    params = FlashAttentionParams(**dtypes, **call.sizes(shapes), **call.choices(), **pointers)
    if found := contract_problems(params):
        raise refusal(found[0])
    _require_second_queries(call)
    require_score_shapes(shapes, call.sizes(shapes))
    require_update_shapes(shapes, call.batch(shapes))
    own = {name: array.shape for name, array in mod_arrays(call).items()}
    require_mod_arrays(call, call.sizes(shapes), shapes | own, {})
    params = plain(params)
    if params.num_splits > 1:
        raise error_for(Status.FEATURE_UNSUPPORTED, f"num_splits={params.num_splits}: must be 0 or 1 with NumPy arrays")
    return params


def _begins(v, k) -> bool:
    """v is the first columns of k, in its memory, or there are no keys."""
    addresses = [array.__array_interface__["data"][0] for array in (k, v)]
    steps = [
        [stride for stride, size in zip(array.strides, k.shape[:-1] + (2,), strict=False) if size > 1]
        for array in (k, v)
    ]
    return not k.size or addresses[0] == addresses[1] and steps[0] == steps[1]


def _require_second_queries(call: AttentionCall) -> None:
    """Raise for a q_v that is not as q, with v's columns."""
    q, q_v, v = call.q, call.q_v, call.v
    if q_v is None:
        return
    if q_v.shape != (shape := (*q.shape[:-1], *v.shape[-1:])):
        raise error_for(Status.INVALID_SHAPE, f"q_v.shape={q_v.shape}: must be {shape}")
    if q_v.dtype != q.dtype:
        raise error_for(Status.INVALID_ARGUMENT, f"q_v is {q_v.dtype.name}: must be {q.dtype.name}, as q is")


def _out_dtype(call: AttentionCall, element: str):
    """NumPy dtype of the result: q's, for FP8 bfloat16 or what a given `out` has."""
    q, out, accepted = call.q, call.out, out_dtypes(element)
    if out is not None:
        shape = (*q.shape[:-1], *call.v.shape[-1:])
        if out.shape != shape or out.dtype.name not in accepted:
            raise error_for(
                Status.INVALID_SHAPE if out.shape != shape else Status.INVALID_ARGUMENT,
                f"out is {out.dtype.name}{list(out.shape)}: must be {' or '.join(accepted)}{list(shape)}",
            )
        if not out.flags.writeable:
            raise error_for(Status.INVALID_ARGUMENT, "out is a read-only array: must be writable, or None")
        if not _are_apart(out):
            raise error_for(
                Status.INVALID_SHAPE, f"out has the strides {out.strides} (bytes): must keep its elements apart"
            )
        return out.dtype
    if element != FP8:
        return q.dtype
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise error_for(
            Status.FEATURE_UNSUPPORTED,
            "out=None: must be a float16 array without the package ml_dtypes, which has NumPy's bfloat16",
        ) from error
    return bfloat16


def _are_apart(array) -> bool:
    """No two elements of an array share memory."""
    from numpy import add, arange, diff, sort

    if array.flags.c_contiguous or array.size < 2:
        return True
    places = 0
    for size, stride in zip(array.shape, array.strides, strict=True):
        places = add.outer(places, arange(size) * stride)
    return bool((diff(sort(places, axis=None)) >= array.itemsize).all())
