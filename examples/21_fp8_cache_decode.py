"""BF16 queries over an FP8 cache: the next token of 8 sequences, K and V in E4M3 with a scale for each KV head.

Queries, probabilities and out stay in BF16; the cache has half the bytes. Without a Hopper GPU: compiles the same
kernel for sm_90a and computes the example in NumPy.
"""

import numpy as np

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward
from fa3_cute.arrays.memory import download, fill, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin, to_bits

BATCH, CONTEXT, HEADS, HEADS_K, HEAD_DIM = 8, 1024, 32, 8, 128
LENGTHS = np.array([1024, 1000, 777, 512, 65, 64, 1, 0], np.int32)  # keys of each sequence; 0: out is 0


def params_of(q, k, v, out, lengths, k_descale, v_descale):
    """One call. q, out [batch, 1, heads, head_dim] BF16; k, v [batch, context, heads_k, head_dim] E4M3; descales FP32
    [batch, heads_k]: all addresses."""
    return FlashAttentionParams(
        q=q,
        k=k,
        v=v,
        out=out,
        mode=AttentionMode.DECODE,
        batch_size=BATCH,
        seqlen_q=1,
        seqlen_k=CONTEXT,
        num_heads=HEADS,
        num_heads_k=HEADS_K,
        head_dim=HEAD_DIM,
        seqused_k=lengths,
        k_descale_ptr=k_descale,
        v_descale_ptr=v_descale,
        k_descale_batch_stride=HEADS_K,
        k_descale_head_stride=1,
        v_descale_batch_stride=HEADS_K,
        v_descale_head_stride=1,
        dtype=DataType.BF16,
        kv_dtype=DataType.FP8_E4M3,
    )


def on_gpu(q, k, v, k_descale, v_descale):
    """out as a NumPy array, by one call."""
    device = open_device()
    stream = device.create_stream()
    arrays = (q, k, v, LENGTHS, k_descale, v_descale)
    q_gpu, k_gpu, v_gpu, *others = (upload(array, stream=stream) for array in arrays)
    out_gpu = device.allocate(q.nbytes, stream=stream)
    fill(out_gpu, 0xFF, stream=stream)  # NaN: what the call does not write shows
    params = params_of(*(buffer.handle for buffer in (q_gpu, k_gpu, v_gpu, out_gpu, *others)))
    forward(params, stream).check()
    print(f"{device.name}: {k.nbytes + v.nbytes} bytes of K and V, half of what they have in BF16")
    return download(out_gpu, q.shape, q.dtype, stream=stream)


def compile_only():
    """What ptxas made of the kernel that `on_gpu` would run."""
    from fa3_cute.planning.operations import checked, operation_of
    from fa3_cute.runtime.compiler import compile_report

    (launch,) = operation_of(checked(params_of(*[16] * 7))).launches
    report = compile_report(launch.config)
    print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")


def quantised(rng):
    """(E4M3 bits [batch, context, heads_k, head_dim], descale [batch, heads_k]) of KV heads of unlike size."""
    x = rng.standard_normal((BATCH, CONTEXT, HEADS_K, HEAD_DIM), np.float32) * 2.0 ** np.arange(HEADS_K)[:, None]
    descale = np.abs(x).max(axis=(1, 3)) / 448  # 448: the largest E4M3 number
    return to_bits(x / descale[:, None, :, None], "fp8_e4m3"), descale.astype(np.float32)


def main() -> int:
    rng = np.random.default_rng(0)
    q = to_bits(rng.standard_normal((BATCH, 1, HEADS, HEAD_DIM), np.float32) / 64, "bf16")
    (k, k_descale), (v, v_descale) = quantised(rng), quantised(rng)
    given = {"seqused_k": LENGTHS, "k_descale": k_descale, "v_descale": v_descale}
    exact, _ = attention_reference(q, k, v, **given)  # float64, of the dequantised cache
    out, _ = low_precision_twin(q, k, v, "bf16", **given)  # the error that BF16 queries, P and out explain
    unit = np.repeat(v_descale, HEADS // HEADS_K, axis=1)[:, None, :, None]  # of each head's error
    allowed = 2 * np.abs((out - exact) / unit).max() + 1e-5
    problem = hopper_device_problem()
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        compile_only()
    else:
        out = as_float(on_gpu(q, k, v, k_descale, v_descale))
    error = np.abs((out - exact) / unit).max()
    print(f"largest error against float64, in units of v's scales {error:.1e}, allowed {allowed:.1e}")
    return 0 if error <= allowed else 1  # a NaN is no small error


if __name__ == "__main__":
    raise SystemExit(main())
