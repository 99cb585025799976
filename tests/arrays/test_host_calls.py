"""attention() of NumPy arrays refuses what a call on the device refuses."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from fa3_cute import FlashAttentionError, attention

X = np.random.default_rng(0).standard_normal((1, 3, 1, 64)).astype(np.float32)


@pytest.mark.parametrize("strides", [(0, 0, 0, 4), (768, 128, 256, 4), (768, 256, 256, 2), (768, 256, 256, -2)])
def test_out_whose_elements_overlap(strides):
    memory = np.zeros(4096, np.float32)
    out = as_strided(memory[1024:], X.shape, strides)
    with pytest.raises(FlashAttentionError, match=r"keep its elements apart.*-7"):
        attention(X, X, X, out=out)
    assert not memory.any()


@pytest.mark.parametrize("strides", [(768, 256, 256, 4), (768, 256, 256, -4), (4, 1024, 8, 12), (0, 512, 0, 8)])
def test_out_of_any_other_strides(strides):
    memory = np.zeros(4096, np.float32)
    out = as_strided(memory[1024:], X.shape, strides)
    assert attention(X, X, X, out=out) is out
    np.testing.assert_array_equal(out, attention(X, X, X))


def test_dense_k_and_v_without_keys():
    with pytest.raises(FlashAttentionError, match=r"k.shape.*-7"):
        attention(X, X[:, :0], X[:, :0])


def test_no_sequence():
    offsets = np.zeros(1, np.int32)
    with pytest.raises(FlashAttentionError, match=r"cu_seqlens_q.shape.*-7"):
        attention(X[0], X[0], X[0], cu_seqlens_q=offsets, cu_seqlens_k=offsets)
