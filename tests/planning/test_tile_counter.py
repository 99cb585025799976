"""How many counters a caller has to give: the rule that FlashAttentionParams.tile_counter states."""

from itertools import product

import pytest

from fa3_cute import AttentionMode, DataType, FlashAttentionParams, workspace_size
from fa3_cute.planning.operations import operation_of
from fa3_cute.planning.problem import ProblemShape


SPLITS = (*range(18), *(number + step for number in (32, 64, 128) for step in (-1, 0, 1)), 255, 256)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [DataType.BF16, DataType.FP8_E4M3])
def test_an_eighth_of_the_workspace_holds_the_arrival_counts(head_dim, dtype):
    if dtype is DataType.FP8_E4M3 and head_dim > 128:
        pytest.skip("no such kernel")
    num_split = 0
    for batch, heads, queries, splits in product((1, 3, 64), ((16, 2), (64, 1), (8, 8)), (1, 2, 70), SPLITS):
        params = FlashAttentionParams(
            batch_size=batch,
            seqlen_q=queries,
            seqlen_k=8192,
            num_heads=heads[0],
            num_heads_k=heads[1],
            head_dim=head_dim,
            dtype=dtype,
            mode=AttentionMode.DECODE if queries == 1 else AttentionMode.PREFILL,
            num_splits=splits,
        )
        for launch in operation_of(ProblemShape.of(params)).launches:
            if launch.scratch == "splits":
                num_split += 1
                assert 4 * launch.plan.num_arrivals <= workspace_size(params) // 8
    assert num_split > 100
