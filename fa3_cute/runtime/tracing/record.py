"""A call as one line of JSON, and back: what a bug report needs, and nothing that is in device memory.

    {"fa3_cute": "forward", "fields": {"q": 256, "k": 256, ..., "batch_size": 2, "seqlen_q": 512, "dtype": "BF16"}}

Fields that have their default are left out. A pointer stands as its alignment in bytes, at most MAX_ALIGNMENT, or as
the name of a field before it that has the same address. What means nothing in its field stands as {"wrong": its type}.
Pure Python.
"""

import json
import math
from dataclasses import fields
from typing import Any, NamedTuple

from ...contract import backward_params, merge
from ...contract.backward_params import BackwardParams
from ...contract.block_mask import LISTS, BlockMask
from ...contract.merge import MergeParams
from ...contract.mods import Mod
from ...contract.params import (
    ARGUMENTS,
    AttentionMode,
    DataType,
    FlashAttentionParams,
    address,
    integer,
    is_array,
    is_true,
    member,
)

KEY = "fa3_cute"  # of the call's name, the first in a line: what another program's does not begin with
START = f'{{"{KEY}": '
MAX_ALIGNMENT = 256
WRONG = "wrong"
Params = FlashAttentionParams | BackwardParams | MergeParams
# By the call's name: the class of its params and the descriptions of their fields.
CALLS: dict[str, tuple[type, dict]] = {
    "forward": (FlashAttentionParams, ARGUMENTS),
    "merge_attention": (MergeParams, merge.ARGUMENTS),
    "backward": (BackwardParams, backward_params.ARGUMENTS),
}


class Unreadable(ValueError):
    """A line, or what stands in one, cannot be made a call again; the text says why."""


# ---- a call -> its line ----------------------------------------------------------------------------------------------


def line_of(call: str, params: Params, **facts: Any) -> str:
    """The line, without an end, of a call by its name; facts stand in it as they are. Reads no device memory."""
    return json.dumps({KEY: call} | facts | {"fields": fields_of(call, params)})


def fields_of(call: str, params: Params) -> dict[str, Any]:
    """The fields that are not their defaults, as they stand in a line. Raises nothing, whatever they hold."""
    kind, arguments = CALLS[call]
    names: dict[int, str] = {}  # of fields, by their addresses
    found = {}
    for field in fields(kind):
        value = getattr(params, field.name)
        if value is not field.default:
            shown = _shown(field.name, arguments[field.name].kind, value, names)
            if shown != field.default:
                found[field.name] = shown
    return found


def _shown(name: str, kind: str, value: Any, names: dict[int, str]) -> Any:
    if kind == "pointer":
        return _pointer(name, value, names)
    if value is None:
        return None
    if kind == "object":
        return _object(name, value)
    if kind == "choice":
        found = member(_enum(name), value)
        shown = None if found is None else found.name
    elif kind == "flag":
        shown = is_true(value)
    else:
        shown = _number(value) if kind == "number" else integer(value)
    return {WRONG: type(value).__name__} if shown is None else shown


def _enum(name: str) -> type[AttentionMode] | type[DataType]:
    return AttentionMode if name == "mode" else DataType


def _pointer(name: str, value: Any, names: dict[int, str]) -> Any:
    found = address(value)
    if not found:
        return None if found == 0 else {WRONG: type(value).__name__}
    if found in names:
        return names[found]
    names[found] = name
    return _alignment(found)


def _alignment(found: int) -> int:
    return math.gcd(found, MAX_ALIGNMENT)


def _number(value: Any) -> float | None:
    if type(value) in (int, float):
        return value
    try:
        return None if type(value) is bool or is_array(type(value)) else float(value)
    except Exception:  # a foreign class's __float__ may raise anything
        return None


def _object(name: str, value: Any) -> Any:
    if isinstance(value, Mod):
        return {"name": value.name, "id": value.id, "scalars": value.scalars, "pointers": list(value.pointers)}
    if isinstance(value, BlockMask):
        lists = {item: _pointer(item, getattr(value, item), {}) for item in LISTS}
        sizes = ("q_block", "kv_block", "batches", "heads")
        return lists | {item: _shown(item, "size", getattr(value, item), {}) for item in sizes}
    if isinstance(value, (tuple, list)):
        kind = "pointer" if name == "mod_pointers" else "number"
        return [_shown(name, kind, item, {}) for item in value]
    return {WRONG: type(value).__name__}


# ---- a line -> its call ----------------------------------------------------------------------------------------------


def parsed(line: str) -> dict[str, Any] | None:
    """What a line says; None if it is another program's. Raises Unreadable for one of ours that is damaged."""
    start = line.find(START)
    if start < 0:
        return None
    try:
        found = json.loads(line[start:])
    except ValueError as error:
        raise Unreadable(f"the line is damaged: {error}") from None
    if found[KEY] not in CALLS or not isinstance(found.get("fields"), dict):
        raise Unreadable(f"{KEY}={found[KEY]!r}: must be {', '.join(CALLS)}, with its fields")
    return found


def params_of(record: dict[str, Any]) -> Params:
    """The params of a record: pointers as they stand there. Raises Unreadable for what no params can hold again."""
    kind, arguments = CALLS[record[KEY]]
    given = record["fields"]
    unknown = given.keys() - arguments.keys()
    if unknown:
        raise Unreadable(f"{', '.join(sorted(unknown))}: no field of {kind.__name__} of this version")
    return kind(**{name: _read(name, arguments[name].kind, value) for name, value in given.items()})


def _read(name: str, kind: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, dict) and WRONG in value:
        raise Unreadable(f"{name} held a {value[WRONG]}, which means nothing there")
    if kind == "object":
        raise Unreadable(f"{name} is a function, or belongs to one, which a line does not hold")
    if kind == "choice":
        enum = _enum(name)
        if value not in enum.__members__:
            raise Unreadable(f"{name}={value!r}: must be {', '.join(enum.__members__)}")
        return enum[str(value)]
    return value


# ---- lengths ---------------------------------------------------------------------------------------------------------


class Ints(NamedTuple):
    """An int32 array of a call in device memory: [rows, columns], `stride` elements from row to row."""

    rows: int
    columns: int
    stride: int

    @property
    def extent(self) -> int:
        """Elements from the first to behind the last; 0 of an empty one."""
        return (self.rows - 1) * self.stride + self.columns if self.rows and self.columns else 0


def lengths_of(p: Any) -> dict[str, Ints]:
    """The arrays of plain params that say where the sequences lie, of those that are there."""
    batch = p.batch_size
    found: dict[str, int] = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new"), batch + 1)
    found |= dict.fromkeys(("seqused_q", "seqused_k", "kv_batch_idx", "leftpad_k", "seqlens_rotary"), batch)
    arrays = {name: Ints(1, columns, columns) for name, columns in found.items() if getattr(p, name)}
    if p.page_table:
        pages = p.seqlen_k // p.page_size
        stride = pages if p.page_table_batch_stride is None else p.page_table_batch_stride
        arrays["page_table"] = Ints(p.batch_size_k or batch, pages, stride)
    return arrays
