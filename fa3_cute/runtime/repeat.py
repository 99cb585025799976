"""Calls that were launched, so that the next ones like them are launched at once. Pure Python."""

import threading
from operator import attrgetter, ge
from typing import Any

from ..contract.head_dims import has_qv_dims
from ..contract.mla import is_mla
from ..contract.params import ARGUMENTS, DESCALES, OPTIONALS, POINTERS
from ..contract.scores import alignment_of
from ..contract.strides import DESCALE_STRIDES

_read_addresses = attrgetter(*POINTERS, *DESCALES, *OPTIONALS, "q_v")
_read_strides = attrgetter(*DESCALE_STRIDES)  # batch and head of q, k and v
_ADDRESSES = frozenset((int, type(None)))  # types of plain addresses
MAX_SHAPES, MAX_SEEN = 512, 4096  # calls that a thread remembers, and hashes of others; the next one starts anew


class Repeatable:
    """A good call that was launched. The next one is mostly the same but for addresses: then only these are checked.

    Equal values are as good as those that were checked: 4096.0 passes after 4096. Of FP8 keys the addresses of the
    descales are as free as the tensors': each layer of a model has its own.
    """

    __slots__ = (
        "values",
        "call",
        "has_lse",
        "has_descales",
        "strided",
        "has_qv",
        "has_v_in_k",
        "alignments",
        "has_more",
        "resolved",
    )

    def __init__(self, values: tuple, call, shape, p, resolved):
        self.values, self.call, self.resolved = values, call, resolved
        self.has_lse = shape is not None and shape.has_lse
        self.has_descales = shape is not None and shape.has_fp8_keys
        # Of the descales of q, k and v, which have strides and so must be in every call; () of none.
        strides = _read_strides(p) if self.has_descales else ()
        of_tensors = zip(strides[::2], strides[1::2], strict=True)
        self.strided = tuple([bool(batch or head) for batch, head in of_tensors]) if any(strides) else ()
        self.has_qv = shape is not None and has_qv_dims(shape)
        self.has_v_in_k = shape is not None and is_mla(shape)
        # of OPTIONALS, in bytes; 0 of those that the call does not have
        self.alignments: tuple[int, ...] = ()
        if shape is not None and shape.optionals:
            self.alignments = tuple(
                [
                    alignment_of(p, name, ARGUMENTS[name].alignment) if name in shape.optionals else 0
                    for name in OPTIONALS
                ]
            )
        self.has_more = self.has_descales or self.has_qv or bool(self.alignments)

    def repeat(self, params, stream) -> bool:
        """Launch these params, whose shape is this call's, its way; False, and nothing done, if that cannot be."""
        q, k, v, out, lse, q_scale, k_scale, v_scale, s_aux, slopes, mask, rng, q_v = _read_addresses(params)
        if not (type(q) is type(k) is type(v) is type(out) is int and (lse is None or type(lse) is int)):
            return False
        lse = lse or 0
        bits = q | k | v | out | lse << 2  # the LSE is aligned to 4 bytes, the others to 16
        if not (q and k and v and out) or bits & 15 or bits >> 64 or (lse != 0) != self.has_lse:
            return False
        if self.has_v_in_k and v != k:
            return False
        addresses = q, k, v, out, lse
        if self.has_more or not q_scale is k_scale is v_scale is s_aux is slopes is mask is rng is q_v is None:
            more = self.more((q_scale, k_scale, v_scale), (s_aux, slopes, mask, rng), q_v)
            if more is None:
                return False
            addresses += more
        handle = stream if type(stream) is int and stream >= 0 else self.resolved(stream)
        if not self.call.repeat(addresses, handle):
            self.call.launch(addresses, self.resolved(handle))
        return True

    def more(self, descales: tuple, optionals: tuple, q_v: int | None) -> tuple[int, ...] | None:
        """The addresses that few calls have, as `addresses_of` has them; None if one is no plain int, is misaligned,
        or is there where this call has none, or the other way."""
        if not _ADDRESSES.issuperset(map(type, (*descales, *optionals, q_v))):
            return None
        second = q_v or 0
        if (second != 0) != self.has_qv or second & 15 or second >> 64:
            return None
        others = self.others(descales, optionals)
        return others if others is None or not second else (*others, second)

    def others(self, descales: tuple, optionals: tuple) -> tuple[int, ...] | None:
        """`more` but q_v."""
        q, k, v = descales
        q, k, v = q or 0, k or 0, v or 0
        bits = q | k | v
        if bits & 3 or bits >> 64 or bits and not self.has_descales:
            return None
        scales = (q, k, v) if self.has_descales else ()
        if self.strided and not all(map(ge, map(bool, scales), self.strided)):
            return None
        if not self.alignments:
            return None if any(optionals) else scales
        for address, alignment in zip(optionals, self.alignments, strict=True):
            if bool(address) != bool(alignment) or address and (address % alignment or address >> 64):
                return None
        return scales + tuple([address or 0 for address in optionals])


class Thread(threading.local):
    """What a thread has launched, by the values of SHAPE."""

    def __init__(self):
        self.last = Repeatable((), None, None, None, None)  # before the first call: equal to no values
        self.known: dict[tuple, Repeatable] = {}
        self.seen: set[int] = set()  # hashes of values

    def known_for(self, values: Any) -> Repeatable | None:
        """What can repeat a call of these values, if there is something."""
        try:
            if values == self.last.values:
                return self.last
            known = self.known.get(values)
            if known is not None:
                self.last = known
            return known
        except Exception:  # a value that cannot be hashed or compared: the rules put it into words
            return None

    def remember(self, values: tuple, call: Repeatable) -> None:
        """Keep the call for its values, which are constants, if they have come before: to keep what comes once, and to
        drop it in the end, is a tenth of what such a call costs."""
        self.last, key = call, hash(values)
        if len(self.known) >= MAX_SHAPES or len(self.seen) >= MAX_SEEN:
            self.known.clear()
            self.seen.clear()
        if key in self.seen:
            self.known[values] = call
        self.seen.add(key)
