"""The argument buffer of a kernel: what lies where, and what of it a shape fills. Pure Python.

A buffer holds first what changes with every call, then what changes with the shape. The addresses of lengths count
among the latter, for all layers of a model share them; those of descales among the former, for each layer has its own.
What a 16-bit kernel takes of descales, which it never reads, is one zero behind all that, and so are the pointers that
few calls have where a call has none of them.
"""

import struct
from functools import cache
from operator import attrgetter

from ..contract.arguments import Entry
from ..contract.fp8_cache import has_fp8_keys
from ..contract.params import DESCALES, OPTIONALS, POINTERS, FlashAttentionParams
from ..planning.problem import LENGTHS, ProblemShape

STRUCT_CODES = {"pointer": "Q", "int64": "q", "int32": "i", "float32": "f", "stream": "Q"}
_read_pointers, _read_descales, _read_optionals = (attrgetter(*names) for names in (POINTERS, DESCALES, OPTIONALS))


class Layout:
    """The buffer of one kernel entry.

    per_call, per_shape   names of the arguments, in the order of their values in the buffer
    absent                names of the arguments that are always 0; they share one place
    offsets               bytes from its start of each argument of the entry, in the entry's order, and last of the
                          cudaError_t that a launch writes
    """

    def __init__(self, entry: Entry, has_descales: bool, has_optionals: bool = False):
        codes = {name: STRUCT_CODES[kind] for name, kind in entry.arguments}
        absent = (entry.fp8_only if not has_descales else frozenset()).union(() if has_optionals else entry.optional)
        self.absent = tuple(name for name in codes if name in absent)
        self.per_call = tuple(name for name in entry.per_call if name not in self.absent)
        self.per_shape = tuple(name for name in codes if name not in self.per_call + self.absent)
        self.lengths = tuple(LENGTHS.index(name) for name in self.per_shape if name in LENGTHS)
        self.per_call_struct, self.per_shape_struct = (
            struct.Struct("".join(codes[name] for name in names)) for names in (self.per_call, self.per_shape)
        )
        self.per_shape_offset = self.per_call_struct.size
        self.zero_offset = self.per_shape_offset + -(-self.per_shape_struct.size // 8) * 8
        self.error_offset = self.zero_offset + 8
        places = dict.fromkeys(self.absent, self.zero_offset)
        for names, start in ((self.per_call, 0), (self.per_shape, self.per_shape_offset)):
            before = ""
            for name in names:
                before += codes[name]
                places[name] = start + struct.calcsize(before) - struct.calcsize(codes[name])
        self.offsets = [*(places[name] for name in codes), self.error_offset]

    def values(self, shape: ProblemShape, counts: tuple[int, ...]) -> tuple:
        """The values of per_shape, in its order: an entry has pointers, strides, sizes, counts, then the scale
        and the numbers of features, and what mods read.

        counts   what the launch adds (Launch.counts)
        """
        lengths, scales = shape.lengths, shape.scales + shape.mod_values
        return (*[lengths[index] for index in self.lengths], *shape.strides, *shape.sizes, *counts, *scales)

    def pack(self, shape: ProblemShape, counts: tuple[int, ...]) -> bytes:
        """The bytes of per_shape."""
        return self.per_shape_struct.pack(*self.values(shape, counts))


@cache
def layout_of(entry: Entry, has_descales: bool, has_optionals: bool = False) -> Layout:
    """The buffer of a kernel that takes this entry, for calls that have one of its optional pointers or none."""
    return Layout(entry, has_descales, has_optionals)


def addresses_of(p: FlashAttentionParams) -> tuple[int, ...]:
    """What changes with every call, of plain params: q, k, v, out, softmax_lse, of FP8 the descales, where there is one
    of OPTIONALS all of them, and q_v, if any."""
    found = _read_pointers(p)
    if not p.softmax_lse:
        found = (*found[:-1], 0)
    if has_fp8_keys(p):
        found = (*found, *[address or 0 for address in _read_descales(p)])
    optionals = _read_optionals(p)
    if any(optionals):
        found = (*found, *[address or 0 for address in optionals])
    return (*found, p.q_v) if p.q_v else found
