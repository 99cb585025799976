"""BF16 causal prefill with grouped heads: 32 query heads over 8 KV heads of 128, and the log-sum-exp of every row.

What an 8-billion-parameter Llama asks for. NumPy has no BF16 of its own: `to_bits` rounds to it, as uint16. Without a
Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import DataType, FlashAttentionParams, forward
from fa3_cute.arrays.memory import download, hopper_device_problem, upload
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin, to_bits

SEQLEN, HEADS, HEADS_K, HEAD_DIM = 700, 32, 8, 128
FLOPS = 4 * HEADS * SEQLEN * SEQLEN * HEAD_DIM / 2  # two GEMMs; the causal mask leaves half


def on_gpu(q, k, v):
    """Returns out and LSE as NumPy arrays, after one checked call and a hundred timed ones."""
    from cuda.core import Device, EventOptions

    device = Device()
    device.set_current()
    stream = device.create_stream()
    q_gpu, k_gpu, v_gpu = (upload(array, stream=stream) for array in (q, k, v))
    out_gpu = device.allocate(q.nbytes, stream=stream)
    lse_gpu = device.allocate(4 * HEADS * SEQLEN, stream=stream)  # [batch, heads, seqlen] float32

    params = FlashAttentionParams(
        q=q_gpu.handle,
        k=k_gpu.handle,
        v=v_gpu.handle,
        out=out_gpu.handle,
        softmax_lse=lse_gpu.handle,
        batch_size=1,
        seqlen_q=SEQLEN,
        seqlen_k=SEQLEN,
        num_heads=HEADS,
        num_heads_k=HEADS_K,
        head_dim=HEAD_DIM,
        is_causal=True,
        dtype=DataType.BF16,
    )
    forward(params, stream).check()  # queued on the stream; the first call compiles or loads the kernel
    out = download(out_gpu, q.shape, np.uint16, stream=stream)
    lse = download(lse_gpu, (1, HEADS, SEQLEN), np.float32, stream=stream)

    timed = EventOptions(timing_enabled=True)
    start = stream.record(options=timed)
    for _ in range(100):
        forward(params, stream)
    stop = stream.record(options=timed)
    stop.sync()
    milliseconds = (stop - start) / 100
    print(f"{device.name}: {1000 * milliseconds:.1f} us, {FLOPS / milliseconds / 1e9:.0f} TFLOP/s")
    return as_float(out), lse


def compile_only():
    """What ptxas made of the kernel that `on_gpu` would run."""
    from fa3_cute.runtime.compiler import compile_report
    from fa3_cute.planning.tables import forward_config

    report = compile_report(forward_config("bf16", HEAD_DIM, "causal", has_lse=True, is_varlen=False))
    print(
        f"{report.name} for sm_90a: {report.registers} registers, {report.smem_bytes} bytes of shared memory, "
        f"{report.stack_bytes} bytes spilled, compiled in {report.seconds:.1f} s"
    )


def main() -> int:
    rng = np.random.default_rng(0)
    q, k, v = (
        to_bits(rng.standard_normal((1, SEQLEN, heads, HEAD_DIM), np.float32), "bf16")
        for heads in (HEADS, HEADS_K, HEADS_K)
    )
    exact, exact_lse = attention_reference(q, k, v, causal=True)  # float64
    rounded, rounded_lse = low_precision_twin(q, k, v, "bf16", causal=True)  # the error that BF16 alone explains
    allowed = 2 * np.abs(rounded - exact).max() + 1e-5

    problem = hopper_device_problem()
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        compile_only()
        out, lse = rounded, rounded_lse
    else:
        out, lse = on_gpu(q, k, v)
    error, lse_error = np.abs(out - exact).max(), np.abs(lse - exact_lse).max()
    print(f"out {out.shape}: largest error against float64 {error:.1e}, allowed {allowed:.1e}; LSE {lse_error:.1e}")
    return 0 if error <= allowed and lse_error <= 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
