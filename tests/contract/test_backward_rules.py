"""What `backward` accepts and refuses, under which status and in which words."""

from dataclasses import fields, replace

import numpy as np
import pytest
from cuda.bindings.driver import CUdeviceptr
from hypothesis import given, settings
from hypothesis import strategies as st
from backward_calls import APART, DENSE, LENGTHS, PACKED, POINTERS, SCORES, A
from rule_calls import BF16, DECODE, FP8, FP16, FP32, VALUES, Array, Handle, Recorded, every

from fa3_cute.contract import backward_rules as rules
from fa3_cute.contract.append import NEW_STRIDES
from fa3_cute.contract.backward_params import ARGUMENTS, BACKWARD, NEW, BackwardParams, plain_backward, strides_of
from fa3_cute.contract.backward_rules import REFUSED, contract_problems
from fa3_cute.contract.block_mask import BlockMask
from fa3_cute.contract.limits import MAX_SIZE
from fa3_cute.contract.mods import MaskMod, ScoreMod
from fa3_cute.contract.params import ARGUMENTS as FORWARD_ARGUMENTS
from fa3_cute.contract.params import OFF, FlashAttentionParams
from fa3_cute.contract.plain import BAD

ONE_ROW = replace(DENSE, batch_size=1, seqlen_q=1, seqlen_k=1, num_heads=1, num_heads_k=1)
# Columns of one buffer [batch, rows, 16 + 2 * 4 heads, 128], as of a fused projection of q, k and v.
PITCH = 24 * 128
FUSED_STRIDES = {
    f"{name}_{dim}_stride": stride
    for name in ("dq", "dk", "dv")
    for dim, stride in (("row", PITCH), ("batch", 512 * PITCH), ("head", 128))
}
D = POINTERS["dq"]
FUSED = FUSED_STRIDES | {"seqlen_k": 512, "dq": D, "dk": D + 2 * 16 * 128, "dv": D + 2 * 20 * 128}
NO_ROWS_Q, NO_ROWS_K = ("q", "out", "softmax_lse", "dout", "dq"), ("k", "v", "dk", "dv")


def first_problem(params):
    return rules.first_problem(plain_backward(params))


ACCEPTED = [
    (DENSE, {}),
    (ONE_ROW, {}),
    (PACKED, {}),
    (DENSE, {"softmax_scale": 2.0**-96}),
    (DENSE, {"head_dim": 64, "dtype": BF16, "out_dtype": BF16, "grad_dtype": BF16, "softmax_scale": 0.3}),
    (DENSE, {"dlse": POINTERS["dq"] - 4 * APART - 4, "deterministic": True}),
    (DENSE, {"dlse": POINTERS["softmax_lse"], "deterministic": np.bool_(True)}),  # inputs may be the same
    (DENSE, {"is_causal": True, "seqused_q": LENGTHS, "seqused_k": LENGTHS + 4}),
    (DENSE, {"window_size_left": 100, "window_size_right": 0}),
    (PACKED, {"window_size_right": 7, "seqused_q": Handle(), "seqused_k": LENGTHS, "max_seqlen_q": 640}),
    (DENSE, {"num_heads_k": 1}),
    (DENSE, {"num_heads_k": 16}),
    (ONE_ROW, {"mode": DECODE}),
    (DENSE, {"dq": CUdeviceptr(D), "dlse": Handle(), "dv": np.int64(POINTERS["dv"])}),
    *((DENSE, every(names, None)) for names in ("dq", "dk", "dv", "dq dk", "dq dv", "dk dv")),
    (DENSE, {"workspace": LENGTHS, "workspace_bytes": 1 << 20}),
    *((PACKED, {"total_q": 0} | {name: None}) for name in NO_ROWS_Q),
    *((PACKED, {"total_k": 0} | {name: 0}) for name in NO_ROWS_K),
    (PACKED, {"total_q": 0} | dict.fromkeys(NO_ROWS_Q)),
    (PACKED, {"total_k": 0} | dict.fromkeys(NO_ROWS_K)),
    (PACKED, {"total_k": 0} | dict.fromkeys((*NO_ROWS_K, "dq"))),
    # of dimensions of one entry a stride means nothing, even that of an expanded tensor
    (ONE_ROW, every("dout_batch_stride dout_row_stride dout_head_stride dq_head_stride", 0)),
    (PACKED, {"dout_batch_stride": 0}),
    # [batch, heads, rows, head_dim] in memory
    (DENSE, {"dout_head_stride": 512 * 128, "dout_row_stride": 128}),
    (DENSE, {"dq_head_stride": 512 * 128, "dq_row_stride": 128, "dk_head_stride": 640 * 128, "dk_row_stride": 128}),
    (DENSE, FUSED),
    (DENSE, FUSED | {"dk": None}),
    # side by side: the end of one is the start of the other
    (DENSE, {"dv": POINTERS["dk"] + 2 * 640 * 4 * 128 * 2}),
    (DENSE, {"dq": POINTERS["softmax_lse"] + 2 * 16 * 512 * 4}),
    (DENSE, {"pack_gqa": False, "grad_dtype": FP16, "accumulate_dkv": 0, "softcap": 0}),
]


@pytest.mark.parametrize("base, changes", ACCEPTED)
def test_accepted(base, changes):
    assert contract_problems(replace(base, **changes)) == []


# status, the good call, what is changed, the words that its one sentence must have.
REFUSED_CALLS = [
    *(
        (-1, DENSE, {name: value}, (f"{name}=", "device address"))
        for name in ("q", "k", "v", "out", "softmax_lse", "dout")
        for value in (None, 0, CUdeviceptr(0))
    ),
    (-1, PACKED, {"softmax_lse": None}, ("softmax_lse=None", "forward's LSE")),
    (-1, PACKED, {"total_k": 0, "dout": None}, ("dout=None", "device address")),
    (-1, PACKED, {"total_q": 0, "k": None}, ("k=None", "device address")),
    (-1, DENSE, every("dq dk dv", None), ("dq=None, dk=None, dv=None", "one of them")),
    *(
        (-2, DENSE, {name: value}, (f"{name}={value!r}", "a multiple of 8 from 8 to 256"))
        for name, values in (("head_dim", (84, 0, 520, 128.0, None)), ("head_dim_v", (4, 264, -8, "64")))
        for value in values
    ),
    (-4, DENSE, {"num_heads": 18}, ("num_heads=18", "multiple of num_heads_k=4")),
    (-5, DENSE, {"is_causal": True, "window_size_left": 3}, ("window_size_left=3", "negative")),
    (-6, PACKED, {"cu_seqlens_q": None}, ("cu_seqlens_q=None", "cu_seqlens_k")),
    (-7, DENSE, {"seqlen_q": 0}, ("seqlen_q=0", "from 1")),
    (
        -7,
        PACKED,
        {"num_heads": 2048, "num_heads_k": 2048, "total_k": MAX_SIZE, "total_q": 9},
        ("total_k=2147483392", "num_heads_k=2048", "at most 2147483647 tiles of 64 keys"),
    ),
    *(
        (-7, DENSE, {name: value}, (f"{name}={value!r}", words))
        for name, value, words in (
            ("dout_row_stride", 0, "copy it to a contiguous one"),
            ("dout_head_stride", 0, "copy it to a contiguous one"),
            ("dout_batch_stride", 0, "copy it to a contiguous one"),
            ("dout_row_stride", 2052, "multiple of 8 elements"),
            ("dout_row_stride", -2048, "at least 1"),
            ("dout_head_stride", 2**39, f"below {2**39}"),
            ("dout_head_stride", "x", "None (contiguous) or an int"),
            ("dq_row_stride", 0, "at least 128 (head_dim: rows must not overlap)"),
            ("dq_row_stride", 64, "at least 128 (head_dim: rows must not overlap)"),
            ("dv_head_stride", 120, "at least 128 (head_dim: rows must not overlap)"),
            ("dk_row_stride", 516, "multiple of 8 elements"),
            ("dv_batch_stride", 2**39, f"below {2**39}"),
            ("dv_head_stride", 1.5, "None (contiguous) or an int"),
            ("dk_row_stride", 128, "keep the rows of dk apart"),
            ("dq_batch_stride", 2048 * 511, "keep the rows of dq apart"),
            ("out_row_stride", 2052, "multiple of 8 elements"),
        )
    ),
    (
        -7,
        replace(DENSE, q=None),
        {"q": A, "num_heads_k": 4, "seqlen_k": MAX_SIZE, "k_batch_stride": 0, "v_batch_stride": 0, "dv": None},
        ("dk_batch_stride=None (contiguous: 1099511496704)", f"below {2**39}"),
    ),
    (-8, DENSE, {"mode": DECODE}, ("seqlen_q=512", "1 with mode=DECODE")),
    *((-9, DENSE, {name: A + 20 * APART + 8}, (f"{name}=0x", "16 bytes")) for name in ("dout", "dq", "dk", "dv")),
    *((-9, DENSE, {name: LENGTHS + 2}, (f"{name}=0x", "4 bytes")) for name in ("dlse", "softmax_lse")),
    *(
        (-9, DENSE, {name: value}, (f"{name}=", "__int__"))
        for name in ("dout", "dq", "dlse")
        for value in ("0x7f", 1.5, True, [A], Array())
    ),
    *((-9, DENSE, {"dk": value}, (f"dk={value:#x}", "device address")) for value in (-16, 2**64)),
    *((-9, DENSE, {"deterministic": value}, ("deterministic=", "True or False")) for value in (2, None, "yes")),
    *((-9, DENSE, {"grad_dtype": value}, ("grad_dtype=", "None, FP32 or dtype=DataType.FP16")) for value in ("x", 9)),
    (-9, DENSE, {"softmax_scale": 0}, ("softmax_scale=0", "a number from")),
    (-9, DENSE, {"softmax_scale": 2.0**-97}, ("softmax_scale=6.3", "at least 1.2621774e-29 in backward")),
    (-9, DENSE, {"workspace_bytes": 8}, ("workspace=None", "together")),
    *(
        (-9, DENSE, {output: POINTERS[other]}, (f"{output}={POINTERS[other]:#x}: must not overlap {other}=",))
        for output in ("dq", "dk", "dv")
        for other in ("q", "k", "v", "out", "dout", "softmax_lse")
    ),
    (-9, DENSE, {"dlse": POINTERS["dq"] + 64}, ("must not overlap dlse",)),
    (-9, DENSE, {"dv": POINTERS["dk"]}, ("dk=", "must not overlap dv=")),
    # the last row of one, the first of the other
    (-9, DENSE, {"dv": POINTERS["dk"] + 2 * 640 * 4 * 128 * 2 - 256}, ("dk=", "must not overlap dv=")),
    (-9, DENSE, {"dq": A - 2 * 512 * 16 * 128 * 2 + 256}, ("dq=", f"must not overlap q={A:#x}")),
    (-9, DENSE, {"dq": POINTERS["softmax_lse"] + 2 * 16 * 512 * 4 - 16}, ("dq=", "must not overlap softmax_lse=")),
    (-9, PACKED, {"dk": A + 895 * 16 * 128 * 2}, ("dk=", f"must not overlap q={A:#x}")),
    # columns of one buffer that are not apart
    (-9, DENSE, FUSED | {"dv": D + 2 * 19 * 128}, ("dk=", "must not overlap dv=")),
    (-9, DENSE, FUSED | {"dv": D + 2 * (PITCH - 128)}, ("dq=", "must not overlap dv=")),
    (-11, DENSE, {"softcap": -1}, ("softcap=-1", "0 (off) or a number")),
    (-13, DENSE, {"num_splits": 300}, ("num_splits=300", "256")),
    (-15, DENSE, {"rotary_dim": 64}, ("rotary_dim=64",)),
    (
        -16,
        DENSE,
        {"head_dim": 576, "head_dim_v": 512, "num_heads_k": 1, "v": POINTERS["k"]},
        ("head_dim=576", "at most 256"),
    ),
    (-16, DENSE, {"dtype": FP8, "head_dim": 64}, ("dtype=DataType.FP8_E4M3", "FP16 or BF16")),
    (-16, DENSE, {"out_dtype": FP32}, ("out_dtype=DataType.FP32", "out is an input in dtype")),
    (-16, DENSE, {"grad_dtype": FP32}, ("grad_dtype=DataType.FP32", "of the dtype of q, k and v")),
    (-16, PACKED, {"cu_seqlens_k": None, "total_k": 0, "seqused_k": LENGTHS, "seqlen_k": 640}, ("no packed q with",)),
    *(
        (-16, DENSE, {name: value, **others}, (f"{name}=", "must be off", words))
        for name, value, others, words in (
            ("accumulate_dkv", True, {}, "add them up"),
            ("batch_size_k", 2, {}, "entries of a cache"),
            ("num_splits", 1, {}, "deterministic=True"),
            ("max_num_splits", 8, {}, "split-KV"),
            ("fixed_split_size", 512, {}, "split-KV"),
            ("pack_gqa", True, {}, "forward"),
            ("scheduler_metadata", LENGTHS, {}, "schedule"),
            ("tile_counter", LENGTHS, {}, "workspace"),
        )
    ),
    (-16, PACKED, {"zero_padding": True}, ("zero_padding=True", "stay as they are")),
]


@pytest.mark.parametrize("status, base, changes, words", REFUSED_CALLS)
def test_refused(status, base, changes, words):
    params = replace(base, **changes)
    found = contract_problems(params)
    assert found and found[0] == first_problem(params)
    assert found[0].status == status, found
    same = [problem for problem in found if problem.status == status]
    assert any(all(word in problem.detail for word in words) for problem in same), same
    if "overlap" not in words[-1]:
        assert len(same) == 1, same


def test_caches_and_pages_are_refused():
    for changes in (
        {"kv_batch_idx": LENGTHS, "batch_size_k": 4},
        {"page_table": LENGTHS, "page_size": 64, "num_pages": 40, "seqused_k": LENGTHS},
    ):
        found = contract_problems(replace(DENSE, **changes))
        assert {problem.status for problem in found} == {-16}
        assert {problem.detail.split("=")[0] for problem in found} == set(changes) & set(REFUSED)


def test_rows_that_forward_appends_are_refused():
    changes = every("k_new v_new", A + 20 * APART) | {"seqlen_knew": 1, "seqused_k": LENGTHS}
    found = contract_problems(replace(DENSE, **changes))
    assert {problem.status for problem in found} == {-16}
    assert {problem.detail.split("=")[0] for problem in found} >= {"k_new", "v_new"}


def test_mods_and_block_lists_are_refused():
    score_mod = ScoreMod(lambda score, batch, head, query, key, info, aux: score, name="same", key="same")
    mask_mod = MaskMod(lambda batch, head, query, key, info, aux: query >= key, name="seen", key="seen")
    lists = BlockMask(**every("partial_count partial_index full_count full_index", A), q_block=128, kv_block=128)
    for changes in ({"score_mod": score_mod}, {"mask_mod": mask_mod}, {"mask_mod": mask_mod, "block_mask": lists}):
        found = contract_problems(replace(DENSE, **changes))
        assert [(problem.status, problem.detail.split("=")[0]) for problem in found] == [
            (-16, name) for name in changes
        ]


def test_every_field_of_forward_is_read_refused_or_means_nothing_alone():
    """So that a field that forward gets is not overlooked here, and taken for served."""
    companions = {
        *("s_aux_dtype", "alibi_batch_stride", "attn_mask_dtype", "rng_state"),
        *(f"attn_mask_{dim}_stride" for dim in ("batch", "head", "row")),
        *("mod_pointers", "mod_strides", "mod_scalars", *(f"q_v_{dim}_stride" for dim in ("batch", "head", "row"))),
        *("page_table_batch_stride", "page_size", "num_pages"),
        *("kv_new_dtype", "seqlen_knew", "cu_seqlens_k_new", "seqlens_rotary", *NEW_STRIDES),
        *(f"rotary_{name}" for name in ("dim", "positions", "interleaved", "dtype", "row_stride")),
        *(name for name, argument in FORWARD_ARGUMENTS.items() if argument.is_fp8),
        *(name for name in FORWARD_ARGUMENTS if name.startswith(("k_new_", "v_new_", "rotary_"))),
        *("seqlen_knew", "cu_seqlens_k_new", "seqlens_rotary"),
    } - set(REFUSED)
    without_kernel = {
        "head_dim",
        "head_dim_v",
        "dtype",
        "out_dtype",
        "kv_dtype",
        "is_causal",
        "mode",
        "total_q",
        "total_k",
        "max_seqlen_q",
    }
    read = {name for name, argument in ARGUMENTS.items() if argument.takers == (BACKWARD,)} | without_kernel
    read |= {"workspace", "workspace_bytes"}
    assert set(FORWARD_ARGUMENTS) == (read | set(REFUSED) | companions) & set(FORWARD_ARGUMENTS)
    assert not (read | companions) & set(REFUSED)
    assert set(REFUSED) <= set(ARGUMENTS)


def test_a_row_of_the_tables_is_all_that_refuses(monkeypatch):
    """What gets a kernel is served when its row goes."""
    monkeypatch.delitem(REFUSED, "accumulate_dkv")
    monkeypatch.setattr(rules, "SERVED_GRAD_DTYPES", (FP32,))
    assert contract_problems(replace(DENSE, accumulate_dkv=True, head_dim=96, grad_dtype=FP32)) == []
    found = contract_problems(replace(DENSE, head_dim=96, grad_dtype=FP32, dq_row_stride=2050))
    assert [problem.status for problem in found] == [-7] and "multiple of 4 elements" in found[0].detail


def test_first_problem_follows_the_table():
    """A call that breaks every rule is refused for each in turn, as one after the other is mended."""
    params = replace(
        DENSE,
        dout=None,
        head_dim=84,
        num_heads=6,
        is_causal=True,
        window_size_left=1,
        total_q=1,
        dq_row_stride=4,
        mode=DECODE,
        dk=POINTERS["k"],
        accumulate_dkv=True,
        softcap=-1,
        num_splits=300,
        page_size=7,
        rotary_dim=8,
    )
    mending = [
        (-1, {"dout": POINTERS["dout"]}),
        (-2, {"head_dim": 192}),
        (-4, {"num_heads": 8}),
        (-5, {"is_causal": False}),
        (-6, {"total_q": 0}),
        (-7, {"dq_row_stride": None}),
        (-8, {"seqlen_q": 1}),
        (-9, {"dk": POINTERS["dk"]}),
        (-11, {"softcap": 0}),
        (-13, {"num_splits": 0}),
        (-14, {"page_size": 0}),
        (-15, {"rotary_dim": 0}),
        (-16, {"accumulate_dkv": False}),
    ]
    for status, change in mending:
        assert first_problem(params).status == status, (first_problem(params), change)
        params = replace(params, **change)
    assert first_problem(params) is None
    statuses = [rule.status for rule in rules.RULES]
    assert statuses == sorted(statuses, reverse=True)


# ---- plain values ----------------------------------------------------------------------------------------------------


def test_plain_params_are_themselves():
    assert plain_backward(DENSE) is DENSE and plain_backward(PACKED) is PACKED


def test_values_mean_what_they_say():
    params = replace(
        DENSE,
        dq=Handle(),
        dk=np.int64(A),
        dlse=CUdeviceptr(0),
        dq_row_stride=np.int32(8),
        grad_dtype=1,
        deterministic=1,
    )
    p = plain_backward(params)
    assert (p.dq, p.dk, p.dlse, p.dq_row_stride, p.grad_dtype) == (Handle().__int__(), A, 0, 8, BF16)
    assert p.deterministic is True and p.q == DENSE.q and p.batch_size == 2
    assert plain_backward(replace(params, dv=1.5)).dv is BAD


def test_strides_have_defaults():
    p = replace(DENSE, dk_row_stride=1024, dk_batch_stride=640 * 1024)
    assert strides_of(p, "dk") == (640 * 1024, 1024, 128)
    assert strides_of(p, "dout") == (512 * 16 * 128, 16 * 128, 128)
    assert strides_of(replace(PACKED, dq_batch_stride=3), "dq") == (896 * 16 * 128, 16 * 128, 128)


def test_forward_fields_are_forward_s():
    """But for those that mean something else, which say so: inputs, and scratch memory."""
    changed = {"out", "softmax_lse", "workspace", "workspace_bytes"}
    forward = {item.name: item for item in fields(FlashAttentionParams)}
    own = {item.name: item for item in fields(BackwardParams)}
    assert {name for name in forward if forward[name] is not own[name]} == changed
    assert set(own) - set(forward) == set(NEW)
    assert all(forward[name].default == own[name].default for name in forward)


# ---- any value -------------------------------------------------------------------------------------------------------

# By number: hypothesis wants to print what it draws.
SCORE_FIELDS = (*SCORES, *(name for name in FORWARD_ARGUMENTS if name.startswith(("attn_mask", "alibi", "s_aux"))))
NAMES = st.sampled_from([*NEW, *NEW, *SCORE_FIELDS, *(field.name for field in fields(BackwardParams))])
CHANGES = st.dictionaries(NAMES, st.integers(0, len(VALUES) - 1), max_size=6)
BASES = st.sampled_from(
    [
        *(DENSE, PACKED, ONE_ROW, replace(DENSE, **FUSED), replace(DENSE, dtype=FP8)),
        *(replace(PACKED, seqused_k=LENGTHS), replace(DENSE, **SCORES), replace(PACKED, **SCORES)),
    ]
)
CHOICES = {name for name, argument in ARGUMENTS.items() if not argument.changes and not argument.varies}


@settings(max_examples=600, deadline=None)
@given(BASES, CHANGES)
def test_any_value_is_a_problem_and_no_exception(base, changes):
    params = replace(base, **{name: VALUES[number] for name, number in changes.items()})
    found = contract_problems(params)
    assert first_problem(params) == (found or [None])[0]
    assert [problem.status for problem in found] == sorted((problem.status for problem in found), reverse=True)
    assert all(problem.detail.isprintable() for problem in found)
    p = plain_backward(params)
    for rule in rules.RULES:
        call = Recorded(p)
        if rule.of_choices:
            rule.objections(call)
            assert call.read <= CHOICES, rule


def test_what_is_off_is_off():
    """Every value that switches a refused field off."""
    for name in REFUSED:
        values = OFF if ARGUMENTS[name].kind in ("pointer", "number") else (getattr(DENSE, name),)
        assert all(contract_problems(replace(DENSE, **{name: value})) == [] for value in values), name
