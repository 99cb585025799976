"""T5's position bias as a ScoreMod: a function in Python that the kernel calls for every score; 2 x 1000 tokens, BF16.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

import math

import cutlass
import cutlass.cute as cute
import numpy as np

from fa3_cute import DataType, FlashAttentionParams, ScoreMod, forward
from fa3_cute.api import kernel_config
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin, to_bits

BATCH, SEQLEN, HEADS, HEAD_DIM = 2, 1000, 4, 64
BUCKETS, EXACT, MOST = 32, 16, 128  # the first distances have a bucket each, up to MOST they get wider
PER_DOUBLING = EXACT / math.log2(MOST / EXACT)


@cute.jit
def t5_bias(score, batch, head, query, key, info, aux):
    """On the device. Distances of a decoder: keys lie before their query, or the causal mask hides them."""
    distance = cutlass.max(query + info.n_k - info.n_q - key, 0)
    bucket = distance
    if distance >= EXACT:
        steps = cute.math.log2(cutlass.Float32(distance) * (1 / EXACT), fastmath=True) * PER_DOUBLING
        bucket = cutlass.min(EXACT + cutlass.Int32(steps + 1e-4), BUCKETS - 1)
    return score + aux.load(0, head, bucket)  # an index beyond the array is taken to its end


def t5_bias_on_host(score, batch, head, query, key, info, aux):
    """The same in NumPy, which defines it: indices come as arrays that broadcast."""
    distance = np.maximum(query + info.n_k - info.n_q - key, 0)
    steps = np.log2(np.maximum(distance, EXACT) / EXACT) * PER_DOUBLING
    bucket = np.where(distance >= EXACT, EXACT + (steps + 1e-4).astype(int), distance)
    return score + aux.load(0, head, np.minimum(bucket, BUCKETS - 1))


# Once, at import: its hash is part of the kernel's name and of its key in the disk cache.
T5_BIAS = ScoreMod(t5_bias, pointers=[("float32", (HEADS, BUCKETS))], numpy=t5_bias_on_host)


def params_of(q=1 << 20, k=1 << 20, v=1 << 20, out=1 << 20, table=1 << 20) -> FlashAttentionParams:
    """The call."""
    return FlashAttentionParams(
        q=q,
        k=k,
        v=v,
        out=out,  # [batch, seqlen, heads, head_dim]
        batch_size=BATCH,
        seqlen_q=SEQLEN,
        seqlen_k=SEQLEN,
        num_heads=HEADS,
        num_heads_k=HEADS,
        head_dim=HEAD_DIM,
        is_causal=True,
        softmax_scale=1.0,  # T5 does not scale
        dtype=DataType.BF16,
        score_mod=T5_BIAS,
        mod_pointers=(table,),
    )


def on_gpu(q, k, v, table):
    """Returns out as bits of BF16, after one call."""
    device = open_device()
    stream = device.create_stream()
    inputs = [upload(array, stream=stream) for array in (q, k, v)]
    table_gpu, out_gpu = upload(table, stream=stream), device.allocate(q.nbytes, stream=stream)
    addresses = [int(buffer.handle) for buffer in (*inputs, out_gpu, table_gpu)]
    forward(params_of(*addresses), stream).check()
    print(f"{device.name}: causal attention of {SEQLEN} tokens with T5's bias")
    return download(out_gpu, q.shape, np.uint16, stream=stream)


def compile_only():
    """What ptxas made of the kernel that `on_gpu` would run."""
    from fa3_cute.runtime.compiler import compile_report

    report = compile_report(kernel_config(params_of()))
    print(
        f"{report.name} for sm_90a: {report.registers} registers, {report.smem_bytes} bytes of shared memory, "
        f"{report.stack_bytes} bytes spilled, compiled in {report.seconds:.1f} s"
    )


def main() -> int:
    rng = np.random.default_rng(0)
    q, k, v = (to_bits(rng.standard_normal((BATCH, SEQLEN, HEADS, HEAD_DIM)) * 0.4, "bf16") for _ in range(3))
    table = rng.standard_normal((HEADS, BUCKETS)).astype(np.float32)
    options = {"causal": True, "softmax_scale": 1.0, "score_mod": T5_BIAS.on_host((table,))}
    exact, _ = attention_reference(q, k, v, **options)  # float64
    rounded, _ = low_precision_twin(q, k, v, "bf16", **options)  # the error that BF16 alone explains
    allowed = 2 * np.abs(rounded - exact).max() + 1e-5
    problem = hopper_device_problem()
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        compile_only()
        out = rounded
    else:
        out = as_float(on_gpu(q, k, v, table))
    error = np.abs(out - exact).max()
    print(f"out {out.shape}: largest error against float64 {error:.1e}, allowed {allowed:.1e}")
    return 0 if error <= allowed else 1


if __name__ == "__main__":
    raise SystemExit(main())
