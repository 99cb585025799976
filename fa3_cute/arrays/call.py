"""attention() over arrays: what it accepts, in NumPy on the host and as a call of `forward` on a device. No framework.

The element type comes from the arrays, the sizes from their shapes; what remains to be checked is checked by the rules
of the contract, on the host too.
"""

import re
from dataclasses import dataclass
from typing import Any

from ..contract.params import AttentionMode, DataType, FlashAttentionParams, is_true
from ..contract.plain import plain
from ..contract.status import FlashAttentionError, Problem, Status, error_for, shown
from ..planning.operations import checked

FP8 = "float8_e4m3fn"
DEVICE_DTYPES = {"float16": DataType.FP16, "bfloat16": DataType.BF16, FP8: DataType.FP8_E4M3}
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
DESCALES = ("q_descale", "k_descale", "v_descale")
DIMS = ("batch", "row", "head")
ANY_ADDRESS = 16
# The words of the rules, which speak of FlashAttentionParams, as attention() has them.
_WORDS = (
    (r"\bis_causal\b", "causal"),
    (r"\bwindow_size_left=", "window_size[0]="),
    (r"\bwindow_size_right=", "window_size[1]="),
    (r"\b([qkv]_descale)_ptr=\w+: must be None", r"\1: must be None"),
    (r"\b([qkv]_descale)_ptr=", r"\1="),
    (r"\b([qkv]|out|[qkv]_descale)_(batch|row|head)_stride=", r"\1's \2 stride="),
    (r"must be a device address: cu_seqlens", "must be an array: cu_seqlens"),
)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of attention(), as given.

    numbers   the scale and features that are numbers, by their names in FlashAttentionParams and in the reference
    """

    q: Any
    k: Any
    v: Any
    out: Any
    stream: Any
    causal: Any
    window_size: Any
    numbers: dict[str, Any]
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_k: Any
    q_descale: Any
    k_descale: Any
    v_descale: Any
    num_splits: Any
    return_lse: Any
    dtype: Any

    def given(self, *names: str) -> dict:
        """Those of the arguments that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None or self.cu_seqlens_k is not None

    @property
    def wants_lse(self) -> bool:
        """return_lse; raises FlashAttentionError where it is neither true nor false."""
        found = is_true(self.return_lse)
        if found is None:
            sentence = f"return_lse={shown(self.return_lse)}: must be True or False"
            raise error_for(Status.INVALID_ARGUMENT, sentence)
        return found

    @property
    def is_on_host(self) -> bool:
        from numpy import ndarray

        return isinstance(self.q, ndarray)

    def choices(self) -> dict:
        """The fields of FlashAttentionParams that are no tensors, sizes or strides."""
        try:
            left, right = self.window_size
        except (TypeError, ValueError) as error:
            sentence = f"window_size={shown(self.window_size)}: must be a pair (left, right)"
            raise error_for(Status.INVALID_ARGUMENT, sentence) from error
        return {
            "is_causal": self.causal,
            "window_size_left": left,
            "window_size_right": right,
            **self.numbers,
            "num_splits": self.num_splits,
            "mode": AttentionMode.VARLEN_PREFILL if self.is_packed else AttentionMode.PREFILL,
        }

    def element_type(self, q: str, k: str, v: str, known: dict) -> str:
        """The element type by name: that of the arrays, or what `dtype` says that their bytes are."""
        stated = self.dtype if self.dtype is None else getattr(self.dtype, "name", self.dtype)
        stated = stated if stated is None or isinstance(stated, str) else ""
        if not q == k == v:
            raise error_for(Status.INVALID_ARGUMENT, f"dtypes {q}, {k}, {v} of q, k, v: must be the same")
        if q == "uint8" and stated == FP8:
            return FP8
        if q not in known or stated not in (None, q):
            raise error_for(
                Status.INVALID_ARGUMENT,
                f"dtype={shown(self.dtype)} with arrays of {q}: must be None with arrays of "
                f"{', '.join(known)}, or '{FP8}' with arrays of uint8",
            )
        return q

    def require_dims(self, **shapes) -> None:
        """Raise unless q and k have as many dimensions as they must."""
        dims = "[rows, heads, head_dim] with cu_seqlens" if self.is_packed else "[batch, seqlen, heads, head_dim]"
        for name, shape in shapes.items():
            if len(shape) != (3 if self.is_packed else 4):
                raise error_for(Status.INVALID_SHAPE, f"{name}.shape={shape}: must be {dims}")

    def sizes(self, q_shape, k_shape) -> dict:
        """The fields of FlashAttentionParams that are sizes, but for the number of packed sequences.

        An array of no rows or no sequences is meant: only in params does 0 stand for a size that was not given.
        """
        rows = ("total_q", "total_k") if self.is_packed else ("seqlen_q", "seqlen_k")
        least = 0 if self.is_packed and (q_shape[0] or k_shape[0]) else 1
        return {
            rows[0]: max(least, q_shape[-3]),
            rows[1]: max(least, k_shape[-3]),
            "batch_size": 1 if self.is_packed else max(1, q_shape[0]),
            "num_heads": q_shape[-2],
            "num_heads_k": k_shape[-2],
            "head_dim": q_shape[-1],
        }


def refusal(problem: Problem) -> FlashAttentionError:
    """The problem of a call's params as the error of attention()."""
    sentence = problem.detail
    for theirs, ours in _WORDS:
        sentence = re.sub(theirs, ours, sentence)
    return error_for(problem.status, sentence)


# ---- on a device -----------------------------------------------------------------------------------------------------


def attention_on_device(call: AttentionCall, forward):
    """attention() of arrays on a CUDA device: one `forward(params, stream)`."""
    from . import dlpack

    arrays = {"q": call.q, "k": call.k, "v": call.v, **call.given("out", *LENGTHS, *DESCALES)}
    for name, array in arrays.items():
        dlpack.require_on_device(name, array)
    with dlpack.on_device_of(call.stream) as (handle, device):
        tensors = {name: dlpack.view(name, array, handle) for name, array in arrays.items()}
        q, k, v = (tensors[name] for name in "qkv")
        element = call.element_type(q.dtype, k.dtype, v.dtype, DEVICE_DTYPES)
        _check_tensors(call, tensors, element, device)
        params = _params(call, tensors, element)
        found = checked(plain(params))
        if isinstance(found, Problem):
            raise refusal(found)
        out, lse, wants_lse = call.out, None, call.wants_lse
        if out is None:
            out = dlpack.new_array("out", q.shape, out_dtypes(element)[0], call.stream, device)
            params.out = out.address
        if wants_lse:
            *batch, rows, heads, _ = q.shape
            lse = dlpack.new_array("the LSE", (*batch, heads, rows), "float32", call.stream, device)
            params.softmax_lse = lse.address
        if not q.is_empty:
            forward(params, handle).check()
        return out if lse is None else (out, lse)


def _check_tensors(call: AttentionCall, tensors: dict, element: str, device: int) -> None:
    """Raise for what `forward` cannot see: it knows addresses only."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise error_for(
                Status.INVALID_ARGUMENT,
                f"{name} is on device {tensor.device}: must be on device {device}, which is the stream's",
            )
    q, k = tensors["q"], tensors["k"]
    call.require_dims(q=q.shape, k=k.shape)
    batch = _batch(call, tensors)
    shapes = {
        "k": (*q.shape[:-3], *k.shape[-3:-1], q.shape[-1]),
        "v": k.shape,
        "out": q.shape,
        "cu_seqlens_q": (batch + 1,),
        "cu_seqlens_k": (batch + 1,),
        "seqused_k": (batch,),
    }
    dtypes = {"out": out_dtypes(element)} | dict.fromkeys(LENGTHS, ("int32",))
    dtypes |= dict.fromkeys(DESCALES, ("float32",))
    for name, tensor in tensors.items():
        if name in LENGTHS and len(tensor.shape) != 1:
            raise error_for(Status.INVALID_SHAPE, f"{name}.shape={tensor.shape}: must have one dimension")
        if tensor.shape != shapes.get(name, tensor.shape):
            raise error_for(Status.INVALID_SHAPE, f"{name}.shape={tensor.shape}: must be {shapes[name]}")
        if tensor.dtype not in dtypes.get(name, (tensor.dtype,)):
            raise error_for(Status.INVALID_ARGUMENT, f"{name} is {tensor.dtype}: must be {' or '.join(dtypes[name])}")
        if name not in DESCALES and tensor.shape[-1] > 1 and tensor.strides[-1] != 1:
            raise error_for(
                Status.INVALID_SHAPE,
                f"{name} has the strides {tensor.strides} (elements): the last "
                "dimension must be contiguous, of stride 1",
            )
    if k.is_empty and not (call.is_packed or q.is_empty):
        raise error_for(Status.INVALID_SHAPE, f"k.shape={k.shape}: must not be empty")
    if "out" in tensors and tensors["out"].is_readonly:
        raise error_for(
            Status.INVALID_ARGUMENT,
            f"out is a {type(call.out).__qualname__}, which is read-only: must be writable, or None",
        )


def _batch(call: AttentionCall, tensors: dict) -> int:
    """Number of sequences."""
    if not call.is_packed:
        return tensors["q"].shape[0]
    offsets = tensors["cu_seqlens_q" if "cu_seqlens_q" in tensors else "cu_seqlens_k"]
    return max(0, offsets.shape[0] - 1) if len(offsets.shape) == 1 else 0


def _params(call: AttentionCall, tensors: dict, element: str) -> FlashAttentionParams:
    """The call as params: what has no elements, and an out that is not given, has an address that nothing uses."""
    q, k = tensors["q"], tensors["k"]
    sizes = call.sizes(q.shape, k.shape)
    if call.is_packed:
        sizes["batch_size"] = _batch(call, tensors)
    out = tensors.get("out")
    params = FlashAttentionParams(
        **sizes,
        **call.choices(),
        dtype=DEVICE_DTYPES[element],
        out=ANY_ADDRESS,
        out_dtype=None if element != FP8 or out is None else DEVICE_DTYPES[out.dtype],
    )
    for name, tensor in tensors.items():
        if name in DESCALES:
            _set_descale(params, name, tensor, _batch(call, tensors))
            continue
        setattr(params, name, (q.address or ANY_ADDRESS) if tensor.is_empty else tensor.address)
        if name not in LENGTHS:
            _set_strides(params, name, tensor)
    return params


def _set_strides(params, name: str, tensor) -> None:
    """A stride along a dimension of size 1 means nothing, and libraries leave any number there: None."""
    for dim, size, stride in zip(DIMS[-len(tensor.shape) + 1 :], tensor.shape, tensor.strides, strict=False):
        if size > 1:
            setattr(params, f"{name}_{dim}_stride", stride)


def _set_descale(params, name: str, tensor, batch: int) -> None:
    """[], [heads], [batch, heads], or a size of 1 instead of one of them."""
    full = (batch, params.num_heads if name == "q_descale" else params.num_heads_k)
    shape, strides = ((1, 1) + x for x in (tensor.shape, tensor.strides))
    if len(tensor.shape) > 2 or any(size not in (1, most) for size, most in zip(shape[-2:], full, strict=True)):
        raise error_for(
            Status.INVALID_SHAPE, f"{name}.shape={tensor.shape}: must be (), ({full[1]},), ({full[0]}, 1) or {full}"
        )
    setattr(params, f"{name}_ptr", tensor.address)
    for dim, size, stride in zip(("batch", "head"), shape[-2:], strides[-2:], strict=True):
        setattr(params, f"{name}_{dim}_stride", stride if size > 1 else 0)


def out_dtypes(element: str) -> tuple[str, ...]:
    """Element types that out may have, the one that it gets first."""
    return ("bfloat16", "float16") if element == FP8 else (element,)
