"""Chunked prefill: a prompt of 1,000 tokens comes in chunks of 256, in one call with the next tokens of 3 sequences
that decode meanwhile; when it is through, it decodes too. BF16, packed queries over pages, causal.

Sizes are the same at every step: the GPU reads how many queries and keys each sequence has. Such a call is two kernel
launches, and each sequence is the work of the kernel that suits it. Rows behind the last sequence are padding.

Without a Hopper GPU: compiles both kernels for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import as_float, attention_reference, bf16_bits, low_precision_twin

PROMPT, CHUNK, PAGE, HEADS, HEADS_K, HEAD_DIM = 1000, 256, 64, 16, 2, 128
LENGTHS = (40, 333, 700)  # keys of the decoding sequences before the first step
STEPS, BATCH, MAX_PAGES = 6, len(LENGTHS) + 1, -(-PROMPT // PAGE) + 1
NUM_PAGES, MAX_TOKENS = BATCH * MAX_PAGES, CHUNK + len(LENGTHS)


def schedule():
    """Yields queries of each sequence and its keys with them, for every step."""
    done = 0
    for step in range(STEPS):
        chunk = min(CHUNK, PROMPT - done) or 1
        done = min(PROMPT, done + chunk)
        decoded = max(0, step + 1 - -(-PROMPT // CHUNK))
        yield (1, 1, chunk, 1), (LENGTHS[0] + step + 1, LENGTHS[1] + step + 1, done + decoded, LENGTHS[2] + step + 1)


def call(q, k, v, out, cu_seqlens_q, seqused_k, page_table):
    """The call of every step: q and out [max_tokens, heads, head_dim], k and v [num_pages, page, heads_k, head_dim]."""
    tensors = {"q": q, "k": k, "v": v, "out": out, "page_table": page_table}
    lengths = {"cu_seqlens_q": cu_seqlens_q, "seqused_k": seqused_k}
    sizes = {"batch_size": BATCH, "total_q": MAX_TOKENS, "seqlen_k": MAX_PAGES * PAGE}
    pages = {"page_size": PAGE, "num_pages": NUM_PAGES}
    heads = {"num_heads": HEADS, "num_heads_k": HEADS_K, "head_dim": HEAD_DIM}
    mode = {"mode": AttentionMode.VARLEN_PREFILL, "is_causal": True, "zero_padding": True, "dtype": DataType.BF16}
    return FlashAttentionParams(**tensors, **lengths, **sizes, **pages, **heads, **mode)


def pools_of(k, v, table, used):
    """K and V in pages, as an engine's kernels have left them before the step: what is not written yet is NaN."""
    pools = np.full((2, NUM_PAGES, PAGE, HEADS_K, HEAD_DIM), bf16_bits(np.nan))
    for sequence, length in enumerate(used):
        keys = np.arange(length)
        pools[:, table[sequence, keys // PAGE], keys % PAGE] = k[sequence, keys], v[sequence, keys]
    return pools


def on_gpu(device, stream, step):
    """out of one step, of its arrays in the order of the call, out left out."""
    q, *others = (upload(x, stream=stream) for x in step)
    k, v, cu_seqlens_q, seqused_k, page_table = others
    out = device.allocate(step[0].nbytes, stream=stream)
    params = call(*(buffer.handle for buffer in (q, k, v, out, cu_seqlens_q, seqused_k, page_table)))
    forward(params, stream).check()
    return download(out, step[0].shape, np.uint16, stream=stream)


def show_kernels():
    """Compiles what the call launches."""
    from fa3_cute.planning.operations import operation_of
    from fa3_cute.planning.problem import ProblemShape
    from fa3_cute.runtime.compiler import compile_report

    for launch in operation_of(ProblemShape.of(call(*[256] * 7))).launches:
        report = compile_report(launch.config)
        print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")


def main() -> int:
    rng = np.random.default_rng(0)
    q = bf16_bits(rng.standard_normal((STEPS, MAX_TOKENS, HEADS, HEAD_DIM)))
    k, v = bf16_bits(rng.standard_normal((2, BATCH, MAX_PAGES * PAGE, HEADS_K, HEAD_DIM)))
    table = rng.permutation(NUM_PAGES).astype(np.int32).reshape(BATCH, MAX_PAGES)
    problem, worst = hopper_device_problem(), 0.0
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernels, computing the example in NumPy.")
        show_kernels()
    else:
        device = open_device()
        stream = device.create_stream()
        print(f"{device.name}: {STEPS} calls, a prompt of {PROMPT} tokens beside {len(LENGTHS)} sequences that decode")
    for step, lengths in enumerate(schedule()):
        queries, used = np.array(lengths, np.int32)
        cu_seqlens_q = np.cumsum((0, *queries), dtype=np.int32)
        pools = pools_of(k, v, table, used)
        options = {"cu_seqlens_q": cu_seqlens_q, "seqused_k": used, "causal": True, "zero_padding": True}
        exact, _ = attention_reference(q[step], k, v, **options)  # float64, of each sequence's keys in a row
        rounded, _ = low_precision_twin(q[step], k, v, "bf16", **options)
        if problem:
            out, _ = low_precision_twin(q[step], *pools, "bf16", page_table=table, **options)
        else:
            out = as_float(on_gpu(device, stream, (q[step], *pools, cu_seqlens_q, used, table)))
        error = np.abs(out - exact).max() / (2 * np.abs(rounded - exact).max() + 1e-5)
        worst = np.maximum(worst, error)  # NaN stays
    print(f"{STEPS} steps: the largest error against float64 is {worst:.0%} of what BF16 may have")
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
