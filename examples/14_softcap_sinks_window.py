"""Softcap, attention sinks and sliding windows as models use them, in BF16, with LSE: a layer like gpt-oss's (a window
of 128 keys, sinks, 8 query heads per KV head), one like Gemma 2's (softcap 50, head_dim 256) and the next token of the
first one over a longer cache.

Without a Hopper GPU: compiles their kernels for sm_90a, shows what came out, computes the example in NumPy.
"""

from typing import NamedTuple

import numpy as np

from fa3_cute import DataType, FlashAttentionParams, forward
from fa3_cute.api import kernel_config
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import as_float, attention_reference, bf16_bits, low_precision_twin

BATCH, LSE_TOLERANCE = 2, 1e-4
CAP_TOLERANCE = 2e-5  # of a softcap: the hardware's tanh, one instruction


class Layer(NamedTuple):
    """Sizes of a call, and what becomes of its scores."""

    name: str
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_k: int
    head_dim: int
    left: int  # keys before a query's own that it sees; 0 after it: a causal window
    softcap: float = 0.0
    has_sinks: bool = False


LAYERS = (
    Layer("window and sinks", 700, 700, 16, 2, 64, left=127, has_sinks=True),
    Layer("softcap and window", 600, 600, 4, 2, 256, left=511, softcap=50.0),
    Layer("decode with sinks", 1, 2000, 16, 2, 64, left=127, has_sinks=True),
)


def params_of(layer: Layer, q=1 << 20, k=1 << 20, v=1 << 20, out=1 << 20, lse=1 << 20, sinks=1 << 20):
    """The call; `sinks` is not read where the layer has none."""
    tensors = {"q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
    sizes = {"batch_size": BATCH, "seqlen_q": layer.seqlen_q, "seqlen_k": layer.seqlen_k}
    heads = {"num_heads": layer.heads, "num_heads_k": layer.heads_k, "head_dim": layer.head_dim}
    scores = {"softcap": layer.softcap, "window_size_left": layer.left, "window_size_right": 0}
    if layer.has_sinks:
        scores |= {"s_aux": sinks, "s_aux_dtype": DataType.BF16}  # [num_heads]; FP32 unless it is said
    return FlashAttentionParams(**tensors, **sizes, **heads, **scores, dtype=DataType.BF16)


def on_gpu(layer: Layer, q, k, v, sinks):
    """Returns out as bits of BF16, and the LSE."""
    device = open_device()
    stream = device.create_stream()
    inputs = [upload(array, stream=stream) for array in (q, k, v)]
    lse_shape = BATCH, layer.heads, layer.seqlen_q
    outputs = [device.allocate(nbytes, stream=stream) for nbytes in (q.nbytes, 4 * int(np.prod(lse_shape)))]
    buffers = [*inputs, *outputs, upload(sinks, stream=stream)]
    forward(params_of(layer, *(int(buffer.handle) for buffer in buffers)), stream).check()
    out, lse = outputs
    return download(out, q.shape, np.uint16, stream=stream), download(lse, lse_shape, np.float32, stream=stream)


def compile_only():
    """What ptxas made of the kernels that `on_gpu` would run."""
    from fa3_cute.runtime.compiler import compile_report

    for layer in LAYERS:
        report = compile_report(kernel_config(params_of(layer)))
        print(
            f"{report.name} for sm_90a: {report.registers} registers, {report.smem_bytes} bytes of shared memory, "
            f"{report.stack_bytes} bytes spilled, compiled in {report.seconds:.1f} s"
        )


def main() -> int:
    rng, problem, failed = np.random.default_rng(0), hopper_device_problem(), 0
    print(f"No Hopper GPU here ({problem}): NumPy." if problem else open_device().name)
    if problem:
        compile_only()
    for layer in LAYERS:
        spread = 1 + layer.softcap / 2  # scores that the cap bends
        q = bf16_bits(spread * rng.standard_normal((BATCH, layer.seqlen_q, layer.heads, layer.head_dim)))
        k, v = bf16_bits(rng.standard_normal((2, BATCH, layer.seqlen_k, layer.heads_k, layer.head_dim)))
        sinks = bf16_bits(np.linspace(-2, 8, layer.heads))
        options = {
            "window_size": (layer.left, 0),
            "softcap": layer.softcap,
            "s_aux": sinks if layer.has_sinks else None,
        }
        exact, exact_lse = attention_reference(q, k, v, **options)  # float64
        rounded, rounded_lse = low_precision_twin(q, k, v, "bf16", **options)  # the error that BF16 alone explains
        bits, lse = (None, rounded_lse) if problem else on_gpu(layer, q, k, v, sinks)
        error = np.abs((rounded if problem else as_float(bits)) - exact).max()
        allowed = 2 * np.abs(rounded - exact).max() + 1e-5
        lse_error, lse_allowed = np.abs(lse - exact_lse).max(), LSE_TOLERANCE + CAP_TOLERANCE * layer.softcap
        print(
            f"{layer.name} {q.shape}: largest error against float64 {error:.1e}, allowed {allowed:.1e}; of the LSE "
            f"{lse_error:.1e}, allowed {lse_allowed:.1e}"
        )
        if layer.has_sinks:
            print(f"  of the weights sinks take {np.exp(as_float(sinks)[:, None] - exact_lse).mean():.0%}")
        failed += error > allowed or lse_error > lse_allowed
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
