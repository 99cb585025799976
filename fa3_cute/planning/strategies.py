"""What a kernel can do in more than one way: its config chooses, device code asks. Pure Python."""

import enum


class Steps(enum.Enum):
    """How the two GEMMs of a step follow one another.

    OVERLAPPED   QK[n] and PV[n+1] are in flight together
    SERIAL       one after the other, and each PV has an accumulator of its own, T, which is added to O in FP32: the
                 accumulator of FP8 WGMMA keeps too few bits for a sum over all keys. S and T share registers, and
                 warpgroups or CTAs overlap one another.
    """

    OVERLAPPED = enum.auto()
    SERIAL = enum.auto()


class Values(enum.Enum):
    """In what form PV reads V.

    AS_STORED            WGMMA transposes 16-bit operands itself
    TRANSPOSED_BY_WARPS  two warps of the producer warpgroup bring V to a ring of V^T
    TRANSPOSED_IN_PLACE  the consumers do it, within V's slot
    """

    AS_STORED = enum.auto()
    TRANSPOSED_BY_WARPS = enum.auto()
    TRANSPOSED_IN_PLACE = enum.auto()

    @property
    def is_transposed(self) -> bool:
        """V^T lies in shared memory, its keys and columns in transpose.py's order."""
        return self is not Values.AS_STORED

    @property
    def has_ring(self) -> bool:
        """V^T has slots of its own, and warps that fill them."""
        return self is Values.TRANSPOSED_BY_WARPS


class Output(enum.Enum):
    """Where O waits for its store.

    IN_Q_SLOT   in the slot of its tile's Q
    OWN_SLOT    in one of its own, where O is wider than Q: one warpgroup's rows of O would cover rows of Q that another
                still reads
    NOWHERE     consumers store it themselves: O in FP32, which shared memory has no room for
    """

    IN_Q_SLOT = enum.auto()
    OWN_SLOT = enum.auto()
    NOWHERE = enum.auto()
