"""FP8 E4M3 varlen prefill: packed sequences of 256, 512 and 128 tokens; real value = FP8 value * descale.

First one descale for all, then one per sequence and head: of 16 query heads for Q, of 4 KV heads for K and V. Without a
Hopper GPU: compiles the same kernel, computes it in NumPy.
"""

from importlib.util import find_spec

import numpy as np

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward, quantize_fp8
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin

LENGTHS, HEADS, HEAD_DIM = (256, 512, 128), 16, 128
OFFSETS, TOTAL = np.cumsum((0, *LENGTHS), dtype=np.int32), sum(LENGTHS)
# KV heads, how to quantise, type of out (never FP8; None is BF16). 0.1: real values up to 44.8, the rest saturates.
GLOBAL, PER_HEAD = {"descale": 0.1}, {"granularity": "batch_head", "cu_seqlens": OFFSETS}
CASES = ((16, GLOBAL, None), (4, PER_HEAD, None), (4, PER_HEAD, DataType.FP16))


def on_gpu(q, k, v, descales, out_dtype):
    """Returns out as a NumPy array, after one checked call and a hundred timed ones."""
    from cuda.core import EventOptions

    device = open_device()
    stream = device.create_stream()
    q_gpu, k_gpu, v_gpu, cu_seqlens = (upload(array, stream=stream) for array in (q, k, v, OFFSETS))
    q_descale, k_descale, v_descale = (upload(array, stream=stream) for array in descales)  # float32
    out_gpu = device.allocate(2 * q.nbytes, stream=stream)
    heads_k, per_head = k.shape[1], int(descales[0].ndim == 2)  # descales [batch, heads], KV heads for k, v
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
        cu_seqlens_k=cu_seqlens.handle,
        num_heads=HEADS,
        num_heads_k=heads_k,
        head_dim=HEAD_DIM,
        dtype=DataType.FP8_E4M3,
        out_dtype=out_dtype,
        q_descale_ptr=q_descale.handle,
        k_descale_ptr=k_descale.handle,
        v_descale_ptr=v_descale.handle,
        q_descale_batch_stride=per_head * HEADS,
        q_descale_head_stride=per_head,
        k_descale_batch_stride=per_head * heads_k,
        k_descale_head_stride=per_head,
        v_descale_batch_stride=per_head * heads_k,
        v_descale_head_stride=per_head,
    )
    forward(params, stream).check()  # queued on the stream; the first call compiles or loads the kernel
    out = download(out_gpu, q.shape, np.uint16 if out_dtype is None else np.float16, stream=stream)

    start = stream.record(options=EventOptions(timing_enabled=True))
    for _ in range(100):
        forward(params, stream)
    stop = stream.record(options=EventOptions(timing_enabled=True))
    stop.sync()
    print(f"{device.name}: {10 * (stop - start):.1f} us")
    return as_float(out)  # uint16 is BF16 bits


def quantised(rng, heads_k, how):
    """(FP8 array, descale) of q, k and v; every sequence and every head has a magnitude of its own."""
    loudness = np.repeat((0.5, 1, 2), LENGTHS)[:, None] * np.logspace(-1, 0, HEADS)  # [total, heads]
    return [
        quantize_fp8(rng.standard_normal((TOTAL, heads, HEAD_DIM)) * loudness[:, :: HEADS // heads, None], **how)
        for heads in (HEADS, heads_k, heads_k)
    ]


def main() -> int:
    if find_spec("ml_dtypes") is None:  # NumPy's FP8, which no other example needs
        raise SystemExit("This example needs the package ml_dtypes: pip install 'fa3_cute[dtypes]'")
    problem, is_right = hopper_device_problem(), True
    if problem:
        from fa3_cute.runtime.compiler import compile_report
        from fa3_cute.planning.tables import forward_config

        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        report = compile_report(forward_config("fp8_e4m3", HEAD_DIM, "full", False, is_varlen=True, out_dtype="bf16"))
        print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")
    for heads_k, how, out_dtype in CASES:
        (q, q_descale), (k, k_descale), (v, v_descale) = quantised(np.random.default_rng(0), heads_k, how)
        options = {
            "cu_seqlens_q": OFFSETS,
            "cu_seqlens_k": OFFSETS,
            "q_descale": q_descale,
            "k_descale": k_descale,
            "v_descale": v_descale,
        }
        exact, _ = attention_reference(q, k, v, **options)  # float64, of the FP8 values
        rounded, _ = low_precision_twin(q, k, v, "fp8_e4m3", **options)  # the error that P in FP8 explains: a kernel
        allowed = 4 * np.abs(rounded - exact).max() + 1e-5  # rounds P elsewhere, hence 4 times that
        out = rounded if problem else on_gpu(q, k, v, (q_descale, k_descale, v_descale), out_dtype)
        error = np.abs(out - exact).max()
        print(f"descales {q_descale.shape}, {k_descale.shape}: error against float64 {error:.1e}, limit {allowed:.1e}")
        is_right &= bool(error <= allowed)
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
