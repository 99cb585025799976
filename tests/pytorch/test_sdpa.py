"""An implementation of torch's registry of flash attentions: what its operators compute, and how it comes and goes."""

import pytest
import torch
from tensors import BF16, packed, rand
from test_forward import diagonals, exact
from torch.nn import attention

from fa3_cute.contract.status import UnsupportedFeatureError
from fa3_cute.torch import flash_attn_varlen_func, register_sdpa, sdpa

ATEN = torch.ops.aten
needs_registry = pytest.mark.skipif(
    not hasattr(attention, "register_flash_attention_impl"), reason="this torch has no registry of flash attentions"
)


def has_kernel(name):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA")


@needs_registry
def test_activated_and_restored():
    """This torch is built without CUDA, so that its operators there are ours or none."""
    if torch.version.cuda:
        pytest.skip("this torch has operators of its own on CUDA")
    register_sdpa()
    assert "FA3_CUTE" in attention.list_flash_attention_impls() and not has_kernel("_flash_attention_forward")
    attention.activate_flash_attention_impl("FA3_CUTE")
    assert all(has_kernel(name) for name in sdpa._OPERATORS)
    attention.restore_flash_attention_impl()
    assert not any(has_kernel(name) for name in sdpa._OPERATORS)


def test_a_torch_without_the_registry_is_named(monkeypatch):
    monkeypatch.delattr(attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(UnsupportedFeatureError, match=f"torch {torch.__version__}".replace("+", r"\+")):
        register_sdpa()


@pytest.fixture
def on_cpu():
    """torch's operators on CPU tensors are ours, as they are on CUDA once activated."""
    registration = sdpa.Registration("CPU")
    yield
    registration.remove()


def heads_first(dim, layout, seqlen_q=24, seqlen_k=24):
    """q, k and v [batch, heads, seqlen, dim], as projections leave them in memory or contiguous."""
    tensors = rand(2, seqlen_q, 4, dim), *(rand(2, seqlen_k, 2, dim, seed=seed) for seed in (1, 2))
    tensors = [x.transpose(1, 2) for x in tensors]
    if layout == "columns":
        return [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    return [x.contiguous() for x in tensors] if layout == "contiguous" else tensors


def rows_first(*tensors):
    return [x.detach().transpose(1, 2).double().requires_grad_() for x in tensors]


CASES = [(64, "projected", True), (128, "contiguous", False), (80, "projected", True), (64, "columns", False)]


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("dim, layout, is_causal", CASES)
def test_both_passes(dim, layout, is_causal, where, on_cpu, request):
    """Through torch's autograd; out and gradients have the strides that torch's meta functions say."""
    if where == "device":
        request.getfixturevalue("fake_device")
    leaves = [x.requires_grad_() for x in heads_first(dim, layout)]
    out, lse, *_ = ATEN._scaled_dot_product_flash_attention(*leaves, 0.0, is_causal)
    dout = rand(*out.shape, seed=5)
    found = torch.autograd.grad(out, leaves, dout)
    wide = rows_first(*leaves)
    expected, expected_lse = exact(*wide, diagonals(24, 24, right=0) if is_causal else None)
    gradients = torch.autograd.grad(expected, wide, dout.transpose(1, 2).double())
    assert (out.transpose(1, 2).double() - expected).abs().max() < 2**-6 and (lse - expected_lse).abs().max() < 1e-4
    assert [x.stride() for x in (out, *found)] == [torch.empty_like(x).stride() for x in (leaves[0], *leaves)]
    for ours, theirs in zip(found, gradients, strict=True):
        assert ours.dtype == BF16
        assert (ours.transpose(1, 2).double() - theirs).abs().max() < 2**-6 * theirs.abs().max()


@pytest.mark.parametrize("where", ["device", "host"])
def test_packed(where, on_cpu, request):
    """aten's own packed attention, with a window, into a given out, and its gradients."""
    if where == "device":
        request.getfixturevalue("fake_device")
    q, k, v, cu_q, cu_k = packed()
    arguments = (cu_q, cu_k, 33, 49, 0.0, True, False)
    options = {"window_size_left": 9, "window_size_right": 0}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse, *_ = ATEN._flash_attention_forward(*leaves, *arguments, **options)
    expected, expected_lse = flash_attn_varlen_func(
        *leaves, cu_q, cu_k, 33, 49, causal=True, window_size=(9, 0), return_attn_probs=True
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    dout = rand(*out.shape, seed=5)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        assert torch.equal(ours, theirs)
    given = torch.empty(50, 2, 4, 64, dtype=BF16)[:, 0]
    with torch.no_grad():
        again = ATEN._flash_attention_forward_no_dropout_inplace(given, q, k, v, *arguments, **options)
    assert torch.equal(given, expected) and torch.equal(again, lse)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("dropout_p=0.5", (24, 24, 0.5, False)),
        ("is_causal=True with 24 queries and 30 keys", (24, 30, 0.0, True)),
        ("return_debug_mask", (24, 24, 0.0, False, True)),
    ],
)
def test_refused(name, arguments, on_cpu):
    seqlen_q, seqlen_k, *options = arguments
    with pytest.raises(UnsupportedFeatureError, match=name):
        ATEN._scaled_dot_product_flash_attention(*heads_first(64, "", seqlen_q, seqlen_k), *options)
