"""The rules of new keys and values and of rotary positions: what is accepted, what is refused and in which words."""

from dataclasses import replace

import pytest
from cache_calls import CACHES, PACKED_PAGED, PAGED
from rule_calls import BF16, DENSE, DENSE_FP8, FP8, FP16, FP32, PACKED, A, every, first_problem

from fa3_cute import workspace_size
from fa3_cute.contract.append import APPEND_ENTRY, NEW_STRIDES, QUANTISE_ENTRY
from fa3_cute.contract.limits import MAX_SIZE
from fa3_cute.contract.plain import plain
from fa3_cute.planning.operations import operation_of, problems
from fa3_cute.planning.problem import ProblemShape

NEW = {"k_new": A, "v_new": A, "seqlen_knew": 3}
ROTARY = {"rotary_cos": A, "rotary_sin": A + 16, "rotary_dim": 64}
CACHE = replace(DENSE, seqused_k=A)
APPENDING = replace(CACHE, **NEW)
FP8_CACHE = replace(CACHE, dtype=BF16, kv_dtype=FP8)
FP8_PAGES = replace(PAGED, dtype=BF16, kv_dtype=FP8)
QUANTISED = NEW | {"kv_new_dtype": BF16}
ACCEPTED = [
    *((base, NEW | more) for base in (CACHE, *CACHES) for more in ({}, ROTARY)),
    *((base, ROTARY) for base in (DENSE, PACKED, CACHE, *CACHES)),
    (PAGED, NEW | {"kv_batch_idx": A, "batch_size_k": 5, "cu_seqlens_k_new": A + 4, "seqlen_knew": 1}),
    (DENSE_FP8, NEW | {"seqused_k": A, "k_new_row_stride": 1024}),
    *((APPENDING, ROTARY | {"head_dim": dim, "head_dim_v": dim_v}) for dim, dim_v in ((192, 128), (64, 128))),
    (APPENDING, {"k_new_batch_stride": 0, "k_new_row_stride": 640, "k_new_head_stride": 128, "v_new_head_stride": 8}),
    # along a dimension of size 1 nothing moves
    (APPENDING, {"seqlen_knew": 1, "k_new_row_stride": 7, "v_new_row_stride": -1}),
    (APPENDING, {"cu_seqlens_k_new": A, "k_new_batch_stride": 3}),
    (replace(APPENDING, **ROTARY), {"rotary_dtype": FP32, "rotary_row_stride": 36, "rotary_positions": 7}),
    (replace(APPENDING, **ROTARY), {"rotary_dim": 128, "rotary_interleaved": True, "seqlens_rotary": A + 4}),
    (DENSE, every("seqlen_knew rotary_dim rotary_positions k_new rotary_cos cu_seqlens_k_new", None)),
    # Over an FP8 cache new rows are FP8 too, or of q's type.
    *((base, more) for base in (FP8_CACHE, FP8_PAGES) for more in (NEW, ROTARY, QUANTISED, QUANTISED | ROTARY)),
    (FP8_CACHE, NEW | {"kv_new_dtype": FP8}),
    (FP8_CACHE, QUANTISED | {"k_new_row_stride": 4 * 128 + 8}),
    (APPENDING, {"kv_new_dtype": FP16}),
]


@pytest.mark.parametrize("base, changes", ACCEPTED)
def test_accepted(base, changes):
    params = replace(base, **changes)
    assert problems(params) == [] and first_problem(params) is None


# (status, a good call, what is changed, what the sentence says).
REFUSED = [
    (-7, APPENDING, {"seqlen_knew": 0}, ("seqlen_knew=0", "an int from 1", "of each sequence")),
    (-7, APPENDING, {"seqlen_knew": -1, "cu_seqlens_k_new": A}, ("seqlen_knew=-1", "all sequences together")),
    (-7, APPENDING, {"seqlen_knew": MAX_SIZE // 2 + 1}, (f"seqlen_knew={MAX_SIZE // 2 + 1}", "rows of all sequences")),
    (-7, APPENDING, {"k_new_row_stride": 12}, ("k_new_row_stride=12", "multiple of 8 elements (16 bytes)")),
    (-7, APPENDING, {"v_new_batch_stride": -8}, ("v_new_batch_stride=-8", "from 0")),
    (-7, APPENDING, {"v_new_head_stride": 2**39}, (f"v_new_head_stride={2**39}", f"below {2**39}")),
    (-7, DENSE, {"k_new_row_stride": "8"}, ("k_new_row_stride='8'", "None (contiguous)")),
    (-7, replace(DENSE_FP8, seqused_k=A, **NEW), {"k_new_row_stride": 8}, ("k_new_row_stride=8", "multiple of 16")),
    (-9, APPENDING, {"k_new": A + 8}, ("k_new=", "aligned to 16 bytes")),
    (-9, APPENDING, {"cu_seqlens_k_new": A + 2}, ("cu_seqlens_k_new=", "aligned to 4 bytes")),
    (-9, APPENDING, {"v_new": None}, ("v_new=None", "a device address with k_new")),
    (-9, APPENDING, {"k_new": 0}, ("k_new=0", "a device address with v_new")),
    (-9, APPENDING, {"seqused_k": None}, ("seqused_k=None", "before the call")),
    (-9, PACKED, NEW, (f"k_new={A}", "with cu_seqlens_k")),
    (-9, DENSE, {"seqlen_knew": 2}, ("seqlen_knew=2", "without k_new and v_new")),
    *((-9, DENSE, {name: 8}, (f"{name}=8", "without k_new and v_new")) for name in NEW_STRIDES),
    (-9, DENSE, {"cu_seqlens_k_new": A}, (f"cu_seqlens_k_new={A}", "without k_new and v_new")),
    (-14, PACKED_PAGED, NEW | {"seqused_k": None}, ("seqused_k=None", "page_table")),
    (-15, APPENDING, {"rotary_cos": A}, ("rotary_sin=None", "with rotary_cos", "rotary_dim=0")),
    *(
        (-15, replace(DENSE, **ROTARY), {"rotary_dim": dim}, (f"rotary_dim={dim}", "a multiple of 16", "head_dim=128"))
        for dim in (0, 8, 72, 136, 144, -16)
    ),
    (-15, DENSE, {"rotary_dim": 64}, ("rotary_dim=64", "without rotary_cos and rotary_sin")),
    (-15, DENSE, {"seqlens_rotary": A}, (f"seqlens_rotary={A}", "without rotary_cos and rotary_sin")),
    (-15, replace(DENSE, **ROTARY), {"rotary_positions": -1}, ("rotary_positions=-1", "from 0")),
    (-15, replace(DENSE, **ROTARY), {"rotary_row_stride": 36}, ("rotary_row_stride=36", "multiple of 8 elements")),
    (-15, replace(DENSE, **ROTARY), {"rotary_dtype": FP8}, ("rotary_dtype=", "FP16, BF16 or FP32")),
    (-15, DENSE, {"rotary_interleaved": "yes"}, ("rotary_interleaved='yes'", "True or False")),
    (-16, DENSE_FP8, ROTARY, ("rotary_cos=", "FP8_E4M3", "before q and k are quantised")),
    (-16, replace(FP8_CACHE, **NEW), ROTARY, ("rotary_cos=", "with k_new of FP8_E4M3", "kv_new_dtype=BF16")),
    *(
        (-9, replace(FP8_CACHE, **NEW), {"kv_new_dtype": dtype}, ("kv_new_dtype=", "None (as k and v)", "kv_dtype"))
        for dtype in (FP16, FP32, "bf16")
    ),
    (-9, APPENDING, {"kv_new_dtype": BF16}, ("kv_new_dtype=DataType.BF16", "what dtype is")),
    (-9, FP8_CACHE, {"kv_new_dtype": BF16}, ("kv_new_dtype=DataType.BF16", "without k_new and v_new")),
    (-7, replace(FP8_CACHE, **NEW), {"k_new_row_stride": 520}, ("k_new_row_stride=520", "multiple of 16")),
    (-7, replace(FP8_CACHE, **QUANTISED), {"k_new_row_stride": 516}, ("k_new_row_stride=516", "multiple of 8")),
]


@pytest.mark.parametrize("status, base, changes, words", REFUSED)
def test_refused(status, base, changes, words):
    params = replace(base, **changes)
    assert first_problem(base) is None
    found = problems(params)
    assert found and found[0] == first_problem(params)
    assert found[0].status == status, found
    same = " ".join(problem.detail for problem in found if problem.status == status)
    assert all(word in same for word in words), same


# ---- what it becomes -------------------------------------------------------------------------------------------------


def launches(params):
    return operation_of(ProblemShape.of(plain(params))).launches


def test_a_launch_of_its_own_comes_first():
    for base in (CACHE, *CACHES):
        ahead, *others = launches(replace(base, **NEW))
        assert ahead.config.name == "append_fp16" and others == list(launches(base))
    names = {
        launches(replace(DENSE, dtype=dtype, **ROTARY, **more))[0].config.name
        for dtype in (FP16, BF16)
        for more in ({}, {"rotary_interleaved": True}, {"rotary_dtype": FP32})
    }
    assert names == {
        f"append_{dtype}_{rotary}"
        for dtype in ("fp16", "bf16")
        for rotary in (f"halves_{dtype}", f"neighbours_{dtype}", "halves_fp32")
    }


def test_what_is_quantised_has_kernels_of_its_own():
    """What is copied, and what only turns q, are those of other caches."""
    names = {
        "": NEW,
        "turned q": ROTARY,
        "quantised": QUANTISED,
        "turned": QUANTISED | ROTARY | {"rotary_interleaved": True},
    }
    configs = {what: launches(replace(FP8_CACHE, **fields))[0].config for what, fields in names.items()}
    assert {what: config.name for what, config in configs.items()} == {
        "": "append_fp8_e4m3",
        "turned q": "append_bf16_halves_bf16",
        "quantised": "append_bf16_into_fp8_e4m3",
        "turned": "append_bf16_into_fp8_e4m3_neighbours_bf16",
    }
    for what in ("", "turned q"):
        assert configs[what].entry is APPEND_ENTRY
    for what in ("quantised", "turned"):
        assert configs[what].entry is QUANTISE_ENTRY and configs[what].element_out == "fp8_e4m3"


def test_strides_of_descales_reach_the_kernel():
    params = replace(FP8_CACHE, **QUANTISED, k_descale_ptr=A, v_descale_ptr=A + 4)
    params = replace(params, k_descale_batch_stride=7, v_descale_batch_stride=9, v_descale_head_stride=2)
    names = [name for name, kind in QUANTISE_ENTRY.arguments if kind == "int64"]
    strides = dict(zip(names, ProblemShape.of(plain(params)).append.strides[-len(names) :], strict=True))
    found = {name: stride for name, stride in strides.items() if "descale" in name}
    assert found == {
        "k_descale_batch_stride": 7,
        "k_descale_head_stride": 0,
        "v_descale_batch_stride": 9,
        "v_descale_head_stride": 2,
    }


def test_without_queries_the_cache_is_updated():
    params = replace(PACKED_PAGED, total_q=0, q=None, out=None, **NEW)
    assert problems(params) == []
    assert [launch.scratch for launch in launches(params)] == ["append"]


def test_workspace():
    """Behind the partial results of splits, which stay where they are, in whole 256 bytes: q, then lengths."""
    splits = replace(CACHE, seqlen_q=1, num_splits=48)
    partial_bytes = workspace_size(splits)
    assert partial_bytes > 0
    q_bytes = 2 * 2 * 16 * 128
    for more, size in ((NEW, 8), (ROTARY, q_bytes), (NEW | ROTARY, q_bytes + 8)):
        assert workspace_size(replace(splits, **more)) == -(-partial_bytes // 256) * 256 + size
    assert workspace_size(replace(DENSE, **ROTARY)) == 2 * 2 * 512 * 16 * 128
    small = replace(splits, **NEW, workspace=A, workspace_bytes=partial_bytes)
    assert first_problem(small).status == -9 and "workspace_size(params)" in first_problem(small).detail


def test_new_values_have_columns_of_their_own():
    """And strides of their own where they are contiguous."""
    params = replace(APPENDING, head_dim=192, head_dim_v=128, cu_seqlens_k_new=A)
    shape = ProblemShape.of(plain(params)).append
    names = [name for name, kind in APPEND_ENTRY.arguments if kind == "int64"]
    strides = dict(zip(names, shape.strides[-len(names) :], strict=True))
    assert [strides[f"k_new_{dim}_stride"] for dim in ("batch", "row", "head")] == [0, 4 * 192, 192]
    assert [strides[f"v_new_{dim}_stride"] for dim in ("batch", "row", "head")] == [0, 4 * 128, 128]
    sizes = dict(zip([name for name, kind in APPEND_ENTRY.arguments if kind == "int32"], shape.sizes, strict=True))
    assert (sizes["head_dim"], sizes["head_dim_v"], sizes["batch_size_k"], sizes["seqlen_knew"]) == (192, 128, 2, 3)
