"""What a user calls: `forward` over device pointers, `attention` over arrays, and the calls around them.

`forward` goes contract -> planning -> runtime, no step back. Nothing here imports CUDA, the DSL or NumPy before a call
needs it: validation, `explain` and refusals work on any machine.
"""

from dataclasses import replace
from functools import cache
from importlib import import_module

from .arrays.call import AttentionCall, attention_on_device
from .arrays.host import attention_on_host
from .contract.backward_params import BackwardParams
from .contract.merge import MergeParams
from .contract.params import AttentionMode, DataType, FlashAttentionParams
from .contract.plain import plain, read_shape
from .contract.status import FlashAttentionError, Problem, Status, error_for, record_error
from .planning import backward_launch, merge, operations
from .planning.operations import Config, operation_of
from .runtime.repeat import Repeatable
from .runtime.repeat import Thread as _Thread
from .runtime.tracing.stats import first_calls, stats
from .runtime.tracing.watch import watched

__all__ = [
    "AttentionMode",
    "BackwardParams",
    "DataType",
    "FlashAttentionParams",
    "MergeParams",
    "attention",
    "backward",
    "backward_workspace_size",
    "explain",
    "forward",
    "merge_attention",
    "stats",
    "warmup",
    "workspace_size",
]

_OK = Status.OK
_thread = _Thread()


@watched
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
        values = read_shape(params) if type(params) is FlashAttentionParams else None
        known: Repeatable | None = _thread.last  # mostly it is that one; asked here, to spare a call of a function
        try:
            if values != known.values:
                known = _thread.known_for(values)
        except Exception:  # a value that cannot be compared
            known = None
        if known is not None and known.repeat(params, stream):
            return _OK
        return _first_call(params, values, stream)
    except RuntimeError as error:
        return _failure(error)


@watched
def merge_attention(params: MergeParams, stream=None) -> Status:
    """One attention result of two over disjoint keys, enqueued on a stream; returns at once.

        m = max(lse_a, lse_b),   w_x = exp(lse_x - m)
        out = (w_a out_a + w_b out_b) / (w_a + w_b),   lse = m + log(w_a + w_b)

    params   one call (see MergeParams); it may be changed and used again as soon as this returns
    stream   as of `forward`

    A part whose LSE is -inf saw no key and counts for nothing, NaN in it or not; if both are, out = 0 and lse = -inf.
    Sums are FP32. Returns and raises as `forward`; `explain` and `warmup` take these params too.
    Source: online softmax (Milakov & Gimelshein 2018); merge_reference in contract/merge_reference.py defines it.
    """
    found = merge.checked(params)
    if isinstance(found, Problem):
        return record_error(*found)
    shape, addresses = found
    try:
        if not shape.is_empty:
            _merger().merge(shape, addresses, stream)
    except RuntimeError as error:
        return _failure(error)
    return _OK


@watched
def backward(params: BackwardParams, stream=None) -> Status:
    """The gradients dq, dk and dv of a `forward` call, enqueued on a stream; returns at once.

        P = exp(softmax_scale q k^T - softmax_lse), masked;   dS = P * (dout v^T - rowsum(dout * out) + dlse)
        dv = P^T dout,   dk = softmax_scale dS^T q,   dq = softmax_scale dS k

    params   one call (see BackwardParams), with a workspace of backward_workspace_size(params) bytes; it may be changed
             and used again as soon as this returns
    stream   as of `forward`

    Returns and raises as `forward`; `explain` and `warmup` take these params too. All launches are captured into a CUDA
    graph: two; three where dq, and dk with dv, have one each (head_dim 256; 192 deterministic or with 128 columns of
    V), with some features of scores four; one more with d_s_aux and two with d_bias. dk and dv have the same bits in
    every call, dq where it has a launch of its own, else with deterministic=True alone; d_bias that is summed may
    differ.
    Source: FlashAttention-2 (Dao 2023), algorithm 2; backward_reference in contract/backward_reference.py defines it.
    """
    found = backward_launch.checked(params)
    if isinstance(found, Problem):
        return record_error(*found)
    try:
        _differentiator().backward(*found, stream)
    except RuntimeError as error:
        return _failure(error)
    return _OK


def _warm_other(planning, runtime, params, stream) -> Status:
    """`warmup` of a merge or a backward pass, by the modules that plan and launch it."""
    found = planning.checked(params)
    if isinstance(found, Problem):
        return record_error(*found)
    try:
        runtime().warm(found[0], stream)
    except RuntimeError as error:
        return _failure(error)
    return _OK


def _first_call(params, values: tuple | None, stream) -> Status:
    """`forward` of a shape that this thread has not launched yet, or in another way."""
    first_calls.add()
    p = _plain(params) if values is None else plain(params, values)
    if p is not params:  # values that are not plain may change and still be the same objects
        values = None
    shape = operations.checked(p, values)
    if isinstance(shape, Problem):
        return record_error(*shape)
    if shape.seqlen_q == 0:  # packed: no row to write
        if not shape.append or not shape.append.has_new:
            return _OK
        p = replace(p, q=p.q or p.k, out=p.out or p.k)  # neither is looked at
    if shape.seqlen_k == 0:  # nothing of k and v is read, but TMA's descriptors are made: of an address that is one
        p = replace(p, k=p.k or p.q, v=p.v or p.q)
    launcher = _launcher()
    ahead = import_module(".runtime.append", __package__) if shape.append else launcher
    call = ahead.launch_all(operation_of(shape).launches, shape, launcher.addresses_of(p), stream)
    if values is not None:
        _thread.remember(values, Repeatable(values, call, shape, p, _resolved))
    return _OK


def warmup(params: FlashAttentionParams | BackwardParams | MergeParams, stream=None) -> Status:
    """Compile and load the kernel that `forward(params, stream)` would use; launches nothing, touches no tensor.

    After it, such a call can be captured into a CUDA graph, on any stream of the context. If it needs a workspace and
    none is given, this makes the stream's own. Arguments, returns and raises as `forward`; the params are checked in
    full, but of the pointers only presence and alignment matter. Takes `backward`'s and `merge_attention`'s params too.
    """
    if isinstance(params, BackwardParams):
        return _warm_other(backward_launch, _differentiator, params, stream)
    if isinstance(params, MergeParams):
        return _warm_other(merge, _merger, params, stream)
    shape = operations.checked(_plain(params))
    if isinstance(shape, Problem):
        return record_error(*shape)
    launcher = _launcher()
    try:
        for step in operation_of(shape).launches:
            launcher.ensure_loaded(step.config, stream)
            launcher.prepare_workspace(step, shape, stream)
    except RuntimeError as error:
        return _failure(error)
    return _OK


def explain(params: FlashAttentionParams | BackwardParams | MergeParams) -> list[Problem]:
    """Every reason why `forward` would refuse these params, in its order; [] if it would not. Needs no GPU.

    A Problem has `status` and `detail` (the field, its value, what is accepted) and prints as a sentence. Takes the
    params of `backward` and `merge_attention` too.
    """
    if isinstance(params, BackwardParams):
        return backward_launch.problems(params)
    if isinstance(params, MergeParams):
        return merge.problems(params)
    _require_params(params)
    return operations.problems(params)


def workspace_size(params: FlashAttentionParams) -> int:
    """Bytes of `workspace` that `forward(params)` needs for the partial results of split-KV; 0 if it needs none.

    It depends on dtype, sizes, which lengths, masks and mods there are, splits and pack_gqa, and needs no GPU. Without
    a `workspace` the library keeps one per device and stream. Contents before the call do not matter. Raises
    FlashAttentionError for params that `forward` would refuse, but for missing tensors and the workspace itself.
    """
    _require_params(params)
    found = operations.workspace_bytes(params)
    if isinstance(found, Problem):
        raise error_for(*found)
    return found


def backward_workspace_size(params: BackwardParams) -> int:
    """Bytes of `workspace` that `backward(params)` needs: for each row of q and head about 4 * (head_dim + 2).

    It depends on dtype, sizes, windows and whether q is packed, and needs no GPU. Contents before the call do not
    matter. Raises FlashAttentionError for params that `backward` would refuse, but for missing tensors and the
    workspace itself.
    """
    found = backward_launch.workspace_bytes(params)
    if isinstance(found, Problem):
        raise error_for(*found)
    return found


def kernel_config(params: FlashAttentionParams) -> Config:
    """The kernel that `forward(params)` would launch, as its compile-time choices. Needs no GPU.

    Raises FlashAttentionError for params that `forward` would refuse.
    """
    shape = operations.checked(_plain(params))
    if isinstance(shape, Problem):
        raise error_for(*shape)
    return operation_of(shape).launches[-1].config


def _plain(params) -> FlashAttentionParams:
    if type(params) is not FlashAttentionParams:
        _require_params(params)
    return plain(params)


def _require_params(params) -> None:
    """A forward call: BackwardParams is none, though it has the fields of one."""
    if not isinstance(params, FlashAttentionParams) or isinstance(params, BackwardParams):
        raise TypeError(f"params must be a FlashAttentionParams, not {type(params).__name__}")


@cache
def _merger():
    from .runtime import merge  # as _launcher

    return merge


@cache
def _differentiator():
    from .runtime import backward  # as _launcher

    return backward


@cache
def _launcher():
    from .runtime import launch  # imports CUDA and the DSL: half a second that `import fa3_cute` must not take

    return launch


def _resolved(stream) -> int:
    """The handle of a stream."""
    return _launcher().resolve_stream(stream)


def _failure(error: RuntimeError) -> Status:
    """Record what a launch raised under its status; what is no row of the table is a bug and goes on up."""
    if isinstance(error, FlashAttentionError):  # of a stream that is none
        return record_error(Status(error.code), error.detail)
    from .runtime.compiler import CompileError

    launch = _launcher()
    rows = {
        launch.CudaFailure: Status.CUDA_ERROR,
        launch.UnsupportedDevice: Status.UNSUPPORTED_DEVICE,
        CompileError: Status.COMPILE_ERROR,
        launch.NotWarmedUp: Status.NOT_WARMED_UP,
    }
    for kind, status in rows.items():
        if isinstance(error, kind):
            return record_error(status, str(error), error)
    raise error


# ---- arrays ----------------------------------------------------------------------------------------------------------


def attention(
    q,
    k,
    v,
    *,
    out=None,
    stream=None,
    causal=False,
    window_size=(-1, -1),
    softmax_scale=None,
    softcap=0.0,
    s_aux=None,
    alibi_slopes=None,
    attn_mask=None,
    attention_chunk=0,
    dropout_p=0.0,
    rng_state=None,
    q_v=None,
    score_mod=None,
    mask_mod=None,
    mod_arrays=(),
    mod_scalars=(),
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    k_new=None,
    v_new=None,
    cu_seqlens_k_new=None,
    rotary_cos=None,
    rotary_sin=None,
    rotary_interleaved=False,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    num_splits=0,
    max_seqlen_q=0,
    zero_padding=False,
    return_lse=False,
    dtype=None,
):
    """softmax(softmax_scale * q k^T, masked) v of arrays: on a CUDA device by `forward`, of NumPy arrays on the host.

    q, out        [batch, seqlen_q, num_heads, head_dim], or [total_q, num_heads, head_dim] with cu_seqlens_q
    k, v          [batch, seqlen_k, num_heads_k, head_dim], or [total_k, num_heads_k, head_dim] with cu_seqlens_k, or
                  [num_pages, page_size, num_heads_k, head_dim] with page_table. float16, bfloat16 or float8_e4m3fn; FP8
                  also as uint8 with dtype="float8_e4m3fn", or k and v alone. v and out may have another head_dim than q
                  and k; of head_dim 576 v is k[..., :512] itself. Last dimension contiguous, other strides multiples
                  of 16 in FP8, else of 8. A given out is written: of q's type (FP8: 16 bit) or float32
    stream        int handle, anything with `__cuda_stream__`, or None: the legacy default stream
    window_size   (left, right) around the bottom-right diagonal; negative is unbounded
    softcap       scores become softcap * tanh(scores / softcap); 0: they stay
    s_aux         [num_heads] float32, bfloat16 or float16: attention sinks, logits of one more key, whose value is 0
    alibi_slopes  [num_heads] or [batch, num_heads] float32: scores -= slope * |i + seqlen_k - seqlen_q - j|
    attn_mask     what broadcasts to [batch, num_heads, seqlen_q, seqlen_k], with all of the last dimension: bool or
                  uint8, False and 0 hide a key; or float16, bfloat16, float32, added to the scores. For dense q alone
    attention_chunk   keys of a chunk: queries see those of their own; 0: no chunks
    dropout_p     the probability to drop a weight, 0 <= p < 1; with rng_state, [2] uint64 or int64: seed, offset
    q_v           as q, with v's columns, of head_dim 64 and v's 512: a second part of q, which meets v in the scores
    score_mod, mask_mod   a ScoreMod and a MaskMod (docs/mods.md); mod_arrays, mod_scalars: what they read, in order
    cu_seqlens_*  [batch + 1] int32: packed sequences; cu_seqlens_q alone with a cache and seqused_k
    seqused_k     [batch] int32; beyond the rows that there are it is these, in pages and with packed queries
    page_table    [batch, pages] int32: pages of each sequence; past the used ones anything. Needs seqused_k
    kv_batch_idx  [batch] int32: the entry of k and v, or row of page_table, of each sequence; None: its own
    leftpad_k     [batch] int32: first rows of each sequence's keys that do not exist; seqused_k counts them
    k_new, v_new  [batch, rows, num_heads_k, head_dim], or [rows, ...] with cu_seqlens_k_new: written behind seqused_k;
                  of k's type, or over FP8 k and v of q's, and quantised by their descales
    rotary_cos, rotary_sin   [positions, rotary_dim / 2] for q and k_new, from seqlens_rotary [batch] on or seqused_k
    *_descale     of FP8 k and v: float32 [], [heads], [batch, 1] or [batch, heads], heads being num_heads for q,
                  num_heads_k for k and v, batch the number of sequences; any strides; real value = FP8 value * descale
    num_splits    0 automatic, 1 never, n exactly n; max_seqlen_q a hint: no packed sequence has more; 0 unknown
    zero_padding  packed rows behind the last sequence get out = 0 and LSE = -inf

    On a device: arrays of any library with DLPack or `__cuda_array_interface__`, all on the stream's device (of a
    default stream: the current one). Returns at once, with the work enqueued on the stream behind what the libraries
    have enqueued on the arrays so far. Without `out` the result is new memory, a DeviceArray (arrays/dlpack.py), which
    libraries take over without a copy: `torch.from_dlpack(out)`; their streams then wait for this one. What uses a
    given `out` on another stream has to wait for this one itself. The arrays must live until the stream has done the
    work: those of a library that frees memory in this stream's order do. JAX's arrays cannot be out. In a capture of a
    CUDA graph, out must be given and return_lse be False.

    On the host (q is a NumPy array): exact and slow, computed by the reference; any strides, float32 and float64 too,
    BF16 and FP8 by ml_dtypes, integers of any size, descales also as numbers; stream None, num_splits 0 or 1.

    Returns out, a new one of q's dtype (FP8: bfloat16), or (out, LSE) with return_lse: float32, natural log, [batch,
    num_heads, seqlen_q] or [num_heads, total_q], -inf for a row that sees no key. Packed rows of no sequence are
    written with zero_padding alone. Raises FlashAttentionError with the status of `forward`, TypeError for no array.
    """
    given = locals()
    names = {"softmax_scale": "softmax_scale", "softcap": "softcap", "dropout_p": "p_dropout"}
    call = AttentionCall(numbers={field: given.pop(name) for name, field in names.items()}, **given)
    if call.is_on_host:
        return attention_on_host(call)
    try:
        return attention_on_device(call, forward)
    except FlashAttentionError:
        raise
    except RuntimeError as error:  # of a CUDA call ahead of the launch
        return _failure(error).check()  # which raises
