"""The launches of merge_attention: each thread keeps what can repeat one, by its shape."""

import threading
from typing import Any

from ..planning.known import MAX_SHAPES
from ..planning.merge import MergeShape
from .launch import Call, ensure_loaded, launch, resolve_stream


class _Thread(threading.local):
    def __init__(self):
        self.calls: dict[MergeShape, Call] = {}


_thread = _Thread()


def merge(shape: Any, addresses: tuple[int, ...], stream=None) -> None:
    """Enqueue a merge of this MergeShape; addresses as planning.merge.checked has them. Raises what launch.launch
    raises."""
    call = _thread.calls.get(shape)
    if call is None:
        call = launch(shape.launch, shape, addresses, stream)
        if len(_thread.calls) >= MAX_SHAPES:
            _thread.calls.clear()
        _thread.calls[shape] = call
        return
    handle = resolve_stream(stream)
    if not call.repeat(addresses, handle):
        call.launch(addresses, handle)


def warm(shape: MergeShape, stream=None) -> None:
    """Compile and load the kernel of a shape. Raises what launch.ensure_loaded raises."""
    config: Any = shape.launch.config
    ensure_loaded(config, stream)
