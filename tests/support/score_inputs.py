"""What the score options of a case put into memory: sinks, slopes, masks, random state; and into its call."""

import zlib

import numpy as np
from images import Image, Tensor, contiguous

from fa3_cute import DataType
from fa3_cute.contract.reference import to_bits

DATA_TYPES = {"fp16": DataType.FP16, "bf16": DataType.BF16, "fp32": DataType.FP32}
HIDDEN = 0.3  # of the keys of a row


def score_inputs(case) -> dict[str, Tensor]:
    """s_aux, alibi_slopes, attn_mask and rng_state of a case, those that it has, filled."""
    rng = np.random.default_rng(zlib.crc32(f"scores of {case}".encode()))
    found = {}
    if case.sinks:
        found["s_aux"] = contiguous("s_aux", (case.num_heads,), case.sink_dtype)
        found["s_aux"].array[...] = to_bits(np.resize(np.float32(case.sinks), case.num_heads), case.sink_dtype)
    if case.alibi:
        slopes = 2.0 ** (-8 * np.arange(1, case.num_heads + 1, dtype=np.float32) / case.num_heads)
        if case.alibi == "sequences":
            slopes = slopes * rng.uniform(0.5, 1.5, (case.batch, 1)).astype(np.float32)
        found["alibi_slopes"] = contiguous("alibi_slopes", slopes.shape, "fp32")
        found["alibi_slopes"].array[...] = slopes
    if case.attn_mask:
        found["attn_mask"] = _mask(case, rng)
    if case.p_dropout:
        found["rng_state"] = contiguous("rng_state", (2,), "uint64")
        found["rng_state"].array[...] = rng.integers(0, 2**64, 2, np.uint64)
    return found


def _mask(case, rng) -> Tensor:
    """[batch, num_heads, seqlen_q, seqlen_k], of stride 0 along the dimensions that case.mask_dims does not name; rows
    are case.mask_gap elements apart, poisoned. Where rows differ, one of them loses every key."""
    full = case.batch, case.num_heads, case.seqlen_q, case.seqlen_k
    *outer, keys = [size if dim in case.mask_dims else 1 for dim, size in zip("bhqk", full, strict=True)]
    image = Image((*outer, keys + case.mask_gap), case.attn_mask)
    part = image.whole[..., :keys]
    is_hidden = rng.random(part.shape) < HIDDEN
    if part.shape[2] > 1:
        is_hidden[:, :, part.shape[2] // 2] = True
    if case.attn_mask == "bool":
        part[...] = np.where(is_hidden, 0, rng.integers(1, 256, part.shape))
    else:
        part[...] = to_bits(np.where(is_hidden, -np.inf, rng.standard_normal(part.shape)), case.attn_mask)
    return image.tensor(part if part.shape == full else np.broadcast_to(part, full))


def score_options(case, inputs: dict[str, Tensor], heads: slice | None = None) -> dict:
    """The reference's options, of all heads or of some."""
    if not case.has_score_options:
        return {}
    heads = heads or slice(0, None)
    parts = {"s_aux": (heads,), "alibi_slopes": (..., heads), "attn_mask": (slice(None), heads), "rng_state": (...,)}
    return {
        "softcap": case.softcap,
        "attention_chunk": case.attention_chunk,
        "p_dropout": case.p_dropout,
        "first_head": heads.start or 0,
        **{name: tensor.array[parts[name]] for name, tensor in inputs.items()},
    }


def score_params(case, inputs: dict[str, Tensor]) -> dict:
    """The fields of the call; strides of masks only where they are not C-contiguous."""
    fields: dict = {name: tensor.address for name, tensor in inputs.items()}
    fields |= {"softcap": case.softcap, "attention_chunk": case.attention_chunk, "p_dropout": case.p_dropout}
    if case.sink_dtype != "fp32":
        fields["s_aux_dtype"] = DATA_TYPES[case.sink_dtype]
    if case.alibi == "sequences":
        fields["alibi_batch_stride"] = inputs["alibi_slopes"].strides[0]
    fields["attn_mask_dtype"] = DATA_TYPES.get(case.attn_mask)
    mask = inputs.get("attn_mask")
    if mask is not None and not mask.array.flags.c_contiguous:
        names = [f"attn_mask_{dim}_stride" for dim in ("batch", "head", "row")]
        fields |= dict(zip(names, mask.strides, strict=False))
    return fields
