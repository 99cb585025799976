"""The launches of `backward`: each thread keeps what can repeat those of a shape."""

import threading
from typing import Any

from ..planning.backward_launch import PLACES, Pass
from ..planning.known import MAX_SHAPES
from .launch import Call, ensure_loaded, launch, require_loaded, resolve_stream

# What a launch is left out without, and its place.
GRADIENTS = tuple((name, PLACES.index(name)) for name in ("dq", "dk", "dv"))
OF_SCORES = (*GRADIENTS, *((name, PLACES.index(name)) for name in ("d_s_aux", "d_bias")))


class _Thread(threading.local):
    def __init__(self):
        self.calls: dict[tuple[Pass, tuple[str, ...]], tuple[Call, ...]] = {}


_thread = _Thread()


def backward(found: Pass, addresses: tuple[int, ...], stream=None) -> None:
    """Enqueue a pass; what it is given is as planning.backward_launch.checked has it. Raises what launch.launch raises,
    with nothing enqueued if a kernel is missing."""
    handle = resolve_stream(stream)
    places = found.places(addresses)
    absent = tuple([name for name, index in (OF_SCORES if found.scores else GRADIENTS) if not places[index]])
    stages = wanted(found.stages, absent) if absent else found.stages
    if not stages:  # no query, and dq alone is wanted
        return
    calls = _thread.calls.get((found, absent))
    if calls is None:
        _keep((found, absent), _first(stages, places, handle))
        return
    own = [stage.pick(places) for stage in stages]
    if not calls[0].repeat(own[0], handle):  # another stream or context, where nothing may be loaded yet
        require_loaded(stages, handle)
        calls[0].launch(own[0], handle)
    for call, values in zip(calls[1:], own[1:], strict=True):
        if not call.repeat(values, handle):
            call.launch(values, handle)


def wanted(stages: Any, absent: tuple[str, ...]) -> tuple[Any, ...]:
    """Without those that make nothing but what is absent."""
    return tuple([stage for stage in stages if not stage.outputs or not set(stage.outputs).issubset(absent)])


def _first(stages: Any, places: tuple[int, ...], handle: int) -> tuple[Call, ...]:
    require_loaded(stages, handle)
    return tuple([launch(stage, stage, stage.pick(places), handle) for stage in stages])


def _keep(key: tuple[Pass, tuple[str, ...]], calls: tuple[Call, ...]) -> None:
    if len(_thread.calls) >= MAX_SHAPES:
        _thread.calls.clear()
    _thread.calls[key] = calls


def warm(found: Pass, stream=None) -> None:
    """Compile and load the kernels of a pass. Raises what launch.ensure_loaded raises."""
    for stage in found.stages:
        config: Any = stage.config
        ensure_loaded(config, stream)
