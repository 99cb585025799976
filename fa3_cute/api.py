"""What a user calls: `forward` over device pointers, `attention` over arrays, and the calls around them.

`forward` goes validate -> heuristics -> launch, no step back. Nothing here imports CUDA, the DSL or NumPy before a call
needs it: validation, `explain` and refusals work on any machine.
"""
import threading
from dataclasses import fields, replace
from functools import cache
from operator import attrgetter

from .config import UNBOUNDED_WINDOW, DecodeConfig
from .heuristics import decode_config, forward_config
from .params import AttentionMode, DataType, FlashAttentionParams, address, are_constants
from .splits import is_decode, is_windowed, plan_of
from .status import Problem, Status, error_for, record_error, shown
from .validate import contract_problems, first_problem, problems

__all__ = ["AttentionMode", "DataType", "FlashAttentionParams", "attention", "explain", "forward", "warmup",
           "workspace_size"]

_OK, _VARLEN = Status.OK, AttentionMode.VARLEN_PREFILL
_CONFIG_DTYPES = ("fp16", "bf16")       # by DataType
_POINTERS = ("q", "k", "v", "out", "softmax_lse")
_read_pointers = attrgetter(*_POINTERS)
_read_values = attrgetter(*(field.name for field in fields(FlashAttentionParams) if field.name not in _POINTERS))


def forward(params: FlashAttentionParams, stream=None) -> Status:
    """out = softmax(softmax_scale * q k^T, masked) v, enqueued on a stream; returns at once.

    params   one call (see FlashAttentionParams); it may be changed and used again as soon as this returns
    stream   int handle, None (the legacy default stream), or anything with `__cuda_stream__`; its device is used

    Returns Status.OK, or the first problem in the order of the status table, with nothing launched and nothing written;
    `last_error()` has the details and `.check()` raises. The first call of a kind compiles or loads its kernel; later
    ones neither allocate nor wait nor read device memory. Fastest with plain ints and enum members as field values.
    Raises TypeError if params is no FlashAttentionParams or stream no stream.
    Source: FlashAttention-3 (Shah et al. 2024), algorithms 1 and 2.
    """
    try:
        if type(params) is FlashAttentionParams and _recent.repeat(params, stream):
            return _OK
        problem = _problem(params)
        if problem is not None:
            return record_error(*problem)
        if params.mode == _VARLEN and params.total_q == 0:
            return _OK          # no row to write
        call = _launcher().launch(params, _config(params), stream)
    except RuntimeError as error:
        return _failure(error)
    _recent.remember(params, call)
    return _OK


def warmup(params: FlashAttentionParams, stream=None) -> Status:
    """Compile and load the kernel that `forward(params, stream)` would use; launches nothing, touches no tensor.

    After it, such a call can be captured into a CUDA graph. If it needs a workspace and none is given, this makes the
    stream's own and a spare one, which the first capture on a stream without one takes. Arguments, returns and raises
    as `forward`; the params are checked in full, but of the pointers only presence and alignment matter.
    """
    problem = _problem(params)
    if problem is not None:
        return record_error(*problem)
    launch = _launcher()
    cfg = _config(params)
    try:
        launch.ensure_loaded(cfg, stream)
        if isinstance(cfg, DecodeConfig):
            launch.prepare_workspace(params, cfg, stream)
    except RuntimeError as error:
        return _failure(error)
    return _OK


def explain(params: FlashAttentionParams) -> list[Problem]:
    """Every reason why `forward` would refuse these params, in its order; [] if it would not. Needs no GPU.

    A Problem has `status` and `detail` (the field, its value, what is accepted) and prints as a sentence.
    """
    _require_params(params)
    return problems(params)


def workspace_size(params: FlashAttentionParams) -> int:
    """Bytes of `workspace` that `forward(params)` needs for the partial results of split-KV; 0 if it needs none.

    It depends on sizes, mask, num_splits and pack_gqa alone and needs no GPU. Without a `workspace` the library keeps
    one per device and stream. Contents before the call do not matter. Raises FlashAttentionError for params that
    `forward` would refuse, but for missing tensors and the workspace itself.
    """
    _require_params(params)
    for problem in contract_problems(replace(params, workspace=None, workspace_bytes=0)):
        if problem.status is not Status.NULL_POINTER:
            raise error_for(*problem)
    return plan_of(params).partial_bytes if is_decode(params) else 0


class _Recent(threading.local):
    """A thread's last good call. The next one is mostly the same but for its addresses: then only these are checked.

    Equal values are as good as those that were checked: 4096.0 passes after 4096.
    """
    values = call = shape = None
    has_lse = False

    def repeat(self, params, stream) -> bool:
        """Launch these params the way of the last ones; False, and nothing done, if they differ in more than that."""
        q, k, v, out, lse = _read_pointers(params)
        if not (type(q) is type(k) is type(v) is type(out) is int and (lse is None or type(lse) is int)):
            return False
        lse = lse or 0
        bits = q | k | v | out | lse << 2     # the LSE is aligned to 4 bytes, the others to 16
        if not (q and k and v and out) or bits & 15 or bits >> 64 or (lse != 0) != self.has_lse:
            return False
        try:
            is_same = _read_values(params) == self.values
        except Exception:       # a value that cannot be compared: the rules put it into words
            return False
        return is_same and self.call.repeat(self.shape, (q, k, v, out, lse), stream)

    def remember(self, params, call) -> None:
        """Take a call that `launch` has just made."""
        values = _read_values(params)
        self.values = values if are_constants(values) else None
        self.has_lse, self.call, self.shape = address(params.softmax_lse) != 0, call, call.shape


_recent = _Recent()


def _problem(params) -> Problem | None:
    if type(params) is not FlashAttentionParams:
        _require_params(params)
    return first_problem(params)


def _require_params(params) -> None:
    if not isinstance(params, FlashAttentionParams):
        raise TypeError(f"params must be a FlashAttentionParams, not {type(params).__name__}")


def _config(p):
    if is_decode(p):
        return decode_config(_CONFIG_DTYPES[p.dtype], int(p.head_dim), is_windowed(p))
    is_varlen = any(map(address, (p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_q, p.seqused_k)))
    return forward_config(_CONFIG_DTYPES[p.dtype], int(p.head_dim), _mask(p), address(p.softmax_lse) != 0, is_varlen)


def _mask(p) -> str:
    if p.is_causal:
        return "causal"
    left, right = p.window_size_left, p.window_size_right
    if 0 <= left < UNBOUNDED_WINDOW:
        return "local"
    if 0 <= right < UNBOUNDED_WINDOW:
        return "local" if right else "causal"
    return "full"


@cache
def _launcher():
    from . import launch        # imports CUDA and the DSL: half a second that `import fa3_cute` must not take
    return launch


def _failure(error: RuntimeError) -> Status:
    """Record what a launch raised under its status; what is no row of the table is a bug and goes on up."""
    from .compiler import CompileError
    launch = _launcher()
    rows = {launch.CudaFailure: Status.CUDA_ERROR, launch.UnsupportedDevice: Status.UNSUPPORTED_DEVICE,
            CompileError: Status.COMPILE_ERROR, launch.NotWarmedUp: Status.NOT_WARMED_UP}
    for kind, status in rows.items():
        if isinstance(error, kind):
            return record_error(status, str(error), error)
    raise error


# ---- arrays ----------------------------------------------------------------------------------------------------------

# float32 and float64 exist on the host only; there they follow the rules of FP16.
_HOST_DTYPES = {"float16": DataType.FP16, "bfloat16": DataType.BF16, "float8_e4m3fn": DataType.FP8_E4M3,
                "float32": DataType.FP16, "float64": DataType.FP16}
_ANY_ADDRESS = 16


def attention(q, k, v, *, out=None, stream=None, causal=False, window_size=(-1, -1), softmax_scale=None,
              cu_seqlens_q=None, cu_seqlens_k=None, seqused_k=None, q_descale=None, k_descale=None, v_descale=None,
              num_splits=0, return_lse=False, dtype=None):
    """softmax(softmax_scale * q k^T, masked) v of NumPy arrays, computed exactly on the host by the reference: slow.

    q, out        [batch, seqlen_q, num_heads, head_dim], or [total_q, num_heads, head_dim] with cu_seqlens
    k, v          [batch, seqlen_k, num_heads_k, head_dim], or [total_k, num_heads_k, head_dim] with cu_seqlens
                  float16, float32, float64, bfloat16 or float8_e4m3fn (ml_dtypes), any strides; FP8 also as uint8
                  with dtype="float8_e4m3fn". out, if given, is written in place.
    stream        None; num_splits 0 or 1: the host has neither streams nor splits
    window_size   (left, right) around the bottom-right diagonal; negative is unbounded
    cu_seqlens_*  [batch + 1] integers; seqused_k [batch] integers
    *_descale     FP8 only: scalar, [heads], [batch, 1] or [batch, heads]; real value = FP8 value * descale

    Returns out of q's dtype (FP8: bfloat16), or (out, LSE) with return_lse: float32, natural log, [batch, num_heads,
    seqlen_q] or [num_heads, total_q], -inf for a row that sees no key.
    Raises FlashAttentionError with the status that `forward` would return, FEATURE_UNSUPPORTED for arrays on a device
    (they come later: `forward` takes their addresses), TypeError for what is no array.
    """
    offsets = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    _require_numpy(q=q, k=k, v=v)
    _require_numpy(**{name: value for name, value in {"out": out, **offsets}.items() if value is not None})
    _require_numpy(**{name: value for name, value in descales.items() if not isinstance(value, float | int | None)})
    if stream is not None:
        raise error_for(Status.INVALID_ARGUMENT, f"stream={shown(stream)}: must be None with NumPy arrays")

    dtype = _host_dtype(q, k, v, dtype)
    options = {"causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, **offsets, **descales}
    _check_host_call(q, k, dtype, num_splits, options)
    out_dtype = _out_dtype(q, out, dtype)

    from .reference import attention_reference
    try:
        exact, lse = attention_reference(q, k, v, **options)
    except ValueError as error:
        raise error_for(Status.INVALID_SHAPE, str(error)) from error
    # Packed rows outside every sequence are not the call's to write.
    used = slice(None) if cu_seqlens_q is None else slice(int(cu_seqlens_q[0]), int(cu_seqlens_q[-1]))
    if out is None:
        out = exact.astype(out_dtype)
    else:
        out[used] = exact[used].astype(out_dtype)
    return (out, lse.astype("float32")) if return_lse else out


def _require_numpy(**arrays) -> None:
    from numpy import ndarray
    for name, array in arrays.items():
        if isinstance(array, ndarray):
            continue
        kind = type(array)
        if hasattr(kind, "__dlpack__") or hasattr(kind, "__cuda_array_interface__"):
            raise error_for(Status.FEATURE_UNSUPPORTED,
                            f"{name} is a {kind.__module__}.{kind.__qualname__}: must be a NumPy array; attention() of "
                            "arrays on a device is not implemented yet, forward() takes their addresses")
        raise TypeError(f"{name} must be a NumPy array, not {kind.__name__}")


def _host_dtype(q, k, v, dtype) -> str:
    """The element type by name: the arrays' common one, or what `dtype` says that their bytes are."""
    names = {array.dtype.name for array in (q, k, v)}
    name = names.pop()
    if names:
        raise error_for(Status.INVALID_ARGUMENT, f"dtypes {q.dtype}, {k.dtype}, {v.dtype} of q, k, v: must be the same")
    if name == "uint8" and dtype == "float8_e4m3fn":
        return dtype
    if name not in _HOST_DTYPES or dtype not in (None, name):
        accepted = f"None with arrays of {', '.join(_HOST_DTYPES)}, or 'float8_e4m3fn' with arrays of uint8"
        raise error_for(Status.INVALID_ARGUMENT, f"dtype={shown(dtype)} with arrays of {name}: must be {accepted}")
    return name


def _check_host_call(q, k, dtype: str, num_splits: int, options: dict) -> None:
    """Raise what `forward` would say to this call, apart from addresses and from what has no kernel yet."""
    packed = options["cu_seqlens_q"] is not None or options["cu_seqlens_k"] is not None
    for name, array in (("q", q), ("k", k)):
        if array.ndim != (3 if packed else 4):
            shape = "[rows, heads, head_dim] with cu_seqlens" if packed else "[batch, seqlen, heads, head_dim]"
            raise error_for(Status.INVALID_SHAPE, f"{name}.shape={array.shape}: must be {shape}")
    try:
        left, right = options["window_size"]
    except (TypeError, ValueError) as error:
        sentence = f"window_size={shown(options['window_size'])}: must be a pair (left, right)"
        raise error_for(Status.INVALID_ARGUMENT, sentence) from error
    pointers = {name: name for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")}
    pointers |= {name: f"{name}_ptr" for name in ("q_descale", "k_descale", "v_descale")}
    given = {field: _ANY_ADDRESS for name, field in pointers.items() if options[name] is not None}
    rows = ("total_q", "total_k") if packed else ("seqlen_q", "seqlen_k")
    # An array of no rows or no sequences is meant: only in params does 0 stand for a size that was not given.
    sizes = {name: max(1, array.shape[-3]) for name, array in zip(rows, (q, k), strict=True)}
    found = contract_problems(FlashAttentionParams(
        q=_ANY_ADDRESS, k=_ANY_ADDRESS, v=_ANY_ADDRESS, out=_ANY_ADDRESS, batch_size=1 if packed else max(1, len(q)),
        num_heads=q.shape[-2], num_heads_k=k.shape[-2], head_dim=q.shape[-1], dtype=_HOST_DTYPES[dtype],
        mode=AttentionMode.VARLEN_PREFILL if packed else AttentionMode.PREFILL, is_causal=options["causal"],
        window_size_left=left, window_size_right=right, softmax_scale=options["softmax_scale"],
        num_splits=num_splits, **sizes, **given))
    if found:
        raise error_for(*found[0])
    if num_splits > 1:
        raise error_for(Status.FEATURE_UNSUPPORTED, f"num_splits={num_splits}: must be 0 or 1 with NumPy arrays")


def _out_dtype(q, out, dtype: str):
    """NumPy dtype of the result: q's, for FP8 bfloat16 or what a given `out` has."""
    accepted = ("bfloat16", "float16") if dtype == "float8_e4m3fn" else (dtype,)
    if out is not None:
        if out.shape != q.shape or out.dtype.name not in accepted:
            raise error_for(Status.INVALID_SHAPE if out.shape != q.shape else Status.INVALID_ARGUMENT,
                            f"out is {out.dtype.name}{list(out.shape)}: must be {' or '.join(accepted)}{list(q.shape)}")
        return out.dtype
    if dtype != "float8_e4m3fn":
        return q.dtype
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise error_for(Status.FEATURE_UNSUPPORTED, "out=None: must be a float16 array without the package ml_dtypes, "
                                                    "which has NumPy's bfloat16") from error
    return bfloat16
