"""MLA decode over pages, as DeepSeek's attention with absorbed weights has it: 16 query heads of 576 columns over one
latent row per token, whose first 512 columns are the values. Two causal queries per sequence, as with a draft token.
Then the same call in two parts, as vLLM makes it: q_v and v of 512 columns, q and k of the 64 with rotary positions.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

from dataclasses import replace

import numpy as np

from fa3_cute import DataType, FlashAttentionParams, forward
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin, to_bits

BATCH, QUERIES, HEADS, LATENT, VALUES, PAGE, NUM_PAGES, MAX_PAGES = 4, 2, 16, 576, 512, 64, 40, 12
USED = np.array([2, 100, 512, 700], np.int32)  # tokens of each sequence
SCALE = 192**-0.5  # of the model's heads before they were absorbed: 128 columns and 64 with rotary positions


def call(q, pool, out, page_table, seqused_k):
    """q and out [batch, queries, heads, 576 and 512], pool [num_pages, page, 1, 576]: v is k."""
    tensors = {"q": q, "k": pool, "v": pool, "out": out, "page_table": page_table, "seqused_k": seqused_k}
    sizes = {"batch_size": BATCH, "seqlen_q": QUERIES, "seqlen_k": MAX_PAGES * PAGE}
    pages = {"page_size": PAGE, "num_pages": NUM_PAGES}
    heads = {"num_heads": HEADS, "num_heads_k": 1, "head_dim": LATENT, "head_dim_v": VALUES}
    return FlashAttentionParams(
        **tensors, **sizes, **pages, **heads, dtype=DataType.BF16, is_causal=True, softmax_scale=SCALE
    )


def in_parts(whole):
    """The same call: the parts are columns of the whole rows, 512 behind 0 and 64 behind 512, 2 bytes each."""
    q_row, page = HEADS * LATENT, PAGE * LATENT
    strides = {f"{name}_head_stride": LATENT for name in ("q", "q_v", "k", "v")}
    strides |= {f"{name}_row_stride": q_row for name in ("q", "q_v")}
    strides |= {f"{name}_batch_stride": QUERIES * q_row for name in ("q", "q_v")}
    strides |= {f"{name}_row_stride": LATENT for name in "kv"} | {f"{name}_batch_stride": page for name in "kv"}
    parts = {"q": int(whole.q) + 2 * VALUES, "q_v": whole.q, "k": int(whole.k) + 2 * VALUES, "v": whole.k}
    return replace(whole, **parts, **strides, head_dim=LATENT - VALUES)


def on_gpu(*arrays):
    """out of both calls, of arrays in the order of the call but out."""
    device = open_device()
    stream = device.create_stream()
    q, pool, table, used = (upload(array, stream=stream) for array in arrays)
    shape = (BATCH, QUERIES, HEADS, VALUES)
    out = device.allocate(2 * int(np.prod(shape)), stream=stream)
    whole, found = call(*(buffer.handle for buffer in (q, pool, out, table, used))), []
    for params in (whole, in_parts(whole)):
        forward(params, stream).check()
        found.append(as_float(download(out, shape, np.uint16, stream=stream)))
    print(f"{device.name}: {BATCH} sequences of {USED.tolist()} tokens in pages of {PAGE}")
    return found


def main() -> int:
    rng = np.random.default_rng(0)
    q = to_bits(rng.standard_normal((BATCH, QUERIES, HEADS, LATENT), np.float32), "bf16")
    pool = to_bits(rng.standard_normal((NUM_PAGES, PAGE, 1, LATENT), np.float32), "bf16")
    table = rng.permutation(NUM_PAGES)[: BATCH * 8].astype(np.int32).reshape(BATCH, 8)
    table = np.pad(table, ((0, 0), (0, MAX_PAGES - 8)), constant_values=-1)[:, :MAX_PAGES]
    table[3, 8:11] = sorted(set(range(NUM_PAGES)) - set(table.ravel()))[:3]
    options = {"causal": True, "softmax_scale": SCALE, "page_table": table, "seqused_k": USED}
    tensors = q, pool, pool[..., :VALUES]
    exact, _ = attention_reference(*tensors, **options)
    rounded, _ = low_precision_twin(*tensors, "bf16", **options)
    if problem := hopper_device_problem():
        from fa3_cute.contract.plain import plain
        from fa3_cute.planning.operations import operation_of
        from fa3_cute.planning.problem import ProblemShape
        from fa3_cute.runtime.compiler import compile_report

        print(f"No Hopper GPU here ({problem}): compiling the kernels, computing the example in NumPy.")
        whole = call(*[256] * 5)
        for params in (whole, in_parts(whole)):
            report = compile_report(operation_of(ProblemShape.of(plain(params))).launches[0].config)
            print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")
        results = [rounded]
    else:
        results = on_gpu(q, pool, table, USED)
    error = max(np.abs(found - exact).max() for found in results) / (2 * np.abs(rounded - exact).max() + 1e-5)
    print(f"the largest error against float64 is {error:.0%} of what BF16 may have")
    return 0 if error <= 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
