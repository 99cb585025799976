"""flash-attn's functions of v with a head_dim of its own. No GPU."""

import pytest
import torch
from tensors import BF16, qkv, rand
from test_forward import ERROR_BF16, diagonals, exact
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


def test_gradients_are_refused():
    q, k, v = qkv(dim=128)
    with pytest.raises(FlashAttentionError, match=r"v.shape\[-1\]=64: must be 128, as q's"):
        flash_attn_func(q.requires_grad_(), k, v[..., :64])
