"""A decode loop: one captured FP16 call, replayed 64 times while the KV cache of 4 sequences grows by a token a step.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward, warmup
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload, window
from fa3_cute.contract.reference import attention_reference, low_precision_twin

STEPS, MAX_LEN, BATCH, HEADS, HEADS_K, HEAD_DIM = 64, 2048, 4, 16, 2, 128
LENGTHS = np.array((0, 100, 1000, MAX_LEN - STEPS), np.int32)  # in the cache before the first step
USED = LENGTHS + np.arange(1, STEPS + 1, dtype=np.int32)[:, None]  # [step, batch], its new token included


def copy_item(target, at, source, index, nbytes, stream):
    """Enqueue a copy within the device: item `index` of the source to item `at` of the target, in units of `nbytes`."""
    window(target, at * nbytes, nbytes).copy_from(window(source, index * nbytes, nbytes), stream=stream)


def on_gpu(q, k, v):
    """Returns out of every step as a NumPy array; the host waits for none of them before the last."""
    from cuda.core import EventOptions

    device = open_device()
    stream = device.create_stream()
    is_cached = (np.arange(MAX_LEN) < LENGTHS[:, None])[:, :, None, None]  # the rest of the cache: NaN
    k_cache, v_cache = (upload(np.where(is_cached, x, np.float16("nan")), stream=stream) for x in (k, v))
    tokens_q, tokens_k, tokens_v, lengths = (upload(x, stream=stream) for x in (q, k, v, USED))  # of all steps
    q_now, used_now, out_now, out_all = (device.allocate(x.nbytes, stream=stream) for x in (q[0], USED[0], q[0], q))

    params = FlashAttentionParams(
        q=q_now.handle,
        k=k_cache.handle,
        v=v_cache.handle,
        out=out_now.handle,  # k, v [batch, max_len, ...]
        mode=AttentionMode.DECODE,
        batch_size=BATCH,
        seqlen_q=1,
        seqlen_k=MAX_LEN,
        seqused_k=used_now.handle,
        num_heads=HEADS,
        num_heads_k=HEADS_K,
        head_dim=HEAD_DIM,
        dtype=DataType.FP16,
    )
    warmup(params, stream).check()  # a capture can neither load a kernel nor allocate memory
    builder = stream.create_graph_builder().begin_building()
    forward(params, builder).check()
    graph = builder.end_building().complete()

    for step in range(STEPS):
        for row in (np.arange(BATCH) * MAX_LEN + USED[step] - 1).tolist():  # where the new tokens belong
            copy_item(k_cache, row, tokens_k, row, k[0, 0].nbytes, stream)
            copy_item(v_cache, row, tokens_v, row, v[0, 0].nbytes, stream)
        copy_item(q_now, 0, tokens_q, step, q[0].nbytes, stream)
        copy_item(used_now, 0, lengths, step, USED[0].nbytes, stream)
        graph.launch(stream)
        copy_item(out_all, step, out_now, 0, q[0].nbytes, stream)

    timed = EventOptions(timing_enabled=True)
    start = stream.record(options=timed)
    for _ in range(STEPS):
        graph.launch(stream)
    stop = stream.record(options=timed)
    stop.sync()
    print(f"{device.name}: {1000 * (stop - start) / STEPS:.1f} us per replay over {USED[-1].tolist()} tokens")
    return download(out_all, q.shape, np.float16, stream=stream)


def main() -> int:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((STEPS, BATCH, 1, HEADS, HEAD_DIM), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, BATCH, MAX_LEN, HEADS_K, HEAD_DIM), np.float32).astype(np.float16)
    exact = np.stack([attention_reference(q[i], k, v, seqused_k=USED[i])[0] for i in range(STEPS)])  # float64
    rounded = np.stack([low_precision_twin(q[i], k, v, "fp16", seqused_k=USED[i])[0] for i in range(STEPS)])
    problem = hopper_device_problem()
    if problem:
        from fa3_cute.runtime.compiler import compile_report
        from fa3_cute.planning.tables import decode_config

        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        report = compile_report(decode_config("fp16", HEAD_DIM, is_local=False))
        print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")
    out = rounded if problem else on_gpu(q, k, v)
    allowed = 2 * np.abs(rounded - exact).max(axis=(2, 3, 4)) + 1e-5  # [step, batch]; the error FP16 explains, twice
    error = np.abs(out - exact).max(axis=(2, 3, 4))
    print(f"{STEPS} steps: largest error against float64 {error.max():.1e}, {(error / allowed).max():.0%} of allowed")
    return 0 if (error <= allowed).all() else 1


if __name__ == "__main__":
    raise SystemExit(main())
