"""A decode step in one captured call: it rotates q and the new keys, appends to a cache in pages, and attends.

Replayed 32 times; nothing but the new tokens and the lengths is copied in between. Without a Hopper GPU: compiles the
kernel that appends for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward, warmup
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload, window
from fa3_cute.contract.reference import attention_reference, low_precision_twin, update_cache

STEPS, BATCH, HEADS, HEADS_K, HEAD_DIM, ROTARY_DIM = 32, 4, 16, 2, 128, 64
PAGE_SIZE, MAX_PAGES = 64, 16
CAPACITY = PAGE_SIZE * MAX_PAGES
LENGTHS = np.array((0, 100, 700, CAPACITY - STEPS), np.int32)  # in the cache before the first step


def tables():
    """Cosines and sines [positions, ROTARY_DIM / 2] in FP32."""
    angles = np.outer(np.arange(CAPACITY), 10000.0 ** (-np.arange(ROTARY_DIM // 2) * 2 / ROTARY_DIM))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def on_gpu(q, k_new, v_new, cache, table, lengths):
    """Returns out of every step."""
    device = open_device()
    stream = device.create_stream()
    steps = {"q": q, "k_new": k_new, "v_new": v_new, "seqused_k": lengths}
    all_steps = {name: upload(array, stream=stream) for name, array in steps.items()}
    now = {name: device.allocate(array[0].nbytes, stream=stream) for name, array in steps.items()}
    fixed = dict(zip(("k", "v", "page_table", "rotary_cos", "rotary_sin"), (*cache, table, *tables()), strict=True))
    fixed = {name: upload(array, stream=stream) for name, array in fixed.items()}
    out = device.allocate(q[0].nbytes, stream=stream)
    params = FlashAttentionParams(
        **{name: buffer.handle for name, buffer in (now | fixed).items()},
        out=out.handle,
        mode=AttentionMode.DECODE,
        batch_size=BATCH,
        seqlen_q=1,
        seqlen_k=CAPACITY,
        page_size=PAGE_SIZE,
        num_pages=len(cache[0]),
        seqlen_knew=1,
        rotary_dim=ROTARY_DIM,
        rotary_dtype=DataType.FP32,
        num_heads=HEADS,
        num_heads_k=HEADS_K,
        head_dim=HEAD_DIM,
        is_causal=True,
        dtype=DataType.FP16,
    )
    warmup(params, stream).check()  # a capture can neither load a kernel nor allocate memory
    builder = stream.create_graph_builder().begin_building()
    forward(params, builder).check()
    graph = builder.end_building().complete()
    found = []
    for step in range(STEPS):
        for name, buffer in now.items():
            nbytes = steps[name][0].nbytes
            buffer.copy_from(window(all_steps[name], step * nbytes, nbytes), stream=stream)
        graph.launch(stream)
        found.append(download(out, q[0].shape, np.float16, stream=stream))
    print(f"{device.name}: {STEPS} replays, the caches hold {(lengths[-1] + 1).tolist()} tokens")
    return np.stack(found)


def main() -> int:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((*shape, HEAD_DIM), np.float32).astype(np.float16)  # noqa: E731
    q, k_new, v_new = normal(STEPS, BATCH, 1, HEADS), normal(STEPS, BATCH, 1, HEADS_K), normal(STEPS, BATCH, 1, HEADS_K)
    table = rng.permutation(BATCH * MAX_PAGES).reshape(BATCH, MAX_PAGES).astype(np.int32)
    cache = normal(BATCH * MAX_PAGES, PAGE_SIZE, HEADS_K), normal(BATCH * MAX_PAGES, PAGE_SIZE, HEADS_K)
    lengths = LENGTHS + np.arange(STEPS, dtype=np.int32)[:, None]  # [step, batch], before the step
    k, v = (x.copy() for x in cache)
    exact, rounded = [], []
    for step in range(STEPS):
        cos, sin = tables()
        options = {"page_table": table, "causal": True}
        new = {"k_new": k_new[step], "v_new": v_new[step], "rotary_cos": cos, "rotary_sin": sin}
        turned, used = update_cache(q[step], k, v, seqused_k=lengths[step], **new, **options)
        exact.append(attention_reference(turned, k, v, seqused_k=used, **options)[0])
        rounded.append(low_precision_twin(turned, k, v, "fp16", seqused_k=used, **options)[0])
    exact, rounded = np.stack(exact), np.stack(rounded)
    problem = hopper_device_problem()
    if problem:
        from fa3_cute.planning.append import append_config
        from fa3_cute.runtime.compiler import compile_report

        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        report = compile_report(append_config("fp16", "halves", "fp32"))
        print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")
    out = rounded if problem else on_gpu(q, k_new, v_new, cache, table, lengths)
    error, allowed = np.abs(out - exact).max(), 2 * np.abs(rounded - exact).max() + 1e-5
    print(f"{STEPS} steps: largest error against float64 {error:.1e}, {error / allowed:.0%} of allowed")
    return 0 if error <= allowed else 1


if __name__ == "__main__":
    raise SystemExit(main())
