"""A cascade: 8 sequences share a prefix of 1,024 tokens. Its keys are read once for all queries, the suffixes' by their
sequence alone, and merge_attention makes one result of the two: that of one call over the whole. BF16, 16:2 heads.

Without a Hopper GPU: compiles the merge kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import DataType, FlashAttentionParams, MergeParams, forward, merge_attention
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.merge_reference import merge_reference
from fa3_cute.contract.reference import as_float, attention_reference, bf16_bits, low_precision_twin

PREFIX, BATCH, HEADS, HEADS_K, HEAD_DIM = 1024, 8, 16, 2, 128
SUFFIXES = np.array((1, 17, 64, 100, 128, 200, 255, 256), np.int32)  # tokens of each sequence behind the prefix
MAX_SUFFIX = int(SUFFIXES.max())
COMMON = {"num_heads": HEADS, "num_heads_k": HEADS_K, "head_dim": HEAD_DIM, "dtype": DataType.BF16}


def on_gpu(q, prefix, suffix):
    """out of the cascade, [batch, 1, heads, head_dim] BF16 bits."""
    device = open_device()
    stream = device.create_stream()
    q_gpu, used = upload(q, stream=stream), upload(SUFFIXES, stream=stream)
    prefix_k, prefix_v, suffix_k, suffix_v = (upload(x, stream=stream) for x in (*prefix, *suffix))
    out_a, out_b, out = (device.allocate(q.nbytes, stream=stream) for _ in range(3))
    lse_a, lse_b = (device.allocate(4 * BATCH * HEADS, stream=stream) for _ in range(2))

    shared = FlashAttentionParams(  # the queries of all sequences are the rows of one
        q=q_gpu.handle,
        k=prefix_k.handle,
        v=prefix_v.handle,
        out=out_a.handle,
        softmax_lse=lse_a.handle,  # [heads, batch]
        batch_size=1,
        seqlen_q=BATCH,
        seqlen_k=PREFIX,
        **COMMON,
    )
    own = FlashAttentionParams(
        q=q_gpu.handle,
        k=suffix_k.handle,
        v=suffix_v.handle,
        out=out_b.handle,
        softmax_lse=lse_b.handle,  # [batch, heads]
        batch_size=BATCH,
        seqlen_q=1,
        seqlen_k=MAX_SUFFIX,
        seqused_k=used.handle,
        **COMMON,
    )
    merge = MergeParams(
        out_a=out_a.handle,
        lse_a=lse_a.handle,
        out_b=out_b.handle,
        lse_b=lse_b.handle,
        out=out.handle,
        seqlen_q=BATCH,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=DataType.BF16,  # rows of one batch entry
        lse_b_row_stride=HEADS,
        lse_b_head_stride=1,
    )
    for call, params in ((forward, shared), (forward, own), (merge_attention, merge)):
        call(params, stream).check()
    print(f"{device.name}: two calls and their merge, {BATCH} queries over {PREFIX} shared keys and up to {MAX_SUFFIX}")
    return download(out, q.shape, np.uint16, stream=stream)


def in_numpy(q, prefix, suffix):
    """The same, rounded where the kernels round."""
    rows = q.swapaxes(0, 1)  # [1, batch, ...]
    out_a, lse_a = low_precision_twin(rows, *prefix, "bf16")
    out_b, lse_b = low_precision_twin(q, *suffix, "bf16", seqused_k=SUFFIXES)
    return bf16_bits(merge_reference(out_a, lse_a, out_b.swapaxes(0, 1), lse_b.transpose(2, 1, 0))[0].swapaxes(0, 1))


def main() -> int:
    rng = np.random.default_rng(0)
    q = bf16_bits(rng.standard_normal((BATCH, 1, HEADS, HEAD_DIM)))
    prefix = bf16_bits(rng.standard_normal((2, 1, PREFIX, HEADS_K, HEAD_DIM)))
    suffix = bf16_bits(rng.standard_normal((2, BATCH, MAX_SUFFIX, HEADS_K, HEAD_DIM)))
    problem = hopper_device_problem()
    if problem:
        from fa3_cute.planning.merge import merge_config
        from fa3_cute.runtime.compiler import compile_report

        print(f"No Hopper GPU here ({problem}): compiling the merge kernel, computing the example in NumPy.")
        report = compile_report(merge_config("bf16", "bf16"))
        print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")
    out = as_float((in_numpy if problem else on_gpu)(q, prefix, suffix))
    whole = [np.concatenate((np.repeat(a, BATCH, 0), b), 1) for a, b in zip(prefix, suffix, strict=True)]
    exact, _ = attention_reference(q, *whole, seqused_k=PREFIX + SUFFIXES)  # float64, one call over the whole
    rounded, _ = low_precision_twin(q, *whole, "bf16", seqused_k=PREFIX + SUFFIXES)
    error, allowed = np.abs(out - exact).max(), 3 * np.abs(rounded - exact).max() + 1e-5  # the parts are rounded too
    print(f"largest error against one call in float64 {error:.1e}, allowed {allowed:.1e}")
    return 0 if error <= allowed else 1


if __name__ == "__main__":
    raise SystemExit(main())
