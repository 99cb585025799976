"""attention() of v with a head_dim of its own: as params of `forward`, and what is refused before. No GPU."""

# ruff: noqa: F811
import pytest
from test_dlpack import OFFSETS, DLArray, gpu  # noqa: F401

from fa3_cute import FlashAttentionError, attention

Q, K, V = DLArray(2, 5, 4, 192), DLArray(2, 9, 2, 192), DLArray(2, 9, 2, 128)


def test_out_has_the_columns_of_v(gpu):
    out, lse = attention(Q, K, V, causal=True, return_lse=True)
    p, _ = gpu.launches[0]
    assert (p.head_dim, p.head_dim_v) == (192, 128)
    assert tuple(out.shape) == (2, 5, 4, 128) and tuple(lse.shape) == (2, 4, 5)
    assert (p.v_row_stride, p.v_head_stride, p.k_row_stride) == (2 * 128, 128, 2 * 192)


def test_equal_columns_are_head_dim(gpu):
    attention(Q, K, K)
    assert gpu.launches[0][0].head_dim_v == 0


def test_packed_out_may_be_given(gpu):
    q, k, v, out = (DLArray(7, 4, 72), DLArray(9, 2, 72), DLArray(9, 2, 40), DLArray(7, 4, 40))
    attention(q, k, v, out=out, **OFFSETS)
    p, _ = gpu.launches[0]
    assert (p.head_dim, p.head_dim_v, p.out) == (72, 40, out.address)


@pytest.mark.parametrize(
    "v, out, words",
    [
        (V, DLArray(2, 5, 4, 192), r"out.shape=\(2, 5, 4, 192\): must be \(2, 5, 4, 128\)"),
        (DLArray(2, 9, 2, 0), None, r"v.shape=\(2, 9, 2, 0\): must be \(2, 9, 2, 192\)"),
        (DLArray(2, 8, 2, 128), None, r"v.shape=\(2, 8, 2, 128\): must be \(2, 9, 2, 128\)"),
        (DLArray(2, 9, 2, 132), None, "head_dim_v=132: must be 0"),
    ],
    ids=["out", "no columns", "rows", "132"],
)
def test_refused(gpu, v, out, words):
    with pytest.raises(FlashAttentionError, match=words):
        attention(Q, K, v, out=out)
    assert gpu.launches == []
