"""flash-attn's functions of v with a head_dim of its own. No GPU."""

import pytest
import torch
from tensors import BF16, qkv, rand
from test_forward import ERROR_BF16, diagonals, exact
from test_gradients import gradients
from torch._subclasses.fake_tensor import FakeTensorMode

from fa3_cute.contract.status import FlashAttentionError
from fa3_cute.torch import flash_attn_func, flash_attn_varlen_func


def tensors(dims=(192, 128)):
    q, k, _ = qkv(dim=dims[0])
    return q, k, rand(2, 40, 2, dims[1], seed=2)


@pytest.mark.parametrize("dims", [(192, 128), (64, 256), (72, 40)], ids=str)
def test_out_has_the_columns_of_v(fake_device, dims):
    q, k, v = tensors(dims)
    for _ in range(2):  # a plan, and once more from it
        out = flash_attn_func(q, k, v, causal=True)
        expected, _ = exact(q, k, v, diagonals(24, 40, right=0))
        assert out.shape == (2, 24, 4, dims[1]) and (out.double() - expected).abs().max() <= ERROR_BF16
    assert [(p.head_dim, p.head_dim_v) for p in fake_device.calls] == [dims] * 2


def test_on_the_cpu():
    q, k, v = tensors()
    expected, _ = exact(q, k, v)
    assert (flash_attn_func(q, k, v).double() - expected).abs().max() <= ERROR_BF16
    empty = flash_attn_func(q[:, :0], k, v)
    assert empty.shape == (2, 0, 4, 128)


def test_fake_tensors():
    with FakeTensorMode():
        q, k, v = (torch.empty(30, heads, dim, dtype=BF16) for heads, dim in ((4, 192), (2, 192), (2, 128)))
        offsets = torch.empty(3, dtype=torch.int32)
        assert flash_attn_varlen_func(q, k, v, offsets, offsets, 30, 30).shape == (30, 4, 128)


@pytest.mark.parametrize("where", ["device", "host", "compiled"])
@pytest.mark.parametrize("dims", [(192, 128), (64, 256), (72, 40)], ids=str)
def test_gradients_have_the_columns_of_their_tensors(where, dims, request):
    if where == "device":
        fake_device = request.getfixturevalue("fake_device")

    def call(q, k, v):
        return flash_attn_func(q, k, v, causal=True, return_attn_probs=True)

    ours = torch.compile(call, fullgraph=True, backend="aot_eager") if where == "compiled" else call
    found = gradients(ours, tensors(dims), with_lse=True)
    wide = [x.double() for x in tensors(dims)]
    expected = gradients(lambda q, k, v: exact(q, k, v, diagonals(24, 40, right=0)), wide, with_lse=True)
    for mine, theirs, of in zip(found, expected, "qkv", strict=True):
        assert mine.dtype == BF16 and mine.shape == theirs.shape
        assert (mine.double() - theirs).abs().max() / theirs.abs().max() < 2**-6, f"d{of}"
    if where == "device":
        assert (fake_device.calls[-1].head_dim, fake_device.calls[-1].head_dim_v) == dims


def test_a_head_dim_without_kernels_is_an_error_of_forward(fake_device):
    q, k, v = (x[..., :44].requires_grad_() for x in tensors((64, 64)))
    with pytest.raises(FlashAttentionError, match="head_dim=44: must be a multiple of 8") as raised:
        flash_attn_func(q, k, v)
    assert raised.value.code == -2
