"""FP16 decode: the next token of 4 sequences of 2048 tokens, 16 query heads that share 2 KV heads of 128.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward, warmup, workspace_size
from fa3_cute.arrays.memory import download, fill, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import attention_reference, low_precision_twin
from fa3_cute.planning.operations import checked, operation_of

BATCH, CONTEXT, HEADS, HEADS_K, HEAD_DIM = 4, 2048, 16, 2, 128
NUM_SPLITS = (0, 1, 32)  # parts of the context, computed side by side: as many as pay, one (batch-invariant), 32


def params_of(num_splits, q, k, v, out):
    """One call. q, out [batch, 1, heads, head_dim]; k, v [batch, context, heads_k, head_dim]: their addresses."""
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
        num_splits=num_splits,
        dtype=DataType.FP16,
    )


def on_gpu(q, k, v):
    """Yields (params, out as a NumPy array) for each of NUM_SPLITS, after a checked call and a hundred timed ones."""
    from cuda.core import EventOptions

    device = open_device()
    stream = device.create_stream()
    q_gpu, k_gpu, v_gpu = (upload(array, stream=stream) for array in (q, k, v))
    out_gpu = device.allocate(q.nbytes, stream=stream)
    timed = EventOptions(timing_enabled=True)
    for num_splits in NUM_SPLITS:
        params = params_of(num_splits, q_gpu.handle, k_gpu.handle, v_gpu.handle, out_gpu.handle)
        fill(out_gpu, 0xFF, stream=stream)  # NaN: what the call does not write shows
        forward(params, stream).check()  # without `workspace`, the library keeps the scratch memory
        out = download(out_gpu, q.shape, np.float16, stream=stream)
        warmup(params, stream).check()  # the captured calls need scratch memory too
        builder = stream.create_graph_builder().begin_building()
        for _ in range(100):  # one by one, the gaps between such short calls would count
            forward(params, builder).check()
        graph = builder.end_building().complete()
        graph.launch(stream)
        start = stream.record(options=timed)
        graph.launch(stream)
        stop = stream.record(options=timed)
        stop.sync()
        milliseconds = (stop - start) / 100
        print(f"{device.name}: {1000 * milliseconds:.1f} us, {2 * k.nbytes / milliseconds / 1e9:.2f} TB/s of K and V")
        yield params, out


def compile_only():
    """What ptxas made of the kernel that `on_gpu` would run."""
    from fa3_cute.runtime.compiler import compile_report
    from fa3_cute.planning.tables import decode_config

    report = compile_report(decode_config("fp16", HEAD_DIM, is_local=False))
    print(
        f"{report.name} for sm_90a: {report.registers} registers, {report.smem_bytes} bytes of shared memory, "
        f"{report.stack_bytes} bytes spilled, compiled in {report.seconds:.1f} s"
    )


def main() -> int:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((BATCH, 1, HEADS, HEAD_DIM), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, BATCH, CONTEXT, HEADS_K, HEAD_DIM), np.float32).astype(np.float16)
    exact, _ = attention_reference(q, k, v)  # float64
    rounded, _ = low_precision_twin(q, k, v, "fp16")  # the error that FP16 alone explains
    allowed, errors = 2 * np.abs(rounded - exact).max() + 1e-5, []
    problem = hopper_device_problem()
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        compile_only()
    no_call = [(params_of(n, 16, 16, 16, 16), rounded) for n in NUM_SPLITS]  # some addresses: none is looked at
    for params, out in no_call if problem else on_gpu(q, k, v):
        errors.append(np.abs(out - exact).max())
        (launch,) = operation_of(checked(params)).launches
        print(
            f"num_splits={params.num_splits} runs as {launch.plan.num_splits} and needs a workspace of "
            f"{workspace_size(params)} bytes: largest error against float64 {errors[-1]:.1e}, allowed {allowed:.1e}"
        )
    return 0 if np.max(errors) <= allowed else 1  # a NaN is no small error


if __name__ == "__main__":
    raise SystemExit(main())
