"""Rings and roles of a kernel as data: threads, arrival counts and shared memory follow from it. Pure Python."""

from typing import NamedTuple

WARP = 32
WARPS_PER_WARPGROUP = 4
HEAD_BYTES = 1024  # mbarriers and small tensors before the first slot, which is aligned to so much


class Ring(NamedTuple):
    """An array of slots with a (full, empty) pair of mbarriers each.

    full, empty    arrivals that complete the halves; TMA's bytes count besides
    slot_bytes     of shared memory; 0 where a slot lies in another ring's or in the first HEAD_BYTES
    label          of its memory in a map
    """

    name: str
    slots: int
    slot_bytes: int
    full: int
    empty: int
    label: str = ""

    @property
    def nbytes(self) -> int:
        """Shared memory of all slots."""
        return self.slots * self.slot_bytes


class Role(NamedTuple):
    """What some warps of the CTA do; registers per thread after setmaxnreg, None without one."""

    name: str
    warps: range
    registers: int | None = None


def smem_bytes(rings: tuple[Ring, ...]) -> int:
    """Shared memory of a CTA with these rings."""
    return HEAD_BYTES + sum(ring.nbytes for ring in rings)


def num_threads(roles: tuple[Role, ...]) -> int:
    """Threads of a CTA with these roles."""
    return WARP * (1 + max(role.warps[-1] for role in roles))


def by_name(rows: tuple) -> dict:
    """{name: row} of rings or roles."""
    return {row.name: row for row in rows}
