"""Packed calls without a key on the GPU: k and v have no address, rows of out are 0 and of the LSE -inf."""

import numpy as np
import pytest

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward
from fa3_cute.arrays import memory as cuda

pytestmark = pytest.mark.gpu

TOTAL_Q, HEADS, HEAD_DIM = 200, 4, 128


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_without_keys_are_written(is_causal, stream):
    rng = np.random.default_rng(0)
    q = cuda.upload(rng.standard_normal((TOTAL_Q, HEADS, HEAD_DIM), np.float32).astype(np.float16))
    out, lse = cuda.allocate(2 * TOTAL_Q * HEADS * HEAD_DIM), cuda.allocate(4 * TOTAL_Q * HEADS)
    offsets = [cuda.upload(np.array(values, np.int32)) for values in ([0, 70, TOTAL_Q], [0, 0, 0])]
    for buffer in (out, lse):
        cuda.fill(buffer, 0xFF)
    params = FlashAttentionParams(
        q=cuda.address(q),
        out=cuda.address(out),
        softmax_lse=cuda.address(lse),
        batch_size=2,
        total_q=TOTAL_Q,
        num_heads=HEADS,
        num_heads_k=2,
        head_dim=HEAD_DIM,
        dtype=DataType.FP16,
        mode=AttentionMode.VARLEN_PREFILL,
        cu_seqlens_q=cuda.address(offsets[0]),
        cu_seqlens_k=cuda.address(offsets[1]),
        is_causal=is_causal,
    )
    forward(params, stream).check()
    forward(params, stream).check()
    stream.sync()
    assert (cuda.download(out, (TOTAL_Q, HEADS, HEAD_DIM), np.float16) == 0).all()
    assert (cuda.download(lse, (HEADS, TOTAL_Q), np.float32) == -np.inf).all()
