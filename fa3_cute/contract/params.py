"""FlashAttentionParams: one forward call as data, and how the value of a field is read. Pure Python."""

import operator
from dataclasses import dataclass, field, fields
from enum import IntEnum
from functools import cache
from typing import Any

from .block_mask import BlockMask
from .mods import MaskMod, ScoreMod


class DataType(IntEnum):
    """Element type of q, k and v, and of out. FP32 is for partial results (MergeParams), never of q, k and v."""

    FP16 = 0
    BF16 = 1
    FP8_E4M3 = 2
    FP32 = 3


class AttentionMode(IntEnum):
    """How the sequences lie in memory and how many queries each has."""

    PREFILL = 0
    DECODE = 1
    VARLEN_PREFILL = 2


# ---- what a field holds ----------------------------------------------------------------------------------------------

FORWARD, DECODE = "forward", "decode"  # the kernels
BOTH = (FORWARD, DECODE)
LEFTPAD, QV = "leftpad", "qv"  # and those of either that serve leftpad_k, and q_v


@dataclass(frozen=True, slots=True)
class Argument:
    """The description of a field, which rules, kernel entries, argument buffers and repeat checks are made of.

    kind        "pointer", "size", "stride", "count", "number", "flag", "choice" or "object"
    element     what a pointer points at: "input" and "query" (dtype), "stored" (kv_dtype), "output" (out_dtype),
                "float32", "int32", "uint64" or "bytes"
    alignment   of a pointer, in bytes
    takers      the kernels whose entry takes it
    entry       its name there; "" where it is the field's
    is_fp8      only calls with FP8 keys have it: 16-bit kernels take it and never read it
    changes     an address that is another one in every call; all else changes with the shape at most
    is_optional of these, one that few calls have: whether they do is part of the shape
    varies      other shapes have other values of it, as of lengths; what neither changes nor varies is a choice
    """

    kind: str
    element: str = ""
    alignment: int = 1
    takers: tuple[str, ...] = ()
    entry: str = ""
    is_fp8: bool = False
    changes: bool = False
    is_optional: bool = False
    varies: bool = False


def _field(default, kind: str, **facts) -> Any:
    return field(default=default, metadata={"argument": Argument(kind, **facts)})


def _tensor(element: str = "input", alignment: int = 16) -> Any:
    return _field(None, "pointer", element=element, alignment=alignment, takers=BOTH, changes=True)


def _lengths(*takers: str) -> Any:
    return _field(None, "pointer", element="int32", alignment=4, takers=takers, varies=True)


def _descale(entry: str) -> Any:
    return _field(None, "pointer", element="float32", alignment=4, takers=BOTH, entry=entry, is_fp8=True, changes=True)


def _optional(element: str, alignment: int) -> Any:
    return _field(None, "pointer", element=element, alignment=alignment, takers=BOTH, changes=True, is_optional=True)


def _stride(default: int | None = None, is_fp8: bool = False) -> Any:
    """None: contiguous. 0 by default: one for all."""
    return _field(default, "stride", takers=BOTH, is_fp8=is_fp8, varies=default is None)


def _size(*takers: str, varies: bool = True) -> Any:
    return _field(0, "size", takers=takers, varies=varies)


def _new(element: str, alignment: int) -> Any:
    """Of what is done before attention, by a kernel with an entry of its own (append.py)."""
    return _field(None, "pointer", element=element, alignment=alignment, varies=True)


def _new_stride() -> Any:
    return _field(None, "stride", varies=True)


@dataclass(slots=True, kw_only=True)
class FlashAttentionParams:
    """Arguments of `forward`: pointers, sizes, strides, choices. Mutable; a misspelt field is an error.

    A pointer is an int device address or anything with `__int__` (a cuda.core Buffer's handle); None or 0 is absent.
    Strides are in elements, None is contiguous in the shapes below; lengths are in tokens. Fields hold what the caller
    wrote: `explain(params)` says what is wrong with them, nothing is checked here.
    """

    # [batch, seqlen_q, num_heads, head_dim] q and out, [batch, seqlen_k, num_heads_k, head_dim] k and v; packed
    # [total_q, num_heads, head_dim] and [total_k, num_heads_k, head_dim]; k and v in pages are
    # [num_pages, page_size, num_heads_k, head_dim]. 16-byte aligned, last dimension contiguous.
    q: int | None = _tensor()
    k: int | None = _tensor("stored")
    v: int | None = _tensor("stored")
    out: int | None = _tensor("output")
    # FP32 output, natural logarithm, contiguous: [batch, num_heads, seqlen_q], packed [num_heads, total_q].
    softmax_lse: int | None = _tensor("float32", 4)

    batch_size: int = _size(*BOTH)
    seqlen_q: int = _size(*BOTH)  # ignored with cu_seqlens_q
    seqlen_k: int = _size(*BOTH)  # ignored with cu_seqlens_k; with seqused_k the capacity of a sequence
    num_heads: int = _size(*BOTH, varies=False)
    num_heads_k: int = _size(*BOTH, varies=False)  # divides num_heads: MHA if equal, MQA if 1, else GQA
    head_dim: int = _size(*BOTH, varies=False)
    head_dim_v: int = _size(*BOTH, varies=False)  # of v and out; 0: head_dim

    q_batch_stride: int | None = _stride()
    q_row_stride: int | None = _stride()
    q_head_stride: int | None = _stride()
    k_batch_stride: int | None = _stride()
    k_row_stride: int | None = _stride()
    k_head_stride: int | None = _stride()
    v_batch_stride: int | None = _stride()
    v_row_stride: int | None = _stride()
    v_head_stride: int | None = _stride()
    out_batch_stride: int | None = _stride()
    out_row_stride: int | None = _stride()
    out_head_stride: int | None = _stride()

    dtype: DataType = _field(DataType.FP16, "choice")
    out_dtype: DataType | None = _field(None, "choice")  # None: dtype, BF16 for FP8_E4M3
    kv_dtype: DataType | None = _field(None, "choice")  # of k and v; None: dtype; FP8_E4M3 with q of FP16 or BF16 too
    softmax_scale: float | None = _field(None, "number", takers=BOTH, varies=True)  # None: 1/sqrt(head_dim)

    # Bottom-right aligned: query i sees key j iff j <= i + seqlen_k - seqlen_q.
    is_causal: bool = _field(False, "flag")
    # Query i sees i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right; negative is unbounded.
    window_size_left: int = _field(-1, "count", takers=BOTH)
    window_size_right: int = _field(-1, "count", takers=BOTH)
    mode: AttentionMode = _field(AttentionMode.PREFILL, "choice")

    # int32 [batch + 1]. Packed queries go with packed keys, or with seqused_k and a dense cache or pages.
    cu_seqlens_q: int | None = _lengths(*BOTH)
    cu_seqlens_k: int | None = _lengths(*BOTH)
    total_q: int = _size()
    total_k: int = _size()
    max_seqlen_q: int = _size()  # a hint: no packed sequence has more queries; 0 is unknown
    seqused_q: int | None = _lengths(*BOTH)  # int32 [batch]
    seqused_k: int | None = _lengths(*BOTH)

    # K and V in pages: k and v are pools [num_pages, page_size, num_heads_k, head_dim], their batch strides those of
    # pages, seqlen_k the capacity of a sequence. int32 [batch, seqlen_k / page_size]; needs seqused_k.
    page_table: int | None = _lengths(*BOTH)
    page_table_batch_stride: int | None = _stride()
    page_size: int = _size(*BOTH)
    num_pages: int = _size(*BOTH)
    # int32 [batch]: the sequence's entry of k and v, which have batch_size_k of them, or its row of page_table.
    kv_batch_idx: int | None = _lengths(*BOTH)
    batch_size_k: int = _size(*BOTH)
    # int32 [batch]: the first rows of a sequence's keys that do not exist, among those that seqused_k counts.
    leftpad_k: int | None = _lengths(LEFTPAD)

    # Of FP8 k and v. FP32; real value = FP8 value * descale; None: 1.0. Strides 0 and 0: one scale for all; else by
    # sequence, packed or not, and by head: q by query head [batch, num_heads], k and v by KV head [batch, num_heads_k].
    q_descale_ptr: int | None = _descale("q_descale")
    k_descale_ptr: int | None = _descale("k_descale")
    v_descale_ptr: int | None = _descale("v_descale")
    q_descale_batch_stride: int = _stride(0, is_fp8=True)
    q_descale_head_stride: int = _stride(0, is_fp8=True)
    k_descale_batch_stride: int = _stride(0, is_fp8=True)
    k_descale_head_stride: int = _stride(0, is_fp8=True)
    v_descale_batch_stride: int = _stride(0, is_fp8=True)
    v_descale_head_stride: int = _stride(0, is_fp8=True)

    # Scores and masks, in this order: scale, softcap, attn_mask and ALiBi, score_mod, masks, softmax with the sink,
    # dropout. Scores become softcap * tanh(scores / softcap); 0: they stay.
    softcap: float = _field(0.0, "number", takers=BOTH)
    # [num_heads] of s_aux_dtype (FP16, BF16 or FP32; None: FP32), aligned to its elements: attention sinks, the logit
    # of one more key of each head, whose value is 0.
    s_aux: int | None = _optional("bytes", 2)
    s_aux_dtype: DataType | None = _field(None, "choice", takers=BOTH)
    # FP32 [num_heads], or [batch, num_heads] with a stride: scores -= slope * abs(i + seqlen_k - seqlen_q - j).
    alibi_slopes: int | None = _optional("float32", 4)
    alibi_batch_stride: int = _stride(0)
    # [batch, num_heads, seqlen_q, seqlen_k], strides in elements, 0: one for all along it; aligned to its elements.
    # None: bytes, of which 0 hides the key; FP16, BF16 or FP32: added to the score.
    attn_mask: int | None = _optional("bytes", 1)
    attn_mask_dtype: DataType | None = _field(None, "choice")
    attn_mask_batch_stride: int | None = _stride()
    attn_mask_head_stride: int | None = _stride()
    attn_mask_row_stride: int | None = _stride()
    attention_chunk: int = _field(0, "count", takers=BOTH)  # a query sees its own chunk of so many keys alone; 0: off
    p_dropout: float = _field(0.0, "number", takers=BOTH)  # the probability to drop, 0 <= p < 1; needs rng_state
    rng_state: int | None = _optional("uint64", 8)  # uint64 [2]: seed, offset
    # [batch, seqlen_q, num_heads, head_dim_v], packed [total_q, num_heads, head_dim_v], of head_dim 64 and head_dim_v
    # 512: a second part of q, whose products with the rows of v scores are of too. Like q otherwise.
    q_v: int | None = _field(None, "pointer", element="query", alignment=16, takers=(QV,), changes=True)
    q_v_batch_stride: int | None = _field(None, "stride", takers=(QV,), varies=True)
    q_v_row_stride: int | None = _field(None, "stride", takers=(QV,), varies=True)
    q_v_head_stride: int | None = _field(None, "stride", takers=(QV,), varies=True)
    # Functions of score and place, and what they read: see mods.py.
    # A user's functions of scores (contract/mods.py), and of what both read, the ScoreMod's first: the address of each
    # array; its strides of all dimensions but the last, two of each array, None: contiguous; scalars as float32.
    score_mod: ScoreMod | None = _field(None, "object")
    mask_mod: MaskMod | None = _field(None, "object")
    block_mask: BlockMask | None = _field(None, "object", varies=True)  # lists of the mask_mod's blocks
    mod_pointers: tuple[int, ...] | None = _field(None, "object", varies=True)
    mod_strides: tuple[int, ...] | None = _field(None, "object", varies=True)
    mod_scalars: tuple[float, ...] | None = _field(None, "object", varies=True)

    num_splits: int = _field(0, "count")  # 0 automatic, 1 never (batch-invariant), n exactly n
    max_num_splits: int = _field(0, "count")  # of what num_splits = 0 chooses; 0: 256
    fixed_split_size: int = _field(0, "count")  # keys per split, for bits that do not depend on the batch; 0: off
    zero_padding: bool = _field(False, "flag")  # packed rows behind the last sequence get out = 0 and LSE = -inf
    sm_margin: int = _field(0, "count")  # SMs that are left to other kernels
    scheduler_metadata: int | None = _field(None, "pointer", element="bytes", varies=True)  # ignored
    pack_gqa: bool | None = _field(None, "flag")  # None: automatic
    # Scratch memory for split-KV; None: ours.
    workspace: int | None = _field(None, "pointer", element="bytes", alignment=16, varies=True)
    workspace_bytes: int = _field(0, "count")
    # int32 on the device that are 0, and 0 again after the call; None: ours. One of them, and for split-KV
    # workspace_size(params) / 8 bytes. Launches that may run at the same time must not share them.
    tile_counter: int | None = _field(None, "pointer", element="int32", alignment=4, varies=True)

    # Rows that the call itself writes behind the seqused_k rows of each sequence, which are those before the call, and
    # then attends. [batch, seqlen_knew, num_heads_k, head_dim], packed [seqlen_knew, num_heads_k, head_dim] with
    # cu_seqlens_k_new, int32 [batch + 1]; 16-byte aligned, last dimension contiguous.
    k_new: int | None = _new("bytes", 16)
    v_new: int | None = _new("bytes", 16)
    kv_new_dtype: DataType | None = _field(None, "choice")  # None: as k and v; or dtype, quantised by their descales
    seqlen_knew: int = _size()
    cu_seqlens_k_new: int | None = _new("int32", 4)
    k_new_batch_stride: int | None = _new_stride()
    k_new_row_stride: int | None = _new_stride()
    k_new_head_stride: int | None = _new_stride()
    v_new_batch_stride: int | None = _new_stride()
    v_new_row_stride: int | None = _new_stride()
    v_new_head_stride: int | None = _new_stride()
    # Rotary positions of q and k_new: cosines and sines [rotary_positions, rotary_dim / 2], rows of rotary_row_stride
    # elements (None: contiguous), 16-byte aligned, of rotary_dtype (None: dtype; or FP32). Pairs are (2i, 2i + 1) if
    # interleaved, else (i, i + rotary_dim / 2). rotary_positions 0: as many as the keys can be.
    rotary_cos: int | None = _new("bytes", 16)
    rotary_sin: int | None = _new("bytes", 16)
    rotary_dim: int = _size()
    rotary_positions: int = _size()
    rotary_interleaved: bool = _field(False, "flag")
    rotary_dtype: DataType | None = _field(None, "choice")
    rotary_row_stride: int | None = _new_stride()
    seqlens_rotary: int | None = _new("int32", 4)  # int32 [batch]: the position of the first new key


ARGUMENTS: dict[str, Argument] = {item.name: item.metadata["argument"] for item in fields(FlashAttentionParams)}


def names(**facts) -> tuple[str, ...]:
    """The fields whose description has all of these facts, in order."""
    return tuple(
        name
        for name, argument in ARGUMENTS.items()
        if all(getattr(argument, fact) == value for fact, value in facts.items())
    )


TENSORS = names(element="input") + names(element="stored") + names(element="output")  # q, k, v, out
DESCALES = names(kind="pointer", is_fp8=True)
# Pointers that few calls have.
OPTIONALS = names(is_optional=True)
# Features that are a number, 0 where they are off; the scale, which every call has, is none.
NUMBERS = tuple(name for name in names(kind="number") if name != "softmax_scale")
# What changes with every call, and what changes with the shape at most; q_v apart, which one kernel takes.
POINTERS = tuple(name for name in names(changes=True) if name not in (*DESCALES, *OPTIONALS, "q_v"))
CHOICES = names(changes=False, varies=False)
SHAPE = CHOICES + names(varies=True)

DTYPE_NAMES = ("fp16", "bf16", "fp8_e4m3", "fp32")  # by DataType, as configs call them
OFF = frozenset((None, 0))  # what switches a field off
CONSTANTS = frozenset((int, float, bool, type(None), DataType, AttentionMode))  # types without inner state


def is_off(value) -> bool:
    """None and zero switch a field off."""
    try:
        return value in OFF
    except Exception:  # unhashable (an array, a list) or of a class that will not be compared
        return False


def integer(value) -> int | None:
    """The value as an int; None if it is no integer (bool and arrays count as none)."""
    kind = type(value)
    if kind is int:
        return value
    try:
        return None if kind is bool or is_array(kind) else int(operator.index(value))
    except Exception:  # a foreign class's __index__ may raise anything
        return None


def address(value) -> int | None:
    """The device address in a pointer field: 0 if it is absent, None if the value is no address."""
    kind = type(value)
    if kind is int:
        return value
    if value is None:
        return 0
    try:
        if holds_address(kind):
            return int(value)
    except Exception:  # a foreign class's __int__ may raise anything
        return None
    return 0 if is_off(value) else None


@cache
def holds_address(kind: type) -> bool:
    """Instances have `__int__` and mean it: not a bool, not a fraction, not an array (whose int is its one element)."""
    is_fraction = hasattr(kind, "__float__") and not hasattr(kind, "__index__")
    return hasattr(kind, "__int__") and kind is not bool and not is_array(kind) and not is_fraction


@cache
def is_array(kind: type) -> bool:
    """Instances are arrays: no numbers, even of one element, which may lie on a device and is never fetched."""
    return hasattr(kind, "__dlpack__") or hasattr(kind, "__cuda_array_interface__")


def is_given(value) -> bool:
    """The field asks for something, whether or not its value makes sense."""
    return not is_off(value) and address(value) != 0


def are_constants(values) -> bool:
    """No value can change and still be the same object, as an array scalar or a pointer object of a framework can."""
    return CONSTANTS.issuperset(map(type, values))


def member(enum: type[IntEnum], value) -> IntEnum | None:
    """The enum member that an int or a member stands for; None for anything else."""
    try:
        return enum(integer(value))
    except ValueError:
        return None


def is_true(value) -> bool | None:
    """A flag's truth (True, False, 1, 0, NumPy's bools); None if the value is no flag."""
    try:
        return bool(value) if not is_array(type(value)) and value in (0, 1) else None
    except Exception:  # a foreign class may refuse to be compared
        return None


def is_packed(p) -> bool:
    """The queries of plain params are packed, or meant to be."""
    return bool(p.cu_seqlens_q or p.cu_seqlens_k) or p.mode is AttentionMode.VARLEN_PREFILL


def has_packed_keys(p) -> bool:
    """The keys of plain params are packed, or meant to be."""
    return bool(p.cu_seqlens_k) or is_packed(p) and not (p.seqused_k or p.page_table)


def is_paged(p) -> bool:
    """The keys of plain params lie in pages."""
    return bool(p.page_table)


def all_sizes(p) -> tuple:
    """(batch_q, rows_q, batch_k, rows_k) of plain params; a packed tensor has one batch, a pool its pages."""
    packed = p.cu_seqlens_q or p.cu_seqlens_k or p.mode is AttentionMode.VARLEN_PREFILL
    q = (1, p.total_q) if packed else (p.batch_size, p.seqlen_q)
    if p.cu_seqlens_k or packed and not (p.seqused_k or p.page_table):
        return *q, 1, p.total_k
    if p.page_table:
        return *q, p.num_pages, p.page_size
    return *q, p.batch_size_k or p.batch_size, p.seqlen_k


def tensor_sizes(p, tensor: str) -> tuple:
    """(batch, rows, heads) of one tensor of plain params."""
    batch_q, rows_q, batch_k, rows_k = all_sizes(p)
    return (batch_q, rows_q, p.num_heads) if tensor in ("q", "q_v", "out") else (batch_k, rows_k, p.num_heads_k)
