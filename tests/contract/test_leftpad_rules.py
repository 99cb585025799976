"""leftpad_k in calls: with what it is accepted, with what it is refused, and which kernels then serve."""

from dataclasses import replace

import pytest
from cache_calls import CACHES, PACKED_CACHE, PACKED_PAGED, PAGED
from rule_calls import DECODE, DENSE, DENSE_FP8, PACKED, A, first_problem

from fa3_cute import BlockMask
from fa3_cute.contract.block_mask import LISTS
from fa3_cute.contract.plain import plain
from fa3_cute.planning.operations import operation_of, problems
from fa3_cute.planning.problem import ProblemShape

PAD = {"leftpad_k": A + 8}
ONE_TOKEN = replace(DENSE, seqlen_q=1, mode=DECODE)
APPENDING = {"seqused_k": A, "k_new": A, "v_new": A, "seqlen_knew": 3}
ROTARY = {"rotary_cos": A, "rotary_sin": A, "rotary_dim": 64}
ACCEPTED = [
    *((base, {}) for base in (DENSE, DENSE_FP8, PACKED, ONE_TOKEN, *CACHES)),
    (DENSE, {"is_causal": True, "softcap": 30.0, "s_aux": A, "alibi_slopes": A}),
    (DENSE, {"window_size_left": 100, "attention_chunk": 64}),
    (ONE_TOKEN, APPENDING | ROTARY),
    (PACKED_PAGED, APPENDING),
    (PACKED_CACHE, {"num_splits": 4, "zero_padding": True, "kv_batch_idx": A, "batch_size_k": 9}),
    (DENSE, {"leftpad_k": None}),
]


@pytest.mark.parametrize("base, changes", ACCEPTED)
def test_accepted(base, changes):
    params = replace(base, **PAD | changes)
    assert problems(params) == [] and first_problem(params) is None


REFUSED = [
    (-9, {"leftpad_k": A + 2}, ("leftpad_k=", "aligned to 4 bytes")),
    (-9, {"leftpad_k": "3"}, ("leftpad_k='3'", "an int device address")),
    (-16, {"attn_mask": A}, (f"attn_mask={A}", "None or 0 with leftpad_k", "the first that exists")),
    (-16, {"p_dropout": 0.1, "rng_state": A}, ("p_dropout=0.1", "None or 0 with leftpad_k")),
]


@pytest.mark.parametrize("status, changes, words", REFUSED)
def test_refused(status, changes, words):
    params = replace(DENSE, **PAD | changes)
    (found,) = problems(params)
    assert found == first_problem(params) and found.status == status
    assert all(word in found.detail for word in words), found.detail


def test_mods_and_block_lists_are_refused():
    from fa3_cute.cli.features import mask_mod, score_mod

    for name, mod, more in (
        ("score_mod", score_mod(), {"mod_scalars": (1.0, 1.0)}),
        ("mask_mod", mask_mod(), {"mod_pointers": (A,)}),
    ):
        served = replace(DENSE, **{name: mod} | more)
        assert problems(served) == []
        (found,) = problems(replace(served, **PAD))
        assert found.status == -16 and found.detail.startswith(f"{name}=") and "None with leftpad_k" in found.detail
    lists = BlockMask(**dict.fromkeys(LISTS, A), q_block=128, kv_block=128)
    refused = problems(replace(DENSE, mask_mod=mask_mod(), mod_pointers=(A,), block_mask=lists, **PAD))
    assert any("leftpad_k" in found.detail and "block_mask" in found.detail for found in refused)


# ---- which kernels ---------------------------------------------------------------------------------------------------


def configs(params):
    return [launch.config for launch in operation_of(ProblemShape.of(plain(params))).launches]


@pytest.mark.parametrize("base", [DENSE, DENSE_FP8, PACKED, ONE_TOKEN, *CACHES])
def test_kernels_have_it(base):
    """The ones that serve the call without padding if it is ragged; without it nothing of them is left."""
    padded, others = configs(replace(base, **PAD)), configs(base)
    assert all(cfg.has_leftpad and cfg.is_ragged and cfg.entry.pointers for cfg in padded)
    assert not any(cfg.has_leftpad for cfg in others)
    assert [type(cfg) for cfg in padded] == [type(cfg) for cfg in others]
    assert {cfg.page_box for cfg in padded} == {int(bool(base.page_table))}


def test_small_windows_pack_no_heads():
    """A ragged batch has no kernels for that."""
    windowed = replace(DENSE, window_size_left=127, window_size_right=0, num_heads=16, num_heads_k=2)
    assert configs(windowed)[0].packs_heads and not configs(replace(windowed, **PAD))[0].packs_heads


def test_its_address_is_of_the_shape():
    """A call with other padding is another shape; a kernel that does not take it is told nothing of it."""
    first, second = (ProblemShape.of(plain(replace(PAGED, leftpad_k=address))) for address in (A, A + 4))
    assert first != second and first.length("leftpad_k") == A
    assert "leftpad_k" not in dict(configs(PAGED)[0].arguments)
