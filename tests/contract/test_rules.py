"""The table of the rules: its order, and that any value whatever is a problem and no exception."""

from dataclasses import fields, replace

from cache_calls import PACKED_CACHE, PACKED_PAGED, PAGED
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_calls import (
    A,
    DECODE,
    DENSE,
    DENSE_FP8,
    DESCALES,
    FP8,
    ONE_ROW,
    PACKED,
    PACKED_FP8,
    PER_HEAD,
    first_problem,
    Recorded,
    VALUES,
)

from fa3_cute.contract import rules
from fa3_cute.contract.params import FlashAttentionParams
from fa3_cute.contract.params import CHOICES
from fa3_cute.contract.plain import plain, read_shape
from fa3_cute.contract.status import Problem
from fa3_cute.planning import operations
from fa3_cute.planning.operations import checked
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.operations import problems


def test_first_problem_follows_the_table():
    """A call that breaks every rule is refused for each in turn, as one after the other is mended."""
    params = FlashAttentionParams(
        k=A,
        v=A,
        out=A + 1,
        head_dim=84,
        num_heads=6,
        num_heads_k=4,
        is_causal=True,
        window_size_left=1,
        mode=DECODE,
        cu_seqlens_q=A,
        softcap=-1,
        num_splits=300,
        page_table=A,
        rotary_dim=8,
        total_q=1,
        leftpad_k=A,
        attn_mask=A,
        dtype=FP8,
    )
    mending = [
        (-1, {"q": A}),
        (-2, {"head_dim": 200}),
        (-3, {"head_dim": 128}),
        (-4, {"num_heads": 8}),
        (-5, {"is_causal": False}),
        (-6, {"cu_seqlens_q": None, "total_q": 0}),
        (-7, {"batch_size": 1, "seqlen_q": 2, "seqlen_k": 1}),
        (-8, {"seqlen_q": 1}),
        (-9, {"out": A}),
        (-11, {"softcap": 0}),
        (-13, {"num_splits": 0}),
        (-14, {"page_table": None}),
        (-15, {"rotary_dim": 0}),
        (-16, {"leftpad_k": 0}),
    ]
    for status, change in mending:
        assert first_problem(params).status == status, (first_problem(params), change)
        params = replace(params, **change)
    assert first_problem(params) is None


def test_rules_are_in_the_order_of_the_table():
    statuses = [rule.status for rule in rules.RULES]
    assert statuses == sorted(statuses, reverse=True)


# By number: hypothesis wants to print what it draws.
CHANGES = st.dictionaries(
    st.sampled_from([field.name for field in fields(FlashAttentionParams)]), st.integers(0, len(VALUES) - 1), max_size=6
)
BASES = st.sampled_from(
    [
        DENSE,
        PACKED,
        ONE_ROW,
        replace(DENSE, seqused_k=A, window_size_left=8),
        replace(DENSE_FP8, **DESCALES, **PER_HEAD),
        PACKED_FP8,
        replace(ONE_ROW, dtype=FP8),
        PAGED,
        PACKED_PAGED,
        replace(PACKED_CACHE, num_splits=0, fixed_split_size=64),
    ]
)


@settings(max_examples=300, deadline=None)
@given(BASES, CHANGES)
def test_a_rule_of_choices_reads_choices_alone(base, changes):
    """So what it says of one call holds for all that make the same choices."""
    params = plain(replace(base, **{name: VALUES[number] for name, number in changes.items()}))
    for rule in rules.RULES:
        call = Recorded(params)
        if rule.concerns and not rule.concerns(call):
            assert call.read <= set(CHOICES), rule
            continue
        assert not rule.concerns or call.read <= set(CHOICES), rule
        rule.objections(call)
        assert not rule.of_choices or call.read <= set(CHOICES), rule


def test_known_choices_are_asked_less_and_say_the_same(monkeypatch):
    monkeypatch.setattr(operations, "_good_choices", {})
    for base in (DENSE, PACKED, DENSE_FP8, replace(DENSE, seqlen_q=1), PAGED, PACKED_PAGED, PACKED_CACHE):
        fresh = checked(base)
        assert checked(base, read_shape(base)) == checked(base, read_shape(base)) == fresh
        for change in ({"batch_size": 0}, {"q": 0}, {"seqused_k": A + 1}, {"softmax_scale": 0.0}):
            wrong = replace(base, **change)
            assert isinstance(checked(wrong), Problem) and checked(wrong, read_shape(wrong)) == checked(wrong)
        for change in ({"num_heads": 5}, {"is_causal": True, "window_size_left": 1}, {"page_size": 7}):
            wrong = replace(base, **change)
            assert isinstance(checked(wrong, read_shape(wrong)), Problem)
    assert len(operations._good_choices) == 3


def test_so_many_choices_are_remembered(monkeypatch):
    monkeypatch.setattr(operations, "_good_choices", {})
    monkeypatch.setattr(operations, "MAX_CHOICES", 4)
    for heads in range(1, 20):
        params = replace(DENSE, num_heads=4 * heads)
        shape = checked(params, read_shape(params))
        assert isinstance(shape, ProblemShape) and shape.num_heads == 4 * heads
        assert len(operations._good_choices) <= 4


def test_problem_prints_as_a_sentence():
    assert str(first_problem(replace(DENSE, head_dim=84))) == (
        "UNSUPPORTED_HEAD_DIM (-2): head_dim=84: must be a multiple of 8 from 8 to 256, 512, or 576 with head_dim_v=512"
    )


@settings(max_examples=800, deadline=None)
@given(BASES, CHANGES)
def test_any_value_is_a_problem_and_no_exception(base, changes):
    params = replace(base, **{name: VALUES[number] for name, number in changes.items()})
    found = problems(params)
    assert first_problem(params) == (found or [None])[0]
    assert [problem.status for problem in found] == sorted((problem.status for problem in found), reverse=True)
    assert all(problem.detail.isprintable() for problem in found)
