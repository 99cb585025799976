"""Status codes, their exceptions, the last error of each thread."""

import copy
import pickle
import threading

import pytest

from fa3_cute import FlashAttentionError, Status, get_error_string, last_error
from fa3_cute.contract import status

# The table of the API: any change of a name, a number or the order is a change of the interface.
TABLE = {
    "OK": 0,
    "NULL_POINTER": -1,
    "UNSUPPORTED_HEAD_DIM": -2,
    "FP8_HEAD_DIM": -3,
    "INVALID_HEADS": -4,
    "CAUSAL_WINDOW_CONFLICT": -5,
    "VARLEN_MISMATCH": -6,
    "INVALID_SHAPE": -7,
    "MODE_MISMATCH": -8,
    "INVALID_ARGUMENT": -9,
    "BF16_UNSUPPORTED": -10,
    "SOFTCAP_UNSUPPORTED": -11,
    "PACK_GQA_UNSUPPORTED": -12,
    "SPLIT_KV_UNSUPPORTED": -13,
    "PAGED_KV_UNSUPPORTED": -14,
    "ROTARY_UNSUPPORTED": -15,
    "FEATURE_UNSUPPORTED": -16,
    "CUDA_ERROR": -100,
    "UNSUPPORTED_DEVICE": -101,
    "COMPILE_ERROR": -102,
    "NOT_WARMED_UP": -103,
}
REFUSALS = [code for code in Status if code is not Status.OK]


class Hostile:
    """Every conversion fails, in its own way."""

    def __repr__(self):
        raise OSError

    __eq__ = __hash__ = __index__ = __int__ = __repr__


def test_table():
    assert {code.name: int(code) for code in Status} == TABLE
    assert list(Status) == sorted(Status, reverse=True)


@pytest.mark.parametrize("code", Status)
def test_error_string_names_the_code(code):
    assert get_error_string(int(code)).startswith(f"{code.name}: ")


@pytest.mark.parametrize(
    "value", [1, -17, -99, 2**70, None, "x", 0.5, [], {}, Hostile()], ids=lambda value: type(value).__name__
)
def test_error_string_never_raises(value):
    assert get_error_string(value).startswith("unknown status ")


def test_ok_passes():
    assert Status.OK.check() is None


@pytest.mark.parametrize("code", REFUSALS)
def test_check_raises_the_class_of_the_code(code):
    status.record_error(code, "head_dim=80: must be 64")
    with pytest.raises(FlashAttentionError, match=rf"^head_dim=80: must be 64 \[{code.name} {int(code)}\]$") as caught:
        code.check()
    error = caught.value
    assert (error.code, error.detail) == (code, "head_dim=80: must be 64")
    assert isinstance(error, RuntimeError)
    assert isinstance(error, ValueError) == (-9 <= code <= -1 or code in (-11, -13, -14, -15))
    assert isinstance(error, NotImplementedError) == (code in (-10, -12, -16))
    assert (
        type(error)
        in (status.CudaError, status.UnsupportedDeviceError, status.KernelCompileError, status.NotWarmedUpError)
    ) == (code <= -100)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(twin), twin.code, twin.detail, str(twin)) == (type(error), code, error.detail, str(error))


def test_each_failure_has_its_own_class():
    assert len({type(status.error_for(code)) for code in Status if code <= -100}) == 4


def test_check_of_another_status_says_the_general_sentence():
    status.record_error(Status.INVALID_SHAPE, "batch_size=0", ValueError("unrelated"))
    with pytest.raises(FlashAttentionError) as caught:
        Status.NULL_POINTER.check()
    assert caught.value.detail == get_error_string(Status.NULL_POINTER)
    assert caught.value.__cause__ is None


def test_check_chains_the_cause():
    cause = RuntimeError("the driver said so")
    assert status.record_error(Status.CUDA_ERROR, "launch failed", cause) is Status.CUDA_ERROR
    with pytest.raises(status.CudaError) as caught:
        Status.CUDA_ERROR.check()
    assert caught.value.__cause__ is cause is last_error().cause


def test_last_error_belongs_to_its_thread():
    status.record_error(Status.INVALID_SHAPE, "of this thread")
    seen = []

    def other():
        seen.append(last_error())
        status.record_error(Status.NULL_POINTER, "of the other thread")
        seen.append(str(last_error()))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [None, "NULL_POINTER (-1): of the other thread"]
    assert str(last_error()) == "INVALID_SHAPE (-7): of this thread"


@pytest.mark.parametrize(
    "value, text",
    [(Status.OK, "Status.OK"), ("a\n b", r"'a\n b'"), ("x" * 200, "'" + "x" * 76 + "..."), (Hostile(), "<Hostile>")],
)
def test_shown(value, text):
    assert status.shown(value) == text
