"""Random tensors, and calls of each kind of flash-attn's functions. Imported by the tests beside it."""

import torch

from fa3_cute.torch import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def rand(*shape, dtype=BF16, device="cpu", seed=0):
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def ints(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def qkv(batch=2, seqlen_q=24, seqlen_k=40, heads=4, heads_k=2, dim=64, dtype=BF16, device="cpu"):
    shape_k = batch, seqlen_k, heads_k, dim
    return (
        rand(batch, seqlen_q, heads, dim, dtype=dtype, device=device),
        rand(*shape_k, dtype=dtype, device=device, seed=1),
        rand(*shape_k, dtype=dtype, device=device, seed=2),
    )


def packed(device="cpu", dtype=BF16, dim=64):
    """(q, k, v, cu_seqlens_q, cu_seqlens_k) of three sequences, one without queries."""
    cu_q, cu_k = ints(0, 17, 17, 50, device=device), ints(0, 30, 41, 90, device=device)
    q = rand(50, 4, dim, device=device, dtype=dtype)
    k, v = (rand(90, 2, dim, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    return q, k, v, cu_q, cu_k


def dense(device="cpu", **options):
    return flash_attn_func(*qkv(device=device), return_attn_probs=True, **options)


def dense_fp8(device="cpu"):
    tensors = [x.to(FP8) for x in qkv(device=device, dtype=torch.float32)]
    scales = [torch.rand(2, 2, generator=torch.Generator().manual_seed(n)).to(device) + 0.5 for n in range(3)]
    names = ("q_descale", "k_descale", "v_descale")
    return flash_attn_func(*tensors, **dict(zip(names, scales, strict=True)), return_attn_probs=True)


def dense_transposed(device="cpu"):
    """[batch, heads, seqlen, head_dim] in memory, as models have it."""
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(device=device)]
    return flash_attn_func(*tensors, causal=True, return_attn_probs=True)


def varlen(device="cpu", **options):
    return flash_attn_varlen_func(*packed(device), 33, 49, causal=True, return_attn_probs=True, **options)


def varlen_used(device="cpu"):
    used = {"seqused_q": ints(9, 0, 33, device=device), "seqused_k": ints(30, 5, 20, device=device)}
    out, lse = varlen(device, **used)
    rows = torch.cat([torch.arange(0, 9), torch.arange(17, 50)]).to(device)
    return out[rows], lse[:, rows]


def kvcache(device="cpu", **options):
    q, k, v = qkv(seqlen_q=1, seqlen_k=200, device=device)
    options = {"cache_seqlens": ints(150, 7, device=device)} | options
    return flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True, **options)


def kvcache_int(device="cpu"):
    return kvcache(device, cache_seqlens=77)


def kvcache_entries(device="cpu"):
    q, k, v = qkv(seqlen_q=3, seqlen_k=200, device=device)
    return flash_attn_with_kvcache(
        q,
        rand(5, 96, 2, 64, device=device),
        rand(5, 96, 2, 64, device=device, seed=3),
        cache_seqlens=ints(90, 20, device=device),
        cache_batch_idx=ints(4, 1, device=device),
        return_softmax_lse=True,
    )


def pages(device="cpu"):
    q = rand(19, 4, 64, device=device)
    pool_k, pool_v = (rand(20, 16, 2, 64, device=device, seed=seed) for seed in (1, 2))
    table = torch.tensor([[3, 9, 1, -1], [7, 0, 19, 2]], dtype=torch.int32, device=device)
    return flash_attn_with_kvcache(
        q,
        pool_k,
        pool_v,
        cache_seqlens=ints(40, 60, device=device),
        page_table=table,
        cu_seqlens_q=ints(0, 1, 19, device=device),
        max_seqlen_q=18,
        causal=True,
        return_softmax_lse=True,
    )


def qv_tensors(batch=2, seqlen_q=3, seqlen_k=40, heads=4, device="cpu"):
    """(q, k, v, qv) of MLA in two parts, by its own columns of the same rows."""
    q, latent = rand(batch, seqlen_q, heads, 576, device=device), rand(batch, seqlen_k, 1, 576, device=device, seed=1)
    return q[..., 512:], latent[..., 512:], latent[..., :512], q[..., :512]


def with_qv(device="cpu", **options):
    q, k, v, qv = qv_tensors(device=device)
    return flash_attn_func(q, k, v, qv=qv, causal=True, return_attn_probs=True, **options)


def varlen_with_qv(device="cpu"):
    q, k, v, qv = (x[0] for x in qv_tensors(1, 20, 60, device=device))
    offsets = ints(0, 3, 3, 20, device=device), ints(0, 17, 30, 60, device=device)
    return flash_attn_varlen_func(q, k, v, *offsets, 17, 30, qv=qv, causal=True, return_attn_probs=True)


def kvcache_with_qv(device="cpu", **options):
    q, k, v, qv = qv_tensors(seqlen_q=2, seqlen_k=48, device=device)
    pages = [x.reshape(6, 16, 1, x.shape[-1]) for x in (k, v)]
    table = torch.tensor([[3, 1, 5], [0, 4, 2]], dtype=torch.int32, device=device)
    options = {"cache_seqlens": ints(40, 7, device=device), "page_table": table} | options
    return flash_attn_with_kvcache(q, *pages, qv=qv, causal=True, return_softmax_lse=True, **options)


def rotary(device="cpu", dtype=torch.float32, rows=160):
    angles = torch.arange(rows)[:, None] * 0.5 ** torch.arange(16)
    return {name: f(angles).to(dtype).to(device) for name, f in (("rotary_cos", torch.cos), ("rotary_sin", torch.sin))}


def append(device="cpu", caches=None, call=flash_attn_with_kvcache, **options):
    """New rows of strides of a fused projection, behind a cache."""
    q, *_ = qkv(seqlen_q=3, device=device)
    new = rand(2, 3, 2, 2, 64, device=device, seed=4)
    k, v = caches or [rand(2, 150, 2, 64, device=device, seed=seed) for seed in (1, 2)]
    options = {"cache_seqlens": ints(140, 7, device=device), "causal": True} | options
    return call(q, k, v, new[..., 0, :], new[..., 1, :], return_softmax_lse=True, **options)


def append_packed(device="cpu"):
    """Packed queries and rows, into pages, rotated from positions that are not the lengths."""
    pool_k, pool_v = (rand(20, 16, 2, 64, device=device, seed=seed) for seed in (1, 2))
    return flash_attn_with_kvcache(
        rand(6, 4, 64, device=device),
        pool_k,
        pool_v,
        *(rand(6, 2, 64, device=device, seed=seed) for seed in (3, 4)),
        **rotary(device, BF16),
        cache_seqlens=ints(40, 15, device=device),
        page_table=torch.tensor([[3, 9, 1, 5], [7, 0, 19, 2]], dtype=torch.int32, device=device),
        cu_seqlens_q=ints(0, 1, 6, device=device),
        cu_seqlens_k_new=ints(0, 1, 6, device=device),
        max_seqlen_q=5,
        rotary_seqlens=ints(60, 3, device=device),
        causal=True,
        return_softmax_lse=True,
    )


CALLS = {
    "dense": dense,
    "causal": lambda device="cpu": dense(device, causal=True),
    "causal window": lambda device="cpu": dense(device, causal=True, window_size=(8, 5)),
    "window": lambda device="cpu": dense(device, window_size=(8, 5)),
    "softcap": lambda device="cpu": dense(device, softcap=5.0, softmax_scale=0.5),
    "sinks": lambda device="cpu": dense(device, s_aux=rand(4, device=device)),
    "chunk": lambda device="cpu": dense(device, causal=True, attention_chunk=16),
    "fp8": dense_fp8,
    "transposed": dense_transposed,
    "varlen": varlen,
    "varlen used": varlen_used,
    "kvcache": kvcache,
    "kvcache int": kvcache_int,
    "kvcache entries": kvcache_entries,
    "kvcache left padding": lambda device="cpu": kvcache(device, cache_leftpad=ints(70, 5, device=device)),
    "pages": pages,
    "append": append,
    "append int": lambda device="cpu": append(device, cache_seqlens=20),
    "append entries": lambda device="cpu": append(device, cache_batch_idx=ints(1, 0, device=device)),
    "append rotary": lambda device="cpu": append(device, **rotary(device)),
    "append halves": lambda device="cpu": append(device, **rotary(device), rotary_interleaved=False, causal=False),
    "append packed": append_packed,
    "rotary": lambda device="cpu": kvcache(device, **rotary(device, rows=200)),
    "qv": with_qv,
    "varlen qv": varlen_with_qv,
    "kvcache qv": kvcache_with_qv,
}
