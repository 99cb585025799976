"""What `backward` plans on the host: entries, kernels, workspace, what is checked of a call that repeats a shape."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from fa3_cute import AttentionMode, BackwardParams, DataType, MergeParams, ScoreMod, Status
from fa3_cute.api import backward, backward_workspace_size, explain, forward, kernel_config, warmup, workspace_size
from fa3_cute.contract import backward_params as contract
from fa3_cute.contract.arguments import KINDS
from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.contract.scores import MASK_STRIDES
from fa3_cute.contract.status import FlashAttentionError, Problem, last_error
from fa3_cute.planning import backward_launch as planning
from fa3_cute.planning.backward_kernels import (
    CLEAR_ENTRY,
    GRADIENT,
    MAIN_ENTRY,
    MASKS,
    PREPARE_ENTRY,
    ROWS,
    SCRATCH,
    SIDE_ENTRY,
    SINKS_ENTRY,
    PrepareConfig,
    kernels_of,
    pass_config,
)
from fa3_cute.planning.backward_tables import SHORT, SHORT_QUERIES, TABLE, VARLEN
from fa3_cute.planning.one_side import TABLE as ONE_SIDE
from fa3_cute.planning.one_side import OneSidePass
from fa3_cute.planning.sections import floats_of_shares
from fa3_cute.planning.selections import backward_configs, backward_dim_configs, backward_kernels

A, STEP = 0x7F00_0000_0000, 1 << 32
SPLIT = [row for row, chosen in TABLE.items() if chosen.is_split]
SAME = ScoreMod(lambda score, batch, head, query, key, info, aux: score, name="same", key="same")
ADDRESSES = {name: A + index * STEP for index, name in enumerate(planning.POINTERS)}
GOOD = BackwardParams(
    **ADDRESSES,
    workspace=A - STEP,
    workspace_bytes=STEP,
    batch_size=2,
    seqlen_q=500,
    seqlen_k=300,
    num_heads=6,
    num_heads_k=3,
    head_dim=64,
    dtype=DataType.BF16,
)
PACKED = replace(
    GOOD, mode=AttentionMode.VARLEN_PREFILL, cu_seqlens_q=A + 64, cu_seqlens_k=A + 128, total_q=700, total_k=900
)
ENTRIES = {
    "prepare": PREPARE_ENTRY,
    "main": MAIN_ENTRY,
    "side": SIDE_ENTRY,
    "sinks": SINKS_ENTRY,
    "clear": CLEAR_ENTRY,
}
# What the host plans, see sections.py.
PLANNED = ("section", "is_rising", "num_behind", "tail_split", "num_sum_slots", "blocks_per_unit", "num_units")
PLANNED += ("num_shared", "num_parts")
# Of calls with one of planning.SCORES, which others have no room for.
SCORES = {name: A - (4 + index) * STEP for index, name in enumerate(planning.SCORES)}
SINKS = {name: SCORES[name] for name in ("s_aux", "d_s_aux")}


def plan(params):
    """The Pass of a good call."""
    found = planning.checked(params)
    assert not isinstance(found, Problem), found
    return found[0]


# ---- kernels ---------------------------------------------------------------------------------------------------------


def test_entries_say_what_the_fields_say():
    """Each argument is a field that backward takes, of its kind, or a part of the workspace; no field is left over."""
    taken = {name: item for name, item in contract.ARGUMENTS.items() if contract.BACKWARD in item.takers}
    arguments = [(name.replace(GRADIENT, "dq"), kind) for entry in ENTRIES.values() for name, kind in entry.arguments]
    others = {"stream": "stream"} | dict.fromkeys(("num_blocks", "num_sms", *PLANNED), "int32")
    others |= dict.fromkeys(SCRATCH, "pointer")
    for name, kind in arguments:
        assert kind == (others[name] if name in others else KINDS[taken[name].kind]), name
    assert {name for name, _ in arguments} == taken.keys() | others.keys()


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
def test_what_changes_with_every_call(entry):
    pointers = [name for name, kind in entry.arguments if kind == "pointer"]
    assert [name for name, _, _ in entry.pointers] == pointers
    lengths = [name for name in pointers if name.startswith(("cu_seqlens", "seqused"))]
    assert entry.per_call == (*(name for name in pointers if name not in lengths), "stream")


def test_kernels_are_told_by_their_names():
    """Those of one name are one kernel: masks and lengths make no other prepare kernels, passes without sums do."""
    everything = [
        kernel
        for row, dtype, *flags, is_short in product(ROWS, ("fp16", "bf16"), *[(False, True)] * 3)
        for kernel in kernels_of(pass_config(dtype, *row, *flags, is_short=is_short))
    ]
    distinct = set(everything)
    assert len({kernel.name for kernel in distinct}) == len(distinct)
    count = lambda kind: sum(isinstance(kernel, kind) for kernel in distinct)
    head_dims = lambda rows: len({row[0] for row in rows})
    assert count(PrepareConfig) == 2 * (head_dims(ROWS) + head_dims(SHORT) + head_dims(SPLIT))


def test_the_selection_has_every_row_and_option():
    everything = backward_configs()
    assert len(set(everything)) == len(everything) <= 55
    configs = [cfg for cfg in everything if cfg.has_sums]
    rows = {(cfg.head_dim, cfg.mask, cfg.is_varlen) for cfg in configs if cfg.dtype == "bf16"}
    assert rows == {(*row, is_varlen) for row in TABLE for is_varlen in (False, True)}
    for facts in (("fp16", False), ("bf16", True)):
        own = [cfg for cfg in configs if (cfg.dtype, cfg.is_deterministic) == facts]
        head_dims = {row[0] for row in TABLE if not (row in SPLIT and facts[1])}
        assert {(cfg.head_dim, cfg.is_varlen) for cfg in own} == set(product(head_dims, (False, True)))
        assert len({cfg.mask for cfg in own}) > 1
    short = [cfg for cfg in configs if (cfg.head_dim, cfg.mask) in SHORT and cfg.tile_m == SHORT[128, cfg.mask].tile_m]
    assert {(cfg.head_dim, cfg.mask) for cfg in short} == set(SHORT)
    for name in ("is_varlen", "is_deterministic"):
        assert {getattr(cfg, name) for cfg in short} == {False, True}
    one_side = [cfg for cfg in everything if not cfg.has_sums]
    assert {(cfg.head_dim, cfg.mask) for cfg in one_side} == set(product(ONE_SIDE, MASKS)) <= set(ROWS)
    for name in ("head_dim", "mask"):
        of_rows = {getattr(cfg, name) for cfg in one_side}
        assert {(getattr(cfg, name), cfg.is_varlen) for cfg in one_side} == set(product(of_rows, (False, True)))
    assert {cfg.dtype for cfg in one_side} == {"bf16", "fp16"}
    passes = [*everything, *backward_dim_configs()]
    assert {kernel for cfg in passes for kernel in kernels_of(cfg)} == set(backward_kernels())


@pytest.mark.parametrize("head_dim", [192, 256])
@pytest.mark.parametrize("call", [GOOD, PACKED], ids=["dense", "packed"])
def test_passes_without_sums(call, head_dim):
    """Asked for the same bits or, at 256, not: the same kernels, and a workspace without sums."""
    is_packed, call = call is PACKED, replace(call, head_dim=head_dim, is_causal=True, deterministic=True)
    passes = [plan(replace(call, deterministic=value)) for value in {True, head_dim == 192}]
    kernels = list(kernels_of(OneSidePass("bf16", head_dim, "causal", is_packed)))
    assert all([stage.config for stage in found.stages] == kernels for found in passes)
    assert [stage.outputs for stage in passes[0].stages] == [(), ("dq",), ("dk", "dv")]
    blocks = 700 // 128 + 2 if is_packed else 2 * 4
    for found in passes:
        assert found.workspace_bytes == backward_workspace_size(call) == 2 * 4 * blocks * 128 * 6
        places = found.places(tuple(range(len(planning.POINTERS) + 1)))
        for stage, own in zip(found.stages[1:], ({GRADIENT: "dq"}, {"dk": "dk", "dv": "dv"}), strict=True):
            given = dict(zip(stage.config.entry.per_call, stage.pick(places), strict=False))
            assert {name: given[name] for name in own} == {
                name: planning.POINTERS.index(gradient) for name, gradient in own.items()
            }
        of_q, of_k = (stage.strides[:-4] for stage in found.stages[1:])  # before those of slopes and masks
        assert of_q[-2] == 6 * head_dim and (of_k[-5], of_k[-2]) == (3 * head_dim, 3 * head_dim), "of the gradients"


# ---- the shape -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, mask, window",
    [
        ({}, "full", (UNBOUNDED_WINDOW, UNBOUNDED_WINDOW)),
        ({"is_causal": True}, "causal", (UNBOUNDED_WINDOW, 0)),
        ({"window_size_left": 40, "window_size_right": 3}, "local", (40, 3)),
        ({"window_size_right": 0}, "causal", (UNBOUNDED_WINDOW, 0)),
    ],
)
@pytest.mark.parametrize("call", [GOOD, PACKED], ids=["dense", "packed"])
def test_what_kernels_are_told(call, changes, mask, window):
    """By name, whatever order their entries have."""
    prepare, main = plan(replace(call, deterministic=True, **changes)).stages
    assert (main.config.mask, main.config.is_varlen, main.config.is_deterministic) == (mask, call is PACKED, True)
    rows_q, rows_k = (700, 900) if call is PACKED else (500, 300)
    sizes = {"batch_size": 2, "seqlen_q": rows_q, "seqlen_k": rows_k, "num_heads": 6, "num_heads_k": 3}
    sizes |= dict(zip(("window_size_left", "window_size_right"), window, strict=True)) | {
        "head_dim": 64,
        "head_dim_v": 64,
    }
    sizes |= {"s_aux_dtype": DataType.FP32, "attention_chunk": 0}
    is_rising = int(mask == "causal")
    planned = (3, is_rising, 3 * 9, 2, 3, 7, 3) if call is PACKED else (6, is_rising, 6 * 3, 2, 6, 4, 6)
    sizes |= dict(zip(PLANNED, (*planned, 0, 0), strict=True))
    scales = {"softmax_scale": 64**-0.5, "softcap": 0.0, "p_dropout": 0.0}
    row_q, row_k = 6 * 64, 3 * 64
    strides = {
        **{f"{x}_row_stride": row_k if x in ("k", "v", "dk", "dv") else row_q for x in planning.TENSORS},
        **{f"{x}_head_stride": 64 for x in planning.TENSORS},
    }
    strides |= {
        f"{x}_batch_stride": 0 if call is PACKED else strides[f"{x}_row_stride"] * (rows_k if x[-1] in "kv" else rows_q)
        for x in planning.TENSORS
    }
    strides |= dict.fromkeys(("alibi_batch_stride", *MASK_STRIDES), 0)
    for stage in (prepare, main):
        kinds = ("int64", "int32", "float32")
        names = {kind: [name for name, own in stage.config.arguments if own == kind] for kind in kinds}
        assert stage.strides == tuple(strides[name] for name in names["int64"])
        assert stage.counts(132) == (132,) * ("num_sms" in names["int32"])
        assert stage.sizes == tuple(sizes[name] for name in names["int32"] if name != "num_sms")
        assert stage.scales == tuple(scales[name] for name in names["float32"])


@pytest.mark.parametrize("mask", [{}, {"is_causal": True}, {"window_size_left": 40}], ids=["full", "causal", "local"])
@pytest.mark.parametrize("call", [GOOD, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("more", [0, 1])
def test_short_sequences_have_tiles_of_their_own(call, mask, more):
    """Their length is a packed batch's in the mean, whose queries are known on the host; head_dim 64 has one row."""
    rows = {"total_q": 2 * (SHORT_QUERIES + more)} if call is PACKED else {"seqlen_q": SHORT_QUERIES + more}
    for head_dim in (64, 128):
        _, main = plan(replace(call, head_dim=head_dim, **rows, **mask)).stages
        name = main.config.mask
        table = TABLE | (VARLEN if call is PACKED else {}) | ({} if more else SHORT)
        row = table[head_dim, name]
        assert (main.config.tile_m, main.config.is_dq_behind) == (row.tile_m, row.is_dq_behind)


# ---- the workspace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [GOOD, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_workspace(call, head_dim):
    """Its parts lie one behind the other, aligned, and hold all Q tiles of each head."""
    call = replace(call, head_dim=head_dim)
    found = plan(call)
    tile_m = found.stages[1].config.tile_m
    tiles, units = (700 // tile_m + 2 if call.mode else 2 * -(-500 // tile_m)) * 6, 3 if call.mode else 6
    sizes = [4 * tiles * tile_m, 4 * tiles * tile_m, 4 * tiles * tile_m * head_dim, 8 * units, 4 * tiles, 4]
    sizes += [
        4 * floats_of_shares(found.stages[1].config, planning.BackwardShape.of(contract.plain_backward(call)).forward)
    ]
    assert (sizes[-1] > 0) == (head_dim == 128 and not call.mode), "of 4 Q tiles nothing would be saved"
    with_sinks = replace(call, **SINKS)
    for own, of_sinks in ((call, 0), (with_sinks, 4 * tiles * 4)):
        found = plan(own)
        ends = [*found.offsets[1:], found.workspace_bytes]
        for start, end, size in zip(found.offsets, ends, (*sizes, of_sinks), strict=True):
            assert start % 16 == 0 and 0 <= end - start - size < 16
        assert backward_workspace_size(own) == found.workspace_bytes


@pytest.mark.parametrize(
    "changes, rows",
    [
        ({"batch_size": 100}, 3 * 43 * 512),
        ({"batch_size": 100, "is_causal": True, "deterministic": True}, 4 * 43 * 512),
        ({"batch_size": 16, "seqlen_q": 4096, "seqlen_k": 4096}, 3 * 4 * 4096),
        ({"seqlen_q": 100_000, "seqlen_k": 100_000}, 3 * 782 * 128),
    ],
)
def test_sums_have_room_for_units_under_way(changes, rows):
    """Not for all of them: so many rows of each query head of a group."""
    found = plan(replace(GOOD, workspace_bytes=1 << 40, **changes))
    room = found.offsets[list(SCRATCH).index("progress")] - found.offsets[list(SCRATCH).index("dq_sum")]
    assert room == 4 * 64 * 2 * rows


def test_a_workspace_must_be_there_and_large_enough():
    needed = backward_workspace_size(GOOD)
    named = f"backward_workspace_size(params)={needed}"
    missing = replace(GOOD, workspace=None, workspace_bytes=0)
    small = replace(GOOD, workspace_bytes=needed - 1)
    for call in (missing, small):
        assert backward_workspace_size(call) == needed, "whatever is given"
    assert explain(missing) == [
        (Status.NULL_POINTER, f"workspace=None: must be the device address of {named} bytes"),
    ]
    assert explain(small) == [
        (Status.INVALID_ARGUMENT, f"workspace_bytes={needed - 1}: must be at least {named}"),
    ]
    assert explain(replace(GOOD, workspace_bytes=needed)) == []
    assert [problem.status for problem in explain(replace(missing, num_heads=5))] == [Status.INVALID_HEADS]


def test_a_size_needs_no_tensors_and_good_sizes():
    bare = replace(GOOD, **dict.fromkeys((*planning.POINTERS, "workspace")), workspace_bytes=0)
    assert backward_workspace_size(bare) == backward_workspace_size(GOOD)
    with pytest.raises(FlashAttentionError, match="num_heads=5") as caught:
        backward_workspace_size(replace(GOOD, num_heads=5))
    assert caught.value.code == Status.INVALID_HEADS


# ---- checking --------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """The calls that the rules looked at, from here on; of GOOD's shape they have seen one."""
    plan(GOOD)
    seen, original = [], planning.plain_backward
    monkeypatch.setattr(planning, "plain_backward", lambda params: seen.append(params) or original(params))
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {"q": A - 4 * STEP, "dv": A - 8 * STEP},
        {"dlse": None},
        {"dq": None, "dv": 0},
        {"v": ADDRESSES["k"]},  # inputs may be the same memory
        {"workspace": A - 2 * STEP},
        {"dq": ADDRESSES["q"] + 2 * 500 * 6 * 64 * 2},  # right behind q
    ],
    ids=str,
)
def test_good_addresses_are_all_that_is_looked_at(counted, changes):
    found = planning.checked(replace(GOOD, **changes))
    assert not counted and not isinstance(found, Problem)
    expected = {**ADDRESSES, "workspace": GOOD.workspace} | changes
    assert found[1] == tuple(value or 0 for value in expected.values())


@pytest.mark.parametrize(
    "changes, status",
    [
        ({"k": None}, Status.NULL_POINTER),
        ({"softmax_lse": 0}, Status.NULL_POINTER),
        ({"dq": None, "dk": None, "dv": None}, Status.NULL_POINTER),
        ({"dout": A + 8}, Status.INVALID_ARGUMENT),
        ({"dlse": A + 2}, Status.INVALID_ARGUMENT),
        ({"dk": 1 << 64}, Status.INVALID_ARGUMENT),
        ({"dq": ADDRESSES["q"]}, Status.INVALID_ARGUMENT),
        ({"dq": ADDRESSES["q"] + 2 * 500 * 6 * 64 * 2 - 16}, Status.INVALID_ARGUMENT),
        ({"q": ADDRESSES["dv"] + 16}, Status.INVALID_ARGUMENT),
        ({"dk": ADDRESSES["dv"]}, Status.INVALID_ARGUMENT),
        ({"dv": ADDRESSES["softmax_lse"] - 16}, Status.INVALID_ARGUMENT),
        ({"workspace": A + 8}, Status.INVALID_ARGUMENT),
        ({"workspace": ADDRESSES["dv"]}, Status.INVALID_ARGUMENT),
        ({"workspace": ADDRESSES["q"] + 2 * 500 * 6 * 64 * 2 - 16}, Status.INVALID_ARGUMENT),
        ({"workspace": None, "workspace_bytes": 0}, Status.NULL_POINTER),
        ({"workspace_bytes": 64}, Status.INVALID_ARGUMENT),
        ({"score_mod": SAME}, Status.FEATURE_UNSUPPORTED),
        ({"d_bias": A - 2 * STEP}, Status.INVALID_ARGUMENT),
        ({"accumulate_dkv": True}, Status.FEATURE_UNSUPPORTED),
        ({"q": "an address"}, Status.INVALID_ARGUMENT),
        ({"softcap": np.ones(3)}, Status.SOFTCAP_UNSUPPORTED),
        ({"s_aux": np.ones(3)}, Status.INVALID_ARGUMENT),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(int(value)),
)
def test_bad_ones_are_put_into_words(counted, changes, status):
    call = replace(GOOD, **changes)
    assert backward(call) == status and len(counted) == 1
    assert warmup(call) == status
    assert last_error().status == status and explain(call)[0].status == status


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
@pytest.mark.parametrize("stride", [8, 3, "x", True, float("nan"), 2**70, -1])
def test_strides_of_an_absent_gradient_are_looked_at(name, stride):
    """A shape is remembered for calls that want the gradient, too."""
    bad = {f"{name}_row_stride": stride}
    assert backward(replace(GOOD, **{name: None}, **bad)) == Status.INVALID_SHAPE
    assert backward(replace(GOOD, **bad)) == Status.INVALID_SHAPE


def test_an_empty_tensor_has_no_strides():
    """Descriptors are made of those of a contiguous one."""
    huge = {f"{name}_{dim}_stride": 2**70 for name in ("q", "out", "dout", "dq") for dim in ("row", "head")}
    (main,) = plan(replace(PACKED, total_q=0, **huge)).stages
    assert max(main.strides) < 2**31


def test_columns_of_one_buffer_are_good():
    """dq, dk and dv of a packed dqkv: the rules are asked, in every call whose addresses are others."""
    row = 3 * 6 * 64
    fields = {f"{name}_row_stride": row for name in ("dq", "dk", "dv")}
    fields |= {f"{name}_batch_stride": 500 * row for name in ("dq", "dk", "dv")}
    places = {"dq": A + 16 * STEP, "dk": A + 16 * STEP + 768, "dv": A + 16 * STEP + 1536}
    call = replace(GOOD, num_heads_k=6, seqlen_k=500, **fields, **places)
    assert planning.checked(call)[1][-4:-1] == tuple(places.values())
    moved = replace(call, **{name: address + STEP for name, address in places.items()})
    assert planning.checked(moved)[1][-4:-1] == tuple(address + STEP for address in places.values())


def test_values_that_can_change_are_not_remembered(counted):
    """An array scalar is the same object when its value is another one."""
    call = replace(GOOD, seqlen_q=np.int64(501))
    for _ in range(2):
        assert planning.checked(call)[0] is plan(replace(GOOD, seqlen_q=501))
    assert counted.count(call) == 2


@pytest.mark.parametrize("function", [forward, workspace_size, kernel_config], ids=lambda function: function.__name__)
def test_a_backward_call_is_no_forward_call(function):
    with pytest.raises(TypeError, match="FlashAttentionParams, not BackwardParams"):
        function(GOOD)


@pytest.mark.parametrize("function", [backward, backward_workspace_size], ids=lambda function: function.__name__)
def test_others_are_no_backward_calls(function):
    for params in (MergeParams(), None):
        with pytest.raises(TypeError, match=f"BackwardParams, not {type(params).__name__}"):
            function(params)
