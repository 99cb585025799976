"""Speculative decoding with a tree of drafted tokens: a MaskMod hides what is on other branches; FP16.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

import numpy as np

from fa3_cute import DataType, FlashAttentionParams, MaskMod, forward
from fa3_cute.api import kernel_config
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.reference import attention_reference, low_precision_twin

BATCH, SEQLEN_K, HEADS, HEADS_K, HEAD_DIM = 2, 1000, 4, 2, 128
PARENTS = (-1, 0, 0, 1, 1, 2, 5)  # of 7 drafted tokens: the root is the last token that is certain


def tree(batch, head, query, key, info, aux):
    """The queries are the nodes of a tree, whose keys come last; a node sees what its row has, and all keys before."""
    node = key - (info.n_k - info.n_q)
    return (node < 0) | (aux.load(0, batch, query, node) != 0)


TREE = MaskMod(tree, pointers=[("uint8", ("batch_size", "seqlen_q", "seqlen_q"))])


def ancestors() -> np.ndarray:
    """[batch, node, node]: 1 where the second one is the first or above it."""
    rows = np.eye(len(PARENTS), dtype=np.uint8)
    for node, parent in enumerate(PARENTS[1:], 1):
        rows[node] |= rows[parent]
    return np.stack([rows] * BATCH)


def params_of(q=1 << 20, k=1 << 20, v=1 << 20, out=1 << 20, array=1 << 20) -> FlashAttentionParams:
    """The call."""
    return FlashAttentionParams(
        q=q,
        k=k,
        v=v,
        out=out,
        batch_size=BATCH,
        seqlen_q=len(PARENTS),
        seqlen_k=SEQLEN_K,
        num_heads=HEADS,
        num_heads_k=HEADS_K,
        head_dim=HEAD_DIM,
        dtype=DataType.FP16,
        mask_mod=TREE,
        mod_pointers=(array,),
    )


def on_gpu(q, k, v, array):
    """Returns out as a NumPy array, after one call."""
    device = open_device()
    stream = device.create_stream()
    inputs = [upload(one, stream=stream) for one in (q, k, v)]
    array_gpu, out_gpu = upload(array, stream=stream), device.allocate(q.nbytes, stream=stream)
    addresses = [int(buffer.handle) for buffer in (*inputs, out_gpu, array_gpu)]
    forward(params_of(*addresses), stream).check()
    print(f"{device.name}: a tree of {len(PARENTS)} drafted tokens over {SEQLEN_K} keys")
    return download(out_gpu, q.shape, np.float16, stream=stream)


def compile_only():
    """What ptxas made of the kernel that `on_gpu` would run."""
    from fa3_cute.runtime.compiler import compile_report

    report = compile_report(kernel_config(params_of()))
    print(
        f"{report.name} for sm_90a: {report.registers} registers, {report.smem_bytes} bytes of shared memory, "
        f"{report.stack_bytes} bytes spilled, compiled in {report.seconds:.1f} s"
    )


def main() -> int:
    rng, array, problem = np.random.default_rng(0), ancestors(), hopper_device_problem()
    q = rng.standard_normal((BATCH, len(PARENTS), HEADS, HEAD_DIM), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, BATCH, SEQLEN_K, HEADS_K, HEAD_DIM), np.float32).astype(np.float16)
    exact, _ = attention_reference(q, k, v, mask_mod=TREE.on_host((array,)))  # float64
    rounded, _ = low_precision_twin(q, k, v, "fp16", mask_mod=TREE.on_host((array,)))  # what FP16 alone explains
    allowed = 2 * np.abs(rounded - exact).max() + 1e-5
    if problem:
        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        compile_only()
        out = rounded
    else:
        out = on_gpu(q, k, v, array)
    error = np.abs(out - exact).max()
    print(f"out {out.shape}: largest error against float64 {error:.1e}, allowed {allowed:.1e}")
    return int(error > allowed)


if __name__ == "__main__":
    raise SystemExit(main())
