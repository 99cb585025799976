"""FP16 varlen prefill: sequences of 256, 512 and 128 tokens packed one after the other, 16 heads of 128, causal.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import attention_reference, low_precision_twin

LENGTHS, HEADS, HEAD_DIM = (256, 512, 128), 16, 128
TOTAL = sum(LENGTHS)
OTHER_LENGTHS = (100, 0, 700)  # the same buffers later: another split, an empty sequence, rows to spare


def offsets(lengths) -> np.ndarray:
    """cu_seqlens: where each packed sequence begins, and where the last one ends."""
    return np.cumsum((0, *lengths), dtype=np.int32)


def on_gpu(q, k, v):
    """Yields out as a NumPy array for LENGTHS, then for OTHER_LENGTHS."""
    device = open_device()
    stream = device.create_stream()
    q_gpu, k_gpu, v_gpu, cu_seqlens = (upload(array, stream=stream) for array in (q, k, v, offsets(LENGTHS)))
    out_gpu = device.allocate(q.nbytes, stream=stream)

    params = FlashAttentionParams(
        q=q_gpu.handle,
        k=k_gpu.handle,
        v=v_gpu.handle,
        out=out_gpu.handle,  # [total, heads, head_dim]
        mode=AttentionMode.VARLEN_PREFILL,
        batch_size=len(LENGTHS),
        total_q=TOTAL,
        total_k=TOTAL,
        cu_seqlens_q=cu_seqlens.handle,
        cu_seqlens_k=cu_seqlens.handle,  # int32 on the device; may differ
        num_heads=HEADS,
        num_heads_k=HEADS,
        head_dim=HEAD_DIM,
        is_causal=True,
        dtype=DataType.FP16,
    )
    forward(params, stream).check()
    yield download(out_gpu, q.shape, np.float16, stream=stream)

    upload(offsets(OTHER_LENGTHS), cu_seqlens, stream=stream)  # the host never reads lengths: a captured graph
    forward(params, stream).check()  # replays with new ones in the same way
    print(f"{device.name}: two calls with the same params, other lengths on the device")
    yield download(out_gpu, q.shape, np.float16, stream=stream)


def compile_only():
    """What ptxas made of the kernel that `on_gpu` would run."""
    from fa3_cute.runtime.compiler import compile_report
    from fa3_cute.planning.tables import forward_config

    report = compile_report(forward_config("fp16", HEAD_DIM, "causal", has_lse=False, is_varlen=True))
    print(
        f"{report.name} for sm_90a: {report.registers} registers, {report.smem_bytes} bytes of shared memory, "
        f"{report.stack_bytes} bytes spilled, compiled in {report.seconds:.1f} s"
    )


def main() -> int:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, TOTAL, HEADS, HEAD_DIM), np.float32).astype(np.float16)
    problem = hopper_device_problem()
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        compile_only()
    computed = None if problem else on_gpu(q, k, v)
    is_right = True
    for lengths in (LENGTHS, OTHER_LENGTHS):
        packing = {"cu_seqlens_q": offsets(lengths), "cu_seqlens_k": offsets(lengths), "causal": True}
        exact, _ = attention_reference(q, k, v, **packing)  # float64
        rounded, _ = low_precision_twin(q, k, v, "fp16", **packing)  # the error that FP16 alone explains
        used = slice(sum(lengths))  # rows past the last sequence stay untouched
        out = next(computed) if computed else rounded
        allowed = 2 * np.abs(rounded - exact)[used].max() + 1e-5
        error = np.abs(out - exact)[used].max()
        print(f"lengths {lengths}: largest error against float64 {error:.1e}, allowed {allowed:.1e}")
        is_right &= bool(error <= allowed)
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
