"""A decode loop over pages: 8 requests take turns in 4 slots, sequences grow, end and are replaced, their pages are
given back and used again. One captured FP16 call is replayed meanwhile: the GPU reads lengths and pages each time.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward, warmup
from fa3_cute.arrays.memory import download, fill, hopper_device_problem, open_device, upload, window
from fa3_cute.contract.reference import attention_reference, low_precision_twin

STEPS, SLOTS, PAGE, NUM_PAGES, MAX_PAGES, HEADS, HEADS_K, HEAD_DIM = 64, 4, 16, 48, 24, 16, 2, 128
REQUESTS = ((5, 20), (100, 12), (300, 40), (33, 48), (1, 30), (64, 25), (200, 20), (17, 9))  # prompt, tokens to decode
MAX_LEN = MAX_PAGES * PAGE


def schedule():
    """Yields for every step: the request in each slot, page table, used lengths, and the new tokens, each as (request,
    token, row of the pools where its K and V belong)."""
    free, waiting = list(range(NUM_PAGES)), list(range(len(REQUESTS)))
    slots, pages, used = [-1] * SLOTS, [[] for _ in range(SLOTS)], [0] * SLOTS
    for _ in range(STEPS):
        new_tokens = []
        for slot in range(SLOTS):
            if slots[slot] >= 0 and used[slot] == sum(REQUESTS[slots[slot]]):  # it has ended
                free += pages[slot]
                slots[slot], pages[slot], used[slot] = -1, [], 0
            if slots[slot] < 0 and waiting:
                slots[slot] = waiting.pop(0)
            if (request := slots[slot]) < 0:
                continue  # an empty slot has no keys, and its out is 0
            first, used[slot] = used[slot], max(used[slot], REQUESTS[request][0]) + 1  # the prompt comes first
            missing = -(-used[slot] // PAGE) - len(pages[slot])
            pages[slot], free = pages[slot] + free[:missing], free[missing:]
            rows = [page * PAGE + row for page in pages[slot] for row in range(PAGE)]
            new_tokens += [(request, token, rows[token]) for token in range(first, used[slot])]
        table = [own + [-1] * (MAX_PAGES - len(own)) for own in pages]  # past the used pages nothing is read
        yield list(slots), np.array(table, np.int32), np.array(used, np.int32), new_tokens


def call(q, k, v, out, page_table, seqused_k):
    """The call of every step: q and out [slots, 1, heads, head_dim], k and v [num_pages, page, heads_k, head_dim]."""
    tensors = {"q": q, "k": k, "v": v, "out": out, "page_table": page_table, "seqused_k": seqused_k}
    sizes = {"batch_size": SLOTS, "seqlen_q": 1, "seqlen_k": MAX_LEN, "page_size": PAGE, "num_pages": NUM_PAGES}
    heads = {"num_heads": HEADS, "num_heads_k": HEADS_K, "head_dim": HEAD_DIM}
    return FlashAttentionParams(**tensors, **sizes, **heads, dtype=DataType.FP16, mode=AttentionMode.DECODE)


def on_gpu(q, k, v, steps):
    """out of every step."""
    device = open_device()
    stream, nbytes = device.create_stream(), k[0, 0].nbytes
    q_all, tokens_k, tokens_v = (upload(x, stream=stream) for x in (q, k, v))
    q_now, out, pool_k, pool_v, table, used = (
        device.allocate(size, stream=stream)
        for size in (*[q[0].nbytes] * 2, *[NUM_PAGES * PAGE * nbytes] * 2, 4 * SLOTS * MAX_PAGES, 4 * SLOTS)
    )
    for pool in (pool_k, pool_v):
        fill(pool, 0xFF, stream=stream)  # NaN: no row is read before it is written
    params = call(*(buffer.handle for buffer in (q_now, pool_k, pool_v, out, table, used)))
    warmup(params, stream).check()  # a capture can neither load a kernel nor allocate memory
    builder = stream.create_graph_builder().begin_building()
    forward(params, builder).check()
    graph, found = builder.end_building().complete(), []
    for step, (_, pages, lengths, new_tokens) in enumerate(steps):
        for request, token, row in new_tokens:  # an engine has a kernel for this
            for pool, tokens in ((pool_k, tokens_k), (pool_v, tokens_v)):
                source = window(tokens, (request * MAX_LEN + token) * nbytes, nbytes)
                window(pool, row * nbytes, nbytes).copy_from(source, stream=stream)
        upload(pages, table, stream=stream)
        upload(lengths, used, stream=stream)
        q_now.copy_from(window(q_all, step * q[0].nbytes, q[0].nbytes), stream=stream)
        graph.launch(stream)
        found.append(download(out, q[0].shape, np.float16, stream=stream))
    print(f"{device.name}: {len(REQUESTS)} requests, {len(found)} replays of one graph, {NUM_PAGES} pages of {PAGE}")
    return found


def main() -> int:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((STEPS, SLOTS, 1, HEADS, HEAD_DIM), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, len(REQUESTS), MAX_LEN, HEADS_K, HEAD_DIM), np.float32).astype(np.float16)
    steps, problem, worst = list(schedule()), hopper_device_problem(), 0.0
    pools = np.full((2, NUM_PAGES, PAGE, HEADS_K, HEAD_DIM), np.float16("nan"))
    if problem:
        from fa3_cute.runtime.compiler import compile_report
        from fa3_cute.planning.operations import operation_of
        from fa3_cute.planning.problem import ProblemShape

        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        report = compile_report(operation_of(ProblemShape.of(call(*[256] * 6))).launches[0].config)
        print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")
    found = [None] * STEPS if problem else on_gpu(q, k, v, steps)
    for step, (slots, table, used, new_tokens) in enumerate(steps):
        tokens = q[step], k[slots], v[slots]  # each request's own, in their order
        exact, _ = attention_reference(*tokens, seqused_k=used)
        rounded, _ = low_precision_twin(*tokens, "fp16", seqused_k=used)
        for request, token, row in new_tokens:
            pools[:, row // PAGE, row % PAGE] = k[request, token], v[request, token]
        if problem:
            found[step], _ = low_precision_twin(q[step], *pools, "fp16", page_table=table, seqused_k=used)
        error = np.abs(found[step] - exact).max() / (2 * np.abs(rounded - exact).max() + 1e-5)
        worst = np.maximum(worst, error)  # NaN stays
    print(f"{STEPS} steps: the largest error against float64 is {worst:.0%} of what FP16 may have")
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
