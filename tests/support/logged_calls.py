"""Good calls of every kind, with addresses that stand for tensors, for what logs them and repeats them."""

from dataclasses import replace

from fa3_cute import AttentionMode, BackwardParams, DataType, FlashAttentionParams, MergeParams

FAR = 1 << 45  # bytes between tensors


def at(number: int, offset: int = 0) -> int:
    """The address of a tensor."""
    return number * FAR + offset


DENSE = FlashAttentionParams(
    q=at(1),
    k=at(2),
    v=at(3),
    out=at(4),
    batch_size=2,
    seqlen_q=70,
    seqlen_k=90,
    num_heads=4,
    num_heads_k=2,
    head_dim=64,
    dtype=DataType.BF16,
)
PACKED = replace(
    DENSE,
    mode=AttentionMode.VARLEN_PREFILL,
    batch_size=3,
    seqlen_q=0,
    seqlen_k=0,
    cu_seqlens_q=at(5, 4),
    cu_seqlens_k=at(5, 4),
    total_q=100,
    total_k=100,
    softmax_lse=at(6, 4),
)
PAGED = replace(
    PACKED,
    cu_seqlens_k=None,
    total_k=0,
    seqused_k=at(7, 8),
    page_table=at(8),
    page_table_batch_stride=7,
    page_size=16,
    num_pages=12,
    seqlen_k=64,
    max_seqlen_q=40,
)
APPEND = replace(
    PAGED,
    k_new=at(22),
    v_new=at(23),
    seqlen_knew=31,
    cu_seqlens_k_new=at(24, 4),
    v_new_row_stride=256,
    rotary_cos=at(25),
    rotary_sin=at(26),
    rotary_dim=32,
    rotary_row_stride=24,
    rotary_positions=60,
    rotary_dtype=DataType.FP32,
    seqlens_rotary=at(27, 4),
)
FP8 = replace(
    DENSE,
    dtype=DataType.FP8_E4M3,
    out_dtype=DataType.FP16,
    q_descale_ptr=at(9, 4),
    q_descale_batch_stride=9,
    q_descale_head_stride=2,
    k_descale_ptr=at(10),
    v_descale_ptr=at(10),
)
SCORES = replace(
    DENSE,
    q=at(1, 16),
    softcap=30.0,
    s_aux=at(11, 2),
    s_aux_dtype=DataType.BF16,
    alibi_slopes=at(12),
    alibi_batch_stride=4,
    attn_mask=at(13, 1),
    attn_mask_head_stride=0,
    attn_mask_batch_stride=6400,
    p_dropout=0.25,
    rng_state=at(14, 8),
    window_size_left=20,
)
DECODE = replace(
    DENSE, mode=AttentionMode.DECODE, seqlen_q=1, seqlen_k=4096, num_splits=24, workspace=at(15), tile_counter=at(16)
)
DECODE = replace(DECODE, workspace_bytes=1 << 20)
STRIDED = replace(DENSE, k_row_stride=128, k_head_stride=64, k_batch_stride=1 << 20, softmax_scale=0.5, is_causal=True)
MERGE = MergeParams(
    out_a=at(1), lse_a=at(2), out_b=at(3), lse_b=at(4, 4), out=at(1), seqlen_q=33, num_heads=3, head_dim=40
)
BACKWARD = BackwardParams(
    **{name: getattr(DENSE, name) for name in ("q", "k", "v", "out", "batch_size", "seqlen_q", "seqlen_k")},
    num_heads=4,
    num_heads_k=2,
    head_dim=64,
    dtype=DataType.BF16,
    softmax_lse=at(6),
    dout=at(17),
    dq=at(18),
    dk=at(19),
    dv=at(20),
    workspace=at(21),
    workspace_bytes=1 << 22,
    deterministic=True,
)
FORWARD = {
    "dense": DENSE,
    "packed": PACKED,
    "paged": PAGED,
    "append": APPEND,
    "fp8": FP8,
    "scores": SCORES,
    "decode": DECODE,
    "strided": STRIDED,
}
# By name: (the function's, the params).
CALLS = {name: ("forward", params) for name, params in FORWARD.items()}
CALLS |= {"merge": ("merge_attention", MERGE), "backward": ("backward", BACKWARD)}
