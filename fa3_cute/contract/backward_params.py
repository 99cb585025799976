"""BackwardParams: one call of `backward` as data, and how the value of a field is read. Pure Python."""

from dataclasses import dataclass, field, fields, replace
from operator import attrgetter

from .head_dims import columns_of
from .params import Argument, DataType, FlashAttentionParams, address, integer, is_given, is_true, member, tensor_sizes
from .plain import BAD, plain

BACKWARD = "backward"  # what its launches take


def _field(default, kind: str, **facts):
    return field(default=default, metadata={"argument": Argument(kind, **facts)})


def _tensor(element: str, alignment: int = 16, **facts):
    return _field(None, "pointer", element=element, alignment=alignment, takers=(BACKWARD,), changes=True, **facts)


def _stride():
    """None: contiguous."""
    return _field(None, "stride", takers=(BACKWARD,), varies=True)


@dataclass(slots=True, kw_only=True)
class BackwardParams(FlashAttentionParams):
    """Arguments of `backward`: those of the `forward` call that it differentiates, and gradients. Mutable.

    Fields of FlashAttentionParams mean what they mean there, but for those that stand here again. Of a forward call
    that `backward` does not differentiate yet, the status and the sentence of what is served (backward_rules.py).

    dq, dk and dv are the gradients of q, k and v, where dout is that of out: of any number that changes with out as the
    sum of dout * out, and with softmax_lse as the sum of dlse * softmax_lse. dk and dv of a KV head sum over the query
    heads of its group. Query rows that see no key get dq = 0, keys that no row sees dk = dv = 0; rows past the used
    length, and those that no packed sequence has, stay as they are. No output may overlap an input or another output.
    """

    # Inputs, of the shapes that forward's outputs have: what it wrote, or the merged results over more keys than those
    # given here, of which dq is then a part. out in dtype; its strides are those above.
    out: int | None = _tensor("input")
    softmax_lse: int | None = _tensor("float32", 4)

    # [batch, seqlen_q, num_heads, head_dim_v], packed [total_q, num_heads, head_dim_v]: the gradient of out, in dtype.
    # 16-byte aligned, last dimension contiguous, no stride 0.
    dout: int | None = _tensor("input")
    dout_batch_stride: int | None = _stride()
    dout_row_stride: int | None = _stride()
    dout_head_stride: int | None = _stride()
    # FP32, laid out as softmax_lse: the gradient of softmax_lse; None: zeros.
    dlse: int | None = _tensor("float32", 4, is_optional=True)

    # Outputs of the shapes of q, k and v, of grad_dtype; 16-byte aligned, last dimension contiguous. None: not wanted
    # and not written; one of them is.
    dq: int | None = _tensor("gradient")
    dk: int | None = _tensor("gradient")
    dv: int | None = _tensor("gradient")
    dq_batch_stride: int | None = _stride()
    dq_row_stride: int | None = _stride()
    dq_head_stride: int | None = _stride()
    dk_batch_stride: int | None = _stride()
    dk_row_stride: int | None = _stride()
    dk_head_stride: int | None = _stride()
    dv_batch_stride: int | None = _stride()
    dv_row_stride: int | None = _stride()
    dv_head_stride: int | None = _stride()
    grad_dtype: DataType | None = _field(None, "choice")  # of dq, dk and dv; None: dtype, or FP32
    # dk and dv are added to what they hold, in FP32, and rounded then; rows that no sequence uses stay as they are.
    accumulate_dkv: bool = _field(False, "flag")

    # FP32 [num_heads], contiguous: the gradient of s_aux, which it needs; of all sequences, every head is written.
    d_s_aux: int | None = _tensor("float32", 4, is_optional=True)
    # FP32, the gradient of an attn_mask that is added (attn_mask_dtype is not None), which it needs, with its strides:
    # along a stride of 0 the sum, along others rows must lie apart. 0 where a key is hidden, and where seqused_q or
    # seqused_k say that the row or the key is not used: all of it is written.
    d_bias: int | None = _tensor("float32", 4, is_optional=True)

    deterministic: bool = _field(False, "flag")  # the same bits in every call; else sums of dq may differ in rounding
    # Scratch memory, of backward_workspace_size(params) bytes; required, but where there is no query. Its contents mean
    # nothing between calls. Launches that may run at the same time must not share it.
    workspace: int | None = _field(None, "pointer", element="bytes", alignment=16, varies=True)
    workspace_bytes: int = _field(0, "count")


# What backward's launches take of forward's fields.
_TAKEN = frozenset(
    (
        *("q", "k", "v", "batch_size", "seqlen_q", "seqlen_k", "num_heads", "num_heads_k", "softmax_scale"),
        *("head_dim", "head_dim_v"),
        *(f"{tensor}_{dim}_stride" for tensor in ("q", "k", "v", "out") for dim in ("batch", "row", "head")),
        *("window_size_left", "window_size_right", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"),
        *("s_aux", "s_aux_dtype", "attention_chunk", "softcap", "alibi_slopes", "alibi_batch_stride"),
        *("p_dropout", "rng_state", "attn_mask"),
        *("attn_mask_batch_stride", "attn_mask_head_stride", "attn_mask_row_stride"),
    )
)


def _described(item) -> Argument:
    argument = item.metadata["argument"]
    if item.name in OWN:
        return argument
    return replace(argument, takers=(BACKWARD,) if item.name in _TAKEN else ())


# Fields that stand in BackwardParams, and not in FlashAttentionParams alone.
OWN = frozenset(BackwardParams.__annotations__)
ARGUMENTS: dict[str, Argument] = {item.name: _described(item) for item in fields(BackwardParams)}
OUTPUTS = ("dq", "dk", "dv")
SCORE_OUTPUTS = ("d_s_aux", "d_bias")
SCORE_INPUTS = ("s_aux", "alibi_slopes", "attn_mask", "rng_state")
INPUTS = ("q", "k", "v", "out", "dout")
LSES = ("softmax_lse", "dlse")
# Those that plain.py, which reads forward's fields, does not know.
NEW = tuple(name for name in ARGUMENTS if name not in FlashAttentionParams.__dataclass_fields__)
_NONE = type(None)
_TYPES = {"pointer": {int, _NONE}, "stride": {int, _NONE}, "choice": {DataType, _NONE}, "flag": {bool}}
_ACCEPTED = tuple(_TYPES[ARGUMENTS[name].kind] for name in NEW)  # types that mean themselves
_read_new = attrgetter(*NEW)


# ---- plain values ----------------------------------------------------------------------------------------------------


class PlainBackward(BackwardParams):
    """A call whose values are plain; `raw` is the caller's."""

    __slots__ = ("raw",)
    raw: BackwardParams


def plain_backward(params: BackwardParams) -> BackwardParams:
    """The params themselves if every value is plain, else a copy in which it is; where one means nothing, its field
    holds BAD."""
    forward, values = plain(params), _read_new(params)
    if forward is params and all(type(value) in types for value, types in zip(values, _ACCEPTED, strict=True)):
        return params
    copy = PlainBackward()
    copy.raw = params
    for name in FlashAttentionParams.__dataclass_fields__:
        setattr(copy, name, getattr(forward, name))
    for name, value in zip(NEW, values, strict=True):
        setattr(copy, name, _plain(ARGUMENTS[name].kind, value))
    return copy


def _plain(kind: str, value):
    if kind == "pointer":
        found = address(value) if is_given(value) else 0
    elif kind == "flag":
        found = is_true(value)
    elif value is None:
        return None
    else:
        found = member(DataType, value) if kind == "choice" else integer(value)
    return BAD if found is None else found


def grad_dtype_of(p: BackwardParams) -> DataType:
    """The element type of dq, dk and dv of plain params."""
    return p.dtype if p.grad_dtype is None else p.grad_dtype


def sizes_of(p: BackwardParams, tensor: str) -> tuple[int, int, int]:
    """(batch, rows, heads) of a tensor of plain params, gradients too; a packed one has one batch."""
    return tensor_sizes(p, "q" if tensor in ("q", "q_v", "out", "dout", "dq") else "k")


def strides_of(p: BackwardParams, tensor: str) -> tuple[int, int, int]:
    """(batch, row, head) of a tensor of good plain params, in elements; the contiguous ones where they are None, or
    never used because the dimension has one entry or the tensor none."""
    batch, rows, heads = sizes = sizes_of(p, tensor)
    columns = columns_of(p, tensor)
    contiguous = rows * heads * columns, heads * columns, columns
    given = [getattr(p, f"{tensor}_{dim}_stride") for dim in ("batch", "row", "head")]
    batch_stride, row_stride, head_stride = [
        default if stride is None or size == 1 or 0 in sizes else stride
        for stride, default, size in zip(given, contiguous, sizes, strict=True)
    ]
    return batch_stride, row_stride, head_stride
