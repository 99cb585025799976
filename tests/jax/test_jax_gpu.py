"""attention() on a GPU: compiled by XLA, differentiated, in loops and under vmap, against einsum in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import BF16, FP8, FP16, einsum_attention, error, packed, qkv, rand, visible, weighted

from fa3_cute.jax import attention

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact():
    """einsum_attention on the CPU, where float32 is float32."""
    if jax.default_backend() != "gpu":
        pytest.skip("this jax has no CUDA, or there is no GPU")

    def on_cpu(function, *arrays):
        with jax.default_device(jax.devices("cpu")[0]):
            return function(*[jnp.asarray(np.asarray(x.astype(jnp.float32))) for x in arrays])

    return on_cpu


def causal(q, k, v):
    return einsum_attention(q, k, v, visible(q.shape[1], k.shape[1], right=0))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_jit(exact, dtype):
    """Not further from the truth than twice what einsum in 16 bit is: FlashAttention's own rule."""
    arrays = qkv(seqlen_q=200, seqlen_k=300, dim=128, dtype=dtype)
    out, lse = jax.jit(lambda *x: attention(*x, causal=True, return_lse=True))(*arrays)
    expected, expected_lse = exact(causal, *arrays)

    def in_16_bit(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.dtype.type(128**0.5)
        scores = jnp.where(visible(200, 300, right=0), scores, -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

    allowed = 2 * error(in_16_bit(*arrays), expected)
    assert out.dtype == dtype and error(out, expected) <= allowed and error(lse, expected_lse) < 1e-5


def test_gradients(exact):
    """dq, dk and dv, with a gradient of the LSE, as JAX has them of einsum."""
    arrays = qkv(seqlen_q=200, seqlen_k=300, dim=128)
    weights = rand(2, 200, 4, 128, dtype=jnp.float32, seed=7), rand(2, 4, 200, dtype=jnp.float32, seed=8)
    ours = weighted(lambda *x: attention(*x, causal=True, return_lse=True), *weights)
    found = jax.jit(jax.grad(ours, (0, 1, 2)))(*arrays)
    weights = [np.asarray(x) for x in weights]
    expected = exact(jax.grad(weighted(causal, *weights), (0, 1, 2)), *arrays)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == BF16 and error(mine, theirs) < 2**-6


def test_packed_sequences():
    """As on the CPU, gradients too: 0 in rows of no sequence."""
    q, k, v, lengths = packed(dim=128)

    def loss(q, k, v):
        return (attention(q, k, v, **lengths, causal=True).astype(jnp.float32)[:50] ** 2).sum()

    function = jax.value_and_grad(loss, (0, 1, 2))
    found = jax.tree.leaves(jax.jit(function)(q, k, v))
    with jax.default_device(jax.devices("cpu")[0]):
        q, k, v, lengths = packed(dim=128)
        expected = jax.tree.leaves(jax.jit(function)(q, k, v))
    for mine, theirs in zip(found, expected, strict=True):
        assert error(mine, theirs) < 2**-6
    assert not np.asarray(found[1], np.float32)[50:].any()


@pytest.mark.parametrize("num_splits", [1, 20])
def test_decode_with_lengths_that_change(exact, num_splits):
    """One program for all lengths; XLA gives split-KV its workspace."""
    q, k, v = qkv(seqlen_q=1, seqlen_k=4096)
    function = jax.jit(lambda used: attention(q, k, v, seqused_k=used, num_splits=num_splits))
    for used in ((4096, 17), (5, 2000), (4096, 4096)):
        found = function(jnp.asarray(used, jnp.int32))
        for b, n in enumerate(used):
            part = q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]
            theirs, _ = exact(lambda *x: einsum_attention(*x, True), *part)
            assert error(found[b : b + 1], theirs) < 2**-6
    assert function._cache_size() == 1


def test_fp8():
    arrays = [x.astype(FP8) for x in qkv(dtype=jnp.float32)]
    scale = jnp.asarray([[0.5, 1.5], [1.25, 0.75]], jnp.float32)
    found = jax.jit(lambda *x: attention(*x, k_descale=scale))(*arrays)
    with jax.default_device(jax.devices("cpu")[0]):
        real = [jnp.asarray(np.asarray(x.astype(jnp.float32))) for x in arrays]
        real[1] = real[1] * np.asarray(scale)[:, None, :, None]
        expected = einsum_attention(*real, True)[0]
    assert found.dtype == BF16 and error(found, expected) < 2**-4


def test_in_a_loop(exact):
    """A program that calls it again and again, each time of what the last call gave: in order, on XLA's stream."""
    q, k, v = qkv(seqlen_q=200, seqlen_k=300, dim=128)

    def layers(q):
        return jax.lax.fori_loop(0, 20, lambda _, x: attention(x, k, v, causal=True), q)

    found = jax.jit(layers)(q)
    one_by_one = q
    for _ in range(20):
        one_by_one = attention(one_by_one, k, v, causal=True)
    assert np.array_equal(np.asarray(found, np.float32), np.asarray(one_by_one, np.float32))
    assert error(found, exact(lambda q, k, v: causal(q, k, v)[0], q, k, v)) > 2**-4  # it has moved


def test_vmap():
    """The results of the calls one by one."""
    q, k, v = (jnp.stack([x, x[::-1]]) for x in qkv(seqlen_q=200, seqlen_k=300, dim=128))
    found = jax.jit(jax.vmap(lambda *x: attention(*x, causal=True)))(q, k, v)
    for i in range(2):
        assert np.array_equal(found[i], attention(q[i], k[i], v[i], causal=True))
