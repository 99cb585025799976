"""Good calls of `backward`, and what they are changed with: what the tests of its rules share."""

from rule_calls import BF16, FP32, VARLEN

from fa3_cute.contract import backward_rules
from fa3_cute.contract.backward_params import BackwardParams

A, APART = 0x7F00_0000_0000, 1 << 30
TENSORS = ("q", "k", "v", "out", "softmax_lse", "dout", "dq", "dk", "dv", "dlse")
POINTERS = {name: A + number * APART for number, name in enumerate(TENSORS) if name != "dlse"}
LENGTHS = A + 16 * APART
HEADS = {"num_heads": 16, "num_heads_k": 4, "head_dim": 128}
DENSE = BackwardParams(**POINTERS, **HEADS, batch_size=2, seqlen_q=512, seqlen_k=640)
PACKED = BackwardParams(
    **POINTERS,
    **HEADS,
    batch_size=3,
    mode=VARLEN,
    cu_seqlens_q=LENGTHS,
    cu_seqlens_k=LENGTHS,
    total_q=896,
    total_k=700,
)
# What scores are changed with, and the gradients of these; refused until it has kernels, when all else is good.
SINKS = {"s_aux": A + 17 * APART, "d_s_aux": A + 18 * APART}
BIAS = {"attn_mask": A + 20 * APART, "d_bias": A + 22 * APART, "attn_mask_dtype": BF16}
SCORES = SINKS | BIAS
WITHOUT_KERNEL = ("accumulate_dkv",)


def serve_all(monkeypatch) -> None:
    """As if these had kernels: all that is left to say of them is what the rules say."""
    for name in WITHOUT_KERNEL:
        monkeypatch.delitem(backward_rules.REFUSED, name, raising=False)
    monkeypatch.setattr(backward_rules, "SERVED_GRAD_DTYPES", (FP32,))
