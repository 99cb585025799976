"""Launches of a call that updates the cache or rotates q: one ahead of attention's, which read what it has made."""

from operator import itemgetter
from typing import Any

from cuda.bindings.driver import CUstream

from ..contract.params import DESCALES, POINTERS
from ..planning.append import AppendPlan, AppendShape, attended
from ..planning.decode_append import AppendingConfig, launched
from ..planning.problem import LENGTHS, ProblemShape
from . import launch as attention
from .cuda_driver import is_capturing, stream_id
from .launch import NO_STREAM, SCRATCH, Call, launch, require_loaded, resolve_stream
from .scratch import Memory

SEQUSED_K = LENGTHS.index("seqused_k")
# Of all that changes with every call (arguments.addresses_of), what the first launch takes.
_PLACES = POINTERS + DESCALES
_pick = itemgetter(*map(_PLACES.index, ("q", "k", "v")))
_pick_to_quantise = itemgetter(*map(_PLACES.index, ("q", "k", "v", "k_descale_ptr", "v_descale_ptr")))


class AppendScratch:
    """The part behind partial results of the stream's workspace, or of the caller's; `places` are those of the last
    launch."""

    def __init__(self, memory: Memory, stream: int, plan: AppendPlan, shape: AppendShape):
        self.memory, self.stream, self.handle, self.plan = memory, stream, CUstream(stream), plan
        self.shape, self.identity, self.own = shape, NO_STREAM, 0
        self.places = 0, 0

    def addresses(self) -> tuple[int, int]:
        """rotated_q, new_lengths; 0 for what is not made."""
        base = self.shape.workspace or self._workspace()
        rotated = base + self.plan.q_offset if self.shape.q_elements else 0
        self.places = rotated, base + self.plan.lengths_offset if self.shape.has_new else 0
        return self.places

    def _workspace(self) -> int:
        nbytes = self.plan.partial_bytes
        if is_capturing(self.handle):
            workspace = self.memory.workspace(self.stream, nbytes, 0)
            workspace.is_captured = True
            return workspace.partials
        identity = stream_id(self.stream, self.handle)
        if identity != self.identity:
            self.own = self.memory.workspace(self.stream, nbytes, 0, identity).partials
            self.identity = identity
        return self.own


SCRATCH["append"] = AppendScratch


class Appended:
    """One thread's way to launch them all with one shape, again and again; as launch.Call."""

    __slots__ = "append", "attend", "lengths", "pick", "shape", "steps"

    def __init__(self, steps: tuple, shape: ProblemShape):
        self.steps, self.shape = steps, shape
        self.pick = _pick_to_quantise if steps[0].config.kv_dtype else _pick
        self.append: Call | None = None
        self.attend: tuple[Call, ...] | None = None
        self.lengths = 0  # the address that `attend` has

    def launch(self, addresses: tuple[int, ...], handle: int) -> None:
        """As Call.launch, all of them; nothing is enqueued if one of the kernels is missing."""
        require_loaded(self.steps, handle)
        own = self.pick(addresses)
        if self.append is None:
            ahead: Any = self.shape.append
            self.append = launch(self.steps[0], ahead, own, handle)
        else:
            self.append.launch(own, handle)
        self._attend(addresses, handle)

    def repeat(self, addresses: tuple[int, ...], handle: int) -> bool:
        """As Call.repeat; once the first is launched, the others are."""
        if self.append is None or not self.append.repeat(self.pick(addresses), handle):
            return False
        self._attend(addresses, handle)
        return True

    def _attend(self, addresses: tuple[int, ...], handle: int) -> None:
        """What was made may lie elsewhere now. Where q lies changes with every call, lengths are part of the shape."""
        rotated, lengths = self.append.scratch.places if self.append else (0, 0)
        if rotated:
            addresses = (rotated, *addresses[1:])
        if self.attend is None or lengths != self.lengths:
            shape = attended(self.shape, rotated != 0, (SEQUSED_K, lengths) if lengths else None)
            self.attend = tuple([launch(step, shape, addresses, handle) for step in self.steps[1:]])
            self.lengths = lengths
            return
        for call in self.attend:
            if not call.repeat(addresses, handle):
                call.launch(addresses, handle)


def launch_all(steps: tuple, shape: ProblemShape, addresses: tuple[int, ...], stream=None):
    """As launch.launch_all, of steps of which the first is what is ahead; or of one that needs nothing ahead."""
    if isinstance(steps[0].config, AppendingConfig):
        return attention.launch_all(steps, launched(shape), addresses, stream)
    call = Appended(steps, shape)
    call.launch(addresses, resolve_stream(stream))
    return call
