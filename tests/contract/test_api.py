"""forward, warmup, explain, workspace_size over a stub of launch.py. No GPU."""

import os
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from calls import GOOD, GOOD_FP8, PACKED, A
from cuda.bindings.driver import CUdeviceptr

import fa3_cute
from fa3_cute import (
    AttentionMode,
    DataType,
    FlashAttentionError,
    FlashAttentionParams,
    Status,
    explain,
    forward,
    last_error,
    warmup,
    workspace_size,
)
from fa3_cute.api import kernel_config
from fa3_cute.runtime.compiler import CompileError
from fa3_cute.planning.tables import decode_config, forward_config
from fa3_cute.runtime.launch import CudaFailure, NotWarmedUp, UnsupportedDevice
from fa3_cute.planning.splits import plan

BAD = replace(GOOD, head_dim=84, num_heads=6)
ROOT = Path(__file__).resolve().parents[2]


# ---- the package -----------------------------------------------------------------------------------------------------


def test_public_names():
    assert set(fa3_cute.__all__) <= set(dir(fa3_cute))
    assert all(getattr(fa3_cute, name) is not None for name in fa3_cute.__all__)
    contract = (
        "FlashAttentionParams DataType AttentionMode Status FlashAttentionError forward get_error_string "
        "last_error explain warmup workspace_size attention"
    )
    assert set(contract.split()) <= set(fa3_cute.__all__)
    with pytest.raises(AttributeError, match="flash_attention"):
        fa3_cute.flash_attention  # noqa: B018 (the access is the test)


def test_refusals_and_explanations_import_nothing_heavy():
    script = (
        "import sys; from fa3_cute import FlashAttentionParams, explain, forward, get_error_string, last_error;"
        "p = FlashAttentionParams(); assert forward(p) == -1 and explain(p) and last_error();"
        "print(*sorted({'cutlass', 'cuda', 'numpy'} & {name.split('.')[0] for name in sys.modules}))"
    )
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


@pytest.mark.parametrize(
    "base, changes, config",
    [
        (GOOD, {}, ("fp16", 128, "full", False, False)),
        (GOOD, {"dtype": DataType.BF16, "is_causal": True, "softmax_lse": A}, ("bf16", 128, "causal", True, False)),
        (GOOD, {"dtype": 1, "head_dim": np.int64(64), "is_causal": np.True_}, ("bf16", 64, "causal", False, False)),
        (GOOD, {"seqused_q": A}, ("fp16", 128, "full", False, True)),
        (GOOD, {"seqused_k": A, "window_size_left": 9}, ("fp16", 128, "local", False, True)),
        (GOOD, {"seqused_q": 0, "seqused_k": CUdeviceptr(0)}, ("fp16", 128, "full", False, False)),
        (GOOD, {"seqused_k": CUdeviceptr(A)}, ("fp16", 128, "full", False, True)),
        (PACKED, {}, ("fp16", 128, "full", False, True)),
        (PACKED, {"is_causal": True, "softmax_lse": A}, ("fp16", 128, "causal", True, True)),
        (PACKED, {"total_k": 0, "mode": 2}, ("fp16", 128, "full", False, True)),
        (GOOD, {"dtype": DataType.BF16, "out_dtype": DataType.BF16}, ("bf16", 128, "full", False, False)),
        (GOOD_FP8, {}, ("fp8_e4m3", 128, "full", False, False, "bf16")),
        (GOOD_FP8, {"out_dtype": DataType.BF16, "is_causal": True}, ("fp8_e4m3", 128, "causal", False, False, "bf16")),
        (
            GOOD_FP8,
            {"out_dtype": DataType.FP16, "head_dim": 64, "softmax_lse": A},
            ("fp8_e4m3", 64, "full", True, False, "fp16"),
        ),
        (
            GOOD_FP8,
            {"dtype": 2, "out_dtype": np.int64(0), "head_dim": 96, "window_size_left": 3},
            ("fp8_e4m3", 96, "local", False, False, "fp16"),
        ),
        (PACKED, {"dtype": DataType.FP8_E4M3, "seqused_k": A}, ("fp8_e4m3", 128, "full", False, True, "bf16")),
    ],
)
def test_forward_launches_the_config_of_the_params(launches, base, changes, config):
    params = replace(base, **changes)
    assert forward(params, 7) is Status.OK
    ((_, addresses, cfg, stream),) = launches.calls
    assert addresses[:5] == (A, A, A, A, params.softmax_lse or 0) and cfg is forward_config(*config) and stream == 7
    assert [type(value) for value in (cfg.head_dim, cfg.has_lse, cfg.is_varlen)] == [int, bool, bool]


LARGEST, UNBOUNDED = 2**31 - 256, 2**30


@pytest.mark.parametrize(
    "left, right, mask",
    [
        (-1, -1, "full"),
        (-9, LARGEST, "full"),
        (UNBOUNDED, -1, "full"),
        (LARGEST, UNBOUNDED, "full"),
        (-1, 0, "causal"),
        (UNBOUNDED, 0, "causal"),
        (LARGEST, np.int64(0), "causal"),
        (0, 0, "local"),
        (0, -1, "local"),
        (-1, 1, "local"),
        (UNBOUNDED - 1, -1, "local"),
        (-1, UNBOUNDED - 1, "local"),
        (4096, 0, "local"),
        (LARGEST, 7, "local"),
        (np.int32(5), LARGEST, "local"),
    ],
)
def test_the_window_chooses_the_mask(launches, left, right, mask):
    """An unbounded side costs nothing, and a window from the diagonal on to the left is causal."""
    assert forward(replace(GOOD, window_size_left=left, window_size_right=right)) is Status.OK
    assert launches.calls[0][2].mask == mask


def test_no_queries_are_no_launch(launches):
    """Nothing to write: OK with no stream, no compile, no device; warmup still loads what a like call will need."""
    empty = replace(PACKED, total_q=0)
    assert forward(empty, 7) is forward(replace(empty, total_q=np.int64(0)), 7) is Status.OK
    assert launches.calls == []
    assert forward(replace(empty, head_dim=84)) is Status.UNSUPPORTED_HEAD_DIM
    assert warmup(empty, 7) is Status.OK
    assert launches.calls == [("load", forward_config("fp16", 128, "full", False, True), 7)]


@pytest.mark.parametrize("call", [forward, warmup])
def test_refusal(launches, call):
    assert call(BAD, 7) is Status.UNSUPPORTED_HEAD_DIM
    assert launches.calls == []
    assert last_error().detail == "head_dim=84: must be a multiple of 8 from 8 to 256, 512, or 576 with head_dim_v=512"
    with pytest.raises(ValueError, match="head_dim=84"):
        call(BAD).check()


def test_success_keeps_the_last_error(launches):
    forward(BAD)
    refused = last_error()
    assert forward(GOOD) is Status.OK and last_error() is refused
    with pytest.raises(FrozenInstanceError):
        refused.detail = ""


def test_warmup_loads_and_launches_nothing(launches):
    assert warmup(replace(GOOD, softmax_lse=A), 7) is Status.OK
    assert launches.calls == [("load", forward_config("fp16", 128, "full", True, False), 7)]


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


@pytest.mark.parametrize(
    "changes, is_local",
    [
        ({"seqlen_q": 1, "mode": AttentionMode.DECODE, "softmax_lse": 0}, False),
        ({"seqlen_q": 1, "is_causal": True}, False),  # the last query sees every key
        ({"seqlen_q": 1, "window_size_right": 5}, False),
        ({"seqlen_q": 1, "window_size_left": 5}, True),
        ({"seqlen_q": 2, "is_causal": True}, True),
        ({"num_splits": 2}, False),
        ({"pack_gqa": True, "window_size_right": 0}, True),
    ],
)
def test_forward_launches_the_decode_config_of_the_params(launches, changes, is_local):
    assert forward(replace(GOOD, **changes), 7) is Status.OK
    assert launches.calls[0][2] is decode_config("fp16", 128, is_local)
    assert forward(replace(GOOD_FP8, **changes), 7) is Status.OK
    assert launches.calls[1][2] is decode_config("fp8_e4m3", 128, is_local, "bf16")
    assert forward(replace(GOOD_FP8, out_dtype=DataType.FP16, **changes), 7) is Status.OK
    assert launches.calls[2][2] is decode_config("fp8_e4m3", 128, is_local, "fp16")


def test_workspace_size():
    """Of what cannot be merged within clusters; a workspace that is smaller is refused."""
    decode = replace(GOOD, seqlen_q=1, num_splits=32, q=None)
    rows = 2 * decode.num_heads  # 2 clusters of 16 CTAs
    needed = 4 * decode.batch_size * rows * (decode.head_dim + 1)
    assert workspace_size(decode) == workspace_size(replace(decode, workspace=A, workspace_bytes=1)) == needed
    assert workspace_size(GOOD) == workspace_size(replace(decode, num_splits=16)) == 0
    with pytest.raises(ValueError, match="head_dim=84"):
        workspace_size(BAD)
    with pytest.raises(ValueError, match="head_dim=136"):
        workspace_size(replace(decode, dtype=DataType.FP8_E4M3, head_dim=136))
    small, enough = (replace(decode, q=A, workspace=A, workspace_bytes=needed - less) for less in (1, 0))
    assert [str(problem) for problem in explain(small)] == [
        f"INVALID_ARGUMENT (-9): workspace_bytes={needed - 1}: must be at least workspace_size(params)={needed}"
    ]
    assert explain(enough) == []


@pytest.mark.parametrize(
    "changes", [{}, {"num_splits": 32}, {"seqlen_k": 2**17, "batch_size": 1}, {"seqlen_k": 20_000}]
)
def test_workspace_size_of_fp8(changes):
    """Of the plan of the very kernel that is launched: what one byte less is refused for."""
    decode = replace(GOOD_FP8, seqlen_q=1, **changes)
    cfg = kernel_config(decode)
    assert cfg == decode_config("fp8_e4m3", 128, False, "bf16")
    choices = (None, decode.num_splits)
    found = plan(cfg, decode.batch_size, 1, decode.seqlen_k, 16, 4, 2 * UNBOUNDED + 1, choices)
    needed = workspace_size(decode)
    assert needed == found.partial_bytes == workspace_size(replace(decode, out_dtype=DataType.FP16))
    assert not needed or explain(replace(decode, workspace=A, workspace_bytes=needed - 1))
    assert explain(replace(decode, workspace=A, workspace_bytes=needed or 1)) == []


def test_warmup_prepares_the_workspace(launches):
    assert warmup(replace(GOOD, seqlen_q=1, num_splits=32), 7) is Status.OK
    assert [call[0] for call in launches.calls] == ["load", "prepare"]


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
    assert details == {
        n: {f"head_dim={n}: must be a multiple of 8 from 8 to 256, 512, or 576 with head_dim_v=512"} for n in (1, 2, 3)
    }


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU")
@pytest.mark.parametrize("call", [forward, warmup])
def test_no_device(call):
    assert call(GOOD) is Status.UNSUPPORTED_DEVICE
    assert last_error().cause is not None
