"""ScoreMod and MaskMod: functions of a user that a kernel calls for every score. Pure Python; NumPy on the host only.

A function takes (score, batch, head, query, key, info, aux), a mask's none of the score, and is traced into the kernel:
`@cute.jit`, or plain arithmetic. On the host its NumPy twin takes the same arguments as arrays that broadcast.

score        scaled, capped and biased q.k, FP32; a ScoreMod returns the score to use, a MaskMod whether it counts
batch, head  of the sequence in the batch and of the query heads
query, key   in 0 .. info.n_q - 1 and 0 .. info.n_k - 1, where bottom-right alignment has query at key
             query + info.n_k - info.n_q. The kernel also calls with those of a tile that lie beyond, and ignores what
             it gets
aux          aux.scalars[i], float32; aux.load(i, *index), an element of the i-th array: int32 of integers, else FP32.
             An index beyond the array is taken to its end, so that nothing else is read
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

from .function_hash import function_hash, undecorated

MAX_POINTERS = 4  # of the mods of a call together, as MAX_SCALARS
MAX_SCALARS = 4
STRIDES_PER_POINTER = 2  # of all dimensions but the last, which is contiguous
ELEMENTS = {"uint8": 1, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}  # bytes of each
SIZES = ("batch_size", "num_heads", "num_heads_k", "seqlen_q", "seqlen_k")  # packed: seqlen_q is total_q, k likewise


class ModArray(NamedTuple):
    """An array that a mod reads.

    element   of ELEMENTS
    shape     one to three extents: a positive int, or the name of a size of the call (SIZES)
    """

    element: str
    shape: tuple[int | str, ...]

    def problem(self) -> str:
        """What is wrong with it, in words; "" if nothing is."""
        if self.element not in ELEMENTS:
            return f"element={self.element!r}: must be one of {', '.join(ELEMENTS)}"
        if not 1 <= len(self.shape) <= STRIDES_PER_POINTER + 1:
            return f"shape={self.shape}: must have 1 to {STRIDES_PER_POINTER + 1} extents"
        for extent in self.shape:
            if not (extent in SIZES if isinstance(extent, str) else type(extent) is int and 0 < extent < 1 << 31):
                return f"extent={extent!r}: must be a positive int32 or one of {', '.join(SIZES)}"
        return ""

    def extents(self, sizes: Any) -> tuple[int, ...]:
        """In numbers; `sizes` has the SIZES as attributes."""
        return tuple(getattr(sizes, extent) if isinstance(extent, str) else extent for extent in self.shape)

    def strides(self, extents: tuple[int, ...]) -> tuple[int, ...]:
        """Of a contiguous array of these extents, STRIDES_PER_POINTER of them, 0 where there is no dimension."""
        found: tuple[int, ...] = ()
        for extent in reversed(extents[1:]):
            found = (extent * (found[0] if found else 1), *found)
        return found + (0,) * (STRIDES_PER_POINTER - len(found))


@dataclass(frozen=True, eq=False)
class Mod:
    """What ScoreMod and MaskMod have in common: make one of those.

    fn        the function
    name      in kernels' names and messages, an identifier; "": the function's own
    key       stands in the hash for what has none (function_hash.py): other meaning, other key
    pointers  arrays that it reads: a ModArray, or (element, shape), for each address in the call's mod_pointers
    scalars   how many of the call's mod_scalars it takes
    numpy     its twin for NumPy arrays; None: the function itself without `cute.jit`
    id        name and hash: equal for functions of equal meaning, in every process; part of a kernel's cache key

    Mods of equal id are equal. Raises ValueError for what has no hash or is none of these, TypeError for no function.
    """

    fn: Callable
    _: KW_ONLY
    name: str = ""
    key: str = ""
    pointers: Sequence[Any] = ()
    scalars: int = 0
    numpy: Callable | None = None
    id: str = field(init=False)

    kind = ""

    def __post_init__(self):
        if not callable(self.fn):
            raise TypeError(f"fn must be a function, not {type(self.fn).__name__}")
        name = self.name or re.sub(r"\W", "", getattr(self.fn, "__name__", type(self.fn).__name__))
        self._set("name", name)
        try:
            pointers = tuple([ModArray(element, tuple(shape)) for element, shape in self.pointers])
        except (TypeError, ValueError):
            found = f"pointers={self.pointers!r}: must be a sequence of (element, shape), as ('float32', (4,))"
            raise ValueError(f"{self.kind} {name}: {found}") from None
        self._set("pointers", pointers)
        problem = next(filter(None, self._problems()), "")
        if problem:
            raise ValueError(f"{self.kind} {name}: {problem}")
        self._set("id", f"{name}_{self._hash()}")
        _registered[self.id] = self

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _problems(self):
        if not re.fullmatch(r"[A-Za-z_]\w{0,39}", self.name, re.ASCII):
            yield f"name={self.name!r}: must be an identifier of ASCII letters, of at most 40"
        if not isinstance(self.key, str):
            yield f"key={self.key!r}: must be a str"
        if len(self.pointers) > MAX_POINTERS:
            yield f"{len(self.pointers)} pointers: must be at most {MAX_POINTERS}"
        if type(self.scalars) is not int or not 0 <= self.scalars <= MAX_SCALARS:
            yield f"scalars={self.scalars!r}: must be an int from 0 to {MAX_SCALARS}"
        yield from (array.problem() for array in self.pointers)

    def _hash(self) -> str:
        try:
            meaning = function_hash(self.fn, self.key)
        except ValueError as error:
            raise ValueError(f"{self.kind} {self.name}: {error}") from None
        return hashlib.sha256(f"{self.kind} {self.pointers} {self.scalars} {meaning}".encode()).hexdigest()[:32]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mod) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def on_host(self, arrays: tuple = (), scalars: tuple[float, ...] = ()) -> Callable:
        """Its NumPy twin with these arrays and scalars: a function of all arguments but aux."""
        twin, aux = self.numpy or undecorated(self.fn), HostAux(arrays, scalars)
        return lambda *arguments: twin(*arguments, aux)


class ScoreMod(Mod):
    """A function (score, batch, head, query, key, info, aux) -> score; fields as Mod says. NaN that it makes stays."""

    kind = "score_mod"


class MaskMod(Mod):
    """A function (batch, head, query, key, info, aux) -> whether the key counts, besides what causal masks, windows and
    lengths leave; fields as Mod says. A row without keys: out = 0, LSE = -inf."""

    kind = "mask_mod"


class HostAux(NamedTuple):
    """`aux` of a function on the host: arrays of NumPy and scalars."""

    arrays: tuple
    scalars: tuple[float, ...]

    def load(self, i: int, *index):
        """Elements of the i-th array, at indices that broadcast; those beyond it are taken to its ends."""
        import numpy as np

        array = np.asarray(self.arrays[i])
        place = tuple(np.clip(at, 0, extent - 1) for at, extent in zip(index, array.shape, strict=True))
        return array[place].astype(np.int32 if array.dtype.kind in "bui" else np.float32)


_registered: dict[str, Mod] = {}  # by id: what device code finds a config's mods by


def registered(id: str) -> Mod:
    """The mod of a config. Raises ValueError if this process has none, or if it means something else by now."""
    mod = _registered.get(id)
    if mod is None:
        raise ValueError(f"no ScoreMod or MaskMod {id} was made in this process")
    if mod.id != f"{mod.name}_{mod._hash()}":
        raise ValueError(
            f"{mod.kind} {mod.name} has changed since it was made, or its file or what it refers to has: make a new one"
        )
    return mod


def short_name(id: str) -> str:
    """Of an id, as kernels' names have it: the name and the first digits of the hash."""
    name, _, digits = id.rpartition("_")
    return f"{name}_{digits[:8]}"
