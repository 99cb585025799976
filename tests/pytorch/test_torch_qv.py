"""flash-attn's functions with a second part of q, and of MLA whose v is in k. No GPU."""

import pytest
import torch
from tensors import BF16, FP16, ints, kvcache_with_qv, qv_tensors, rand, varlen_with_qv, with_qv
from test_forward import ERROR_BF16, diagonals, exact
from torch._subclasses.fake_tensor import FakeTensorMode

from fa3_cute.contract.status import FlashAttentionError, Status
from fa3_cute.torch import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


def whole(q, k, v, qv):
    """q and k of one part: their scale is that of 576 columns too."""
    return torch.cat((q, qv), -1), torch.cat((k, v), -1), v


@pytest.mark.parametrize("where", ["device", "host", "compiled"])
def test_scores_are_of_both_parts(where, request):
    fake_device = request.getfixturevalue("fake_device") if where == "device" else None

    def call(q, k, v, qv):
        return flash_attn_func(q, k, v, qv=qv, causal=True, return_attn_probs=True)

    ours = torch.compile(call, fullgraph=True, backend="aot_eager") if where == "compiled" else call
    tensors = qv_tensors()
    expected, lse = exact(*whole(*tensors), diagonals(3, 40, right=0))
    for _ in range(2):  # a plan, and once more from it
        out, found = ours(*tensors)
        assert out.shape == (2, 3, 4, 512) and (out.double() - expected).abs().max() <= ERROR_BF16
        assert torch.allclose(found.double(), lse, rtol=0, atol=1e-4)
    if fake_device:
        assert [(p.head_dim, p.head_dim_v, p.q_v_row_stride) for p in fake_device.calls] == [(64, 512, 4 * 576)] * 2


@pytest.mark.parametrize("call", [with_qv, varlen_with_qv, kvcache_with_qv])
def test_on_a_device_as_on_the_cpu(call, request):
    on_the_cpu = call()
    fake_device = request.getfixturevalue("fake_device")
    for ours, expected in zip(call(), on_the_cpu, strict=True):
        assert torch.allclose(ours.float(), expected.float(), rtol=0, atol=ERROR_BF16)
    assert len(fake_device.calls) == 1 and fake_device.calls[0].q_v


def test_qv_of_any_strides(fake_device):
    q, k, v, qv = qv_tensors()
    expected = flash_attn_func(q, k, v, qv=qv.contiguous())
    turned = qv.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(flash_attn_func(q, k, v, qv=turned), expected)


def test_fake_tensors():
    with FakeTensorMode():
        q, qv = torch.empty(30, 16, 64, dtype=BF16), torch.empty(30, 16, 512, dtype=BF16)
        k, v = torch.empty(90, 1, 64, dtype=BF16), torch.empty(90, 1, 512, dtype=BF16)
        offsets = torch.empty(3, dtype=torch.int32)
        out, lse = flash_attn_varlen_func(q, k, v, offsets, offsets, 30, 30, qv=qv, return_attn_probs=True)
        assert out.shape == (30, 16, 512) and lse.shape == (16, 30)


q, k, v, qv = qv_tensors()
REFUSED = [
    (lambda: flash_attn_func(q, k, v, qv=qv[:, :2]), Status.INVALID_SHAPE, "q_v.shape=(2, 2, 4, 512)"),
    (lambda: flash_attn_func(q, k, v, qv=qv.to(FP16)), Status.INVALID_ARGUMENT, "q_v is float16: must be bfloat16"),
    (lambda: flash_attn_func(q, k, v), Status.UNSUPPORTED_HEAD_DIM, "head_dim_v=512"),
    (lambda: flash_attn_func(q, k, v, qv=qv, window_size=(9, 0)), Status.FEATURE_UNSUPPORTED, "window_size[0]=9"),
    (
        lambda: flash_attn_with_kvcache(q, k, v, qv=qv, cache_leftpad=ints(1, 1), cache_seqlens=ints(9, 9)),
        Status.FEATURE_UNSUPPORTED,
        "leftpad_k: must be None with q_v",
    ),
    *(
        (lambda more=more: flash_attn_func(q, k, v, qv=qv.clone().requires_grad_(), **more), -16, "qv: must be None")
        for more in ({}, {"causal": True})
    ),
    (lambda: flash_attn_func(q.clone().requires_grad_(), k, v, qv=qv), -16, "qv: must be None where a gradient"),
]


@pytest.mark.parametrize("call, status, words", REFUSED)
@pytest.mark.parametrize("where", ["host", "device"])
def test_refused(call, status, words, where, request):
    if where == "device":
        request.getfixturevalue("fake_device")
    with pytest.raises(FlashAttentionError) as raised:
        call()
    assert raised.value.code == status and words in raised.value.detail


def test_a_gradient_of_qv_is_refused_when_compiled():
    call = torch.compile(lambda qv: flash_attn_func(q, k, v, qv=qv), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="qv: must be None where a gradient is asked for"):
        call(qv.clone().requires_grad_())


def test_values_of_mla_lie_in_its_keys():
    """On the CPU too, where the reference could do with another tensor."""
    rows, latent = rand(2, 3, 4, 576), rand(2, 40, 1, 576, seed=1)
    expected, _ = exact(rows, latent, latent[..., :512])
    assert (flash_attn_func(rows, latent, latent[..., :512]).double() - expected).abs().max() <= ERROR_BF16
    with pytest.raises(FlashAttentionError, match=r"v: must be k\[..., :512\], the same memory, with head_dim=576"):
        flash_attn_func(rows, latent, latent[..., :512].clone(memory_format=torch.preserve_format))
