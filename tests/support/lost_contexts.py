"""Contexts of device 0 that end while the process goes on: what only a process of its own can do to a GPU.

test_state_gpu.py runs it: a verb of WAYS in, as JSON out the rounds whose results differed from those of the first, and
how far that one is from the reference. Through the driver alone: other libraries do not survive this.
"""

import json
import sys

import numpy as np
from cuda.bindings import driver

from fa3_cute import AttentionMode, FlashAttentionParams, forward
from fa3_cute.contract.reference import attention_reference

HEADS, HEADS_K, DIM, ROUNDS = 8, 2, 128, 4


def done(result):
    """The value of a driver call that must succeed."""
    failed, *values = result
    assert not failed, failed
    return values[0] if values else None


def uploaded(array) -> int:
    """The address of a copy in the current context."""
    address = int(done(driver.cuMemAlloc(array.nbytes)))
    done(driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))
    return address


def outputs(rows_q: int, rows_k: int, **choices) -> tuple[tuple, np.ndarray]:
    """(inputs, out) of a call in the current context, which is made twice: out of the second one."""
    draw = np.random.default_rng(rows_q)
    shapes = (1, rows_q, HEADS, DIM), (1, rows_k, HEADS_K, DIM), (1, rows_k, HEADS_K, DIM)
    arrays = tuple(draw.standard_normal(shape).astype(np.float16) for shape in shapes)
    out = np.zeros(shapes[0], np.float16)
    q, k, v, target = map(uploaded, (*arrays, out))
    stream = done(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
    params = FlashAttentionParams(
        q=q,
        k=k,
        v=v,
        out=target,
        batch_size=1,
        seqlen_q=rows_q,
        seqlen_k=rows_k,
        num_heads=HEADS,
        num_heads_k=HEADS_K,
        head_dim=DIM,
        **choices,
    )
    for _ in range(2):
        forward(params, int(stream)).check()
    done(driver.cuStreamSynchronize(stream))
    done(driver.cuMemcpyDtoH(out.ctypes.data, target, out.nbytes))
    done(driver.cuStreamDestroy(stream))
    return arrays, out


def results() -> list[tuple]:
    """Of a prefill, and of a decode call whose splits merge through scratch memory."""
    return [outputs(300, 300), outputs(1, 3000, mode=AttentionMode.DECODE, num_splits=48)]


def reset() -> list[tuple]:
    """In the primary context, which is reset afterwards."""
    context = done(driver.cuDevicePrimaryCtxRetain(0))
    done(driver.cuCtxSetCurrent(context))
    found = results()
    done(driver.cuCtxSetCurrent(None))
    done(driver.cuDevicePrimaryCtxReset(0))
    return found


def destroyed() -> list[tuple]:
    """In a context that is made and destroyed."""
    context = done(driver.cuCtxCreate(None, 0, 0))
    found = results()
    done(driver.cuCtxDestroy(context))
    return found


WAYS = {"reset": reset, "destroyed": destroyed}

if __name__ == "__main__":
    done(driver.cuInit(0))
    rounds = [WAYS[sys.argv[1]]() for _ in range(ROUNDS)]
    differing = [
        index
        for index, found in enumerate(rounds)
        if any(out.tobytes() != first.tobytes() for (_, out), (_, first) in zip(found, rounds[0], strict=True))
    ]
    distances = [float(np.abs(out - attention_reference(*arrays)[0]).max()) for arrays, out in rounds[0]]
    print(json.dumps({"differing": differing, "distances": distances}))
