"""workspace_size answers for calls that forward takes, and raises for those that it refuses."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_calls import DECODE, DENSE, DENSE_FP8, PACKED, VALUES, A

from fa3_cute import FlashAttentionError, FlashAttentionParams, Status, explain, workspace_size
from fa3_cute.contract.params import TENSORS

ONE_TOKEN = replace(DENSE, seqlen_q=1, mode=DECODE, num_splits=32)


@pytest.mark.parametrize(
    "base, changes, status",
    [
        (PACKED, {"num_splits": 257}, -13),
        (ONE_TOKEN, {"leftpad_k": A, "attn_mask": A}, -16),
        (ONE_TOKEN, {"num_splits": 257}, -13),
        (ONE_TOKEN, {"seqused_k": A + 1}, -9),
        (ONE_TOKEN, {"softmax_scale": -1.0}, -9),
        (ONE_TOKEN, {"seqlen_q": 2}, -8),
        (ONE_TOKEN, {"seqlen_k": 0}, -7),
        (ONE_TOKEN, {"is_causal": True, "seqlen_k": 2**30}, -7),
    ],
)
def test_what_forward_refuses_has_no_size(base, changes, status):
    params = replace(base, **changes)
    with pytest.raises(FlashAttentionError) as caught:
        workspace_size(params)
    assert caught.value.code == status == explain(params)[0].status


@pytest.mark.parametrize("given_workspace", [{}, {"workspace": A}, {"workspace": A + 1, "workspace_bytes": -1}])
@pytest.mark.parametrize("missing", [(), ("q",), TENSORS])
def test_tensors_and_the_workspace_itself_may_be_missing_or_wrong(missing, given_workspace):
    """It is asked before there are any."""
    needed = workspace_size(ONE_TOKEN)
    assert needed > 0
    assert workspace_size(replace(ONE_TOKEN, **dict.fromkeys(missing), **given_workspace)) == needed


FIELDS = sorted(set(FlashAttentionParams.__dataclass_fields__) - {"workspace", "workspace_bytes", *TENSORS})


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([DENSE, PACKED, ONE_TOKEN, DENSE_FP8]),
    st.dictionaries(st.sampled_from(FIELDS), st.integers(0, len(VALUES) - 1), max_size=2),
)
def test_it_raises_what_forward_says(base, changes):
    params = replace(base, **{name: VALUES[number] for name, number in changes.items()})
    problems = explain(params)
    if not problems:
        assert workspace_size(params) >= 0
        return
    with pytest.raises(FlashAttentionError) as caught:
        workspace_size(params)
    assert (caught.value.code, caught.value.detail) == problems[0] and problems[0].status is not Status.NULL_POINTER
