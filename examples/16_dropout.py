"""Reproducible dropout: the same random state gives the same bits, another one drops other weights, and their mean is
the result without dropout. FP16, causal, 2 x 300 tokens; the state lies on the device and is read there.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import DataType, FlashAttentionParams, forward
from fa3_cute.api import kernel_config
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.dropout import effective_p
from fa3_cute.contract.reference import attention_reference, low_precision_twin

BATCH, SEQLEN, HEADS, HEADS_K, HEAD_DIM = 2, 300, 4, 2, 64
P_DROPOUT, SEED, OFFSETS = 0.1, 2026, 64  # one offset per call, as a training step counts them


def params_of(q=1 << 20, k=1 << 20, v=1 << 20, out=1 << 20, rng_state=1 << 20) -> FlashAttentionParams:
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
        p_dropout=P_DROPOUT,  # the probability to drop
        rng_state=rng_state,  # uint64 [2]: seed, offset
    )


def on_gpu(q, k, v):
    """Returns a function offset -> out as a NumPy array, by one call."""
    device = open_device()
    stream = device.create_stream()
    buffers = [upload(array, stream=stream) for array in (q, k, v)]
    state, out = upload(np.zeros(2, np.uint64), stream=stream), device.allocate(q.nbytes, stream=stream)
    params = params_of(*(int(buffer.handle) for buffer in (*buffers, out, state)))

    def attend(offset: int):
        upload(np.array([SEED, offset], np.uint64), state, stream=stream)  # also between replays of a captured call
        forward(params, stream).check()
        return download(out, q.shape, np.float16, stream=stream)

    print(f"{device.name}: {OFFSETS} calls")
    return attend


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
    q = rng.standard_normal((BATCH, SEQLEN, HEADS, HEAD_DIM), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, BATCH, SEQLEN, HEADS_K, HEAD_DIM), np.float32).astype(np.float16)

    def options(offset: int) -> dict:
        return {"causal": True, "p_dropout": P_DROPOUT, "rng_state": (SEED, offset)}

    exact, _ = attention_reference(q, k, v, **options(0))  # float64, the same weights dropped
    rounded, _ = low_precision_twin(q, k, v, "fp16", **options(0))  # the error that FP16 alone explains
    allowed = 2 * np.abs(rounded - exact).max() + 1e-5

    problem = hopper_device_problem()
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        compile_only()

        def attend(offset: int):
            return low_precision_twin(q, k, v, "fp16", **options(offset))[0]
    else:
        attend = on_gpu(q, k, v)
    found = np.stack([attend(offset) for offset in range(OFFSETS)]).astype(np.float64)
    error = np.abs(found[0] - exact).max()
    is_same, is_other = (attend(0) == found[0]).all(), (found[1] != found[0]).any()

    # The mean over offsets is off by what so few draws explain: 1 in units of its standard error.
    without, _ = attention_reference(q, k, v, causal=True)
    standard_error = found.std(axis=0, ddof=1) / OFFSETS**0.5
    distance = np.sqrt(((found.mean(axis=0) - without) ** 2).sum() / (standard_error**2).sum())
    print(f"dropped {effective_p(P_DROPOUT):.4f}: largest error against float64 {error:.1e}, allowed {allowed:.1e}")
    print(
        f"same state, same bits: {is_same}; mean of {OFFSETS} offsets: {distance:.2f} standard errors from no dropout"
    )
    return 0 if error <= allowed and is_same and is_other and distance < 1.2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
