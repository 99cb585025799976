"""Autograd: gradients by `backward`, their params, and the calls that have none."""

import pytest
import torch
from tensors import BF16, ints, packed, qkv, rand, rotary
from test_forward import diagonals, exact

from fa3_cute.contract.backward_rules import REFUSED, SERVED_DTYPES
from fa3_cute.contract.status import UnsupportedFeatureError
from fa3_cute.torch import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, merge_attention, ops


def gradients(call, tensors, with_lse):
    """Of a call's out, and LSE, weighted by random numbers."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = call(*leaves)
    loss = (out * rand(*out.shape, dtype=out.dtype, seed=7)).sum()
    if with_lse:
        loss = loss + (lse * rand(*lse.shape, dtype=lse.dtype, seed=8)).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("where", ["device", "host", "compiled"])
@pytest.mark.parametrize("with_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("options, bounds", [({"causal": True}, {"right": 0}), ({"window_size": (30, 4)}, None)])
def test_dense(where, with_lse, options, bounds, request):
    if where == "device":
        request.getfixturevalue("fake_device")
    bounds = bounds or {"left": 30, "right": 4}

    def call(q, k, v):
        return flash_attn_func(q, k, v, **options, return_attn_probs=True)

    ours = torch.compile(call, fullgraph=True, backend="aot_eager") if where == "compiled" else call
    found = gradients(ours, qkv(dim=128), with_lse)
    wide = [x.double() for x in qkv(dim=128)]
    expected = gradients(lambda q, k, v: exact(q, k, v, diagonals(24, 40, **bounds)), wide, with_lse)
    for ours, theirs, of in zip(found, expected, "qkv", strict=True):
        assert ours.dtype == BF16 and ours.shape == theirs.shape
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < 2**-6, f"d{of}: {error}"


CHUNKS = torch.arange(40)[None] // 16 == (torch.arange(24)[:, None] + 16) // 16
SCORES = {
    "softcap": ({"softcap": 1.5}, None),
    "attention_chunk": ({"attention_chunk": 16}, None),
    "s_aux": ({}, BF16),
    "all": ({"softcap": 1.5, "attention_chunk": 16}, torch.float32),
}


@pytest.mark.parametrize("where", ["device", "host", "compiled"])
@pytest.mark.parametrize("name", SCORES)
def test_what_changes_scores(name, where, request):
    """Sinks have a gradient of their own type, of out and of the LSE; a plan is used again with others."""
    if where == "device":
        request.getfixturevalue("fake_device")
    options, sink_dtype = SCORES[name]
    mask = CHUNKS if "attention_chunk" in options else None

    def call(q, k, v, *sinks):
        s_aux = sinks[0] if sinks else None
        return flash_attn_func(q, k, v, **options, s_aux=s_aux, return_attn_probs=True)

    def wide_call(q, k, v, *sinks):
        return exact(q, k, v, mask, options.get("softcap", 0.0), *sinks)

    ours = torch.compile(call, fullgraph=True, backend="aot_eager") if where == "compiled" else call
    for seed in range(2):
        tensors = [*qkv(dim=96), *([] if sink_dtype is None else [rand(4, dtype=sink_dtype, seed=seed)])]
        found = gradients(ours, tensors, with_lse=True)
        expected = gradients(wide_call, [x.double() for x in tensors], with_lse=True)
        for mine, theirs, of in zip(found, expected, tensors, strict=True):
            assert mine.dtype == of.dtype and mine.shape == of.shape
            assert (mine.double() - theirs).abs().max() / theirs.abs().max() < 2**-6


@pytest.mark.parametrize("where", ["device", "host"])
def test_sinks_of_packed_sequences(where, request):
    """Alone, too: their gradient is the sum of those of the sequences."""
    if where == "device":
        request.getfixturevalue("fake_device")
    q, k, v, cu_q, cu_k = packed()
    s_aux, dout = rand(4, dtype=torch.float32).requires_grad_(), rand(*q.shape, seed=5)
    options = {"causal": True, "softcap": 2.0, "attention_chunk": 16, "s_aux": s_aux}
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 33, 49, **options)
    (found,) = torch.autograd.grad(out, s_aux, dout)
    bounds = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    expected = torch.zeros(4)
    for first, end, first_k, end_k in bounds:
        if first < end:
            keys = slice(first_k, end_k)
            one = flash_attn_func(q[None, first:end], k[None, keys], v[None, keys], **options)
            expected += torch.autograd.grad(one, s_aux, dout[None, first:end])[0]
    assert expected.all() and (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("where", ["device", "host"])
def test_sinks_of_no_rows_or_no_keys(where, request):
    if where == "device":
        request.getfixturevalue("fake_device")
    s_aux = rand(4, dtype=torch.float32).requires_grad_()
    for rows, keys, expected in ((5, 0, 5.0), (0, 7, 0.0), (0, 0, 0.0)):
        q, k, v = rand(rows, 4, 64), rand(keys, 2, 64), rand(keys, 2, 64)
        offsets = ints(0, rows), ints(0, keys)
        _, lse = flash_attn_varlen_func(q, k, v, *offsets, s_aux=s_aux, return_attn_probs=True)
        (found,) = torch.autograd.grad(lse.sum(), s_aux)
        assert torch.equal(found, torch.full((4,), expected))


def test_no_queries(fake_device):
    """Keys that nobody sees have gradients of 0."""
    q, k, v = (x.requires_grad_() for x in qkv())
    for dk in torch.autograd.grad(flash_attn_func(q[:, :0], k, v).sum(), (k, v)):
        assert dk.shape == k.shape and not dk.any()


def test_deterministic_and_strides_reach_the_params(fake_device):
    """Gradients of any strides, expanded and transposed ones, come as TMA can read them."""
    q, k, v = (x.requires_grad_() for x in qkv())
    out = flash_attn_func(q, k, v, deterministic=True)
    transposed = rand(2, 4, 24, 64).transpose(1, 2)
    (dq,) = torch.autograd.grad(out, q, transposed, retain_graph=True)
    assert fake_device.calls[-1].deterministic and fake_device.calls[-1].dout_row_stride == 64
    (again,) = torch.autograd.grad(out, q, transposed.contiguous(), retain_graph=True)
    assert torch.equal(dq, again)
    (summed,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (ones,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert torch.equal(summed, ones) and summed.any()
    assert not flash_attn_func(q, k, v).isnan().any() and not fake_device.calls[-1].is_causal


@pytest.mark.parametrize("where", ["device", "host"])
def test_packed(where, request):
    """Rows that no sequence uses have gradients of 0, though their memory held anything."""
    if where == "device":
        request.getfixturevalue("fake_device")
    q, k, v, cu_q, cu_k = packed()
    cu_q, cu_k = ints(0, 17, 17, 44), ints(0, 30, 41, 80)
    used = {"seqused_q": ints(9, 0, 27), "seqused_k": ints(30, 11, 28)}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = flash_attn_varlen_func(*leaves, cu_q, cu_k, 33, 49, causal=True, return_attn_probs=True, **used)
    sequences = [(slice(0, 9), slice(0, 30)), (slice(17, 44), slice(41, 69))]
    dout = torch.zeros(out.shape, dtype=BF16)
    for rows, _ in sequences:
        dout[rows] = rand(*out[rows].shape, seed=5)
    found = torch.autograd.grad(out, leaves, dout)
    expected = [torch.zeros(x.shape, dtype=torch.float64) for x in leaves]
    for rows, keys in sequences:
        wide = [
            x.detach()[part][None].double().requires_grad_() for x, part in zip(leaves, (rows, keys, keys), strict=True)
        ]
        mask = diagonals(rows.stop - rows.start, keys.stop - keys.start, right=0)
        pieces = torch.autograd.grad(exact(*wide, mask)[0][0], wide, dout[rows].double())
        for whole, piece, part in zip(expected, pieces, (rows, keys, keys), strict=True):
            whole[part] = piece[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() / theirs.abs().max() < 2**-6
        assert not ours[(theirs == 0).all(-1).all(-1)].any()


def test_a_plan_of_backward_is_used_again(fake_device):
    """With other addresses; dlse is part of what a call is."""
    for with_lse in (False, True, False):
        for _ in range(2):
            gradients(lambda q, k, v: flash_attn_func(q, k, v, return_attn_probs=True), qkv(), with_lse)
            params = fake_device.calls[-1]
            assert params.workspace and bool(params.dlse) == with_lse
    from fa3_cute.torch import device

    assert len(device._thread.backward_plans) == 2


@pytest.mark.parametrize("where", ["device", "host"])
def test_saved_tensors_are_seen_by_hooks(where, request):
    """All that backward reads, whether the LSE is wanted or not; what hooks give back is what it reads."""
    if where == "device":
        request.getfixturevalue("fake_device")
    q, k, v = (x.requires_grad_() for x in qkv())
    expected = torch.autograd.grad(flash_attn_func(q, k, v), q, rand(*q.shape, seed=5))
    saved = []

    def pack(x):
        saved.append(x.clone())
        return len(saved) - 1

    for wants_lse in (False, True):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: saved[place]):
            found = flash_attn_func(q, k, v, return_attn_probs=wants_lse)
        assert [x.shape for x in saved] == [q.shape, k.shape, v.shape, q.shape, (2, 4, 24)]
        out = found[0] if wants_lse else found
        (dq,) = torch.autograd.grad(out, q, rand(*q.shape, seed=5), retain_graph=True)
        assert torch.equal(dq, expected[0])
        saved[1].zero_()
        (dq,) = torch.autograd.grad(out, q, rand(*q.shape, seed=5))
        assert not dq.any()  # without keys


def test_a_saved_tensor_that_was_changed_is_an_error(fake_device):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = flash_attn_func(q * 1, k, v)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_gradient_is_recorded_where_none_is_asked_for(fake_device):
    q, k, v = (x.requires_grad_() for x in qkv())
    with torch.no_grad():
        assert not flash_attn_func(q, k, v).requires_grad
    assert not flash_attn_func(*(x.detach() for x in (q, k, v))).requires_grad
    out, lse = flash_attn_func(q.detach(), k, v.detach(), return_attn_probs=True)
    assert out.requires_grad and lse.requires_grad
    assert torch.autograd.grad(lse.sum(), k)[0].any()


def test_a_known_plan_of_backward_is_not_of_misaligned_tensors(fake_device):
    """Addresses are no part of what a call is, but TMA reads only some."""
    q, k, v = (x.requires_grad_() for x in qkv())
    dout, room = rand(*q.shape, seed=5), torch.empty(q.numel() + 1, dtype=BF16)
    misaligned = room[1:].view(q.shape).copy_(dout)
    found = []
    for gradient in (dout, misaligned, dout):
        found.append(torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), gradient))
        assert fake_device.calls[-1].dout % 16 == 0 and misaligned.data_ptr() % 16
    for others in found[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(others, found[0], strict=True))


# ---- what has no gradient --------------------------------------------------------------------------------------------

HAVE_NONE = {
    "kv_batch_idx": lambda q, k, v: flash_attn_with_kvcache(q, k, v, cache_batch_idx=ints(1, 0)),
    "leftpad_k": lambda q, k, v: flash_attn_with_kvcache(q, k, v, cache_leftpad=ints(1, 0)),
    "page_table": lambda q, k, v: flash_attn_with_kvcache(
        q, k.view(10, 8, 2, 64), v.view(10, 8, 2, 64), cache_seqlens=ints(9, 9), page_table=ints(1, 0)[:, None]
    ),
    "cu_seqlens_k": lambda q, k, v: flash_attn_with_kvcache(
        q[0], k, v, cache_seqlens=ints(40, 40), cu_seqlens_q=ints(0, 9, 24)
    ),
    "k: must be": lambda q, k, v: flash_attn_with_kvcache(
        q.detach(), k.detach(), v.detach(), k[:, :3], v[:, :3], cache_seqlens=ints(9, 9)
    ),
    "k: must be None": lambda q, k, v: flash_attn_with_kvcache(
        q.detach(),
        *(x.detach() for x in (k, v)),
        *(x[:, :3].detach() for x in (k, v)),
        cache_seqlens=ints(9, 9),
        s_aux=q[0, 0, :, 0].float(),
    ),
    "rotary_cos": lambda q, k, v: flash_attn_with_kvcache(q, k, v, **rotary()),
    "merge_attention": lambda q, k, v: merge_attention(q, torch.zeros(2, 4, 24), q.detach(), torch.zeros(2, 4, 24)),
}


@pytest.mark.parametrize("where", ["device", "host", "compiled"])
@pytest.mark.parametrize("name", HAVE_NONE)
def test_no_gradient_is_an_error_of_forward(name, where, request):
    """It names the argument; without a gradient the call is served."""
    call = HAVE_NONE[name]
    if where == "device":
        request.getfixturevalue("fake_device")
    tensors = [x.requires_grad_() for x in qkv()]
    run = torch.compile(call, fullgraph=True, backend="aot_eager") if where == "compiled" else call
    with pytest.raises(Exception, match=name) as raised:
        run(*tensors)
    assert isinstance(raised.value, UnsupportedFeatureError) or where == "compiled"
    with torch.no_grad():
        call(*tensors)


def test_what_has_no_gradient_is_what_backward_refuses():
    """A kernel that comes for one of these is noticed here."""
    assert REFUSED.keys() >= set(ops._NOT_DIFFERENTIATED)
    ours = {name for name in REFUSED if name in ops.ForwardCall._fields}
    assert ours - set(ops._NOT_DIFFERENTIATED) == {"num_splits", "pack_gqa", "sm_margin"}
    assert len(SERVED_DTYPES) == 2


def test_gradients_have_none(fake_device):
    q, k, v = (x.requires_grad_() for x in qkv())
    (dq,) = torch.autograd.grad((flash_attn_func(q, k, v) ** 2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
