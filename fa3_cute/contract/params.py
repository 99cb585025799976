"""FlashAttentionParams: one forward call as data, and how the value of a field is read. Pure Python."""
import operator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache


class DataType(IntEnum):
    """Element type of q, k and v, and of out."""
    FP16 = 0
    BF16 = 1
    FP8_E4M3 = 2


class AttentionMode(IntEnum):
    """How the sequences lie in memory and how many queries each has."""
    PREFILL = 0
    DECODE = 1
    VARLEN_PREFILL = 2


@dataclass(slots=True, kw_only=True)
class FlashAttentionParams:
    """Arguments of `forward`: pointers, sizes, strides, choices. Mutable; a misspelt field is an error.

    A pointer is an int device address or anything with `__int__` (a cuda.core Buffer's handle); None or 0 is absent.
    Strides are in elements, None is contiguous in the shapes below; lengths are in tokens. Fields hold what the caller
    wrote: `explain(params)` says what is wrong with them, nothing is checked here.
    """
    # [batch, seqlen_q, num_heads, head_dim] q and out, [batch, seqlen_k, num_heads_k, head_dim] k and v; packed
    # [total_q, num_heads, head_dim] and [total_k, num_heads_k, head_dim]. 16-byte aligned, last dimension contiguous.
    q: int | None = None
    k: int | None = None
    v: int | None = None
    out: int | None = None
    # FP32 output, natural logarithm, contiguous: [batch, num_heads, seqlen_q], packed [num_heads, total_q].
    softmax_lse: int | None = None

    batch_size: int = 0
    seqlen_q: int = 0           # ignored, like seqlen_k, when cu_seqlens_q and cu_seqlens_k are given
    seqlen_k: int = 0
    num_heads: int = 0
    num_heads_k: int = 0        # divides num_heads: MHA if equal, MQA if 1, else GQA
    head_dim: int = 0

    q_batch_stride: int | None = None
    q_row_stride: int | None = None
    q_head_stride: int | None = None
    k_batch_stride: int | None = None
    k_row_stride: int | None = None
    k_head_stride: int | None = None
    v_batch_stride: int | None = None
    v_row_stride: int | None = None
    v_head_stride: int | None = None
    out_batch_stride: int | None = None
    out_row_stride: int | None = None
    out_head_stride: int | None = None

    dtype: DataType = DataType.FP16
    out_dtype: DataType | None = None       # None: dtype, BF16 for FP8_E4M3
    softmax_scale: float | None = None      # None: 1/sqrt(head_dim)

    # Bottom-right aligned: query i sees key j iff j <= i + seqlen_k - seqlen_q.
    is_causal: bool = False
    # Query i sees i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right; negative is unbounded.
    window_size_left: int = -1
    window_size_right: int = -1
    mode: AttentionMode = AttentionMode.PREFILL

    cu_seqlens_q: int | None = None         # int32 [batch + 1], with cu_seqlens_k, total_q and total_k
    cu_seqlens_k: int | None = None
    total_q: int = 0
    total_k: int = 0
    seqused_q: int | None = None            # int32 [batch]
    seqused_k: int | None = None

    # FP8 only. FP32; real value = FP8 value * descale; None: 1.0. Strides 0 and 0: one scale for all; else by sequence,
    # packed or not, and by head: q by query head [batch, num_heads], k and v by KV head [batch, num_heads_k].
    q_descale_ptr: int | None = None
    k_descale_ptr: int | None = None
    v_descale_ptr: int | None = None
    q_descale_batch_stride: int = 0
    q_descale_head_stride: int = 0
    k_descale_batch_stride: int = 0
    k_descale_head_stride: int = 0
    v_descale_batch_stride: int = 0
    v_descale_head_stride: int = 0

    num_splits: int = 0                     # 0 automatic, 1 never (batch-invariant), n exactly n
    pack_gqa: bool | None = None            # None: automatic
    workspace: int | None = None            # scratch for split-KV; None: the library keeps its own
    workspace_bytes: int = 0

    # Known by name, refused while set.
    softcap: float = 0.0
    page_table: int | None = None
    page_size: int = 0
    rotary_cos: int | None = None
    rotary_sin: int | None = None
    rotary_dim: int = 0
    p_dropout: float = 0.0
    rng_state: int | None = None
    attn_mask: int | None = None
    leftpad_k: int | None = None
    k_new: int | None = None
    v_new: int | None = None
    seqlen_knew: int = 0


DTYPE_NAMES = ("fp16", "bf16", "fp8_e4m3")      # by DataType, as configs call them
OFF = frozenset((None, 0))      # what switches a field off
CONSTANTS = frozenset((int, float, bool, type(None), DataType, AttentionMode))      # types without inner state


def is_off(value) -> bool:
    """None and zero switch a field off."""
    try:
        return value in OFF
    except Exception:       # unhashable (an array, a list) or of a class that will not be compared
        return False


def integer(value) -> int | None:
    """The value as an int; None if it is no integer (bool counts as none)."""
    if type(value) is int:
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except Exception:       # a foreign class's __index__ may raise anything
        return None


def address(value) -> int | None:
    """The device address in a pointer field: 0 if it is absent, None if the value is no address."""
    kind = type(value)
    if kind is int:
        return value
    if value is None:
        return 0
    try:
        if _holds_address(kind):
            return int(value)
    except Exception:       # a foreign class's __int__ may raise anything
        return None
    return 0 if is_off(value) else None


@cache
def _holds_address(kind: type) -> bool:
    """Instances have `__int__` and mean it: not a bool, not a fraction, not an array (whose int is its one element)."""
    is_array = hasattr(kind, "__dlpack__") or hasattr(kind, "__cuda_array_interface__")
    is_fraction = hasattr(kind, "__float__") and not hasattr(kind, "__index__")
    return hasattr(kind, "__int__") and kind is not bool and not is_array and not is_fraction


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
        return bool(value) if value in (0, 1) else None
    except Exception:       # an array of several elements has no truth
        return None


def fp8_out_dtype(p) -> str:
    """The element type of out of valid FP8 params, as configs call it."""
    return DTYPE_NAMES[DataType.BF16 if p.out_dtype is None else p.out_dtype]


def is_packed(p) -> bool:
    """The sequences are packed, or meant to be."""
    return (is_given(p.cu_seqlens_q) or is_given(p.cu_seqlens_k)
            or member(AttentionMode, p.mode) is AttentionMode.VARLEN_PREFILL)


def tensor_sizes(p, tensor: str) -> tuple[int | None, int | None, int | None]:
    """(batch, rows, heads) of one tensor; a packed tensor has one batch. None where the field is no integer."""
    side = "q" if tensor in ("q", "out") else "k"
    heads = integer(p.num_heads if side == "q" else p.num_heads_k)
    if is_packed(p):
        return 1, integer(getattr(p, f"total_{side}")), heads
    return integer(p.batch_size), integer(getattr(p, f"seqlen_{side}")), heads
