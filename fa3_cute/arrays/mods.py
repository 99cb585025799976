"""ScoreMod and MaskMod of attention(): the arrays that they read, on a device and on the host."""

from typing import Any

from ..contract.mods import MaskMod, ModArray, ScoreMod
from ..contract.params import FlashAttentionParams
from ..contract.status import Status, error_for

# Element types on a device, by a mod's; of NumPy arrays by their kinds.
MOD_DTYPES = {"uint8": ("uint8", "bool8")}
HOST_KINDS = {"uint8": "biu", "int32": "iu"}


def mod_fields(call) -> dict:
    """The fields of FlashAttentionParams, with any addresses for arrays; raises where there is no tuple."""
    for name in ("mod_arrays", "mod_scalars"):
        if not isinstance(getattr(call, name), (tuple, list)):
            kind = type(getattr(call, name)).__name__
            raise error_for(Status.INVALID_ARGUMENT, f"{name} is of type {kind}: must be a tuple")
    pointers = (1 << 20,) * len(call.mod_arrays)
    return {
        "score_mod": call.score_mod,
        "mask_mod": call.mask_mod,
        "mod_pointers": pointers or None,
        "mod_scalars": tuple(call.mod_scalars) or None,
    }


def mod_arrays(call) -> dict[str, Any]:
    """The arrays by name."""
    return {f"mod_arrays[{i}]": array for i, array in enumerate(call.mod_arrays)}


def declared(call) -> dict[str, ModArray]:
    """What the mods say of each array that there is; mods that are none say nothing, and the rules refuse them."""
    mods = [mod for mod, kind in ((call.score_mod, ScoreMod), (call.mask_mod, MaskMod)) if isinstance(mod, kind)]
    return dict(zip(mod_arrays(call), (array for mod in mods for array in mod.pointers), strict=False))


def require_mod_arrays(call, sizes: dict, shapes: dict[str, tuple], dtypes: dict[str, str]) -> None:
    """Raise for arrays of another shape or element type than the mods declare.

    sizes            fields of FlashAttentionParams that are sizes
    shapes, dtypes   of the arrays by name; dtypes: those on a device
    """
    packed = {"seqlen_q": sizes.get("total_q"), "seqlen_k": sizes.get("total_k")}
    sizes = sizes | {name: rows for name, rows in packed.items() if rows is not None}
    for name, array in declared(call).items():
        shape = tuple(sizes[extent] if isinstance(extent, str) else extent for extent in array.shape)
        if shapes[name] != shape and 0 not in shapes["q"]:
            raise error_for(Status.INVALID_SHAPE, f"{name}.shape={shapes[name]}: must be {shape}")
        accepted = MOD_DTYPES.get(array.element, (array.element,))
        if name in dtypes and dtypes[name] not in accepted:
            raise error_for(Status.INVALID_ARGUMENT, f"{name} is {dtypes[name]}: must be {' or '.join(accepted)}")


def set_mods(params: FlashAttentionParams, tensors: dict[str, Any], any_address: int) -> None:
    """Addresses and strides of the arrays among `tensors`, in the order of their names."""
    own = [tensor for name, tensor in tensors.items() if name.startswith("mod_arrays[")]
    if own:
        params.mod_pointers = tuple(any_address if tensor.is_empty else tensor.address for tensor in own)
        params.mod_strides = tuple(stride for tensor in own for stride in _strides(tensor))


def _strides(tensor) -> tuple[int, int]:
    """Of the dimensions but the last; 0 where there is none, or one of size 1."""
    outer = zip(tensor.shape[:-1], tensor.strides[:-1], strict=True)
    first, second, *_ = (*[0 if size == 1 else stride for size, stride in outer], 0, 0)
    return first, second


def host_mods(call) -> dict[str, Any]:
    """The mods as options of the reference, with their NumPy arrays; raises for elements of another kind."""
    for name, array in declared(call).items():
        found = mod_arrays(call)[name].dtype
        is_float = found.kind == "f" or found.name == "bfloat16"
        if found.kind not in HOST_KINDS[array.element] if array.element in HOST_KINDS else not is_float:
            sentence = f"{name} is {found.name}: must be as {array.element}"
            raise error_for(Status.INVALID_ARGUMENT, sentence)
    arrays, scalars, found = list(call.mod_arrays), list(call.mod_scalars), {}
    for mod in (call.score_mod, call.mask_mod):
        if mod is not None:
            own = tuple(arrays[: len(mod.pointers)])
            found[mod.kind] = mod.on_host(own, tuple(scalars[: mod.scalars]))
            del arrays[: len(mod.pointers)], scalars[: mod.scalars]
    return found
