"""torch's scaled_dot_product_attention on a GPU by this library's kernels, eager and compiled."""

import pytest
import torch
from tensors import rand
from torch.nn import attention
from torch.nn.functional import scaled_dot_product_attention

from fa3_cute import api
from fa3_cute.torch import register_sdpa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch has no CUDA, or there is no GPU"),
    pytest.mark.skipif(not hasattr(attention, "register_flash_attention_impl"), reason="this torch has no registry"),
]
TOLERANCE = 2**-6


@pytest.fixture
def active():
    register_sdpa()
    attention.activate_flash_attention_impl("FA3_CUTE")
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        yield
    attention.restore_flash_attention_impl()


def heads_first(dim):
    shape = 2, 72, 4, dim
    return [rand(*shape, device="cuda", seed=seed).transpose(1, 2).requires_grad_() for seed in range(3)]


def both_passes(attend, leaves):
    out = attend(*leaves)
    return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("dim", [64, 80])
def test_both_passes(active, mode, dim, monkeypatch):
    """Kernels are ours, results those of torch in float32; a compiled graph has no other strides than it was told."""
    ran = []
    for name in ("forward", "backward"):
        original = getattr(api, name)
        monkeypatch.setattr(api, name, lambda *a, name=name, original=original: ran.append(name) or original(*a))

    def attend(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    leaves = heads_first(dim)
    ours = torch.compile(attend, fullgraph=True) if mode == "compiled" else attend
    found = both_passes(ours, leaves)
    assert ran == ["forward", "backward"]
    wide = [x.detach().float().requires_grad_() for x in leaves]
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        expected = both_passes(attend, wide)
    for got, theirs in zip(found, expected, strict=True):
        assert (got.float() - theirs).abs().max() <= TOLERANCE * max(1.0, theirs.abs().max().item())
