"""The rules of ScoreMod and MaskMod and of what they read. Pure Python."""

from .block_mask import LISTS, BlockMask, block_sizes
from .formats import ELEMENT_BYTES
from .head_dims import are_served
from .limits import MAX_SIZE, TMA_STRIDE_BYTES
from .mods import ELEMENTS, MAX_POINTERS, MAX_SCALARS, STRIDES_PER_POINTER, MaskMod, ModArray, ScoreMod
from .params import DTYPE_NAMES
from .plain import BAD
from .sentences import Sentences, is_int, must
from .status import shown

MOST = (2 - 2**-23) * 2.0**127  # of float32
ARGUMENTS = ("mod_pointers", "mod_strides", "mod_scalars")


def mods_of(p) -> tuple[ScoreMod | MaskMod, ...]:
    """The mods of good plain params, in the order in which they take what is given."""
    return tuple([mod for mod in (p.score_mod, p.mask_mod) if mod is not None])


def arrays_of(p) -> tuple[ModArray, ...]:
    """What they read."""
    return tuple([array for mod in mods_of(p) for array in mod.pointers])


def mods(p) -> Sentences:
    """The rule of the mods themselves."""
    if p.score_mod is p.mask_mod is None:
        return ()
    found = [
        must(p, name, f"None or a fa3_cute.{kind.__name__}")
        for name, kind in (("score_mod", ScoreMod), ("mask_mod", MaskMod))
        if getattr(p, name) is BAD
    ]
    if found:
        return found
    pointers, scalars = len(arrays_of(p)), sum(mod.scalars for mod in mods_of(p))
    if pointers > MAX_POINTERS:
        found.append(f"score_mod and mask_mod read {pointers} arrays: must be at most {MAX_POINTERS} together")
    if scalars > MAX_SCALARS:
        found.append(f"score_mod and mask_mod take {scalars} scalars: must be at most {MAX_SCALARS} together")
    return found


def mod_arguments(p) -> Sentences:
    """The rule of what mods read."""
    if p.score_mod is p.mask_mod is p.mod_pointers is p.mod_strides is p.mod_scalars is None:
        return ()
    if BAD in (p.score_mod, p.mask_mod):
        return ()
    found = [must(p, name, "a tuple or None") for name in ARGUMENTS if getattr(p, name) is BAD]
    if found:
        return found
    arrays, scalars = arrays_of(p), sum(mod.scalars for mod in mods_of(p))
    return [*_pointers(p, arrays), *_strides(p, len(arrays)), *_scalars(p, scalars)]


def _pointers(p, arrays: tuple[ModArray, ...]) -> Sentences:
    given = p.mod_pointers or ()
    if len(given) != len(arrays):
        return [must(p, "mod_pointers", f"{len(arrays)} device addresses, one for each array that the mods read")]
    return [
        must(p, "mod_pointers", f"int device addresses, the one at {i} aligned to {ELEMENTS[array.element]} bytes")
        for i, (address, array) in enumerate(zip(given, arrays, strict=True))
        if not is_int(address, 1, 2**64 - 1) or address % ELEMENTS[array.element]
    ]


def _strides(p, arrays: int) -> Sentences:
    given = p.mod_strides
    if given is None:
        return ()
    number, most = STRIDES_PER_POINTER * arrays, TMA_STRIDE_BYTES - 1
    if len(given) == number and all(is_int(stride, 0, most) for stride in given):
        return ()
    return [
        must(
            p,
            "mod_strides",
            f"None (contiguous) or {number} ints from 0 to {most}, {STRIDES_PER_POINTER} of each array",
        )
    ]


def _scalars(p, scalars: int) -> Sentences:
    given = p.mod_scalars or ()
    if len(given) == scalars and all(type(value) in (int, float) and abs(value) <= MOST for value in given):
        return ()
    return [must(p, "mod_scalars", f"{scalars} finite numbers, as many as the mods take")]


# What the kernel that reads block lists does not serve.
_NOT_WITH_LISTS = (
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "kv_batch_idx", "leftpad_k"),
    *("attn_mask", "attention_chunk"),
)


def block_mask(p) -> Sentences:
    """The rule of block lists."""
    lists = p.block_mask
    if lists is None:
        return ()
    if not isinstance(lists, BlockMask):
        return [must(p, "block_mask", f"None or a fa3_cute.{BlockMask.__name__}")]
    if p.mask_mod is None:
        return [must(p, "block_mask", "None without a mask_mod, which it is of")]
    found = [
        f"block_mask.{name}={shown(value)}: must be an int device address aligned to 4 bytes"
        for name in LISTS
        if not is_int(value := getattr(lists, name), 4, 2**64 - 1) or value % 4
    ]
    found += [
        f"block_mask.{name}={shown(getattr(lists, name))}: must be 1, or {size}={shown(getattr(p, size))}"
        for name, size in (("batches", "batch_size"), ("heads", "num_heads"))
        if type(getattr(lists, name)) is not int or getattr(lists, name) not in (1, getattr(p, size))
    ]
    return found + _blocks(p, lists)


def _blocks(p, lists: BlockMask) -> list[str]:
    dtype = DTYPE_NAMES[p.dtype] if p.dtype is not BAD else ""
    if dtype not in ELEMENT_BYTES or not are_served(p):
        return []  # other rules say so
    q_rows, kv_rows = block_sizes(dtype, p.head_dim, p.head_dim_v)
    found = []
    if not is_int(lists.q_block, 1, MAX_SIZE) or lists.q_block % q_rows:
        found.append(f"block_mask.q_block={shown(lists.q_block)}: must be a multiple of {q_rows} with this head_dim")
    if lists.kv_block != kv_rows:
        found.append(f"block_mask.kv_block={shown(lists.kv_block)}: must be {kv_rows} with this head_dim")
    return found


def listed_blocks(p) -> Sentences:
    """The rule of what block lists have no kernel for."""
    if p.block_mask is None:
        return ()
    found = [must(p, name, "None or 0 with block_mask") for name in _NOT_WITH_LISTS if getattr(p, name)]
    has_splits = type(p.num_splits) is int and p.num_splits > 1
    if has_splits or p.fixed_split_size:
        name = "num_splits" if has_splits else "fixed_split_size"
        found.append(must(p, name, "0 with block_mask: keys are those of the lists"))
    return found
