"""Calls that are right, with addresses that stand for tensors."""

from dataclasses import replace

from fa3_cute import AttentionMode, DataType, FlashAttentionParams

A = 0x7F00_0000_0000
GOOD = FlashAttentionParams(
    q=A, k=A, v=A, out=A, batch_size=2, seqlen_q=512, seqlen_k=512, num_heads=16, num_heads_k=4, head_dim=128
)
GOOD_FP8 = replace(
    GOOD,
    dtype=DataType.FP8_E4M3,
    q_descale_ptr=A,
    q_descale_batch_stride=16,
    q_descale_head_stride=1,
    v_descale_ptr=A + 4,
)
PACKED = replace(
    GOOD,
    mode=AttentionMode.VARLEN_PREFILL,
    cu_seqlens_q=A,
    cu_seqlens_k=A + 64,
    total_q=700,
    total_k=900,
    seqlen_q=0,
    seqlen_k=0,
)
