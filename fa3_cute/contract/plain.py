"""What the fields of a call mean: plain values, whatever the caller wrote. The rules and the plan read nothing else.

NumPy's integers, pointer objects, 1 for True and 2 for DataType.FP8_E4M3 mean what they say here once; where a value
means nothing, its field holds BAD, and the rules say so in words.
"""

from collections.abc import Callable
from numbers import Complex, Real
from operator import attrgetter

from .block_mask import BlockMask
from .mods import MaskMod, ScoreMod
from .params import (
    ARGUMENTS,
    SHAPE,
    AttentionMode,
    DataType,
    FlashAttentionParams,
    address,
    integer,
    is_array,
    is_given,
    is_off,
    is_true,
    member,
    names,
)


class _Bad:
    """No value of its field's kind."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "BAD"


BAD = _Bad()
# The types of fields that are objects; of what is in a tuple the rules speak.
OBJECTS = {name: frozenset({type(None), tuple}) for name in names(kind="object")}
OBJECTS |= {
    "score_mod": frozenset({type(None), ScoreMod}),
    "mask_mod": frozenset({type(None), MaskMod}),
    "block_mask": frozenset({type(None), BlockMask}),
}
ENUMS = dict.fromkeys(names(kind="choice"), DataType) | {"mode": AttentionMode}
REQUIRED_CHOICES = ("dtype", "mode")  # of others None is one
# Fields that None switches off, besides pointers, and the value that they have then.
OFF_AS_ZERO = frozenset(
    (
        "workspace_bytes",
        "alibi_batch_stride",
        "head_dim_v",
        "seqlen_knew",
        "rotary_dim",
        "rotary_positions",
        *(name for name, argument in ARGUMENTS.items() if argument.kind == "stride" and argument.is_fp8),
    )
)
_NONE = type(None)
_TYPES = {
    "pointer": {int, _NONE},
    "size": {int},
    "count": {int},
    "number": {int, float, _NONE},
    "flag": {bool},
    "stride": {int, _NONE},
}
_FIELDS = SHAPE + names(changes=True)
read_shape, _read_addresses = attrgetter(*SHAPE), attrgetter(*names(changes=True))


class Plain(FlashAttentionParams):
    """A call whose values are plain; `raw` is the caller's."""

    __slots__ = ("raw",)
    raw: FlashAttentionParams


def _pointer(name: str, value):
    if not is_given(value):
        return 0
    found = address(value)
    return BAD if found is None else found


def _integer(name: str, value):
    found = integer(value)
    if found is None and is_off(value):
        return 0 if name in OFF_AS_ZERO else None
    return BAD if found is None else found


def _stride(name: str, value):
    if name in OFF_AS_ZERO or value is not None:
        found = _integer(name, value)
        return BAD if found is None else found
    return None


def _number(name: str, value):
    kind = type(value)
    if kind is float or kind is int or value is None:
        return value
    if kind is bool or is_array(kind) or not (hasattr(kind, "__float__") or hasattr(kind, "__index__")):
        return BAD
    if isinstance(value, Complex) and not isinstance(value, Real):  # NumPy's have a float, which is their real part
        return BAD
    try:
        return float(value)
    except Exception:  # a foreign class's __float__
        return BAD


def _flag(name: str, value):
    if value is None and name == "pack_gqa":
        return None
    found = is_true(value)
    return BAD if found is None else found


def _choice(name: str, value):
    if value is None and name not in REQUIRED_CHOICES:
        return None
    found = member(ENUMS[name], value)
    return BAD if found is None else found


def _object(name: str, value):
    if is_off(value):
        return None
    if name in _ITEMS and isinstance(value, (list, tuple)):
        return tuple([_ITEMS[name](name, item) for item in value])
    return value if type(value) in OBJECTS[name] else BAD


_ITEMS: dict[str, Callable] = {"mod_pointers": _pointer, "mod_strides": _integer, "mod_scalars": _number}
_PLAIN_ITEMS = frozenset((int, float))
_READERS: dict[str, Callable] = {
    "pointer": _pointer,
    "size": _integer,
    "count": _integer,
    "stride": _stride,
    "number": _number,
    "flag": _flag,
    "choice": _choice,
    "object": _object,
}


def _accepted(name: str) -> frozenset[type]:
    """The types that mean themselves in a field."""
    kind = ARGUMENTS[name].kind
    if kind == "choice":
        return frozenset({ENUMS[name]} | (set() if name in REQUIRED_CHOICES else {_NONE}))
    if kind == "object":
        return OBJECTS[name]
    if name in OFF_AS_ZERO:
        return frozenset({int})
    return frozenset(_TYPES[kind] | ({_NONE} if name == "pack_gqa" else set()))


_ACCEPTED = tuple(map(_accepted, _FIELDS))
# Types of values that were found to be accepted, of which calls have few; and whether tuples are among them.
_plain_types: dict[tuple[type, ...], bool] = {}


def _have_plain_items(params: FlashAttentionParams) -> bool:
    """Tuples hold plain numbers alone."""
    return all(_PLAIN_ITEMS.issuperset(map(type, getattr(params, name) or ())) for name in _ITEMS)


def plain(params: FlashAttentionParams, shape: tuple | None = None) -> FlashAttentionParams:
    """The params themselves if every value is plain, else a copy in which it is; shape is `read_shape(params)`."""
    values = (read_shape(params) if shape is None else shape) + _read_addresses(params)
    types = tuple(map(type, values))
    has_tuples = _plain_types.get(types)
    if has_tuples is None and all(kind in accepted for kind, accepted in zip(types, _ACCEPTED, strict=True)):
        has_tuples = _plain_types[types] = tuple in types
    if has_tuples is False or has_tuples and _have_plain_items(params):
        return params
    copy = Plain()
    copy.raw = params
    for name, value in zip(_FIELDS, values, strict=True):
        argument = ARGUMENTS[name]
        setattr(copy, name, _READERS[argument.kind](name, value))
    return copy
