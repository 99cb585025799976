"""Splits that are asked for, of sequences with more rows than are expected or than an M tile has."""

import pytest
from test_dealer import Batch, call, warp  # noqa: F401


@pytest.mark.usefixtures("warp")
@pytest.mark.parametrize(
    "changes, queries",
    [
        ({"batch_size": 2, "total_q": 2}, [2, 0]),
        ({"batch_size": 2, "total_q": 5, "max_seqlen_q": 1}, [4, 1]),
        ({"batch_size": 2, "total_q": 100, "pack_gqa": True}, [50, 50]),
    ],
)
def test_a_fixed_split_leaves_out_no_key(changes, queries):
    """Of more rows than are expected, and of several M tiles."""
    Batch(call(fixed_split_size=256, **changes), queries, [4096, 4096]).check()


@pytest.mark.usefixtures("warp")
def test_a_number_of_splits_holds_for_sequences_of_several_tiles():
    batch = Batch(call(batch_size=2, total_q=100, num_splits=11), [50, 50], [4096, 4096])
    assert {place.num_clusters for place in batch.places()} == {11}
