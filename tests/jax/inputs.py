"""Random arrays, and attention of einsum in float32, which JAX differentiates. Imported by the tests beside it."""

import jax
import jax.numpy as jnp
import numpy as np

BF16, FP16, FP8 = jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn


def rand(*shape, dtype=BF16, seed=0):
    """The same numbers on every device."""
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape, np.float32)).astype(dtype)


def qkv(batch=2, seqlen_q=24, seqlen_k=40, heads=4, heads_k=2, dim=64, dtype=BF16):
    shape_k = batch, seqlen_k, heads_k, dim
    return (
        rand(batch, seqlen_q, heads, dim, dtype=dtype),
        rand(*shape_k, dtype=dtype, seed=1),
        rand(*shape_k, dtype=dtype, seed=2),
    )


def packed(dim=64):
    """(q, k, v, lengths) of three sequences, one without queries; the last rows are of none."""
    cu_q, cu_k = (jnp.asarray(x, jnp.int32) for x in ((0, 17, 17, 50), (0, 30, 41, 90)))
    k, v = (rand(94, 2, dim, seed=seed) for seed in (1, 2))
    return rand(53, 4, dim), k, v, {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}


def visible(seqlen_q, seqlen_k, left=None, right=None):
    """[seqlen_q, seqlen_k]: keys around the bottom-right diagonal."""
    distance = np.arange(seqlen_k)[None] - np.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    left, right = (seqlen_k + seqlen_q if x is None else x for x in (left, right))
    return (distance >= -left) & (distance <= right)


def einsum_attention(q, k, v, mask, softcap=0.0, s_aux=None):
    """(out, LSE) in float32, of q, k and v of any type."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(mask, scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        if s_aux is not None:
            lse = jnp.logaddexp(lse, s_aux.astype(jnp.float32)[:, None])
        return jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(scores - lse[..., None]), v), lse


def error(found, exact):
    """The largest difference, as a part of the largest number."""
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    assert found.shape == exact.shape
    return np.abs(found - exact).max() / np.abs(exact).max()


def weighted(attend, out_weight, lse_weight):
    """A loss of q, k, v (and sinks): of attend's out and LSE, weighted."""

    def loss(*arrays):
        out, lse = attend(*arrays)
        return (out.astype(jnp.float32) * out_weight).sum() + (lse * lse_weight).sum()

    return loss
