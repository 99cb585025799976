"""Masks as functions in Python: documents, and a prefix that all see; each a MaskMod with block lists, FP16.

The same functions run on the device, traced into the kernel, and in NumPy, where indices come as arrays that broadcast.
Without a Hopper GPU: compiles the kernel for sm_90a, shows what came out, computes the examples in NumPy.
"""

from collections import namedtuple

import numpy as np

from fa3_cute import BlockMask, DataType, FlashAttentionParams, MaskMod, block_lists, block_sizes, forward
from fa3_cute.api import kernel_config
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.block_mask import BlockLists
from fa3_cute.contract.reference import attention_reference, low_precision_twin

BATCH, HEADS, HEADS_K, HEAD_DIM = 2, 4, 2, 128
A = 1 << 20  # an address, where none is needed
BLOCKS = block_sizes("fp16", HEAD_DIM)


def same_document(batch, head, query, key, info, aux):
    """Tokens of one document see one another; numbers of documents by token."""
    return aux.load(0, batch, query + info.n_k - info.n_q) == aux.load(0, batch, key)


def prefix(batch, head, query, key, info, aux):
    """All see the first tokens, so many of each sequence; the rest is causal."""
    return (key < aux.load(0, batch)) | (key <= query + info.n_k - info.n_q)


# A MaskMod, the array that it reads, and a call's tokens.
Example = namedtuple("Example", "mod, array, seqlen, is_causal")


def examples(rng) -> dict[str, Example]:
    """By name."""
    documents = np.cumsum(rng.random((BATCH, 900)) < 0.01, axis=1, dtype=np.int32)
    by_token = MaskMod(same_document, pointers=[("int32", ("batch_size", "seqlen_k"))])
    by_sequence = MaskMod(prefix, pointers=[("int32", ("batch_size",))])
    lengths = np.array([100, 0], np.int32)
    return {"documents": Example(by_token, documents, 900, True), "prefix": Example(by_sequence, lengths, 700, False)}


def lists_of(example: Example):
    """Which blocks of keys each block of queries visits, as four arrays of int32; the same for all heads."""
    sizes = BATCH, 1, example.seqlen, example.seqlen
    return block_lists(example.mod, sizes, BLOCKS, causal=example.is_causal, arrays=(example.array,))


def params_of(example: Example, q=A, k=A, v=A, array=A, *lists, out=A) -> FlashAttentionParams:
    """The call; lists: addresses of the four arrays."""
    sizes = {"batch_size": BATCH, "seqlen_q": example.seqlen, "seqlen_k": example.seqlen}
    heads = {"num_heads": HEADS, "num_heads_k": HEADS_K, "head_dim": HEAD_DIM}
    lists_at = dict(zip(BlockLists._fields, lists or (A, A, A, A), strict=True))
    return FlashAttentionParams(
        q=q,
        k=k,
        v=v,
        out=out,
        **sizes,
        **heads,
        is_causal=example.is_causal,  # both masks hold
        dtype=DataType.FP16,
        mask_mod=example.mod,
        mod_pointers=(array,),
        block_mask=BlockMask(**lists_at, q_block=BLOCKS[0], kv_block=BLOCKS[1], batches=BATCH),
    )


def on_gpu(example: Example, q, k, v):
    """Returns out as a NumPy array, after one call."""
    device = open_device()
    stream = device.create_stream()
    inputs = [upload(array, stream=stream) for array in (q, k, v, example.array, *lists_of(example))]
    out_gpu = device.allocate(q.nbytes, stream=stream)
    forward(params_of(example, *(int(buffer.handle) for buffer in inputs), out=int(out_gpu.handle)), stream).check()
    return download(out_gpu, q.shape, np.float16, stream=stream)


def compiled(example: Example) -> str:
    """What ptxas made of the kernel that `on_gpu` would run."""
    from fa3_cute.runtime.compiler import compile_report

    report = compile_report(kernel_config(params_of(example)))
    return f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled"


def main() -> int:
    rng, problem, failed = np.random.default_rng(0), hopper_device_problem(), 0
    all_examples = examples(rng)
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling a kernel, computing the examples in NumPy.")
    print(compiled(all_examples["documents"]) if problem else f"{open_device().name}: masks as functions")
    for name, example in all_examples.items():
        q = rng.standard_normal((BATCH, example.seqlen, HEADS, HEAD_DIM), np.float32).astype(np.float16)
        k, v = rng.standard_normal((2, BATCH, example.seqlen, HEADS_K, HEAD_DIM), np.float32).astype(np.float16)
        options = {"causal": example.is_causal, "mask_mod": example.mod.on_host((example.array,))}
        exact, rounded = attention_reference(q, k, v, **options)[0], low_precision_twin(q, k, v, "fp16", **options)[0]
        allowed = 2 * np.abs(rounded - exact).max() + 1e-5  # twice the error that FP16 alone explains
        error = np.abs((rounded if problem else on_gpu(example, q, k, v)) - exact).max()
        lists = lists_of(example)
        print(f"{name}: {lists.partial_count.sum() + lists.full_count.sum()} of {lists.full_index.size} blocks visited")
        print(f"out {q.shape}: largest error against float64 {error:.1e}, allowed {allowed:.1e}")
        failed += error > allowed
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
