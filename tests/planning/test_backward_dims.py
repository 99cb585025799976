"""What `backward` plans for head dims that the tables do not have, and for V's own."""

from dataclasses import replace

import pytest
from test_backward_launch import GOOD, PACKED, plan

from fa3_cute import backward_workspace_size
from fa3_cute.planning import backward_launch as planning
from fa3_cute.planning.backward import BackwardConfig
from fa3_cute.planning.backward_kernels import PrepareConfig, kernels_of, pass_config
from fa3_cute.planning.one_side import OneSideConfig, OneSidePass
from fa3_cute.planning.pair import PairConfig
from fa3_cute.planning.selections import backward_configs, backward_dim_configs

PADDED, FEWER = frozenset({("is_padded", True)}), frozenset({("head_dim_v", 128)})


def configs(**changes) -> list:
    """Of the kernels of a call."""
    return [stage.config for stage in plan(replace(GOOD, **changes)).stages]


@pytest.mark.parametrize(
    "dims, columns, fields",
    [
        ((32, 0), 64, PADDED),
        ((64, 64), 64, frozenset()),
        ((64, 32), 64, PADDED),
        ((40, 72), 96, PADDED),
        ((104, 0), 128, PADDED),
        ((128, 8), 128, PADDED),
        ((160, 0), 192, PADDED),
        ((192, 136), 192, PADDED),
        ((192, 128), 192, FEWER),
        ((192, 64), 192, FEWER | PADDED),
        ((136, 128), 192, FEWER | PADDED),
        ((64, 256), 256, PADDED),
        ((256, 128), 256, PADDED),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, frozenset) else value),  # in the same order everywhere
)
def test_kernels_of_the_next_tiles(dims, columns, fields):
    """Those of the larger of the two dims, with fewer columns of V where there are such kernels."""
    head_dim, head_dim_v = dims
    found = configs(head_dim=head_dim, head_dim_v=head_dim_v)
    assert found == list(kernels_of(pass_config("bf16", columns, "full", False, False, is_short=True, dims=fields)))
    for cfg in found:
        of_v = isinstance(cfg, PrepareConfig) and fields >= FEWER
        assert cfg.head_dim == (128 if of_v else columns) and cfg.is_padded == (fields >= PADDED)


@pytest.mark.parametrize("call", [GOOD, PACKED], ids=["dense", "packed"])
def test_dims_of_one_tile_share_kernels_and_workspace(call):
    """Which is that of the tiles: sums of dQ have their columns."""
    passes = [plan(replace(call, head_dim=head_dim)) for head_dim in (72, 80, 96, 104, 128)]
    kernels = [[stage.config for stage in found.stages] for found in passes]
    assert kernels[0] == kernels[1] != kernels[2] and kernels[3] != kernels[4]
    sizes = [backward_workspace_size(replace(call, head_dim=head_dim)) for head_dim in (72, 80, 96, 104, 128)]
    assert sizes[0] == sizes[1] == sizes[2] != sizes[3] == sizes[4]


def test_kernels_are_told_the_dims_of_the_call():
    for stage in plan(replace(GOOD, head_dim=40, head_dim_v=24)).stages:
        names = [name for name, kind in stage.config.arguments if kind == "int32" and name != "num_sms"]
        sizes = dict(zip(names, stage.sizes, strict=True))
        assert (sizes["head_dim"], sizes["head_dim_v"]) == (40, 24)
    assert plan(GOOD).stages[0].sizes[5:7] == (64, 64), "of v as of q where it has none of its own"


def test_columns_of_v_are_those_of_out_dout_and_dv():
    """In default strides, and in what tensors take up."""
    found = plan(replace(GOOD, head_dim=192, head_dim_v=128))
    extents = dict(zip(planning.POINTERS, found.extents, strict=True))
    rows = {"q": 2 * 500 * 6, "k": 2 * 300 * 3}
    for side, names in (("q", ("q", "dq", "out", "dout")), ("k", ("k", "dk", "v", "dv"))):
        assert [extents[name] for name in names] == [2 * rows[side] * dim for dim in (192, 192, 128, 128)]
    strides = dict(planning.BackwardShape.of(replace(GOOD, head_dim=192, head_dim_v=128)).strides)
    assert strides["dout"] == (500 * 6 * 128, 6 * 128, 128) and strides["dk"] == (300 * 3 * 192, 3 * 192, 192)


def test_rings_of_fewer_columns_of_v():
    """V, dO and dV have 128 columns, Q, K, dQ and dK 192."""
    softcap = frozenset({("has_softcap", True)})
    for cfg in OneSidePass("bf16", 192, "causal", False, softcap, head_dim_v=128).sides:
        of_ring = {ring.name: ring.slot_bytes for ring in cfg.rings}
        assert of_ring["x"] == 128 * 192 * 2 and of_ring["x2"] == 128 * 128 * 2 * (cfg.side != "dv")
        assert of_ring["y"] == cfg.tile_columns * 192 * 2 and of_ring["y2"] == cfg.tile_columns * 128 * 2
        assert cfg.dim_gradient == {"dq": 192, "dk": 192, "dv": 128}[cfg.side]
    pair = OneSidePass("bf16", 192, "causal", False, head_dim_v=128).pair
    rows = {"k": (64, 192), "v": (64, 128), "q": (pair.tile_m, 192), "do": (pair.tile_m, 128)}
    found = {ring.name: ring.slot_bytes for ring in pair.rings}
    assert {name: found[name] for name in rows} == {name: 2 * size * columns for name, (size, columns) in rows.items()}


def test_the_kernel_of_all_gradients_has_tiles_of_one_width():
    with pytest.raises(ValueError, match="head_dim_v=64: must be 0, head_dim"):
        pass_config("bf16", 128, "full", False, False, dims=frozenset({("head_dim_v", 64)}))


def test_kernels_of_other_dims_have_names_of_their_own():
    everything = [kernel for cfg in (*backward_configs(), *backward_dim_configs()) for kernel in kernels_of(cfg)]
    assert len({kernel.name for kernel in everything}) == len(set(everything))


def test_the_selection_has_every_tile_and_option():
    """Each padded; the kernels of all gradients and those of one or two, dense and with lengths, both element types."""
    everything = backward_dim_configs()
    assert len(set(everything)) == len(everything)
    of_dims = {(cfg.head_dim, cfg.head_dim_v, cfg.is_padded) for cfg in everything}
    assert of_dims == {(dim, 0, True) for dim in (64, 96, 128, 192, 256)} | {(192, 128, False), (192, 128, True)}
    for kind, masks in ((BackwardConfig, {"full", "causal", "local"}), (OneSidePass, {"causal", "local"})):
        own = [cfg for cfg in everything if isinstance(cfg, kind)]
        assert {cfg.mask for cfg in own} == masks
        assert {cfg.dtype for cfg in own} == {"bf16", "fp16"} and {cfg.is_varlen for cfg in own} == {False, True}
    for kind in (OneSideConfig, PairConfig):
        kernels = [kernel for cfg in everything for kernel in kernels_of(cfg) if isinstance(kernel, kind)]
        assert {(kernel.head_dim_v, kernel.is_padded) for kernel in kernels} == {(0, True), (128, False), (128, True)}
