"""ALiBi slopes, a bias that is added to the scores, a boolean mask of padding: FP16, causal, 2 x 600 tokens.

Without a Hopper GPU: compiles their kernels for sm_90a, shows what came out, computes the example in NumPy.
"""

from typing import Any, NamedTuple

import numpy as np

from fa3_cute import DataType, FlashAttentionParams, forward
from fa3_cute.api import kernel_config
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import attention_reference, bf16_bits, low_precision_twin

BATCH, SEQLEN, HEADS, HEADS_K, HEAD_DIM = 2, 600, 8, 4, 128
PADDING = 0, 37  # tokens in front of each sequence that are none


class Example(NamedTuple):
    """The array, as the reference takes it, and what the call says of it besides its address."""

    field: str
    array: np.ndarray
    fields: dict[str, Any]


def examples(rng) -> dict[str, Example]:
    """By name."""
    slopes = 2.0 ** (-8 * np.arange(1, HEADS + 1, dtype=np.float32) / HEADS)  # the paper's, of a power of 2 of heads
    # Of each head, the same for all sequences; element types of biases do not follow from that of q.
    bias = bf16_bits(rng.standard_normal((1, HEADS, SEQLEN, SEQLEN)))
    # Of each sequence, the same for all heads and queries: rows of padding then see no key, and their out is 0.
    is_token = np.arange(SEQLEN) >= np.array(PADDING)[:, None]
    return {
        "ALiBi": Example("alibi_slopes", slopes, {}),  # FP32
        "bias": Example(
            "attn_mask", bias, {"attn_mask_dtype": DataType.BF16, "attn_mask_batch_stride": 0}
        ),  # strides in elements; 0 broadcasts, None is contiguous
        "padding": Example(
            "attn_mask",
            is_token[:, None, None, :],
            {"attn_mask_batch_stride": SEQLEN, "attn_mask_head_stride": 0, "attn_mask_row_stride": 0},
        ),  # no attn_mask_dtype: bytes, of which 0 hides the key
    }


def params_of(example: Example, q=1 << 20, k=1 << 20, v=1 << 20, out=1 << 20, array=1 << 20) -> FlashAttentionParams:
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
        num_heads_k=HEADS_K,
        head_dim=HEAD_DIM,
        is_causal=True,
        dtype=DataType.FP16,
        **{example.field: array},
        **example.fields,
    )


def on_gpu(example: Example, q, k, v):
    """Returns out as a NumPy array, after one call."""
    device = open_device()
    stream = device.create_stream()
    buffers = [upload(array, stream=stream) for array in (q, k, v)]
    buffers += [device.allocate(q.nbytes, stream=stream), upload(example.array, stream=stream)]
    forward(params_of(example, *(int(buffer.handle) for buffer in buffers)), stream).check()
    return download(buffers[3], q.shape, np.float16, stream=stream)


def compile_only(all_examples):
    """What ptxas made of the kernels that `on_gpu` would run."""
    from fa3_cute.runtime.compiler import compile_report

    for example in all_examples:
        report = compile_report(kernel_config(params_of(example)))
        print(
            f"{report.name} for sm_90a: {report.registers} registers, {report.smem_bytes} bytes of shared memory, "
            f"{report.stack_bytes} bytes spilled, compiled in {report.seconds:.1f} s"
        )


def main() -> int:
    rng, problem, failed = np.random.default_rng(0), hopper_device_problem(), 0
    all_examples = examples(rng)
    print(f"No Hopper GPU here ({problem}): NumPy." if problem else open_device().name)
    if problem:
        compile_only(all_examples.values())
    q = rng.standard_normal((BATCH, SEQLEN, HEADS, HEAD_DIM), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, BATCH, SEQLEN, HEADS_K, HEAD_DIM), np.float32).astype(np.float16)
    for name, example in all_examples.items():
        options = {"causal": True, example.field: example.array}
        exact, lse = attention_reference(q, k, v, **options)  # float64
        rounded, _ = low_precision_twin(q, k, v, "fp16", **options)  # the error that FP16 alone explains
        allowed = 2 * np.abs(rounded - exact).max() + 1e-5
        out = rounded if problem else on_gpu(example, q, k, v)
        error, empty = np.abs(out - exact).max(), np.isneginf(lse).mean(axis=(1, 2))
        print(f"{name}: largest error against float64 {error:.1e}, allowed {allowed:.1e}; rows without keys {empty}")
        failed += error > allowed or not (out[np.isneginf(lse).transpose(0, 2, 1)] == 0).all()
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
