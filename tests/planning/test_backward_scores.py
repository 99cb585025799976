"""What `backward` plans for calls that change scores: configs, launches, addresses."""

import math
from dataclasses import replace
from itertools import chain

import pytest
from test_backward_launch import A, ADDRESSES, GOOD, PACKED, SCORES, SINKS, STEP, plan

from fa3_cute import DataType, Status
from fa3_cute.api import backward
from fa3_cute.planning import backward_launch as planning
from fa3_cute.planning.backward_kernels import MainConfig, SideConfig, SinksConfig
from fa3_cute.planning.score_features import FEATURES


@pytest.fixture
def counted(monkeypatch):
    """The calls that the rules looked at, from here on."""
    seen, original = [], planning.plain_backward
    monkeypatch.setattr(planning, "plain_backward", lambda params: seen.append(params) or original(params))
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {"s_aux": A - 40 * STEP, "d_s_aux": A - 41 * STEP},
        {"d_s_aux": SINKS["s_aux"] + 6 * 4},  # right behind it
        {"workspace": A - 2 * STEP},
    ],
    ids=str,
)
def test_good_addresses_of_scores_are_all_that_is_looked_at(counted, changes):
    good = replace(GOOD, **SINKS)
    known = plan(good)
    counted.clear()
    assert plan(replace(good, **changes)) is known and not counted
    assert known is not plan(GOOD)
    expected = dict.fromkeys(planning.SCORES, 0) | SINKS | changes
    addresses = planning.checked(replace(good, **changes))[1]
    assert addresses[-len(planning.SCORES) :] == tuple(expected[name] for name in planning.SCORES)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_s_aux": SINKS["d_s_aux"] + 2},
        {"s_aux": 1 << 64},
        {"d_s_aux": SINKS["s_aux"] + 5 * 4},
        {"d_s_aux": ADDRESSES["q"] + 4},
        {"s_aux": ADDRESSES["dq"] + 4},
        {"s_aux": GOOD.workspace + 4},
        {"d_s_aux": GOOD.workspace + 4},
    ],
    ids=str,
)
def test_bad_addresses_of_scores_are_put_into_words(counted, changes):
    plan(replace(GOOD, **SINKS))
    counted.clear()
    assert backward(replace(GOOD, **SINKS | changes)) == Status.INVALID_ARGUMENT and len(counted) == 1


@pytest.mark.parametrize("call", [GOOD, PACKED], ids=["dense", "packed"])
def test_features_are_of_the_config(call):
    """One at a time of the kernel of all gradients; several, and those that it has not, of kernels of one each."""
    call = replace(call, head_dim=128)
    options = {"softcap": 3.0, "attention_chunk": 40, "alibi_slopes": SCORES["alibi_slopes"], "alibi_batch_stride": 9}
    for name, flag in (("softcap", "has_softcap"), ("attention_chunk", "has_chunks"), ("alibi_slopes", "has_alibi")):
        main = plan(replace(call, **{name: options[name]})).stages[1].config
        assert isinstance(main, MainConfig)
        assert [field for field in FEATURES if getattr(main, field)] == [flag]
    options |= {"p_dropout": 0.25, "rng_state": SCORES["rng_state"]}
    _, *others = plan(replace(call, **options)).stages
    assert [stage.outputs for stage in others] == [("dq",), ("dk",), ("dv",)]
    for stage in others:
        cfg = stage.config
        assert cfg.mask == "local" and cfg.has_softcap and cfg.has_alibi and cfg.has_chunks and cfg.has_dropout
        arguments = dict(zip([name for name, kind in cfg.arguments if kind == "int32"], stage.sizes, strict=True))
        assert arguments["attention_chunk"] == 40 and arguments["window_size_left"] == 39
        assert stage.scales == (1 / math.sqrt(128), 3.0, 0.25) and stage.strides[-4:] == (9, 0, 0, 0)


def test_masks_are_of_kernels_of_one_gradient():
    """d_bias is of one more, behind one that clears it: of a mask that is added."""
    added = {"attn_mask": SCORES["attn_mask"], "attn_mask_dtype": DataType.BF16, "attn_mask_head_stride": 0}
    for changes, mask, of_bias in (
        ({"attn_mask": SCORES["attn_mask"]}, "bool", []),
        (added | {"d_bias": SCORES["d_bias"]}, "bf16", ["d_bias", "d_bias"]),
    ):
        _, *stages = plan(replace(GOOD, **changes)).stages
        assert [*chain.from_iterable(stage.outputs for stage in stages)] == ["dq", "dk", "dv", *of_bias]
        assert all(stage.config.attn_mask == mask for stage in stages if isinstance(stage.config, SideConfig))
        *_, batch, head, row = stages[0].strides
        assert (batch, head, row) == (6 * 500 * 300, 0 if of_bias else 500 * 300, 300)
    assert plan(replace(GOOD, **added)).scores[planning.SCORES.index("d_bias")] == (4 * (6 * 500 + 500) * 300, 4)


def test_d_s_aux_is_a_launch_of_its_own():
    """Of as many blocks as the prepare kernel has; of none where there is no query."""
    for call, blocks in ((GOOD, 2 * 4), (PACKED, 700 // 128 + 2), (replace(PACKED, total_q=0), 0)):
        stage = plan(replace(call, **SINKS)).stages[-1]
        assert isinstance(stage.config, SinksConfig) and stage.outputs == ("d_s_aux",)
        assert stage.sizes == (6, blocks) and not stage.strides and not stage.scales
        assert not any(isinstance(stage.config, SinksConfig) for stage in plan(call).stages)
    sixteen_bits = replace(GOOD, **SINKS, s_aux_dtype=DataType.BF16)
    assert plan(sixteen_bits).stages[0].sizes[-1] == DataType.BF16
