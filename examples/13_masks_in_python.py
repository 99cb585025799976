"""Masks as functions in Python: documents, a prefix that all see, a tree of drafted tokens; each a MaskMod, FP16.

The same functions run on the device, traced into the kernel, and in NumPy, where indices come as arrays that broadcast.
Documents and prefixes come with block lists: what a list leaves out is skipped.
Without a Hopper GPU: compiles one of the kernels for sm_90a, shows what came out, computes the examples in NumPy.
"""

from typing import NamedTuple

import numpy as np

from fa3_cute import BlockMask, DataType, FlashAttentionParams, MaskMod, block_lists, block_sizes, forward
from fa3_cute.api import kernel_config
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import attention_reference, low_precision_twin

BATCH, HEADS, HEADS_K, HEAD_DIM = 2, 4, 2, 128
A = 1 << 20  # an address, where none is needed


def same_document(batch, head, query, key, info, aux):
    """Tokens of one document see one another; numbers of documents by token."""
    return aux.load(0, batch, query + info.n_k - info.n_q) == aux.load(0, batch, key)


def prefix(batch, head, query, key, info, aux):
    """All see the first tokens, so many of each sequence; the rest is causal."""
    return (key < aux.load(0, batch)) | (key <= query + info.n_k - info.n_q)


def tree(batch, head, query, key, info, aux):
    """Speculative decoding: the queries are the nodes of a tree, whose keys come last; a node sees what its row has."""
    node = key - (info.n_k - info.n_q)
    return (node < 0) | (aux.load(0, batch, query, node) != 0)


class Example(NamedTuple):
    """A mod, the array that it reads, and a call's lengths."""

    mod: MaskMod
    array: np.ndarray
    seqlen_q: int
    seqlen_k: int
    is_causal: bool = False
    has_lists: bool = False  # of blocks of 128 queries x 128 keys: for a few queries there is nothing to skip


def examples(rng) -> dict[str, Example]:
    """By name. Extents of arrays are numbers, or sizes of the call by name."""
    documents = np.cumsum(rng.random((BATCH, 900)) < 0.01, axis=1, dtype=np.int32)
    parents = [-1, 0, 0, 1, 1, 2, 5]  # of 7 drafted tokens
    ancestors = np.eye(len(parents), dtype=np.uint8)
    for node, parent in enumerate(parents[1:], 1):
        ancestors[node] |= ancestors[parent]
    return {
        "documents": Example(
            MaskMod(same_document, pointers=[("int32", ("batch_size", "seqlen_k"))]),
            documents,
            900,
            900,
            is_causal=True,
            has_lists=True,
        ),
        "prefix": Example(
            MaskMod(prefix, pointers=[("int32", ("batch_size",))]),
            np.array([100, 0], np.int32),
            700,
            700,
            has_lists=True,
        ),
        "tree": Example(
            MaskMod(tree, pointers=[("uint8", ("batch_size", "seqlen_q", "seqlen_q"))]),
            np.stack([ancestors] * BATCH),
            len(parents),
            1000,
        ),
    }


def lists_of(example: Example):
    """Which blocks of keys each block of queries visits, as four arrays of int32."""
    sizes = (BATCH, 1, example.seqlen_q, example.seqlen_k)  # the same for all heads
    blocks = block_sizes("fp16", HEAD_DIM)
    return block_lists(example.mod, sizes, blocks, causal=example.is_causal, arrays=(example.array,))


def block_mask(*addresses) -> BlockMask:
    """Of the four arrays on the device."""
    names = ("partial_count", "partial_index", "full_count", "full_index")
    q_block, kv_block = block_sizes("fp16", HEAD_DIM)
    return BlockMask(**dict(zip(names, addresses, strict=True)), q_block=q_block, kv_block=kv_block, batches=BATCH)


def params_of(example: Example, q=A, k=A, v=A, out=A, array=A, lists=(A, A, A, A)) -> FlashAttentionParams:
    """The call."""
    return FlashAttentionParams(
        q=q,
        k=k,
        v=v,
        out=out,
        batch_size=BATCH,
        seqlen_q=example.seqlen_q,
        seqlen_k=example.seqlen_k,
        num_heads=HEADS,
        num_heads_k=HEADS_K,
        head_dim=HEAD_DIM,
        is_causal=example.is_causal,  # both masks hold
        dtype=DataType.FP16,
        mask_mod=example.mod,
        mod_pointers=(array,),
        block_mask=block_mask(*lists) if example.has_lists else None,
    )


def on_gpu(example: Example, q, k, v):
    """Returns out as a NumPy array, after one call."""
    device = open_device()
    stream = device.create_stream()
    buffers = [upload(array, stream=stream) for array in (q, k, v)]
    buffers += [device.allocate(q.nbytes, stream=stream), upload(example.array, stream=stream)]
    lists = [upload(array, stream=stream) for array in lists_of(example)] if example.has_lists else []
    addresses = [int(buffer.handle) for buffer in buffers]
    forward(params_of(example, *addresses, lists=[int(buffer.handle) for buffer in lists]), stream).check()
    return download(buffers[3], q.shape, np.float16, stream=stream)


def compile_only(example: Example):
    """What ptxas made of the kernel that `on_gpu` would run."""
    from fa3_cute.runtime.compiler import compile_report

    report = compile_report(kernel_config(params_of(example)))
    print(
        f"{report.name} for sm_90a: {report.registers} registers, {report.smem_bytes} bytes of shared memory, "
        f"{report.stack_bytes} bytes spilled, compiled in {report.seconds:.1f} s"
    )


def main() -> int:
    rng = np.random.default_rng(0)
    all_examples, problem = examples(rng), hopper_device_problem()
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling a kernel, computing the examples in NumPy.")
        compile_only(all_examples["documents"])
    else:
        print(f"{open_device().name}: masks as functions")
    failed = 0
    for name, example in all_examples.items():
        q = rng.standard_normal((BATCH, example.seqlen_q, HEADS, HEAD_DIM), np.float32).astype(np.float16)
        k, v = rng.standard_normal((2, BATCH, example.seqlen_k, HEADS_K, HEAD_DIM), np.float32).astype(np.float16)
        options = {"causal": example.is_causal, "mask_mod": example.mod.on_host((example.array,))}
        exact, _ = attention_reference(q, k, v, **options)  # float64
        rounded, _ = low_precision_twin(q, k, v, "fp16", **options)  # the error that FP16 alone explains
        allowed = 2 * np.abs(rounded - exact).max() + 1e-5
        error = np.abs((rounded if problem else on_gpu(example, q, k, v)) - exact).max()
        visited = ""
        if example.has_lists:
            lists = lists_of(example)
            visited = f", {lists.partial_count.sum() + lists.full_count.sum()} of {lists.full_index.size} blocks"
        print(f"{name} {q.shape}{visited}: largest error against float64 {error:.1e}, allowed {allowed:.1e}")
        failed += error > allowed
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
