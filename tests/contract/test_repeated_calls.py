"""forward's short cut for a call like the last one: what it takes and what it leaves to the full way. No GPU."""

from dataclasses import fields, replace

import numpy as np
import pytest
from calls import GOOD, GOOD_FP8, PACKED, A
from cuda.bindings.driver import CUdeviceptr

from fa3_cute import DataType, FlashAttentionParams, Status, api, explain, forward, last_error
from fa3_cute.runtime import repeat


@pytest.mark.parametrize("base", [GOOD, PACKED, replace(GOOD, seqused_k=A, window_size_left=8)])
def test_a_like_call_repeats_the_last_launch(launches, base):
    """With other addresses and another stream too; what cannot be repeated is launched anew, without another check."""
    forward(base, 7)
    launches.stub.call.can_repeat = True
    other = replace(base, q=5 * A, k=6 * A, v=7 * A, out=8 * A)
    assert forward(other, 8) is Status.OK
    launches.stub.call.can_repeat = False
    assert forward(other, 8) is Status.OK
    assert [call[0] for call in launches.calls] == ["launch", "repeat", "again"]
    assert launches.calls[1][1:] == launches.calls[2][1:] == ((5 * A, 6 * A, 7 * A, 8 * A, 0), 8)


def test_shapes_in_turn_are_all_known(launches):
    """The layers of a model that differ: a shape that comes again is launched its own way from then on."""
    shapes = GOOD, PACKED, GOOD_FP8, replace(GOOD, is_causal=True), replace(GOOD, seqlen_k=4096)
    for params in shapes * 2:
        assert forward(params, 7) is Status.OK
    launches.stub.call.can_repeat = True
    for params in shapes * 2:
        assert forward(replace(params, q=5 * A), 7) is Status.OK
    assert [call[0] for call in launches.calls] == ["launch"] * 10 + ["repeat"] * 10


def test_a_thread_remembers_so_many_shapes(launches):
    """Those that come again; of others it keeps little, and not for ever."""
    lengths = range(1, repeat.MAX_SHAPES + 1)
    for rows in (*lengths, *lengths):
        assert forward(replace(GOOD, seqlen_q=rows), 7) is Status.OK
    assert len(api._thread.known) == repeat.MAX_SHAPES
    for rows in range(1, repeat.MAX_SEEN + 3):
        assert forward(replace(GOOD, seqlen_q=5000 + rows), 7) is Status.OK
    assert not api._thread.known and len(api._thread.seen) <= repeat.MAX_SEEN


def test_descales_of_a_repeated_launch(launches):
    """They are free as the tensors are: absent, elsewhere, one of them alone."""
    base = replace(GOOD_FP8, q_descale_batch_stride=0, q_descale_head_stride=0)
    forward(base, 7)
    launches.stub.call.can_repeat = True
    for q, k, v in ((A, None, A + 4), (0, A, 4 * A), (None, None, None), (A + 8, A + 16, A + 24)):
        assert forward(replace(base, q_descale_ptr=q, k_descale_ptr=k, v_descale_ptr=v), 8) is Status.OK
        assert launches.calls[-1] == ("repeat", (A, A, A, A, 0, q or 0, k or 0, v or 0), 8)
    assert [call[0] for call in launches.calls] == ["launch"] + ["repeat"] * 4


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
@pytest.mark.parametrize("dim", ["batch", "head"])
def test_descales_with_strides_are_in_every_repeated_launch(launches, name, dim):
    """As in the first: without them the strides would be ignored. The others may be absent."""
    descales = {f"{of}_descale_ptr": A for of in "qkv"}
    base = replace(GOOD_FP8, **descales, q_descale_batch_stride=0, q_descale_head_stride=0)
    base = replace(base, **{f"{name}_{dim}_stride": 1})
    forward(base, 7)
    launches.stub.call.can_repeat = True
    others = {pointer: None for pointer in descales if pointer != f"{name}_ptr"}
    assert forward(replace(base, **others), 7) is Status.OK
    for absent in (None, 0):
        assert forward(replace(base, **{f"{name}_ptr": absent}), 7) is Status.INVALID_ARGUMENT
        assert last_error().detail == f"{name}_{dim}_stride=1: must be None or 0 without {name}_ptr"
    assert [call[0] for call in launches.calls] == ["launch", "repeat"]


@pytest.mark.parametrize(
    "address, status",
    [
        (A + 2, Status.INVALID_ARGUMENT),
        (-4, Status.INVALID_ARGUMENT),
        (2**64, Status.INVALID_ARGUMENT),
        ("x", Status.INVALID_ARGUMENT),
        (True, Status.INVALID_ARGUMENT),
        (CUdeviceptr(A), Status.OK),
    ],
)
@pytest.mark.parametrize("name", ["q_descale_ptr", "k_descale_ptr", "v_descale_ptr"])
def test_descales_of_a_repeated_launch_are_checked(launches, name, address, status):
    forward(GOOD_FP8, 7)
    launches.stub.call.can_repeat = True
    assert forward(replace(GOOD_FP8, **{name: address}), 7) is status
    assert [call[0] for call in launches.calls] == ["launch"] * (1 + (status is Status.OK))


@pytest.mark.parametrize(
    "first, second, status",
    [
        (GOOD_FP8, replace(GOOD, q_descale_ptr=A), Status.INVALID_ARGUMENT),
        (GOOD_FP8, GOOD, Status.OK),
        (GOOD, GOOD_FP8, Status.OK),
        (GOOD, replace(GOOD, v_descale_ptr=A), Status.INVALID_ARGUMENT),
        (GOOD_FP8, replace(GOOD_FP8, out_dtype=DataType.FP16), Status.OK),
    ],
)
def test_another_dtype_is_no_repeated_launch(launches, first, second, status):
    forward(first, 7)
    launches.stub.call.can_repeat = True
    assert forward(second, 7) is status
    assert all(call[0] == "launch" for call in launches.calls)


NOT_TENSORS = sorted({field.name for field in fields(FlashAttentionParams)} - {"q", "k", "v", "out"})


@pytest.mark.parametrize("base", [GOOD, PACKED, GOOD_FP8], ids=["dense", "packed", "FP8"])
@pytest.mark.parametrize("name", NOT_TENSORS)
def test_no_field_escapes_a_repeated_launch(launches, name, base, monkeypatch):
    """Any field that differs from the last call's, and any address that is wrong, is checked as in a first call."""
    launches.stub.call.can_repeat = True
    is_free = base is GOOD_FP8 and name.endswith("descale_ptr")
    for value in (3, "x", np.zeros(2), float("nan")) + (() if is_free else (A + 128,)):
        monkeypatch.setattr(api, "_thread", api._Thread())
        forward(base, 7)
        changed = replace(base, **{name: value})
        status = forward(changed, 7)
        problem = next(iter(explain(changed)), None)
        assert status == (problem.status if problem else Status.OK)
        assert launches.calls[-1][0] == "launch", f"{name}={value!r} was overlooked"


class Movable:
    """A pointer object that `+=` moves, as CuPy's: the same object, another address."""

    def __init__(self, at):
        self.at = at

    def __int__(self):
        return self.at


@pytest.mark.parametrize("base, name", [(PACKED, "cu_seqlens_q"), (PACKED, "cu_seqlens_k"), (GOOD, "seqused_k")])
def test_what_can_change_in_place_is_never_repeated(launches, base, name):
    params = replace(base, **{name: Movable(A)})
    forward(params, 7)
    launches.stub.call.can_repeat = True
    getattr(params, name).at = A + 2
    assert forward(params, 7) is Status.INVALID_ARGUMENT
    getattr(params, name).at = A + 4
    assert forward(params, 7) is Status.OK
    assert [call[0] for call in launches.calls] == ["launch", "launch"]


@pytest.mark.parametrize(
    "address, status",
    [
        (None, Status.NULL_POINTER),
        (A + 8, Status.INVALID_ARGUMENT),
        (-A, Status.INVALID_ARGUMENT),
        (2**64, Status.INVALID_ARGUMENT),
    ],
)
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_addresses_of_a_repeated_launch_are_checked(launches, name, address, status):
    forward(GOOD, 7)
    launches.stub.call.can_repeat = True
    assert forward(replace(GOOD, **{name: address}), 7) is status
    assert len(launches.calls) == 1
