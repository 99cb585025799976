"""What the entry of a kernel takes, derived from the fields of FlashAttentionParams. Pure Python.

An entry takes the pointers of the call and of its scratch memory, the strides, sizes and bounds, what the launch adds
of its own (the number of SMs, splits), the scale and the stream. Strides are in elements; absent pointers are 0;
seqlen_q and seqlen_k are the tensors' rows (packed: total_q, total_k); windows are in [0, UNBOUNDED_WINDOW].
"""

from dataclasses import dataclass, replace

from .block_mask import LISTS
from .mods import MAX_POINTERS, MAX_SCALARS, STRIDES_PER_POINTER
from .params import ARGUMENTS, DECODE, FORWARD, LEFTPAD, QV, Argument

KINDS = {
    "pointer": "pointer",
    "stride": "int64",
    "size": "int32",
    "choice": "int32",
    "count": "int32",
    "number": "float32",
}
SCRATCH_ELEMENTS = {"tile_counter": ("int32", 4), "partials": ("float32", 16), "arrivals": ("int32", 4)}


@dataclass(frozen=True)
class Entry:
    """The arguments of one kernel.

    arguments   (name, kind) in order; kind is "pointer", "int64", "int32", "float32" or "stream"
    per_call    those that are other ones in every call, in the order of the fields, then scratch and stream
    fp8_only    those that 16-bit kernels never read
    optional    pointers of per_call that few calls have
    pointers    (name, element, alignment in bytes) of those that are pointers; elements as Argument names them
    """

    arguments: tuple[tuple[str, str], ...]
    per_call: tuple[str, ...]
    fp8_only: frozenset[str]
    optional: tuple[str, ...]
    pointers: tuple[tuple[str, str, int], ...]


def entry_of(
    kernels: tuple[str, ...],
    scratch: tuple[str, ...],
    counts: tuple[str, ...],
    described: dict[str, Argument] = ARGUMENTS,
) -> Entry:
    """The entry of a kernel, of the fields that name it in `takers`, by one of its names; scratch memory
    and counts are what the launch adds."""
    taken = {
        argument.entry or name: argument
        for name, argument in described.items()
        if not {*kernels}.isdisjoint(argument.takers)
    }
    by_kind = {
        kind: [(name, KINDS[kind]) for name, argument in taken.items() if argument.kind == kind] for kind in KINDS
    }
    added = {"pointer": [(name, "pointer") for name in scratch], "count": [(name, "int32") for name in counts]}
    return Entry(
        arguments=(*(row for kind in KINDS for row in (*by_kind[kind], *added.get(kind, ()))), ("stream", "stream")),
        per_call=(*(name for name, argument in taken.items() if argument.changes), *scratch, "stream"),
        fp8_only=frozenset(name for name, argument in taken.items() if argument.is_fp8),
        optional=tuple(name for name, argument in taken.items() if argument.is_optional),
        pointers=(
            *((name, taken[name].element, taken[name].alignment) for name, _ in by_kind["pointer"]),
            *((name, *SCRATCH_ELEMENTS[name]) for name in scratch),
        ),
    )


# Of ragged batches (kernels/common/ragged.py): whether there is padding to fill, and the number of queries up to which
# sequences are the decode launch's.
RAGGED_COUNTS = ("has_padding", "decode_queries")
FORWARD_SCRATCH, FORWARD_COUNTS = ("tile_counter",), ("num_sms", *RAGGED_COUNTS)
FORWARD_ENTRY = entry_of((FORWARD,), FORWARD_SCRATCH, FORWARD_COUNTS)
# packed_heads query heads of one KV head share an M tile; partials and arrivals are the scratch of split-KV
# (kernels/decode/merge.py), unused if one cluster does all of an item.
# What follows smem_bytes is of ragged batches alone (kernels/decode/ragged.py).
DECODE_COUNTS = (
    "packed_heads",
    "num_splits",
    "cluster_size",
    "smem_bytes",
    *RAGGED_COUNTS,
    "num_clusters",
    "num_extras",
    "first_base",
    "has_base",
    "has_shares",
    "least_clusters",
    "most_clusters",
    "most_tiles",
    "split_tiles",
    "num_partials",
    "partial_rows",
)
DECODE_SCRATCH = ("partials", "arrivals")
DECODE_ENTRY = entry_of((DECODE,), DECODE_SCRATCH, DECODE_COUNTS)
# Of kernels whose sequences may begin behind the first of their rows.
FORWARD_LEFTPAD_ENTRY = entry_of((FORWARD, LEFTPAD), FORWARD_SCRATCH, FORWARD_COUNTS)
DECODE_LEFTPAD_ENTRY = entry_of((DECODE, LEFTPAD), DECODE_SCRATCH, DECODE_COUNTS)
DECODE_QV_ENTRY = entry_of((DECODE, QV), DECODE_SCRATCH, DECODE_COUNTS)  # and of those with a second part of q


# Of kernels that call mods: addresses, strides and scalars of all that the mods read, in front of the stream.
MOD_ARGUMENTS = (
    *((f"mod_pointer_{i}", "int64") for i in range(MAX_POINTERS)),
    *((f"mod_stride_{i}", "int64") for i in range(MAX_POINTERS * STRIDES_PER_POINTER)),
    *((f"mod_scalar_{i}", "float32") for i in range(MAX_SCALARS)),
)
# And those of block lists: addresses of BlockMask's four, its strides along sequences and heads in rows of the lists,
# entries per row, Q tiles per row.
BLOCK_ARGUMENTS = tuple(
    (f"block_{name}", "int64") for name in (*LISTS, "batch_stride", "head_stride", "row_length", "tiles_per_row")
)


def _with_mods(entry: Entry) -> Entry:
    *others, stream = entry.arguments
    return replace(entry, arguments=(*others, *MOD_ARGUMENTS, *BLOCK_ARGUMENTS, stream))


FORWARD_MODS_ENTRY, DECODE_MODS_ENTRY = _with_mods(FORWARD_ENTRY), _with_mods(DECODE_ENTRY)

# By the name of what a config has that most have not.
FORWARD_ENTRIES = {"": FORWARD_ENTRY, "mods": FORWARD_MODS_ENTRY, "leftpad": FORWARD_LEFTPAD_ENTRY}
DECODE_ENTRIES = {"": DECODE_ENTRY, "mods": DECODE_MODS_ENTRY, "leftpad": DECODE_LEFTPAD_ENTRY}
