"""The operators' arguments, described once: their schemas, and what they are as params of this library's calls."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arrays import call as arrays
from ..contract.backward_params import BackwardParams
from ..contract.merge import MergeParams
from ..contract.params import DataType, FlashAttentionParams
from ..contract.status import Status, error_for

# Names of fields in FlashAttentionParams, of which some addresses are called otherwise.
FIELDS = {"q_descale": "q_descale_ptr", "k_descale": "k_descale_ptr", "v_descale": "v_descale_ptr"}
OUT_DTYPE = {torch.float8_e4m3fn: torch.bfloat16}  # else that of q
MERGE_DTYPES = {torch.float16: DataType.FP16, torch.bfloat16: DataType.BF16, torch.float32: DataType.FP32}


class ForwardCall(NamedTuple):
    """Arguments of `fa3_cute::forward`, named as the fields of FlashAttentionParams are.

    is_deterministic is of the backward pass.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    page_table: Tensor | None = None
    kv_batch_idx: Tensor | None = None
    leftpad_k: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    s_aux: Tensor | None = None
    q_v: Tensor | None = None
    softmax_scale: float | None = None
    is_causal: bool = False
    window_size_left: int = -1
    window_size_right: int = -1
    attention_chunk: int = 0
    softcap: float = 0.0
    max_seqlen_q: int = 0
    num_splits: int = 0
    pack_gqa: bool | None = None
    sm_margin: int = 0
    is_deterministic: bool = False


class Update(NamedTuple):
    """What else `fa3_cute::update_forward` takes: rows that it appends to k and v, and rotary tables."""

    k_new: Tensor | None = None
    v_new: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    seqlens_rotary: Tensor | None = None
    rotary_interleaved: bool = False


class BackwardCall(NamedTuple):
    """Arguments of `fa3_cute::backward`, named as the fields of BackwardParams are."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor
    dlse: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    s_aux: Tensor | None = None
    softmax_scale: float | None = None
    is_causal: bool = False
    window_size_left: int = -1
    window_size_right: int = -1
    attention_chunk: int = 0
    softcap: float = 0.0
    is_deterministic: bool = False

    @staticmethod
    def of(call: ForwardCall, **found: Any) -> "BackwardCall":
        """Of a forward call: with dout and what forward has found."""
        given: dict[str, Any] = call._asdict()
        return BackwardCall(**{name: given[name] for name in BackwardCall._fields if name in given}, **found)

    @property
    def differentiated(self) -> ForwardCall:
        """The forward call."""
        given = self._asdict()
        return ForwardCall(**{name: given[name] for name in ForwardCall._fields if name in given})


class MergeCall(NamedTuple):
    """Arguments of `fa3_cute::merge_attention`, named as the fields of MergeParams are."""

    out_a: Tensor
    lse_a: Tensor
    out_b: Tensor
    lse_b: Tensor


_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "SymInt",
    bool: "bool",
    bool | None: "bool?",
}


def schema(*kinds: type, results: int, written: tuple[str, ...] = ()) -> str:
    """An operator's schema, after its name: the fields of its arguments, and so many new tensors.

    written   the arguments that it writes to
    """
    arguments = []
    for kind in kinds:
        defaults: dict[str, Any] = getattr(kind, "_field_defaults", {})
        for name, annotation in kind.__annotations__.items():
            of_type = f"Tensor({name}!)" if name in written else _SCHEMA[annotation]
            arguments.append(f"{of_type} {name}{f'={defaults[name]}' if name in defaults else ''}")
    return f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * results)})"


NUM_TENSORS = {
    kind: sum("Tensor" in _SCHEMA[annotation] for annotation in kind.__annotations__.values())
    for kind in (ForwardCall, BackwardCall, Update)
}


def key_of(call) -> tuple:
    """What two calls have in common that are the same but for addresses."""
    count = NUM_TENSORS[type(call)]
    facts = [x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in call[:count]]
    return *facts, call[count:]


def require_tensors(call) -> None:
    """TypeError for what must be a tensor and is none."""
    for name, x in zip(call._fields, call[: NUM_TENSORS[type(call)]], strict=False):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch tensor, not {type(x).__name__}")


def lse_shape(q: Tensor) -> tuple:
    """[batch, num_heads, seqlen_q], packed [num_heads, total_q]."""
    *batch, rows, heads, _ = q.shape
    return *batch, heads, rows


def out_shape(q: Tensor, v: Tensor) -> tuple:
    """q's, with the columns of v."""
    return *q.shape[:-1], v.shape[-1]


# ---- params ----------------------------------------------------------------------------------------------------------


class _View(NamedTuple):
    """A tensor as the functions of arrays/call.py read it; the address is any."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: torch.device
    is_empty: bool
    address: int = arrays.ANY_ADDRESS
    is_readonly: bool = False


def _view(x: Tensor) -> _View:
    dtype = str(x.dtype).removeprefix("torch.")
    return _View(tuple(x.shape), tuple(x.stride()), dtype, x.device, x.numel() == 0)


def forward_params(call: ForwardCall, update: Update | None = None, **more: Tensor) -> FlashAttentionParams:
    """The call, of which all is checked that addresses do not say; those are placeholders.

    more   an `out` that there is already

    Raises FlashAttentionError for tensors that do not fit together.
    """
    described = _attention_call(call, update)
    names = (*"qkv", *described.given(*arrays.OTHERS, *arrays.DESCALES))
    tensors = {name: _view(x) for name, x in ({name: getattr(described, name) for name in names} | more).items()}
    q, k, v = (tensors[name].dtype for name in "qkv")
    elements = described.element_types(q, k, v, arrays.DEVICE_DTYPES)
    # The rules that attention() has for arrays of any library.
    arrays._check_tensors(described, tensors, elements[0], call.q.device)  # type: ignore[arg-type]
    params = arrays._params(described, tensors, elements)
    batch = described.batch({name: tensor.shape for name, tensor in tensors.items()})
    if call.seqused_q is not None:
        _require("seqused_q", call.seqused_q, (batch,), torch.int32, call.q.device)
        if not call.seqused_q.is_contiguous():
            raise error_for(Status.INVALID_SHAPE, "seqused_q: must be contiguous, of stride 1")
        params.seqused_q = arrays.ANY_ADDRESS
    params.pack_gqa, params.sm_margin = call.pack_gqa, call.sm_margin
    return params


def _attention_call(call: ForwardCall, update: Update | None) -> arrays.AttentionCall:
    given: dict[str, Any] = call._asdict() | ({} if update is None else update._asdict())
    numbers = {name: given.pop(name) for name in ("softmax_scale", "softcap")}
    given |= {
        "causal": given.pop("is_causal"),
        "window_size": (given.pop("window_size_left"), given.pop("window_size_right")),
        "numbers": numbers | {"p_dropout": 0.0},
        "mod_arrays": (),
        "mod_scalars": (),
        "zero_padding": False,
        "return_lse": True,
    }
    fields = arrays.AttentionCall.__dataclass_fields__
    return arrays.AttentionCall(**{name: given.get(name) for name in fields})  # type: ignore[arg-type]


def backward_params(call: BackwardCall, *gradients: Tensor) -> BackwardParams:
    """As forward_params, without the addresses of tensors that overlap nothing but by address.

    gradients   dq, dk and dv, of which only strides are read; none: contiguous ones
    """
    forward = forward_params(call.differentiated, out=call.out)
    params = BackwardParams(**{name: getattr(forward, name) for name in FlashAttentionParams.__dataclass_fields__})
    params.q = params.k = params.v = params.out = None
    _require("dout", call.dout, out_shape(call.q, call.v), call.q.dtype, call.q.device)
    for name, x in zip(("dout", "dq", "dk", "dv"), (call.dout, *gradients), strict=False):
        arrays._set_strides(params, name, _view(x))
    for name in ("softmax_lse", "dlse"):
        if (x := getattr(call, name)) is not None:
            _require(name, x, lse_shape(call.q), torch.float32, call.q.device)
    params.deterministic = call.is_deterministic
    return params


def merge_params(call: MergeCall) -> MergeParams:
    """The call without addresses, its results contiguous; raises FlashAttentionError for tensors that do not fit."""
    out_a, lse_a, out_b, lse_b = call
    if out_a.dim() not in (3, 4):
        accepted = "[batch, seqlen, heads, head_dim], or [rows, heads, head_dim]"
        raise error_for(Status.INVALID_SHAPE, f"out_a.shape={tuple(out_a.shape)}: must be {accepted}")
    if out_a.dtype not in MERGE_DTYPES:
        raise error_for(Status.INVALID_ARGUMENT, f"out_a is {out_a.dtype}: must be float16, bfloat16 or float32")
    _require("out_b", out_b, out_a.shape, out_a.dtype, out_a.device)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _require(name, lse, lse_shape(out_a), torch.float32, out_a.device)
    *batch, rows, heads, head_dim = out_a.shape
    params = MergeParams(
        batch_size=batch[0] if batch else 1,
        seqlen_q=rows,
        num_heads=heads,
        head_dim=head_dim,
        dtype=MERGE_DTYPES[out_a.dtype],
    )
    for name, x in (("out_a", out_a), ("out_b", out_b)):
        arrays._set_strides(params, name, _view(x))
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        *of_batch, of_head, of_row = lse.stride()
        setattr(params, f"{name}_batch_stride", of_batch[0] if of_batch else None)
        setattr(params, f"{name}_head_stride", of_head)
        setattr(params, f"{name}_row_stride", of_row)
    return params


def new_merged(call: MergeCall) -> tuple[Tensor, Tensor]:
    """Memory for (out, LSE)."""
    return (
        torch.empty_like(call.out_a, memory_format=torch.contiguous_format),
        torch.empty_like(call.lse_a, memory_format=torch.contiguous_format),
    )


def _require(name: str, x: Tensor, shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    """Raise for a tensor that is another one."""
    if x.device != device:
        raise error_for(Status.INVALID_ARGUMENT, f"{name} is on device {x.device}: must be on device {device}, as q is")
    if tuple(x.shape) != tuple(shape):
        raise error_for(Status.INVALID_SHAPE, f"{name}.shape={tuple(x.shape)}: must be {tuple(shape)}")
    if x.dtype != dtype:
        raise error_for(Status.INVALID_ARGUMENT, f"{name} is {x.dtype}: must be {dtype}")
