"""Block lists: what block_lists makes of a mask, what is refused, what reaches the kernel."""

from dataclasses import replace

import numpy as np
import pytest
from rule_calls import A, DENSE, DENSE_FP8, PACKED, first_problem

from fa3_cute import BlockMask, MaskMod, ScoreMod, block_lists, block_sizes
from fa3_cute.api import kernel_config
from fa3_cute.contract.arguments import BLOCK_ARGUMENTS
from fa3_cute.contract.block_mask import BLOCK_SIZES
from fa3_cute.contract.plain import plain
from fa3_cute.contract.status import Status
from fa3_cute.planning.operations import problems
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.tables import FORWARD, forward_row


def same_document(batch, head, query, key, info, aux):
    """Numbers of documents by key."""
    return aux.load(0, batch, query + info.n_k - info.n_q) == aux.load(0, batch, key)


def by_head(batch, head, query, key, info, aux):
    """Other keys for other heads."""
    return key >= 70 * head


DOCUMENTS = MaskMod(same_document, pointers=[("int32", ("batch_size", "seqlen_k"))])
BY_HEAD = MaskMod(by_head)


@pytest.mark.parametrize("causal, window", [(False, (-1, -1)), (True, (-1, -1)), (False, (50, 10)), (False, (-1, 0))])
@pytest.mark.parametrize("mod, batches, heads", [(DOCUMENTS, 3, 1), (BY_HEAD, 1, 4), (BY_HEAD, 2, 4)])
def test_lists_are_those_of_every_entry(mod, batches, heads, causal, window):
    """Against the mask entry by entry."""
    seqlen_q, seqlen_k, (q_block, kv_block) = 150, 203, (64, 32)
    documents = np.cumsum(np.random.default_rng(0).random((3, seqlen_k)) < 0.03, axis=1).astype(np.int32)
    lists = block_lists(
        mod,
        (batches, heads, seqlen_q, seqlen_k),
        (q_block, kv_block),
        causal=causal,
        window_size=window,
        arrays=(documents,) if mod is DOCUMENTS else (),
    )
    left, right = (-1, 0) if causal else window
    assert lists.partial_count.shape == (batches, heads, 3) and lists.full_index.shape == (batches, heads, 3, 7)
    assert {array.dtype for array in lists} == {np.dtype(np.int32)}
    for b, h, row in np.ndindex(batches, heads, 3):
        seen = np.zeros((q_block, 7 * kv_block), bool)
        for i in range(q_block):
            query = row * q_block + i
            for key in range(seqlen_k):
                at = query + seqlen_k - seqlen_q
                in_window = (left < 0 or key >= at - left) and (right < 0 or key <= at + right)
                is_same = mod is BY_HEAD or documents[b, min(at, seqlen_k - 1)] == documents[b, key]
                seen[i, key] = query < seqlen_q and in_window and is_same and (mod is DOCUMENTS or key >= 70 * h)
        real = seen[: min(q_block, seqlen_q - row * q_block)].reshape(-1, 7, kv_block)
        full = [n for n in range(6, -1, -1) if real[:, n].all()]
        partial = [n for n in range(6, -1, -1) if real[:, n].any() and n not in full]
        counts, numbers = (lists.partial_count, lists.full_count), (lists.partial_index, lists.full_index)
        found = [list(n[b, h, row, : c[b, h, row]]) for c, n in zip(counts, numbers, strict=True)]
        assert found == [partial, full]


def test_sizes_are_tiles_of_the_kernels():
    for size, head_dim, mask in FORWARD:
        row = forward_row("bf16" if size == 2 else "fp8_e4m3", head_dim, mask, takes_registers=True)
        assert BLOCK_SIZES[size, head_dim] == (row.tile_m, row.tile_n)
    assert block_sizes("fp16", 128) == (128, 128) and block_sizes("fp8_e4m3", 64) == (192, 128)


LISTS = BlockMask(
    partial_count=A, partial_index=A + 4, full_count=A + 8, full_index=A + 12, q_block=256, kv_block=128, batches=1
)
GOOD = {"mask_mod": BY_HEAD, "block_mask": LISTS, "head_dim": 128}


def test_what_reaches_the_kernel():
    params = replace(DENSE, **GOOD, seqlen_q=600, seqlen_k=700)
    assert not problems(params)
    params = replace(params, block_mask=replace(LISTS, heads=params.num_heads, batches=params.batch_size))
    shape = ProblemShape.of(plain(params))
    values = dict(zip([name for name, _ in BLOCK_ARGUMENTS], shape.mod_values[-len(BLOCK_ARGUMENTS) :], strict=True))
    assert [values[f"block_{name}"] for name in ("partial_count", "partial_index", "full_count", "full_index")] == [
        A + 4 * i for i in range(4)
    ]
    assert (values["block_head_stride"], values["block_batch_stride"]) == (3, 3 * params.num_heads)
    assert (values["block_row_length"], values["block_tiles_per_row"]) == (6, 2)
    broadcast = ProblemShape.of(plain(replace(params, block_mask=LISTS))).mod_values[-4:]
    assert broadcast == (0, 0, 6, 2)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("mask", [{}, {"is_causal": True}, {"window_size_left": 64}], ids=str)
def test_tiles_are_blocks_whatever_else_is_asked_for(head_dim, mask):
    blocks = block_sizes("fp16", head_dim)
    lists = replace(LISTS, q_block=blocks[0], kv_block=blocks[1])
    base = replace(DENSE, **GOOD | {"head_dim": head_dim, "block_mask": lists, "is_causal": False} | mask)
    score_mod = ScoreMod(lambda score, *rest: score + 1.0)
    for other in (
        {},
        {"softcap": 3.0},
        {"alibi_slopes": A, "s_aux": A},
        {"p_dropout": 0.5, "rng_state": A},
        {"score_mod": score_mod, "softmax_lse": A},
    ):
        cfg = kernel_config(replace(base, **other))
        assert (cfg.tile_m, cfg.tile_n) == blocks, (other, cfg.name)


def test_one_kernel_reads_them():
    """The forward kernel also where few queries are the decode kernel's."""
    few = replace(DENSE, **GOOD, seqlen_q=1)
    for params in (few, replace(few, seqlen_q=500)):
        cfg = kernel_config(params)
        assert cfg.has_block_lists and cfg.name.startswith("fwd_") and "_block_lists_" in cfg.name
        assert not kernel_config(replace(params, block_mask=None)).has_block_lists


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_mask": (A,) * 4}, ("block_mask=", "None or a fa3_cute.BlockMask")),
        ({"mask_mod": None}, ("block_mask=", "without a mask_mod")),
        ({"block_mask": replace(LISTS, full_index=0)}, ("block_mask.full_index=0", "aligned to 4 bytes")),
        ({"block_mask": replace(LISTS, full_count=A + 2)}, ("block_mask.full_count=", "aligned to 4 bytes")),
        ({"block_mask": replace(LISTS, q_block=64)}, ("block_mask.q_block=64", "multiple of 128")),
        ({"block_mask": replace(LISTS, q_block=0)}, ("block_mask.q_block=0", "multiple of 128")),
        ({"block_mask": replace(LISTS, kv_block=64)}, ("block_mask.kv_block=64", "must be 128")),
        ({"block_mask": replace(LISTS, heads=2)}, ("block_mask.heads=2", f"num_heads={DENSE.num_heads}")),
        ({"block_mask": replace(LISTS, batches=99)}, ("block_mask.batches=99", f"batch_size={DENSE.batch_size}")),
        ({"block_mask": replace(LISTS, heads=True)}, ("block_mask.heads=True",)),
        ({"head_dim": 256}, ("block_mask.kv_block=128", "must be 64")),
    ],
)
def test_bad_lists(change, words):
    problem = first_problem(replace(DENSE, **GOOD | change))
    assert problem.status is Status.INVALID_ARGUMENT
    assert all(word in problem.detail for word in words), problem.detail


def test_what_has_no_kernel_yet():
    for call, change, name in (
        (DENSE, {"seqused_k": A}, "seqused_k"),
        (DENSE, {"seqused_q": A}, "seqused_q"),
        (DENSE, {"num_splits": 2}, "num_splits"),
        (DENSE, {"attn_mask": A}, "attn_mask"),
        (DENSE, {"attention_chunk": 512}, "attention_chunk"),
        (PACKED, {}, "cu_seqlens_q"),
    ):
        problem = first_problem(replace(call, **GOOD | change))
        assert problem.status is Status.FEATURE_UNSUPPORTED and name in problem.detail, (change, problem)
    for changes in ({"num_splits": None}, {"num_splits": None, "fixed_split_size": 64}):
        found = [problem.detail for problem in problems(replace(DENSE, **GOOD | changes))]
        assert any(detail.startswith("num_splits=None: must be an int") for detail in found), found
    fp8 = replace(DENSE_FP8, **GOOD)
    assert not problems(replace(fp8, block_mask=replace(LISTS, q_block=128)))


def test_lists_of_a_causal_mask_and_a_window_are_refused():
    with pytest.raises(ValueError, match="window_size"):
        block_lists(DOCUMENTS, (1, 1, 8, 8), (8, 8), causal=True, window_size=(3, -1))
