"""What a call of torch tensors costs the host: flash_attn_func here beside FlashAttention-3's, in one process.

bench --suite host --peers fa3. Microseconds of wall time of the calling thread, from batches of calls of a tiny problem
with no wait in between, in which the GPU is never the slower one; the functions in turn, the median over batches.
Without gradients, with leaves that want them, and with the backward pass, where a library has one.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

from .peers import PeerMissing

SHAPE = 1, 128, 2, 128  # batch, seqlen, heads, head_dim: kernels of a few microseconds
CALLS = 100  # in a batch: with a backward pass fewer launches than a stream queues
BATCHES_PER_ROUND = 3
# FlashAttention-3's module, and the one of the PyPI wheel fa3-fwd, which is the same without a backward pass.
FA3_MODULES = "flash_attn_interface", "fa3_fwd_interface"

Rows = Iterator[tuple[str, float, str]]


def rows(rounds: int) -> Rows:
    """(name, median, unit) of a call of each function in each way. Raises PeerMissing without torch or without FA3."""
    compared = functions()
    import torch

    for way, make in {"no gradient": plain, "autograd": recorded, "autograd and backward": differentiated}.items():
        calls = {}
        for library, function in compared.items():
            call = make(torch, function)
            try:
                call()
            except (AttributeError, NotImplementedError, RuntimeError):  # a wheel without that pass
                continue
            calls[f"{library}, {way}"] = call
        for name, value in interleaved(calls, torch.cuda.synchronize, rounds).items():
            yield name, value, "us"


def functions() -> dict[str, Callable]:
    """flash_attn_func by library."""
    try:
        ours = import_module("..torch", __package__).flash_attn_func
    except ImportError as error:
        raise PeerMissing(f"torch is not available here ({error})") from error
    for name in FA3_MODULES:
        try:
            return {"fa3_cute": ours, "fa3": import_module(name).flash_attn_func}
        except (ImportError, OSError, RuntimeError):
            continue
    raise PeerMissing(f"fa3 is not available here (no module {' or '.join(FA3_MODULES)})")


def plain(torch: Any, function: Callable) -> Callable:
    """A call of tensors that want no gradient."""
    return partial(function, *_tensors(torch), causal=True)


def recorded(torch: Any, function: Callable) -> Callable:
    """A call that autograd records."""
    return partial(function, *[x.requires_grad_() for x in _tensors(torch)], causal=True)


def differentiated(torch: Any, function: Callable) -> Callable:
    """A call and its gradients."""
    leaves = [x.requires_grad_() for x in _tensors(torch)]
    dout, *_ = _tensors(torch)

    def call():
        out = function(*leaves, causal=True)
        torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaves, dout)

    return call


def _tensors(torch: Any) -> list:
    return [torch.randn(SHAPE, dtype=torch.bfloat16, device="cuda") for _ in "qkv"]


def interleaved(calls: dict[str, Callable], sync: Callable, rounds: int) -> dict[str, float]:
    """Microseconds of a call of each, in turn batch by batch. The first batches do not count."""
    means: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds * BATCHES_PER_ROUND):
        for name, call in calls.items():
            sync()
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            means[name].append((time.perf_counter() - began) / CALLS)
    sync()
    return {name: 1e6 * median(of[1:]) for name, of in means.items()}
