"""attention() over arrays: what it accepts, in NumPy on the host and as a call of `forward` on a device. No framework.

The element type comes from the arrays, the sizes from their shapes; what remains to be checked is checked by the rules
of the contract, on the host too.
"""

from dataclasses import dataclass
from typing import Any

from ..contract.params import ARGUMENTS, AttentionMode, DataType, FlashAttentionParams, is_true
from ..contract.plain import plain
from ..contract.status import Problem, Status, error_for, shown
from ..planning.operations import checked
from .mods import mod_arrays, mod_fields, require_mod_arrays, set_mods
from .append import TABLES, UPDATES, require_update_shapes, require_writable, set_updates, update_dtypes, update_sizes
from .scores import SCORE_DTYPES, SCORES, require_score_shapes, set_scores
from .words import refusal

FP8 = "float8_e4m3fn"
DEVICE_DTYPES = {"float16": DataType.FP16, "bfloat16": DataType.BF16, FP8: DataType.FP8_E4M3}
OUT_DTYPES = DEVICE_DTYPES | {"float32": DataType.FP32}
# The arrays of integers, by their dimensions.
VECTORS = (
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "kv_batch_idx", "leftpad_k"),
    *("cu_seqlens_k_new", "seqlens_rotary"),
)
INTEGERS = dict.fromkeys(VECTORS, 1) | {"page_table": 2}
# What else may be given, besides what mods read: the arrays that are no descales, in the order of checks.
OTHERS = ("q_v", *SCORES, *INTEGERS, *UPDATES)
DESCALES = ("q_descale", "k_descale", "v_descale")
DIMS = ("batch", "row", "head")
# How q and k may lie in memory: dimensions, and what they are.
LAYOUTS = {
    "dense": (4, "[batch, seqlen, heads, head_dim]"),
    "packed": (3, "[rows, heads, head_dim] with cu_seqlens"),
    "pages": (4, "[num_pages, page_size, heads, head_dim] with page_table"),
}
ANY_ADDRESS = 16
FIELDS = frozenset(ARGUMENTS)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of attention(), as given.

    numbers   the scale and features that are numbers, by their names in FlashAttentionParams and in the reference
    """

    q: Any
    k: Any
    v: Any
    q_v: Any
    out: Any
    stream: Any
    causal: Any
    window_size: Any
    numbers: dict[str, Any]
    s_aux: Any
    alibi_slopes: Any
    attn_mask: Any
    attention_chunk: Any
    rng_state: Any
    score_mod: Any
    mask_mod: Any
    mod_arrays: Any
    mod_scalars: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_k: Any
    page_table: Any
    kv_batch_idx: Any
    leftpad_k: Any
    k_new: Any
    v_new: Any
    cu_seqlens_k_new: Any
    rotary_cos: Any
    rotary_sin: Any
    rotary_interleaved: Any
    seqlens_rotary: Any
    q_descale: Any
    k_descale: Any
    v_descale: Any
    num_splits: Any
    max_seqlen_q: Any
    zero_padding: Any
    return_lse: Any
    dtype: Any

    def given(self, *names: str) -> dict:
        """Those of the arguments that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def is_packed(self) -> bool:
        """The queries are packed, or meant to be."""
        return self.cu_seqlens_q is not None or self.cu_seqlens_k is not None

    @property
    def has_packed_keys(self) -> bool:
        """The keys are packed, or meant to be."""
        in_cache = self.page_table is not None or self.seqused_k is not None
        return self.cu_seqlens_k is not None or self.is_packed and not in_cache

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
            "attention_chunk": self.attention_chunk,
            **mod_fields(self),
            "num_splits": self.num_splits,
            "max_seqlen_q": self.max_seqlen_q,
            "zero_padding": self.zero_padding,
            "rotary_interleaved": False if self.rotary_interleaved is None else self.rotary_interleaved,
            "mode": AttentionMode.VARLEN_PREFILL if self.is_packed else AttentionMode.PREFILL,
        }

    def element_types(self, q: str, k: str, v: str, known: dict) -> tuple[str, str]:
        """The element types of q, and of k and v, by name: those of the arrays, or what `dtype` says that their bytes
        are."""
        stated = self.dtype if self.dtype is None else getattr(self.dtype, "name", self.dtype)
        stated = stated if stated is None or isinstance(stated, str) else ""
        is_fp8 = k == v and (k == FP8 and stated in (None, FP8) or k == "uint8" and stated == FP8)
        if is_fp8 and q in known and q != FP8:
            return q, FP8
        if not q == k == v:
            sentence = f"dtypes {q}, {k}, {v} of q, k, v: must be the same, or {FP8} those of k and v alone"
            raise error_for(Status.INVALID_ARGUMENT, sentence)
        if q == "uint8" and stated == FP8:
            return FP8, FP8
        if q not in known or stated not in (None, q):
            raise error_for(
                Status.INVALID_ARGUMENT,
                f"dtype={shown(self.dtype)} with arrays of {q}: must be None with arrays of "
                f"{', '.join(known)}, or '{FP8}' with arrays of uint8",
            )
        return q, q

    def require_dims(self, shapes: dict) -> None:
        """Raise unless q, k and the arrays of integers have as many dimensions as they must, and there are keys.

        shapes   of the arrays by name
        """
        keys = "pages" if self.page_table is not None else "packed" if self.has_packed_keys else "dense"
        for name, layout in (("q", "packed" if self.is_packed else "dense"), ("k", keys)):
            dims, words = LAYOUTS[layout]
            if len(shapes[name]) != dims:
                raise error_for(Status.INVALID_SHAPE, f"{name}.shape={shapes[name]}: must be {words}")
        for name, dims in INTEGERS.items():
            if name in shapes and len(shapes[name]) != dims:
                words = "one dimension" if dims == 1 else "two dimensions, [batch, pages]"
                raise error_for(Status.INVALID_SHAPE, f"{name}.shape={shapes[name]}: must have {words}")
        for name in ("k", "page_table"):
            if 0 in shapes.get(name, ()) and not (self.has_packed_keys or 0 in shapes["q"]):
                raise error_for(Status.INVALID_SHAPE, f"{name}.shape={shapes[name]}: must not be empty")

    def batch(self, shapes: dict) -> int:
        """Number of sequences."""
        if not self.is_packed:
            return shapes["q"][0]
        return max(0, shapes["cu_seqlens_q" if "cu_seqlens_q" in shapes else "cu_seqlens_k"][0] - 1)

    def sizes(self, shapes: dict) -> dict:
        """The fields of FlashAttentionParams that are sizes, of the shapes of the arrays.

        An array of no rows or no sequences is meant: only in params does 0 stand for a size that was not given.
        """
        q, k, v, packed_keys = shapes["q"], shapes["k"], shapes["v"], self.has_packed_keys
        batch, are_totals = self.batch(shapes), q[0] or k[0]
        found = {
            "batch_size": batch if self.is_packed else max(1, batch),
            "num_heads": q[-2],
            "num_heads_k": k[-2],
            "head_dim": q[-1],
            "head_dim_v": 0 if v[-1:] in (q[-1:], ()) else v[-1],
            **update_sizes(shapes),
        }
        if self.is_packed:
            found["total_q"] = q[0] if are_totals or not packed_keys else 1
        else:
            found["seqlen_q"] = max(1, q[1])
        if packed_keys:
            found["total_k"] = k[0] if are_totals else 1
            return found
        cache, page_size = k, 1
        if self.page_table is not None:
            cache, page_size = shapes["page_table"], max(1, k[1])
            found |= {"num_pages": max(1, k[0]), "page_size": page_size}
        found["seqlen_k"] = max(1, cache[1]) * page_size
        if self.kv_batch_idx is not None:
            found["batch_size_k"] = max(1, cache[0])
        return found


# ---- on a device -----------------------------------------------------------------------------------------------------


def attention_on_device(call: AttentionCall, forward):
    """attention() of arrays on a CUDA device: one `forward(params, stream)`."""
    from . import dlpack

    arrays = {"q": call.q, "k": call.k, "v": call.v, **call.given("out", *OTHERS, *DESCALES)}
    mod_fields(call)
    arrays |= mod_arrays(call)
    for name, array in arrays.items():
        dlpack.require_on_device(name, array)
    with dlpack.on_device_of(call.stream) as (handle, device):
        tensors = {name: dlpack.view(name, array, handle) for name, array in arrays.items()}
        q, k, v = (tensors[name] for name in "qkv")
        elements = call.element_types(q.dtype, k.dtype, v.dtype, DEVICE_DTYPES)
        _check_tensors(call, tensors, elements[0], device)
        params = _params(call, tensors, elements)
        found = checked(plain(params))
        if isinstance(found, Problem):
            raise refusal(found)
        out, lse, wants_lse = call.out, None, call.wants_lse
        if out is None:
            out = dlpack.new_array("out", (*q.shape[:-1], v.shape[-1]), out_dtypes(elements[0])[0], call.stream, device)
            params.out = out.address
        if wants_lse:
            *batch, rows, heads, _ = q.shape
            lse = dlpack.new_array("the LSE", (*batch, heads, rows), "float32", call.stream, device)
            params.softmax_lse = lse.address
        if not q.is_empty or call.k_new is not None:
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
    found = {name: tensor.shape for name, tensor in tensors.items()}
    call.require_dims(found)
    require_score_shapes(found, call.sizes(found))
    require_update_shapes(found, call.batch(found))
    require_mod_arrays(call, call.sizes(found), found, {name: tensor.dtype for name, tensor in tensors.items()})
    shapes = _shapes(call, found)
    dtypes = (
        {"out": out_dtypes(element), "q_v": (tensors["q"].dtype,)} | SCORE_DTYPES | dict.fromkeys(INTEGERS, ("int32",))
    )
    dtypes |= dict.fromkeys(DESCALES, ("float32",)) | update_dtypes(tensors["q"].dtype, tensors["k"].dtype)
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise error_for(Status.INVALID_SHAPE, f"{name}.shape={tensor.shape}: must be {shapes[name]}")
        if tensor.dtype not in dtypes.get(name, (tensor.dtype,)):
            raise error_for(Status.INVALID_ARGUMENT, f"{name} is {tensor.dtype}: must be {' or '.join(dtypes[name])}")
        if name not in DESCALES and tensor.shape and tensor.shape[-1] > 1 and tensor.strides[-1] != 1:
            raise error_for(
                Status.INVALID_SHAPE,
                f"{name} has the strides {tensor.strides} (elements): the last "
                "dimension must be contiguous, of stride 1",
            )
    require_writable(tensors)
    if "out" in tensors and tensors["out"].is_readonly:
        raise error_for(
            Status.INVALID_ARGUMENT,
            f"out is a {type(call.out).__qualname__}, which is read-only: must be writable, or None",
        )


def _shapes(call: AttentionCall, found: dict) -> dict:
    """The shapes that the arrays must have, given those that they have."""
    q, k, v, batch = found["q"], found["k"], found["v"], call.batch(found)
    entries = found.get("page_table", k)[0] if call.has_packed_keys or call.kv_batch_idx is not None else batch
    shapes = {
        "k": (*k[:-1], q[-1]),
        "v": (*k[:-1], v[-1] if v and v[-1] else k[-1]),  # of no columns there is nothing
        **dict.fromkeys(("out", "q_v"), (*q[:-1], *v[-1:])),
        "cu_seqlens_q": (batch + 1,),
        "cu_seqlens_k": (batch + 1,),
        "seqused_k": (batch,),
        "kv_batch_idx": (batch,),
        "leftpad_k": (batch,),
        "cu_seqlens_k_new": (batch + 1,),
        "seqlens_rotary": (batch,),
    }
    if "page_table" in found:
        shapes["page_table"] = (entries, found["page_table"][1])
    else:
        shapes["k"] = (entries, *k[1:-1], q[-1])
    return shapes


def _params(call: AttentionCall, tensors: dict, elements: tuple[str, str]) -> FlashAttentionParams:
    """The call as params: what has no elements, and an out that is not given, has an address that nothing uses."""
    q, out = tensors["q"], tensors.get("out")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    params = FlashAttentionParams(
        **call.sizes(shapes),
        **call.choices(),
        dtype=DEVICE_DTYPES[elements[0]],
        kv_dtype=DEVICE_DTYPES[elements[1]],
        out=ANY_ADDRESS,
        out_dtype=None if out is None else OUT_DTYPES[out.dtype],
    )
    for name, tensor in tensors.items():
        if name in DESCALES:
            _set_descale(params, name, tensor, call.batch(shapes))
            continue
        if name not in FIELDS:  # what mods read
            continue
        setattr(params, name, (q.address or ANY_ADDRESS) if tensor.is_empty else tensor.address)
        if name == "page_table" and tensor.shape[0] > 1:
            params.page_table_batch_stride = tensor.strides[0]
        elif name not in (*INTEGERS, *SCORES, *TABLES):
            _set_strides(params, name, tensor)
    set_scores(params, tensors)
    set_updates(params, tensors)
    set_mods(params, tensors, ANY_ADDRESS)
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
    setattr(params, f"{name}_ptr", ANY_ADDRESS if tensor.is_empty else tensor.address)
    for dim, size, stride in zip(("batch", "head"), shape[-2:], strides[-2:], strict=True):
        setattr(params, f"{name}_{dim}_stride", stride if size > 1 else 0)


def out_dtypes(element: str) -> tuple[str, ...]:
    """Element types that out may have, the one that it gets first."""
    return ("bfloat16", "float16", "float32") if element == FP8 else tuple(dict.fromkeys((element, "float32")))
