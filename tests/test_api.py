"""forward, warmup, explain, workspace_size over a stub of launch.py; attention over NumPy arrays. No GPU."""
import os
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import fa3_cute
from fa3_cute import (
    AttentionMode,
    DataType,
    FlashAttentionError,
    FlashAttentionParams,
    Status,
    api,
    attention,
    explain,
    forward,
    last_error,
    warmup,
    workspace_size,
)
from fa3_cute.compiler import CompileError
from fa3_cute.heuristics import forward_config
from fa3_cute.launch import CudaFailure, NotWarmedUp, UnsupportedDevice
from fa3_cute.reference import attention_reference

A = 0x7F00_0000_0000
GOOD = FlashAttentionParams(q=A, k=A, v=A, out=A, batch_size=2, seqlen_q=512, seqlen_k=512, num_heads=16, num_heads_k=4,
                            head_dim=128)
BAD = replace(GOOD, head_dim=80, num_heads=6)
HOST_BUDGET_US = 3.0
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def launches(monkeypatch):
    """Stands in for launch.py and lists what it is asked for."""
    calls = []

    class Call:
        shape = ()
        can_repeat = False

        def repeat(self, shape, pointers, stream):
            calls.extend([("repeat", pointers, stream)] * self.can_repeat)
            return self.can_repeat and shape is self.shape

    def launch(params, cfg, stream):
        calls.append(("launch", params, cfg, stream))
        return stub.call

    stub = SimpleNamespace(
        call=Call(), launch=launch,
        ensure_loaded=lambda cfg, device: calls.append(("load", cfg, device)), device_of=lambda stream: f"of {stream}",
        CudaFailure=CudaFailure, UnsupportedDevice=UnsupportedDevice, NotWarmedUp=NotWarmedUp)
    monkeypatch.setattr(api, "_launcher", lambda: stub)
    monkeypatch.setattr(api, "_recent", api._Recent())
    return SimpleNamespace(calls=calls, stub=stub)


# ---- the package -----------------------------------------------------------------------------------------------------

def test_public_names():
    assert set(fa3_cute.__all__) <= set(dir(fa3_cute))
    assert all(getattr(fa3_cute, name) is not None for name in fa3_cute.__all__)
    contract = ("FlashAttentionParams DataType AttentionMode Status FlashAttentionError forward get_error_string "
                "last_error explain warmup workspace_size attention")
    assert set(contract.split()) <= set(fa3_cute.__all__)
    with pytest.raises(AttributeError, match="flash_attention"):
        fa3_cute.flash_attention  # noqa: B018 (the access is the test)


def test_refusals_and_explanations_import_nothing_heavy():
    script = ("import sys; from fa3_cute import *; p = FlashAttentionParams(); assert forward(p) == -1 and explain(p);"
              "print(*sorted({'cutlass', 'cuda', 'numpy'} & {name.split('.')[0] for name in sys.modules}))")
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_params_are_a_record():
    with pytest.raises(TypeError):
        FlashAttentionParams(headdim=128)
    with pytest.raises(AttributeError):
        FlashAttentionParams().headdim = 128
    params = FlashAttentionParams()
    params.head_dim = 128
    assert params == FlashAttentionParams(head_dim=128)
    assert (params.dtype, params.mode, params.window_size_left) == (DataType.FP16, AttentionMode.PREFILL, -1)


# ---- forward and its relatives ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, config", [
    ({}, ("fp16", 128, False, False)),
    ({"dtype": DataType.BF16, "is_causal": True, "softmax_lse": A}, ("bf16", 128, True, True)),
    ({"dtype": 1, "head_dim": np.int64(64), "is_causal": np.True_}, ("bf16", 64, True, False)),
    ({"seqlen_q": 1, "mode": AttentionMode.DECODE, "softmax_lse": 0}, ("fp16", 128, False, False)),
])
def test_forward_launches_the_config_of_the_params(launches, changes, config):
    params = replace(GOOD, **changes)
    assert forward(params, 7) is Status.OK
    (_, launched, cfg, stream), = launches.calls
    assert launched is params and cfg is forward_config(*config) and stream == 7
    assert [type(value) for value in (cfg.head_dim, cfg.is_causal, cfg.has_lse)] == [int, bool, bool]


@pytest.mark.parametrize("call", [forward, warmup])
def test_refusal(launches, call):
    assert call(BAD, 7) is Status.UNSUPPORTED_HEAD_DIM
    assert launches.calls == []
    assert last_error().detail == "head_dim=80: must be 64, 96, 128, 192 or 256"
    with pytest.raises(ValueError, match="head_dim=80"):
        call(BAD).check()


def test_a_like_call_repeats_the_last_launch(launches):
    """With other addresses and another stream too; the launcher may decline, and then everything is checked anew."""
    forward(GOOD, 7)
    launches.stub.call.can_repeat = True
    other = replace(GOOD, q=5 * A, k=6 * A, v=7 * A, out=8 * A)
    assert forward(other, 8) is Status.OK
    launches.stub.call.can_repeat = False
    assert forward(other, 8) is Status.OK
    assert [call[0] for call in launches.calls] == ["launch", "repeat", "launch"]
    assert launches.calls[1][1:] == ((5 * A, 6 * A, 7 * A, 8 * A, 0), 8)


NOT_TENSORS = sorted({field.name for field in fields(FlashAttentionParams)} - {"q", "k", "v", "out"})


@pytest.mark.parametrize("name", NOT_TENSORS)
def test_no_field_escapes_a_repeated_launch(launches, name):
    """Any field that differs from the last call's, and any address that is wrong, is checked as in a first call."""
    forward(GOOD, 7)
    launches.stub.call.can_repeat = True
    for value in (3, "x", np.zeros(2), float("nan")):
        changed = replace(GOOD, **{name: value})
        status = forward(changed, 7)
        problem = next(iter(explain(changed)), None)
        assert status == (problem.status if problem else Status.OK)
        assert launches.calls[-1][0] == "launch", f"{name}={value!r} was overlooked"


@pytest.mark.parametrize("address, status", [(None, Status.NULL_POINTER), (A + 8, Status.INVALID_ARGUMENT),
                                             (-A, Status.INVALID_ARGUMENT), (2**64, Status.INVALID_ARGUMENT)])
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_addresses_of_a_repeated_launch_are_checked(launches, name, address, status):
    forward(GOOD, 7)
    launches.stub.call.can_repeat = True
    assert forward(replace(GOOD, **{name: address}), 7) is status
    assert len(launches.calls) == 1


def test_success_keeps_the_last_error(launches):
    forward(BAD)
    refused = last_error()
    assert forward(GOOD) is Status.OK and last_error() is refused
    with pytest.raises(FrozenInstanceError):
        refused.detail = ""


def test_warmup_loads_and_launches_nothing(launches):
    assert warmup(replace(GOOD, softmax_lse=A), 7) is Status.OK
    assert launches.calls == [("load", forward_config("fp16", 128, False, True), "of 7")]


FAILURES = [
    (CudaFailure(700, "cudaErrorIllegalAddress", "an illegal address", "launching"), Status.CUDA_ERROR),
    (UnsupportedDevice("compute capability 8.0"), Status.UNSUPPORTED_DEVICE),
    (CompileError("ptxas said no"), Status.COMPILE_ERROR),
    (NotWarmedUp("capturing"), Status.NOT_WARMED_UP),
]


@pytest.mark.parametrize("call, entry", [(forward, "launch"), (warmup, "ensure_loaded")])
@pytest.mark.parametrize("failure, status", FAILURES, ids=lambda value: type(value).__name__)
def test_failure(launches, call, entry, failure, status):
    def fail(*_):
        raise failure
    setattr(launches.stub, entry, fail)
    assert call(GOOD) is status
    assert (last_error().status, last_error().detail, last_error().cause) == (status, str(failure), failure)
    with pytest.raises(FlashAttentionError) as caught:
        call(GOOD).check()
    assert caught.value.__cause__ is failure


def test_a_bug_is_no_status(launches):
    def fail(*_):
        raise RuntimeError("a bug")
    launches.stub.launch = fail
    with pytest.raises(RuntimeError, match="a bug"):
        forward(GOOD)


@pytest.mark.parametrize("call", [forward, warmup, explain, workspace_size])
@pytest.mark.parametrize("params", [None, {}, FlashAttentionParams, 0])
def test_params_of_another_type(call, params):
    with pytest.raises(TypeError, match="params must be a FlashAttentionParams"):
        call(params)


@pytest.mark.parametrize("stream", ["7", True, 1.5, object()])
def test_stream_of_another_type(stream):
    with pytest.raises(TypeError, match="stream"):
        forward(GOOD, stream)


def test_subclass_of_params(launches):
    class Mine(FlashAttentionParams):
        pass
    assert forward(Mine(**{name: getattr(GOOD, name) for name in GOOD.__dataclass_fields__})) is Status.OK


def test_explain_tells_everything():
    assert [problem.status for problem in explain(BAD)] == [Status.UNSUPPORTED_HEAD_DIM, Status.INVALID_HEADS]
    assert str(explain(BAD)[1]) == "INVALID_HEADS (-4): num_heads=6: must be a multiple of num_heads_k=4"
    assert explain(GOOD) == []


def test_workspace_size():
    assert workspace_size(GOOD) == workspace_size(BAD) == 0


def test_threads_have_their_own_last_error(launches):
    details = {}

    def refuse(head_dim):
        for _ in range(200):
            forward(replace(GOOD, head_dim=head_dim))
            details.setdefault(head_dim, set()).add(last_error().detail)

    threads = [threading.Thread(target=refuse, args=(head_dim,)) for head_dim in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert details == {n: {f"head_dim={n}: must be 64, 96, 128, 192 or 256"} for n in (1, 2, 3)}


def test_host_time(launches):
    """What forward adds to launch, the best of many rounds: 3 us on an idle machine, three times that on a busy one."""
    launches.stub.call.can_repeat = True
    launches.stub.call.repeat = lambda shape, pointers, stream: True

    def round_us(count=1000):
        start = perf_counter()
        for _ in range(count):
            forward(GOOD, 7)
        return (perf_counter() - start) / count * 1e6

    assert min(round_us() for _ in range(20)) < 3 * HOST_BUDGET_US


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU")
@pytest.mark.parametrize("call", [forward, warmup])
def test_no_device(call):
    assert call(GOOD) is Status.UNSUPPORTED_DEVICE
    assert last_error().cause is not None


# ---- attention over NumPy arrays -------------------------------------------------------------------------------------

def arrays(*shapes, dtype=np.float16):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


Q, K, V = arrays((2, 5, 4, 64), (2, 9, 2, 64), (2, 9, 2, 64))
PACKED_Q, PACKED_K, PACKED_V = arrays((7, 4, 64), (9, 2, 64), (9, 2, 64))
OFFSETS = {"cu_seqlens_q": np.array([0, 3, 5], np.int32), "cu_seqlens_k": np.array([0, 0, 9], np.int32)}
E4M3 = ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize("qkv, options, result", [
    ((Q, K, V), {}, np.float16),
    ((Q, K, V), {"causal": True, "softmax_scale": 0.3, "num_splits": 1}, np.float16),
    ((Q, K, V), {"window_size": (2, 1), "seqused_k": np.array([4, 0], np.int32)}, np.float16),
    ((Q[:, :0], K, V), {}, np.float16),
    ((Q.astype(np.float32), K.astype(np.float32), V.astype(np.float32)), {}, np.float32),
    ([x.astype(ml_dtypes.bfloat16) for x in (Q, K, V)], {}, ml_dtypes.bfloat16),
    ([x.astype(E4M3) for x in (Q, K, V)], {"q_descale": np.float32([[2], [3]]), "v_descale": 0.5}, ml_dtypes.bfloat16),
    ([x.astype(E4M3).view(np.uint8) for x in (Q, K, V)], {"dtype": "float8_e4m3fn"}, ml_dtypes.bfloat16),
    ((PACKED_Q, PACKED_K, PACKED_V), {**OFFSETS, "causal": True}, np.float16),
])
def test_attention_is_the_reference_rounded(qkv, options, result):
    out, lse = attention(*qkv, return_lse=True, **options)
    exact, exact_lse = attention_reference(
        *qkv, **{name: value for name, value in options.items() if name not in ("dtype", "num_splits")})
    assert out.dtype == result and lse.dtype == np.float32
    np.testing.assert_array_equal(out, exact.astype(result))
    np.testing.assert_array_equal(lse, exact_lse.astype(np.float32))
    np.testing.assert_array_equal(attention(*qkv, **options), out)


def test_attention_writes_out_in_place_and_no_row_beyond_the_sequences():
    out = np.full_like(PACKED_Q, 7)
    assert attention(PACKED_Q, PACKED_K, PACKED_V, out=out, **OFFSETS) is out
    np.testing.assert_array_equal(out[:5], attention(PACKED_Q, PACKED_K, PACKED_V, **OFFSETS)[:5])
    assert (out[:3] == 0).all() and (out[5:] == 7).all()


class DeviceArray:
    __cuda_array_interface__ = {}


REFUSED = [
    (-16, (DeviceArray(), K, V), {}, "q is a .*DeviceArray.*not implemented yet"),
    (-16, (Q, K, V), {"out": DeviceArray()}, "out is a .*DeviceArray"),
    (-16, (Q, K, V), {"num_splits": 4}, "num_splits=4: must be 0 or 1"),
    (-13, (Q, K, V), {"num_splits": 257}, "num_splits=257"),
    (-9, (Q, K, V), {"stream": 7}, "stream=7: must be None"),
    (-9, (Q, K, V), {"softmax_scale": -1.0}, "softmax_scale=-1.0"),
    (-9, (Q, K, V), {"window_size": 3}, "window_size=3: must be a pair"),
    (-9, (Q, K.astype(np.float32), V), {}, "float16, float32, float16 of q, k, v"),
    (-9, (Q, K, V), {"dtype": "bfloat16"}, "dtype='bfloat16' with arrays of float16"),
    (-9, [x.astype(np.int32) for x in (Q, K, V)], {}, "arrays of int32"),
    (-9, (Q, K, V), {"q_descale": 2.0}, "q_descale_ptr=.*FP8_E4M3"),
    (-9, (Q, K, V), {"out": np.empty(Q.shape, np.float32)}, "out is float32.*must be float16"),
    (-7, (Q, K, V), {"out": np.empty((2, 64), np.float16)}, r"out is float16\[2, 64\]: must be float16\[2, 5, 4, 64\]"),
    (-7, (Q[0], K, V), {}, r"q.shape=\(5, 4, 64\)"),
    (-7, (Q, K, V[:, :3]), {}, "k and v alike"),
    (-7, (Q, K, V), {"seqused_k": np.array([4, 10])}, "seqused"),
    (-6, (PACKED_Q, PACKED_K, PACKED_V), {"cu_seqlens_q": OFFSETS["cu_seqlens_q"]}, "cu_seqlens_k=None"),
    (-5, (Q, K, V), {"causal": True, "window_size": (4, -1)}, "window_size_left=4"),
    (-4, (Q[:, :, :3], K, V), {}, "num_heads=3: must be a multiple of num_heads_k=2"),
    (-2, (Q[..., :40], K[..., :40], V[..., :40]), {}, "head_dim=40"),
]


@pytest.mark.parametrize("code, qkv, options, words", REFUSED)
def test_attention_refuses(code, qkv, options, words):
    with pytest.raises(FlashAttentionError, match=words) as caught:
        attention(*qkv, **options)
    assert caught.value.code == code


@pytest.mark.parametrize("qkv, options", [
    ((Q.tolist(), K, V), {}), ((Q, K, None), {}), ((Q, K, V), {"q_descale": "1"}), ((Q, K, V), {"seqused_k": [1, 2]})])
def test_attention_of_no_array(qkv, options):
    with pytest.raises(TypeError, match="must be a NumPy array"):
        attention(*qkv, **options)
