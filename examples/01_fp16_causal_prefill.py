"""FP16 causal prefill: 2 sequences of 512 tokens, 16 heads of 128. cuda.core holds the memory and the stream.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import DataType, FlashAttentionParams, forward
from fa3_cute.arrays.memory import download, hopper_device_problem, upload
from fa3_cute.contract.reference import attention_reference, low_precision_twin

BATCH, SEQLEN, HEADS, HEAD_DIM = 2, 512, 16, 128
FLOPS = 4 * BATCH * HEADS * SEQLEN * SEQLEN * HEAD_DIM / 2  # two GEMMs; the causal mask leaves half


def on_gpu(q, k, v):
    """Returns out as a NumPy array, after one checked call and a hundred timed ones."""
    from cuda.core import Device, EventOptions

    device = Device()
    device.set_current()
    stream = device.create_stream()
    q_gpu, k_gpu, v_gpu = (upload(array, stream=stream) for array in (q, k, v))
    out_gpu = device.allocate(q.nbytes, stream=stream)

    params = FlashAttentionParams(
        q=q_gpu.handle,
        k=k_gpu.handle,
        v=v_gpu.handle,
        out=out_gpu.handle,  # [batch, seqlen, heads, head_dim]
        batch_size=BATCH,
        seqlen_q=SEQLEN,
        seqlen_k=SEQLEN,
        num_heads=HEADS,
        num_heads_k=HEADS,
        head_dim=HEAD_DIM,
        is_causal=True,
        dtype=DataType.FP16,
    )
    forward(params, stream).check()  # queued on the stream; the first call compiles or loads the kernel
    out = download(out_gpu, q.shape, np.float16, stream=stream)

    timed = EventOptions(timing_enabled=True)
    start = stream.record(options=timed)
    for _ in range(100):
        forward(params, stream)
    stop = stream.record(options=timed)
    stop.sync()
    milliseconds = (stop - start) / 100
    print(f"{device.name}: {1000 * milliseconds:.1f} us, {FLOPS / milliseconds / 1e9:.0f} TFLOP/s")
    return out


def compile_only():
    """What ptxas made of the kernel that `on_gpu` would run."""
    from fa3_cute.runtime.compiler import compile_report
    from fa3_cute.planning.tables import forward_config

    report = compile_report(forward_config("fp16", HEAD_DIM, "causal", has_lse=False, is_varlen=False))
    print(
        f"{report.name} for sm_90a: {report.registers} registers, {report.smem_bytes} bytes of shared memory, "
        f"{report.stack_bytes} bytes spilled, compiled in {report.seconds:.1f} s"
    )


def main() -> int:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, BATCH, SEQLEN, HEADS, HEAD_DIM), np.float32).astype(np.float16)
    exact, _ = attention_reference(q, k, v, causal=True)  # float64
    rounded, _ = low_precision_twin(q, k, v, "fp16", causal=True)  # the error that FP16 alone explains
    allowed = 2 * np.abs(rounded - exact).max() + 1e-5

    problem = hopper_device_problem()
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        compile_only()
        out = rounded
    else:
        out = on_gpu(q, k, v)
    error = np.abs(out - exact).max()
    print(f"out {out.shape}: largest error against float64 {error:.1e}, allowed {allowed:.1e}")
    return 0 if error <= allowed else 1


if __name__ == "__main__":
    raise SystemExit(main())
