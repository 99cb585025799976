"""attention() over arrays of CuPy, PyTorch and JAX, whichever is installed: FP16 causal, 2 sequences of 512 tokens.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, calls attention() with NumPy arrays.
"""

import importlib.util
import os

import numpy as np

from fa3_cute import attention
from fa3_cute.arrays.memory import hopper_device_problem, open_device
from fa3_cute.contract.reference import attention_reference, low_precision_twin

BATCH, SEQLEN, HEADS, HEADS_K, HEAD_DIM = 2, 512, 16, 4, 128


def with_cupy(q, k, v):
    import cupy

    q, k, v = (cupy.asarray(array) for array in (q, k, v))
    out = cupy.empty_like(q)
    attention(q, k, v, out=out, causal=True)  # written in place, on the default stream, which is CuPy's as well
    return cupy.asnumpy(out)


def with_torch(q, k, v):
    import torch

    q, k, v = (torch.from_numpy(array).cuda() for array in (q, k, v))
    stream = torch.cuda.Stream()
    out = attention(q, k, v, causal=True, stream=stream.cuda_stream)  # new memory; waits for PyTorch's stream
    return torch.from_dlpack(out).cpu().numpy()  # the same memory as a tensor; PyTorch's stream waits for ours


def with_jax(q, k, v):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to the others
    import jax

    q, k, v = (jax.device_put(array) for array in (q, k, v))
    out = attention(q, k, v, causal=True)  # JAX's arrays are never written to: no out=
    return np.asarray(jax.dlpack.from_dlpack(out))  # JAX's stream waits for the default stream


def on_gpu(q, k, v):
    """Yields (library, out as a NumPy array) for each library that is installed."""
    device = open_device()
    found = {
        name: call
        for name, call in (("cupy", with_cupy), ("torch", with_torch), ("jax", with_jax))
        if importlib.util.find_spec(name)
    }
    print(f"{device.name}: {', '.join(found) or 'no array library, NumPy on the host'}")
    for name, call in found.items():
        yield name, call(q, k, v)
    if not found:
        yield "numpy", attention(q, k, v, causal=True)


def on_host(q, k, v):
    """Shows what ptxas made of the kernel that `on_gpu` would run, and yields what NumPy computes."""
    from fa3_cute.runtime.compiler import compile_report
    from fa3_cute.planning.tables import forward_config

    report = compile_report(forward_config("fp16", HEAD_DIM, "causal", has_lse=False, is_varlen=False))
    print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")
    yield "numpy", attention(q, k, v, causal=True)


def main() -> int:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((BATCH, SEQLEN, HEADS, HEAD_DIM), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, BATCH, SEQLEN, HEADS_K, HEAD_DIM), np.float32).astype(np.float16)
    exact, _ = attention_reference(q, k, v, causal=True)  # float64
    rounded, _ = low_precision_twin(q, k, v, "fp16", causal=True)  # the error that FP16 alone explains
    allowed, errors = 2 * np.abs(rounded - exact).max() + 1e-5, []
    problem = hopper_device_problem()
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
    for library, out in (on_host if problem else on_gpu)(q, k, v):
        errors.append(np.abs(out - exact).max())
        print(f"{library}: out {out.shape}, largest error against float64 {errors[-1]:.1e}, allowed {allowed:.1e}")
    return 0 if np.max(errors) <= allowed else 1  # a NaN is no small error


if __name__ == "__main__":
    raise SystemExit(main())
