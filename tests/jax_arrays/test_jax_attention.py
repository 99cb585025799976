"""attention() under jit, grad and vmap, through XLA's calls and on the CPU."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import BF16, FP8, FP16, STREAM, einsum_attention, error, packed, qkv, rand, visible, weighted

import fa3_cute
from fa3_cute.jax import attention

TOLERANCE = 2**-7  # of results in 16 bit


def fresh():
    """attention, compiled: no other test's, whose device may be another one."""
    return jax.jit(lambda *arrays, **options: attention(*arrays, **options))


MASKS = {
    "full": ({}, {}),
    "causal": ({"causal": True}, {"right": 0}),
    "window": ({"window_size": [9, 3]}, {"left": 9, "right": 3}),
    "softcap": ({"causal": True, "softcap": 1.5, "softmax_scale": 0.125}, {"right": 0}),
}


@pytest.fixture(params=["device", "cpu"])
def where(request):
    """The device that is host memory, None on the CPU."""
    return request.getfixturevalue("fake_device") if request.param == "device" else None


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", MASKS)
def test_forward(where, name, dtype):
    options, bounds = MASKS[name]
    arrays = qkv(dtype=dtype)
    out, lse = jax.jit(lambda q, k, v: attention(q, k, v, **options, return_lse=True))(*arrays)
    exact, exact_lse = einsum_attention(*arrays, visible(24, 40, **bounds), options.get("softcap", 0.0))
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert error(out, exact) < TOLERANCE and error(lse, exact_lse) < 1e-5
    assert error(attention(*arrays, **options), exact) < TOLERANCE  # one result; not traced
    if where:
        assert where.streams == [STREAM] * 2
        assert [bool(call.softmax_lse) for call in where.calls] == [True, False]


def test_no_lse_is_asked_for_in_vain(fake_device):
    """And what differentiates has one."""
    arrays = qkv()
    jax.block_until_ready(jax.grad(lambda q: attention(q, *arrays[1:]).astype(jnp.float32).sum())(arrays[0]))
    forward, backward = fake_device.calls
    assert forward.softmax_lse and backward.softmax_lse and not backward.dlse


@pytest.mark.parametrize("name", MASKS)
def test_gradients(where, name):
    options, bounds = MASKS[name]
    arrays = qkv(dim=128)
    weights = rand(2, 24, 4, 128, dtype=jnp.float32, seed=7), rand(2, 4, 24, dtype=jnp.float32, seed=8)
    options = {name: value for name, value in options.items() if name != "softmax_scale"}
    ours = weighted(lambda q, k, v: attention(q, k, v, **options, return_lse=True), *weights)
    mask = visible(24, 40, **bounds)
    theirs = weighted(lambda q, k, v: einsum_attention(q, k, v, mask, options.get("softcap", 0.0)), *weights)
    found = jax.jit(jax.grad(ours, (0, 1, 2)))(*arrays)
    expected = jax.grad(theirs, (0, 1, 2))(*[x.astype(jnp.float32) for x in arrays])
    for mine, exact in zip(found, expected, strict=True):
        assert mine.dtype == BF16 and error(mine, exact) < 2 * TOLERANCE


@pytest.mark.parametrize("dtype", [BF16, jnp.float32], ids=["bf16", "fp32"])
def test_gradient_of_sinks(where, dtype):
    arrays = *qkv(), rand(4, dtype=dtype, seed=3)
    weights = rand(2, 24, 4, 64, dtype=jnp.float32, seed=7), rand(2, 4, 24, dtype=jnp.float32, seed=8)
    ours = weighted(lambda q, k, v, s: attention(q, k, v, s_aux=s, causal=True, return_lse=True), *weights)
    mask = visible(24, 40, right=0)
    theirs = weighted(lambda q, k, v, s: einsum_attention(q, k, v, mask, s_aux=s), *weights)
    found = jax.grad(ours, (0, 3))(*arrays)
    expected = jax.grad(theirs, (0, 3))(*[x.astype(jnp.float32) for x in arrays])
    for mine, exact, of in zip(found, expected, (arrays[0], arrays[3]), strict=True):
        assert mine.dtype == of.dtype and error(mine, exact) < 2 * TOLERANCE


def test_packed_sequences(where):
    """Rows of no sequence: zeros where that is asked for, and in gradients always."""
    q, k, v, lengths = packed()
    options = {"causal": True, "zero_padding": True}
    out = jax.jit(lambda q, k, v, lengths: attention(q, k, v, **lengths, **options))(q, k, v, lengths)
    weight = rand(53, 4, 64, dtype=jnp.float32, seed=7)

    def loss(q, k, v):
        return (attention(q, k, v, **lengths, causal=True).astype(jnp.float32)[:50] * weight[:50]).sum()

    gradients = jax.grad(loss, (0, 1, 2))(q, k, v)
    exact, exact_gradients = np.zeros(q.shape), [np.zeros(x.shape) for x in (q, k, v)]
    for (i, j), (m, n) in zip(((0, 17), (17, 50)), ((0, 30), (41, 90)), strict=True):
        part = [x.astype(jnp.float32)[None] for x in (q[i:j], k[m:n], v[m:n])]
        mask = visible(j - i, n - m, right=0)
        exact[i:j] = einsum_attention(*part, mask)[0][0]
        of_weight = weight[i:j]
        found = jax.grad(lambda *x, of=of_weight, mask=mask: (einsum_attention(*x, mask)[0] * of).sum(), (0, 1, 2))(
            *part
        )
        for whole, gradient, rows in zip(exact_gradients, found, ((i, j), (m, n), (m, n)), strict=True):
            whole[slice(*rows)] = gradient[0]
    assert error(out, exact) < TOLERANCE and not np.asarray(out, np.float32)[50:].any()
    for mine, expected in zip(gradients, exact_gradients, strict=True):
        assert error(mine, expected) < 2 * TOLERANCE
        assert not np.asarray(mine, np.float32)[expected.sum((1, 2)) == 0].any()


def test_lengths_may_be_traced(where):
    """One compiled function for all lengths; keys past them do not count, NaN there or not."""
    q, k, v = qkv()
    function = jax.jit(lambda used: attention(q, k, v.at[:, 30:].set(jnp.nan), seqused_k=used, softmax_scale=0.125))
    for used in ((7, 30), (30, 1)):
        found = function(jnp.asarray(used, jnp.int32))
        for b, n in enumerate(used):
            exact, _ = einsum_attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], True)
            assert error(found[b : b + 1], exact) < TOLERANCE
    assert function._cache_size() == 1


def test_pages(where):
    q, (k, v) = rand(2, 1, 4, 64), (rand(6, 16, 2, 64, seed=seed) for seed in (1, 2))
    table, used = jnp.asarray([[3, 1, -1], [5, 0, 2]], jnp.int32), jnp.asarray([20, 48], jnp.int32)
    found = fresh()(q, k, v, page_table=table, seqused_k=used)
    for b, n in enumerate((20, 48)):
        cache = [x[np.maximum(table[b], 0)].reshape(1, 48, 2, 64)[:, :n] for x in (k, v)]
        assert error(found[b : b + 1], einsum_attention(q[b : b + 1], *cache, True)[0]) < TOLERANCE


def test_fp8(where):
    arrays = [x.astype(FP8) for x in qkv(dtype=jnp.float32)]
    scales = [jnp.asarray(np.random.default_rng(n).uniform(0.5, 1.5, (2, 2)), jnp.float32) for n in range(3)]
    names = ("q_descale", "k_descale", "v_descale")
    scales[0] = jnp.repeat(scales[0], 2, axis=1)
    out = fresh()(*arrays, **dict(zip(names, scales, strict=True)))
    real = [x.astype(jnp.float32) * scale[:, None, :, None] for x, scale in zip(arrays, scales, strict=True)]
    assert out.dtype == BF16 and error(out, einsum_attention(*real, True)[0]) < 2**-4


def test_vmap(where):
    """Calls one after another, of any axes."""
    q, k, v = (jnp.stack([x, x[::-1]], axis=1) for x in qkv())
    found = jax.vmap(lambda q, k, v: attention(q, k, v, causal=True), in_axes=(1, None, 1))(q, k[:, 0], v)
    for i in range(2):
        exact, _ = einsum_attention(q[:, i], k[:, 0], v[:, i], visible(24, 40, right=0))
        assert error(found[i], exact) < TOLERANCE
    gradient = jax.vmap(jax.grad(lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum()), 1)(q, k, v)
    assert gradient.shape == (2, 2, 24, 4, 64)


def test_nothing_to_do(where):
    """No queries: results without elements, nothing runs; and gradients that are 0."""
    arrays = rand(2, 0, 4, 64), *qkv()[1:]
    out, lse = attention(*arrays, return_lse=True)
    assert out.shape == (2, 0, 4, 64) and lse.shape == (2, 4, 0)
    gradients = jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum(), (0, 1))(*arrays)
    assert [x.shape for x in gradients] == [x.shape for x in arrays[:2]] and not np.asarray(gradients[1]).any()
    assert where is None or where.calls == []


def test_workspace_is_xlas(fake_device):
    """Of split-KV, and of the backward pass: a result that nobody sees."""
    q, k, v = rand(1, 1, 2, 64), *qkv(batch=1, seqlen_k=4096)[1:]
    jax.block_until_ready(attention(q, k, v, num_splits=20))
    call = fake_device.calls[0]
    call.workspace, address = None, call.workspace
    assert address and call.workspace_bytes == fa3_cute.workspace_size(call) > 0
    jax.block_until_ready(jax.grad(lambda q: attention(q, *qkv()[1:]).astype(jnp.float32).sum())(qkv()[0]))
    backward = fake_device.calls[-1]
    assert isinstance(backward, fa3_cute.BackwardParams) and backward.workspace and backward.workspace_bytes > 0


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "float32": (fa3_cute.FlashAttentionError, "float16, bfloat16", {"dtype": jnp.float32}, {}),
    "causal window": (ValueError, "window_size", {}, {"causal": True, "window_size": (3, -1)}),
    "heads": (ValueError, "num_heads=4", {"heads_k": 3}, {}),
    "alibi": (NotImplementedError, "alibi_slopes", {}, {"alibi_slopes": jnp.ones(4)}),
    "mask": (NotImplementedError, "attn_mask", {}, {"attn_mask": jnp.ones((24, 40), bool)}),
    "out": (NotImplementedError, "out", {}, {"out": jnp.ones(4)}),
    "lengths": (ValueError, "seqused_k is float32: must be int32", {}, {"seqused_k": jnp.ones(2)}),
    "scale": (ValueError, "softmax_scale=-1", {}, {"softmax_scale": -1.0}),
    "return_lse": (ValueError, "return_lse=2", {}, {"return_lse": 2}),
    "unknown": (TypeError, "'dropout'", {}, {"dropout": 0.1}),
    "no array": (TypeError, "s_aux must be a JAX array, not list", {}, {"s_aux": [0.0] * 4}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_traced(name):
    """In attention()'s words, by jit as by a call."""
    error_type, words, shapes, options = REFUSED[name]
    arrays = qkv(**shapes)
    for function in (attention, jax.jit(lambda q, k, v, **_: attention(q, k, v, **options))):
        with pytest.raises(error_type, match=re.escape(words)):
            function(*arrays, **options) if function is attention else function(*arrays)


def test_choices_are_not_traced():
    with pytest.raises(fa3_cute.FlashAttentionError, match="softmax_scale: must be a number of Python"):
        jax.jit(lambda q, k, v, scale: attention(q, k, v, softmax_scale=scale))(*qkv(), 0.1)


NOT_DIFFERENTIATED = {
    "fp8": ([x.astype(FP8) for x in qkv(dtype=jnp.float32)], {}, "dtype"),
    "splits": (qkv(), {"num_splits": 4}, "num_splits"),
    "pages": (
        (rand(2, 8, 4, 64), *(rand(6, 16, 2, 64, seed=seed) for seed in (1, 2))),
        {"page_table": jnp.zeros((2, 3), jnp.int32), "seqused_k": jnp.ones(2, jnp.int32)},
        "page_table",
    ),
}


def test_gradients_have_the_columns_of_their_arrays():
    arrays = (*qkv(dim=192)[:2], qkv(dim=128)[2])
    found = jax.eval_shape(jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum(), (0, 1, 2)), *arrays)
    assert [x.shape for x in found] == [x.shape for x in arrays]


@pytest.mark.parametrize("name", NOT_DIFFERENTIATED)
def test_has_no_gradient(name):
    """Said when it is traced; without a gradient the call is good."""
    arrays, options, words = NOT_DIFFERENTIATED[name]
    assert jax.eval_shape(lambda *x: attention(*x, **options), *arrays).shape[:-1] == arrays[0].shape[:-1]
    with pytest.raises(fa3_cute.FlashAttentionError, match=words):
        jax.eval_shape(jax.grad(lambda *x: attention(*x, **options).astype(jnp.float32).sum()), *arrays)


def test_what_a_device_says_is_xlas_error(fake_device, monkeypatch):
    """Not lost, and not the end of the process."""

    def fail(params, stream):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fa3_cute.api, "forward", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="fa3_cute: RuntimeError: no such kernel"):
        jax.block_until_ready(fresh()(*qkv()))
    code = fa3_cute.Status.FEATURE_UNSUPPORTED
    monkeypatch.setattr(fa3_cute.api, "forward", lambda params, stream: code)
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNIMPLEMENTED: fa3_cute: UnsupportedFeatureError"):
        jax.block_until_ready(fresh()(*qkv()))


# ---- what is lowered -------------------------------------------------------------------------------------------------


def lowered(function, *arrays) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_lowered_where_there_is_no_gpu():
    """One call, with all that it needs: a program is the same in another process."""
    text = lowered(lambda q, k, v: attention(q, k, v, causal=True), *qkv())
    (program,) = re.findall(r'@fa3_cute\(.*?call = "(.*?)"}', text)
    function, values, fields = json.loads(program.replace("\\22", '"'))
    assert function == "forward" and values["is_causal"] is True and values["head_dim"] == 64
    assert sorted(fields) == ["k", "out", "q", "v"]
    gradient = lowered(jax.grad(lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum()), *qkv())
    assert len(re.findall("@fa3_cute", gradient)) == 2 and "xla_ffi_python" not in gradient


def test_gradients_of_unused_rows_are_made_before(fake_device):
    """Their zeros are operands that become results."""
    q, k, v, lengths = packed()
    text = lowered(jax.grad(lambda q: attention(q, k, v, **lengths).astype(jnp.float32).sum()), q)
    assert len(re.findall("output_operand_alias<", text)) == 3


def test_other_platforms_are_refused():
    with pytest.raises(NotImplementedError, match="rocm"):
        fresh().trace(*qkv()).lower(lowering_platforms=("rocm",))
