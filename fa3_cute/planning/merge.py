"""A call of merge_attention -> its kernel and its shape. Pure Python."""

import math
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

from ..contract.formats import PARTIAL
from ..contract.merge import (
    IN_PLACE,
    LSES,
    MERGE_ENTRY,
    OUTPUTS,
    MergeParams,
    PlainMerge,
    fits_in_place,
    out_dtype_of,
    plain_merge,
    read_pointers,
    read_shape,
    strides_of,
    walk,
)
from ..contract.params import DTYPE_NAMES, are_constants
from ..contract.status import Problem
from .known import Known


@dataclass(frozen=True)
class MergeConfig:
    """Compile-time choices of one merge kernel: the element types of the partial results and of their merge. It has
    neither shared memory nor WGMMA."""

    dtype: str
    out_dtype: str

    is_fp8 = has_descales = False
    uses_setmaxnreg = False
    smem_bytes = 0
    num_threads = 256
    entry = MERGE_ENTRY
    arguments = MERGE_ENTRY.arguments
    kernel = "fa3_cute.kernels.merge.kernel.MergeAttention"

    @property
    def name(self) -> str:
        """Names cache entries and kernels."""
        return f"merge_{self.dtype}_{self.out_dtype}"

    @property
    def element_out(self) -> str:
        """The element type of out."""
        return self.out_dtype

    def as_dict(self) -> dict:
        """The fields as plain values: a cache key, a JSON row."""
        return asdict(self)


@cache
def merge_config(dtype: str, out_dtype: str) -> MergeConfig:
    """The one config of these element types."""
    return MergeConfig(dtype, out_dtype)


def all_merge_configs() -> list[MergeConfig]:
    """Every config that some call can need."""
    return [merge_config(*dtypes) for dtypes in product(("fp16", "bf16", PARTIAL), repeat=2)]


class MergeLaunch(NamedTuple):
    """As operations.Launch: one kernel launch, which needs no scratch memory and adds no arguments of its own."""

    config: MergeConfig
    scratch: str = "nothing"
    plan: None = None

    def counts(self, num_sms: int) -> tuple[int, ...]:
        """What the launch adds to the entry's arguments."""
        return ()


class MergeShape(NamedTuple):
    """What is the same for all calls of one shape; see MergeParams.

    log2_base   log2 of the base of the LSEs
    strides     in elements, in the order of the entry
    in_place    of IN_PLACE: whether they may have the same address
    """

    dtype: str
    out_dtype: str
    batch_size: int
    seqlen_q: int
    num_heads: int
    head_dim: int
    log2_base: float
    strides: tuple[int, ...]
    in_place: tuple[bool, ...]

    @property
    def launch(self) -> MergeLaunch:
        """What serves it."""
        return MergeLaunch(merge_config(self.dtype, self.out_dtype))

    @property
    def is_empty(self) -> bool:
        """There is no row."""
        return not self.batch_size * self.seqlen_q

    @property
    def lengths(self) -> tuple[int, ...]:
        """None on the device."""
        return ()

    @property
    def mod_values(self) -> tuple[float, ...]:
        """No mods."""
        return ()

    @property
    def optionals(self) -> tuple[str, ...]:
        """Every call has all pointers."""
        return ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of the entry."""
        return self.batch_size, self.seqlen_q, self.num_heads, self.head_dim

    @property
    def scales(self) -> tuple[float, ...]:
        """In the order of the entry."""
        return (self.log2_base,)

    @staticmethod
    def of(p: PlainMerge) -> "MergeShape":
        """Of plain params that the rules accept."""
        return MergeShape(
            DTYPE_NAMES[p.dtype],
            DTYPE_NAMES[out_dtype_of(p)],
            p.batch_size,
            p.seqlen_q or 0,
            p.num_heads,
            p.head_dim,
            math.log2(p.lse_base),
            tuple(stride for tensor in OUTPUTS + LSES for stride in strides_of(p, tensor)),
            tuple(fits_in_place(p, *pair) for pair in IN_PLACE),
        )


_known: Known[MergeShape] = Known()  # by the values of SHAPE


def checked(params: MergeParams) -> Problem | tuple[MergeShape, tuple[int, ...]]:
    """The first problem of a call, or its shape and the addresses that change with every call, 0 for an absent lse.

    Of a shape that has come before only the addresses are looked at. Raises TypeError for what is no MergeParams.
    """
    require(params)
    values = read_shape(params)
    shape = _known.get(values)
    if shape is not None and (addresses := _addresses(shape, read_pointers(params))):
        return shape, addresses
    p = plain_merge(params)
    if problem := next(walk(p), None):
        return problem
    shape = MergeShape.of(p)
    if are_constants(values):
        _known.remember(values, shape)
    return shape, read_pointers(p)


def problems(params: MergeParams) -> list[Problem]:
    """Everything that `merge_attention` would object to, in the order in which it would."""
    require(params)
    return list(walk(plain_merge(params)))


def require(params) -> None:
    """TypeError for what is no MergeParams."""
    if not isinstance(params, MergeParams):
        raise TypeError(f"params must be a MergeParams, not {type(params).__name__}")


def _addresses(shape: MergeShape, given: tuple) -> tuple[int, ...] | None:
    """Good addresses in plain ints; None if the rules have to look."""
    out_a, lse_a, out_b, lse_b, out, lse = given
    lse = 0 if lse is None else lse
    if not type(out_a) is type(lse_a) is type(out_b) is type(lse_b) is type(out) is type(lse) is int:
        return None
    bits = out_a | out_b | out | (lse_a | lse_b | lse) << 2  # LSEs are aligned to 4 bytes, the others to 16
    if bits & 15 or bits >> 64 or not (out_a and out_b and out and lse_a and lse_b):
        return None
    out_in_a, out_in_b, lse_in_a, lse_in_b = shape.in_place
    if out == out_a and not out_in_a or out == out_b and not out_in_b:
        return None
    if lse == lse_a and not lse_in_a or lse == lse_b and not lse_in_b:
        return None
    return out_a, lse_a, out_b, lse_b, out, lse
