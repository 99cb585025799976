"""replay of calls whose v and out have a head_dim of their own: arrays of their size."""

from dataclasses import replace

import pytest
from logged_calls import DENSE, PACKED
from test_replay import arrays


@pytest.mark.parametrize("dims", [(192, 128), (64, 256)], ids=str)
@pytest.mark.parametrize("base", [DENSE, PACKED], ids=["dense", "packed"])
def test_arrays_have_their_columns(base, dims):
    call = replace(base, head_dim=dims[0], head_dim_v=dims[1])
    found = arrays("forward", call)
    rows_q, rows_k = (
        getattr(call, f"total_{side}") or call.batch_size * getattr(call, f"seqlen_{side}") for side in "qk"
    )
    assert [found[name].size for name in ("q", "k", "v", "out")] == [
        rows_q * call.num_heads * dims[0],
        rows_k * call.num_heads_k * dims[0],
        rows_k * call.num_heads_k * dims[1],
        rows_q * call.num_heads * dims[1],
    ]
