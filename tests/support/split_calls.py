"""Calls that the decode kernel serves, and what their plans must hold: shared by the tests of planning/splits.py."""

from dataclasses import replace

from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.contract.params import AttentionMode, FlashAttentionParams
from fa3_cute.contract.plain import plain
from fa3_cute.planning.config import SMEM_BYTES_PER_CTA
from fa3_cute.planning.operations import operation_of
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.splits import CLUSTER_SLOTS
from fa3_cute.planning.tables import decode_config

A = 0x7F00_0000_0000


def shape_of(params: FlashAttentionParams) -> ProblemShape:
    return ProblemShape.of(plain(params))


def launch_of(params: FlashAttentionParams):
    (launch,) = operation_of(shape_of(params)).launches
    return launch


def plan_of(params: FlashAttentionParams):
    return launch_of(params).plan


PREFILL, DECODE, VARLEN = AttentionMode
ONE_TOKEN = FlashAttentionParams(
    q=A,
    k=A,
    v=A,
    out=A,
    batch_size=4,
    seqlen_q=1,
    seqlen_k=8192,
    num_heads=16,
    num_heads_k=2,
    head_dim=128,
    mode=DECODE,
)
PROMPT = replace(ONE_TOKEN, seqlen_q=1000, mode=PREFILL)
UNBOUNDED = 2 * UNBOUNDED_WINDOW + 1  # the reach of a query that sees every key
CFG = decode_config("bf16", 128, False)
LOCAL = decode_config("bf16", 128, True)


def check_memory(cfg, found, batch_size, seqlen_q, num_heads):
    """Shared memory by the CTAs that run at once; scratch as kernels/split.SplitScratch lays it out."""
    rows = seqlen_q * found.packed_heads
    items = -(-rows // 64) * (num_heads // found.packed_heads) * batch_size
    num_ctas, clusters = items * found.num_splits, found.num_splits // found.cluster_size
    fits_one_per_sm = num_ctas <= CLUSTER_SLOTS[found.cluster_size][0]
    assert found.smem_bytes == (SMEM_BYTES_PER_CTA if fits_one_per_sm else cfg.smem_bytes)
    assert found.num_splits % found.cluster_size == 0 and num_ctas < 2**31
    outputs, lse = items * clusters * min(rows, 64) * cfg.head_dim, items * clusters * min(rows, 64)
    is_shared = clusters > 1
    assert found.partial_bytes == is_shared * 4 * (outputs + lse)
    assert found.num_arrivals == is_shared * items * found.cluster_size
    return items
