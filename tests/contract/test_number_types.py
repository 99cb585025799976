"""Numbers as NumPy, Python and other libraries write them: each field takes what it promises, and refuses the rest."""

import subprocess
import sys
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from rule_calls import DENSE, DENSE_FP8, DESCALES, PACKED_FP8, PER_HEAD, first_problem

from fa3_cute import FlashAttentionParams, InvalidCallError, Status, explain, forward, get_error_string, last_error
from fa3_cute.contract.params import ARGUMENTS
from fa3_cute.planning.operations import problems
from fa3_cute.runtime.cuda_driver import resolve_stream

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
NAMES = [field.name for field in fields(FlashAttentionParams)]
HUGE = 10**5000  # Python will not print it

KINDS = "int8 int16 int32 int64 uint8 uint16 uint32 uint64 intp longlong ulonglong bool_ float16 float32 float64"


def test_numpy_numbers_first_leave_nothing_behind():
    """In a process that has seen no plain ones: what a first call leaves in caches serves all later ones."""
    script = SUPPORT / "first_use.py"
    command = [sys.executable, "-W", "error", script, *KINDS.split()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


class Index:
    """An integer of some other library."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


class Own(int):
    """An int of a class of its own, as the members of an IntEnum are."""


class Fetched:
    """An array on a device, of one element: to ask for its value is to wait for the device."""

    def __dlpack__(self):
        raise AssertionError("fetched")

    __index__ = __int__ = __float__ = __bool__ = __dlpack__


@pytest.mark.parametrize("base", [DENSE, replace(DENSE_FP8, **DESCALES, **PER_HEAD), PACKED_FP8])
@pytest.mark.parametrize("kind", [Index, Own])
def test_index_is_enough_for_sizes(base, kind):
    for name, argument in ARGUMENTS.items():
        if argument.kind in ("size", "stride", "count") and getattr(base, name) is not None:
            assert problems(replace(base, **{name: kind(getattr(base, name))})) == [], name


@pytest.mark.parametrize(
    "kind",
    [Fetched, lambda: np.array(True), lambda: np.array(4), lambda: np.ones(1, int)],
    ids=["device", "bool", "int", "one"],
)
def test_arrays_are_no_numbers(kind):
    """None is fetched, refused every one."""
    for name in NAMES:
        params = replace(DENSE_FP8, **DESCALES | {name: kind()})
        assert problems(params), name
        assert first_problem(params) == problems(params)[0]


@pytest.mark.parametrize("base", [DENSE, PACKED_FP8])
@pytest.mark.parametrize(
    "value",
    [HUGE, -HUGE, 2**64, Index(HUGE), True, np.float32(1.5), 1 + 2j, np.complex64(1j)],
    ids=["huge", "minus huge", "2**64", "huge index", "bool", "float32", "complex", "complex64"],
)
def test_no_number_is_an_exception(base, value):
    """Sentences stay short, whatever the number."""
    for name in NAMES:
        params = replace(base, **{name: value})
        found = explain(params)
        assert first_problem(params) == (found or [None])[0]
        assert all(len(problem.detail) < 400 and problem.detail.isprintable() for problem in found), name


@pytest.mark.parametrize("value", [1 + 0j, np.complex64(1), np.complex128(1), True, Fetched(), "1"])
def test_a_scale_is_a_real_number(value):
    assert [problem.status for problem in problems(replace(DENSE, softmax_scale=value))] == [-9]
    assert problems(replace(DENSE, softmax_scale=Fraction(1, 3))) == []


def test_a_status_of_any_size_has_a_sentence():
    assert get_error_string(HUGE).startswith("unknown status <int of 16610 bits>")


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stream",
    [1.0, True, np.float32(5), np.float64(5), np.array(5), np.array([5]), "5", Fetched(), [], 5j],
    ids=lambda stream: type(stream).__name__,
)
def test_no_stream(stream):
    with pytest.raises(TypeError, match="stream must be an int handle, None or have __cuda_stream__"):
        forward(DENSE, stream)


@pytest.mark.parametrize("stream", [-1, -(2**63), 2**64, HUGE, np.int64(-1)], ids=lambda stream: f"{stream:#x}"[:20])
def test_no_handle(stream):
    assert forward(DENSE, stream) is Status.INVALID_ARGUMENT
    assert "stream=" in last_error().detail and "must be a handle, from 0 to 2**64 - 1" in last_error().detail
    with pytest.raises(InvalidCallError):
        resolve_stream(stream)


@pytest.mark.parametrize("stream, handle", [(None, 0), (7, 7), (np.uint64(2**64 - 1), 2**64 - 1), (np.int32(2), 2)])
def test_handles(stream, handle):
    found = resolve_stream(stream)
    assert (type(found), found) == (int, handle)


@pytest.mark.parametrize("stream", [-1, 2**64])
def test_no_handle_of_a_repeated_call(launches, stream):
    assert forward(DENSE, 7) is Status.OK
    assert forward(DENSE, stream) is Status.INVALID_ARGUMENT
    assert [call[0] for call in launches.calls] == ["launch"]
