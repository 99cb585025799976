"""Attention of Hugging Face transformers by this library's kernels.

    import fa3_cute.huggingface
    fa3_cute.huggingface.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fa3_cute", dtype="bfloat16")

Decoders and encoders, grouped heads, sliding windows, softcap, attention sinks, padded batches, packed sequences,
training. What this library has no kernel for is refused by name, when it is asked for. Needs torch and transformers.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract.status import Status, error_for
from .torch import flash_attn_func, flash_attn_varlen_func
from .torch.head_dims import columns, padded

NAME = "fa3_cute"
# The mask functions of transformers (masking_utils.py) that the arguments of attention say as well.
_KNOWN_MASKS = frozenset(
    (
        "causal_mask_function",
        "bidirectional_mask_function",
        "sliding_window_overlay",
        "sliding_window_bidirectional_overlay",
        "packed_sequence_mask_function",
        "remap_positions_for_packed_sequence",
        "padding_mask_function",
        "add_offsets_to_mask_function",
        "and_masks",
    )
)


def register(name: str = NAME) -> None:
    """Make this library an attn_implementation of transformers.

    Raises FlashAttentionError for a name with "flash" in it, for which transformers looks for packages of its own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if "flash" in name:
        raise error_for(Status.INVALID_ARGUMENT, f"name={name!r}: must not have 'flash' in it")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, padding_mask)


def _refuse(what: str, accepted: str) -> None:
    raise error_for(Status.FEATURE_UNSUPPORTED, f"{what}: must be {accepted}")


# ---- masks -----------------------------------------------------------------------------------------------------------


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """What attention_forward is given as its mask: bool [batch, keys], or None where each key is one.

    It is asked once for each kind of layer, and synchronises with the device where there is a mask. Raises
    FlashAttentionError for padding within a sequence, and for masks of other kinds than causal and windows.
    """
    is_compiling = torch.compiler.is_compiling()
    if options.get("use_vmap"):
        _refuse("a mask function of the model's own", "absent")
    if mask_function is not None and not is_compiling:
        for name in _names(mask_function):
            if name not in _KNOWN_MASKS:
                _refuse(f"the mask {name}", "causal, bidirectional or a sliding window")
    if attention_mask is None:
        written = q_offset + q_length - kv_offset  # of a cache that has its final size from the start
        if is_compiling or isinstance(written, int) and written >= kv_length or int(written) >= kv_length:
            return None
        mask = torch.ones(batch_size, int(written), dtype=torch.bool, device=options.get("device"))
        _known(mask)["is_full"] = True
        return mask
    mask = attention_mask[:, -kv_length:].to(torch.bool)
    if is_compiling:
        return mask
    first, end = _bounds(mask)
    is_full, has_holes = torch.stack((mask.all(), (end - first != mask.sum(-1)).any())).tolist()
    if has_holes:
        _refuse("attention_mask with padding between two tokens of a sequence", "padded at its ends alone")
    if is_full and mask.shape[1] == kv_length:
        return None
    _known(mask)["is_full"] = is_full
    return mask


def _names(function: Callable) -> Iterator[str]:
    """Of a mask function and of those that it is made of."""
    yield getattr(function, "__qualname__", type(function).__name__).partition(".")[0]
    for cell in getattr(function, "__closure__", None) or ():
        inner = cell.cell_contents
        for part in inner if isinstance(inner, tuple) else (inner,):
            if callable(part):
                yield from _names(part)


def _bounds(mask: Tensor) -> tuple[Any, Any]:
    """The first token of each sequence and the end of the last, int32 [batch]; both 0 where there is none."""
    length = mask.shape[1]
    places = torch.arange(length, device=mask.device, dtype=torch.int32)
    end = torch.where(mask, places + 1, 0).amax(1)
    return torch.where(mask, places, length).amin(1).minimum(end), end


class _Padded(NamedTuple):
    """Where sequences lie in tensors of batch * length rows.

    offsets_q, offsets_k   int32 [batch + 1]: where each begins, and the end of the tensor
    used_q, used_k         int32 [batch]: its rows
    unused                 bool [batch, queries, 1, 1]: queries that are of no sequence
    """

    offsets_q: Tensor
    offsets_k: Tensor
    used_q: Tensor
    used_k: Tensor
    unused: Tensor


def _padded_batch(mask: Tensor, q_length: int, is_causal: bool) -> _Padded:
    """Queries are the last of the mask's tokens; beside keys of something else they are all there are."""
    first, end = _bounds(mask)
    if not is_causal and q_length != mask.shape[1]:
        first_q = torch.zeros_like(first)
        end_q = first_q + q_length
    else:
        before = mask.shape[1] - q_length
        first_q, end_q = [(x - before).clamp(min=0) for x in (first, end)]
    places = torch.arange(q_length, device=mask.device)[None]
    unused = (places < first_q[:, None]) | (places >= end_q[:, None])
    return _Padded(
        _offsets(first_q, q_length),
        _offsets(first, mask.shape[1]),
        end_q - first_q,
        end - first,
        unused[..., None, None],
    )


def _offsets(first: Tensor, length: int) -> Tensor:
    starts = torch.arange(first.shape[0] + 1, device=first.device, dtype=torch.int32) * length
    starts[:-1] += first
    return starts


def _packed_offsets(position_ids: Tensor, batch: int) -> Tensor | None:
    """int32 [sequences + 1] of a batch whose positions begin anew within a row; None where none do."""
    positions = position_ids.expand(batch, -1)
    begins = torch.ones(positions.shape, dtype=torch.bool, device=positions.device)
    begins[:, 1:] = positions.diff(dim=1) != 1
    places = begins.flatten().nonzero().flatten().to(torch.int32)
    if places.shape[0] == batch:
        return None
    return torch.nn.functional.pad(places, (0, 1), value=begins.numel())


def _known(x: Any) -> dict[Any, Any]:
    """What was found out about a tensor that all layers of a model are given."""
    if torch.compiler.is_compiling():
        return {}
    version = 0 if x.is_inference() else x._version
    if getattr(x, "_fa3_cute_version", None) != version:
        x._fa3_cute_version, x._fa3_cute = version, {}
    return x._fa3_cute


def _remembered(x: Tensor, compute: Callable, *arguments: Any) -> Any:
    known, key = _known(x), (compute, *arguments)
    if key not in known:
        known[key] = compute(x, *arguments)
    return known[key]


# ---- attention -------------------------------------------------------------------------------------------------------

_UNSERVED = ("position_bias", "block_table", "k_cache", "v_cache", "output_attentions")


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    query           [batch, num_heads, q_length, head_dim], float16 or bfloat16; float32 is cast as flash-attention is
    key, value      [batch, num_heads_k, kv_length, head_dim]; value's head_dim may be smaller
    attention_mask  what padding_mask returns
    options         is_causal, sliding_window, softcap, s_aux, position_ids, cu_seq_lens_q, cu_seq_lens_k, max_length_q,
                    as transformers passes them; what it passes besides is not of attention

    Returns (out [batch, q_length, num_heads, head_dim], None); 0 where the mask has no token.
    """
    if dropout:
        _refuse(f"dropout={dropout}", "0: set the config's attention_dropout to 0")
    for name in _UNSERVED:
        if options.get(name) is not None and options[name] is not False:
            _refuse(name, "absent")
    if attention_mask is not None and attention_mask.dim() != 2:
        _refuse(f"attention_mask of {attention_mask.dim()} dimensions", "None or [batch, keys]")
    is_causal = options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)
    if query.dtype == torch.float32:
        query, key, value = _cast(module, query, key, value)
    if attention_mask is not None and key.shape[2] > attention_mask.shape[1]:  # a cache with room for more
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
    if attention_mask is not None and _known(attention_mask).get("is_full"):
        attention_mask = None
    head_dim, columns_v = query.shape[-1], value.shape[-1]
    q, k, v = (padded(x.transpose(1, 2), columns(x.shape[-1])) for x in (query, key, value))
    given = _choices(options, k.shape[1], is_causal)
    given["softmax_scale"] = head_dim**-0.5 if scaling is None else scaling
    out = _attend((q, k, v), attention_mask, options, given)
    return out[..., :columns_v], None


def _choices(options: dict, kv_length: int, is_causal: bool) -> dict[str, Any]:
    """transformers counts a query's own key in its window."""
    window = options.get("sliding_window")
    bound = -1 if window is None or kv_length <= window else window - 1
    return {
        "causal": is_causal,
        "window_size": (bound, bound),
        "softcap": options.get("softcap") or 0.0,
        "s_aux": options.get("s_aux"),
        "num_splits": 0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _attend(tensors: tuple[Tensor, ...], mask: Tensor | None, options: dict, given: dict) -> Tensor:
    """[batch, seqlen, heads, head_dim] of tensors of such dimensions."""
    if mask is not None:
        return _attend_padded(tensors, mask, given)
    q, k, v = tensors
    found = _sequences(options, q.shape[0], q.shape[1], k.shape[1])
    if found is None:
        return flash_attn_func(q, k, v, **given)
    q, k, v = (x.flatten(0, 1) for x in tensors)
    return flash_attn_varlen_func(q, k, v, found[0], found[1], found[2], **given).unflatten(0, tensors[0].shape[:2])


def _attend_padded(tensors: tuple[Tensor, ...], mask: Tensor, given: dict) -> Tensor:
    q_length, kv_length, is_causal = tensors[0].shape[1], tensors[1].shape[1], given["causal"]
    if given["window_size"][0] >= 0 and not is_causal and q_length != kv_length:
        _refuse("sliding_window of queries that are not the keys' own", "None")
    where = _remembered(mask, _padded_batch, q_length, is_causal)
    q, k, v = (x.flatten(0, 1) for x in tensors)
    used = {"seqused_q": where.used_q, "seqused_k": where.used_k}
    out = flash_attn_varlen_func(q, k, v, where.offsets_q, where.offsets_k, q_length, **used, **given)
    return out.unflatten(0, tensors[0].shape[:2]).masked_fill(where.unused, 0)


def _sequences(options: dict, batch: int, q_length: int, kv_length: int) -> tuple | None:
    """(cu_seqlens_q, cu_seqlens_k, longest) of packed sequences: those that are said, else those of the positions."""
    offsets_q, offsets_k = options.get("cu_seq_lens_q"), options.get("cu_seq_lens_k")
    if offsets_q is not None and offsets_k is not None:
        longest = options.get("max_length_q")
        return offsets_q.to(torch.int32), offsets_k.to(torch.int32), longest if isinstance(longest, int) else None
    positions = options.get("position_ids")
    if positions is None or positions.dim() != 2 or q_length == 1 or q_length != kv_length:
        return None
    if torch.compiler.is_compiling():  # how many there are would be data
        return None
    found = _remembered(positions, _packed_offsets, batch)
    return None if found is None else (found, found, None)


def _cast(module: torch.nn.Module, *tensors: Tensor) -> list[Tensor]:
    """Layer norms in float32 make q so: back to what the weights are, or autocast makes of them."""
    from transformers.integrations.flash_attention import get_target_dtype

    dtype = get_target_dtype(tensors[0], module)
    return [x.to(dtype) for x in tensors]
