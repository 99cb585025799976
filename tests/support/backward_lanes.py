"""kernels/backward/listed.py, and what else takes a warp to find a place, by 32 lanes: the device's own code, on Python
ints. backward_order.py has stand-ins for it, of one lane."""

from collections import Counter
from types import SimpleNamespace

import pytest
from backward_order import Launch
from device_code import as_python

from fa3_cute.kernels.backward import blocks, listed, schedule
from fa3_cute.kernels.backward.blocks import Blocks
from fa3_cute.planning.rings import WARP
from fa3_cute.planning.sections import CTAS

FIND = as_python(Blocks.find)


class Exchange(Exception):
    """What a lane gives to the others, which it cannot go on without."""


class Lanes(SimpleNamespace):
    """A warp, which is cute.arch. A lane runs from its start again each time all have something to exchange, up to the
    next time: what it is given before is known.

    known    [what each lane gave] of each exchange
    number   exchanges that the lane has come to
    """

    lane_idx = lambda self: self.lane
    popc = lambda self, bits: (bits & (1 << WARP) - 1).bit_count()
    atomic_add = lambda self, at, number, **_: self.counts.update({at: number})

    def run(self, code) -> list:
        """What it returns, of each lane. counts: what atomics have counted."""
        self.known = []
        while True:
            self.counts, given, results = Counter(), [], []
            for self.lane in range(WARP):
                self.number = 0
                try:
                    results.append(code())
                except Exchange as exchange:
                    given.append(exchange.args)
            if not given:
                return results
            assert len(given) == WARP and len({kind for kind, _ in given}) == 1, "lanes of a warp part"
            self.known.append([value for _, value in given])

    def exchange(self, kind: str, value: int) -> list[int]:
        """That of all lanes."""
        if self.number == len(self.known):
            raise Exchange(kind, value)
        self.number += 1
        return self.known[self.number - 1]

    def shuffle_sync(self, value: int, lane: int) -> int:
        """Another lane's."""
        return self.exchange("shuffle", value)[lane]

    def vote_ballot_sync(self, is_set: bool) -> int:
        """An int32."""
        bits = sum(1 << lane for lane, of in enumerate(self.exchange("ballot", is_set)) if of)
        return bits - (bits >> WARP - 1 << WARP)


def python_lanes():
    """Yields Lanes while the code is theirs. The roles' code must be Python (backward_order.python_roles)."""
    lanes = Lanes()
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, listed, schedule):
            patch.setattr(module, "cute", SimpleNamespace(arch=lanes))
        patch.setattr(schedule, "WARP", WARP)
        patch.setattr(listed, "CTAS", CTAS)
        patch.setattr(Blocks, "find", FIND)
        yield lanes


def orders_of(lanes: Lanes, launch: Launch) -> list:
    """What in_listed_order makes of a launch's params, by lane."""
    of_lane = lambda: listed.in_listed_order(launch.cfg, launch.params, listed.lengths_of_lane(launch.params))
    return lanes.run(of_lane)


def located(lanes: Lanes, orders: list, index: int) -> tuple[int, int, int]:
    """(block, head, sequence) at a place of the order, where all lanes agree."""
    of_lane = lambda: orders[lanes.lane].k_blocks.locate(index, orders[lanes.lane].num_heads_k, False)
    found = set(lanes.run(of_lane))
    assert len(found) == 1, "lanes find different places"
    return found.pop()
