"""The launches of `backward`: each thread keeps what can repeat those of a shape."""

import threading
from typing import Any

from ..planning.backward_launch import MAX_SHAPES, POINTERS, Pass
from .launch import Call, ensure_loaded, launch, require_loaded, resolve_stream

DQ = POINTERS.index("dq")


class _Thread(threading.local):
    def __init__(self):
        self.calls: dict[Pass, tuple[Call, ...]] = {}


_thread = _Thread()


def backward(found: Pass, addresses: tuple[int, ...], stream=None) -> None:
    """Enqueue a pass; what it is given is as planning.backward_launch.checked has it. Raises what launch.launch raises,
    with nothing enqueued if a kernel is missing."""
    handle = resolve_stream(stream)
    places = found.places(addresses)
    stages = found.stages if addresses[DQ] else tuple([stage for stage in found.stages if not stage.is_finish])
    calls = _thread.calls.get(found, ())
    if len(calls) < len(stages):
        _keep(found, _first(stages, places, handle))
        return
    own = [stage.pick(places) for stage in stages]
    if not calls[0].repeat(own[0], handle):  # another stream or context, where nothing may be loaded yet
        require_loaded(stages, handle)
        calls[0].launch(own[0], handle)
    for call, values in zip(calls[1:], own[1:], strict=False):  # without dq, one less
        if not call.repeat(values, handle):
            call.launch(values, handle)


def _first(stages: Any, places: tuple[int, ...], handle: int) -> tuple[Call, ...]:
    require_loaded(stages, handle)
    return tuple([launch(stage, stage, stage.pick(places), handle) for stage in stages])


def _keep(found: Pass, calls: tuple[Call, ...]) -> None:
    if len(_thread.calls) >= MAX_SHAPES:
        _thread.calls.clear()
    _thread.calls[found] = calls


def warm(found: Pass, stream=None) -> None:
    """Compile and load the kernels of a pass. Raises what launch.ensure_loaded raises."""
    for stage in found.stages:
        config: Any = stage.config
        ensure_loaded(config, stream)
