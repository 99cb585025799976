"""The rules of what changes scores and of what hides keys beyond causal masks and windows: softcap, sinks, ALiBi,
attn_mask, chunks, dropout. Pure Python.
"""

from operator import attrgetter

from .limits import LARGEST_SCALE, MAX_SIZE, MAX_WINDOW, SMALLEST_SCALE, TMA_STRIDE_BYTES
from .params import OPTIONALS, DataType, is_packed
from .plain import BAD
from .sentences import Sentences, is_int, must
from .status import shown
from .strides import lone

ELEMENT_BYTES = {DataType.FP16: 2, DataType.BF16: 2, DataType.FP32: 4}  # of sinks and of masks that are added
MASK_STRIDES = ("attn_mask_batch_stride", "attn_mask_head_stride", "attn_mask_row_stride")
_CONTIGUOUS = (None,) * len(MASK_STRIDES)
_POINTERS = {"alibi_batch_stride": "alibi_slopes"} | dict.fromkeys(MASK_STRIDES, "attn_mask")
_read_optionals, _read_mask_strides = attrgetter(*OPTIONALS), attrgetter(*MASK_STRIDES)


def softcap(p) -> Sentences:
    """The rule of the softcap."""
    cap = p.softcap
    if not cap or cap is not BAD and SMALLEST_SCALE <= cap <= LARGEST_SCALE:
        return ()
    accepted = f"0 (off) or a number from {SMALLEST_SCALE:.8g} to {LARGEST_SCALE:.8g}"
    return [must(p, "softcap", accepted)]


def score_choices(p) -> Sentences:
    """The rule of element types, chunks and the probability to drop."""
    found = []
    if p.s_aux_dtype is not None and p.s_aux_dtype not in ELEMENT_BYTES:
        found.append(must(p, "s_aux_dtype", "None (FP32), FP16, BF16 or FP32"))
    if p.attn_mask_dtype is not None and p.attn_mask_dtype not in ELEMENT_BYTES:
        found.append(must(p, "attn_mask_dtype", "None (a byte, of which 0 hides the key), FP16, BF16 or FP32"))
    if not is_int(p.attention_chunk, 0, MAX_WINDOW):
        found.append(must(p, "attention_chunk", f"an int from 0 (off) to {MAX_WINDOW}, in keys"))
    if not is_probability(p.p_dropout):
        found.append(must(p, "p_dropout", "a number from 0 (off) to below 1, the probability to drop"))
    return found


def is_probability(value) -> bool:
    """Of dropping something, but not everything; None is 0."""
    return value is None or value is not BAD and 0 <= value < 1


def has_alibi_stride(p) -> bool:
    """There are slopes of each sequence, or are meant to be."""
    return p.alibi_batch_stride != 0


def alibi_stride(p) -> Sentences:
    """The rule of the slopes' stride."""
    stride = p.alibi_batch_stride
    # As with the tensors' strides, that of a dimension of size 1 means nothing.
    if type(stride) is int and (p.batch_size == 1 or 0 <= stride <= MAX_SIZE):
        return ()
    return [must(p, "alibi_batch_stride", f"an int from 0 to {MAX_SIZE}, in elements; 0: the same slopes for all")]


def mask_strides(p) -> Sentences:
    """The rule of the strides of attn_mask."""
    if (given := _read_mask_strides(p)) == _CONTIGUOUS and not p.attn_mask:
        return ()
    accepted, found = f"an int from 0 (one for all along it) to below {TMA_STRIDE_BYTES}, in elements", []
    sizes = p.batch_size, p.num_heads, p.seqlen_q
    for name, stride, default, size in zip(MASK_STRIDES, given, _contiguous_strides(p), sizes, strict=True):
        if stride is None:
            if size != 1 and default >= TMA_STRIDE_BYTES:
                found.append(f"{name}=None (contiguous: {shown(default)}): must be {accepted}")
        elif stride is BAD or size != 1 and not 0 <= stride < TMA_STRIDE_BYTES:
            found.append(must(p, name, f"None (contiguous) or {accepted}"))
    return found


def lone_strides(p) -> Sentences:
    """The rule of the strides of slopes and of a mask that are not there."""
    if p.alibi_batch_stride == 0 and _read_mask_strides(p) == _CONTIGUOUS:
        return ()
    return lone(p, _POINTERS)


def _contiguous_strides(p) -> tuple[int, int, int]:
    """Of attn_mask; 0 without, and where other rules object to sizes."""
    heads, rows, keys = sizes = p.num_heads, p.seqlen_q, p.seqlen_k
    if not p.attn_mask or is_packed(p) or not all(is_int(size, 1, MAX_SIZE) for size in sizes):
        return 0, 0, 0
    return heads * rows * keys, rows * keys, keys


def rng_state(p) -> Sentences:
    """The rule of the random state, which dropout needs and nothing else has."""
    drops = p.p_dropout is not BAD and bool(p.p_dropout)
    if drops == bool(p.rng_state):
        return ()
    if drops:
        return [must(p, "rng_state", f"a device address with p_dropout={shown(p.p_dropout)}")]
    return [] if p.p_dropout is BAD else [must(p, "rng_state", "None or 0 with p_dropout=0")]


def alignment_of(p, name: str, declared: int) -> int:
    """Of a pointer, in bytes: what the element type asks for where a call chooses it."""
    if name in ("s_aux", "attn_mask"):
        dtype = getattr(p, f"{name}_dtype")
        return declared if dtype is BAD else ELEMENT_BYTES.get(dtype, 4 if name == "s_aux" else 1)
    return declared


def has_optionals(p) -> bool:
    """One of the pointers that few calls have is given."""
    return any(_read_optionals(p))


def packed_masks(p) -> Sentences:
    """The rule of what attn_mask has no kernel for."""
    if not p.attn_mask or p.attn_mask is BAD or not is_packed(p):
        return ()
    return [must(p, "attn_mask", "None or 0 with cu_seqlens_q: masks are those of dense queries")]
