"""BF16 queries over an FP8 cache: the next token of 8 sequences, K and V in E4M3 with a scale for each KV head.

Queries, probabilities and out stay in BF16; the cache has half the bytes. The token's own key and value come in BF16:
the call quantises them by the cache's scales, writes them and attends to them. Without a Hopper GPU: compiles the same
kernels for sm_90a and computes the example in NumPy.
"""

import numpy as np

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward
from fa3_cute.arrays.memory import download, fill, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin, to_bits, update_cache

BATCH, CONTEXT, HEADS, HEADS_K, HEAD_DIM = 8, 1024, 32, 8, 128
LENGTHS = np.array([1023, 1000, 777, 512, 65, 64, 1, 0], np.int32)  # keys of each sequence before its new one


def params_of(q, k, v, out, lengths, descales, new):
    """One call. q, out [batch, 1, heads, head_dim] BF16; k, v [batch, context, heads_k, head_dim] E4M3; of both,
    descales FP32 [batch, heads_k] and new rows BF16 [batch, 1, heads_k, head_dim]: all addresses."""
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
        k_descale_ptr=descales[0],
        v_descale_ptr=descales[1],
        k_descale_batch_stride=HEADS_K,
        k_descale_head_stride=1,
        v_descale_batch_stride=HEADS_K,
        v_descale_head_stride=1,
        dtype=DataType.BF16,
        kv_dtype=DataType.FP8_E4M3,
        k_new=new[0],
        v_new=new[1],
        seqlen_knew=1,
        kv_new_dtype=DataType.BF16,
    )


def on_gpu(q, k, v, descales, new):
    """out, k and v as NumPy arrays, by one call."""
    device = open_device()
    stream = device.create_stream()
    buffers = [upload(array, stream=stream) for array in (q, k, v, LENGTHS, *descales, *new)]
    q_at, k_at, v_at, lengths, *others = (buffer.handle for buffer in buffers)
    out_gpu = device.allocate(q.nbytes, stream=stream)
    fill(out_gpu, 0xFF, stream=stream)  # NaN: what the call does not write shows
    params = params_of(q_at, k_at, v_at, out_gpu.handle, lengths, others[:2], others[2:])
    forward(params, stream).check()
    print(f"{device.name}: {k.nbytes + v.nbytes} bytes of K and V, half of what they have in BF16")
    found = zip((out_gpu, *buffers[1:3]), (q, k, v), strict=True)
    return [download(buffer, array.shape, array.dtype, stream=stream) for buffer, array in found]


def compile_only():
    """What ptxas made of the kernels that `on_gpu` would run."""
    from fa3_cute.planning.operations import checked, operation_of
    from fa3_cute.runtime.compiler import compile_report

    for launch in operation_of(checked(params_of(*[16] * 5, (16, 16), (16, 16)))).launches:
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
    k_new, v_new = to_bits(rng.standard_normal((2, BATCH, 1, HEADS_K, HEAD_DIM), np.float32), "bf16")
    given = {"seqused_k": LENGTHS, "k_descale": k_descale, "v_descale": v_descale}
    caches = k.copy(), v.copy()
    _, used = update_cache(q, *caches, k_new=k_new, v_new=v_new, **given)
    given["seqused_k"] = used
    exact, _ = attention_reference(q, *caches, **given)  # float64, of the dequantised cache
    out, _ = low_precision_twin(q, *caches, "bf16", **given)  # the error that BF16 queries, P and out explain
    unit = np.repeat(v_descale, HEADS // HEADS_K, axis=1)[:, None, :, None]  # of each head's error
    allowed = 2 * np.abs((out - exact) / unit).max() + 1e-5
    problem = hopper_device_problem()
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernels, computing the example in NumPy.")
        compile_only()
    else:
        out, *found = on_gpu(q, k, v, (k_descale, v_descale), (k_new, v_new))
        out = as_float(out)
        if not all(map(np.array_equal, found, caches)):
            return 1  # the cache is not what the reference makes of it
    error = np.abs((out - exact) / unit).max()
    print(f"largest error against float64, in units of v's scales {error:.1e}, allowed {allowed:.1e}")
    return 0 if error <= allowed else 1  # a NaN is no small error


if __name__ == "__main__":
    raise SystemExit(main())
