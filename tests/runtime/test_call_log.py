"""The log of calls: what a line says, that it is there before the call, what it must never do."""

import ctypes
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from cuda.bindings import driver
from logged_calls import BACKWARD, CALLS, DENSE, MERGE, PAGED, at

from fa3_cute import FlashAttentionParams, MaskMod, Status, explain
from fa3_cute.runtime import cuda_driver
from fa3_cute.runtime.tracing import log, watch
from fa3_cute.runtime.tracing.log import CallLog
from fa3_cute.runtime.tracing.record import Ints, Unreadable, fields_of, lengths_of, line_of, params_of, parsed

every_call = pytest.mark.parametrize("call, params", CALLS.values(), ids=CALLS)


def fields(params, call="forward"):
    return json.loads(line_of(call, params))["fields"]


# ---- lines -----------------------------------------------------------------------------------------------------------


@every_call
def test_the_calls_are_good(call, params):
    assert explain(params) == []


def test_a_line_has_what_is_not_the_default():
    found = fields(replace(DENSE, is_causal=1, softcap=0, num_splits=np.int64(3), window_size_right=-1))
    assert found == {
        "q": 256,
        "k": 256,
        "v": 256,
        "out": 256,
        "batch_size": 2,
        "seqlen_q": 70,
        "seqlen_k": 90,
        "num_heads": 4,
        "num_heads_k": 2,
        "head_dim": 64,
        "dtype": "BF16",
        "is_causal": True,
        "num_splits": 3,
    }


@pytest.mark.parametrize("address, shown", [(at(1, 16), 16), (at(1, 3), 1), (at(1, 512), 256), (at(1, 320), 64)])
def test_addresses_are_alignments(address, shown):
    found = fields(replace(DENSE, q=address, softmax_lse=0))
    assert found["q"] == shown and "softmax_lse" not in found
    assert str(address) not in line_of("forward", replace(DENSE, q=address))


def test_the_same_address_is_named():
    found = fields(MERGE, "merge_attention")
    assert (found["out_a"], found["out"], found["lse_b"]) == (256, "out_a", 4)


@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("seqlen_q", "x", "str"),
        ("q", np.zeros(1), "ndarray"),
        ("dtype", "bf16", "str"),
        ("mode", 7, "int"),
        ("softmax_scale", np.zeros(2), "ndarray"),
        ("is_causal", 5, "int"),
        ("score_mod", len, "builtin_function_or_method"),
    ],
)
def test_what_means_nothing_is_its_type(name, value, shown):
    line = line_of("forward", replace(DENSE, **{name: value}))
    assert json.loads(line)["fields"][name] == {"wrong": shown}
    with pytest.raises(Unreadable, match=name):
        params_of(parsed(line) or {})


class Hostile:
    """Raises whatever is asked."""

    def _refuse(self, *_):
        raise RuntimeError("no")

    __eq__ = __hash__ = __int__ = __float__ = __index__ = __bool__ = __repr__ = __len__ = _refuse


@pytest.mark.parametrize(
    "name", ["q", "seqlen_q", "dtype", "is_causal", "softmax_scale", "q_row_stride", "mod_scalars"]
)
def test_nothing_is_raised(name):
    assert fields(replace(DENSE, **{name: Hostile()}))[name] == {"wrong": "Hostile"}


def test_functions_are_named_and_cannot_be_read_back():
    mod = MaskMod(lambda batch, head, query, key, info, aux: key < 5, name="first_five")
    line = line_of("forward", replace(DENSE, mask_mod=mod, mod_pointers=(at(3, 4),), mod_scalars=(1.5,)))
    found = json.loads(line)["fields"]
    assert (found["mask_mod"]["id"], found["mod_pointers"], found["mod_scalars"]) == (mod.id, [4], [1.5])
    with pytest.raises(Unreadable, match="mask_mod is a function"):
        params_of(parsed(line) or {})


@every_call
def test_a_line_is_read_back(call, params):
    record = parsed("[rank 0] " + line_of(call, params, pid=1))
    assert record and record["fa3_cute"] == call and record["pid"] == 1
    found = params_of(record)
    assert type(found) is type(params)
    pointers = {name for name, shown in fields_of(call, params).items() if getattr(params, name) >= at(1)}
    assert all(getattr(found, n) == getattr(params, n) for n in params.__dataclass_fields__ if n not in pointers)


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"fa3_cute": "forward", "fields": {"q": 2', "damaged"),
        ('{"fa3_cute": "attend", "fields": {}}', "forward, merge_attention, backward"),
        ('{"fa3_cute": "forward"}', "with its fields"),
        ('{"fa3_cute": "forward", "fields": {"qq": 1}}', "qq"),
        ('{"fa3_cute": "forward", "fields": {"dtype": "INT4"}}', "FP16, BF16"),
    ],
)
def test_a_bad_line_is_said(line, said):
    with pytest.raises(Unreadable, match=said):
        params_of(parsed(line) or {})


@pytest.mark.parametrize("line", ["", "{}", "WARNING fa3_cute: ignoring", '{"other": 1}'])
def test_other_lines_are_none(line):
    assert parsed(line) is None


# ---- when and where --------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """watched(function, **environment): the function as the environment wants it."""

    def make(function, **environment):
        for name in ("FA3_CUTE_LOG_CALLS", "FA3_CUTE_LOG_LENGTHS", "FA3_CUTE_NVTX", "FA3_CUTE_STATS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        watch._call_log.cache_clear()
        watch._ranges.cache_clear()
        return watch.watched(function)

    yield make
    watch._call_log.cache_clear()
    watch._ranges.cache_clear()


def test_off_is_the_function_itself(watched):
    def forward(params, stream=None):
        return Status.OK

    assert watched(forward) is forward
    off = {"FA3_CUTE_LOG_CALLS": "0", "FA3_CUTE_NVTX": "", "FA3_CUTE_STATS": "0", "FA3_CUTE_LOG_LENGTHS": "1"}
    assert watched(forward, **off) is forward


def test_a_line_is_written_before_the_call(watched, tmp_path):
    file, seen = tmp_path / "calls", []

    def forward(params, stream=None):
        """What it does."""
        seen.append(file.read_text())
        return params.seqlen_q, stream

    call = watched(forward, FA3_CUTE_LOG_CALLS=str(file))
    assert call(DENSE, 5) == (70, 5) and call(params=DENSE, stream=None) == (70, None)
    assert (call.__name__, call.__doc__) == ("forward", "What it does.")
    first, second = seen
    assert second == first * 2 and json.loads(first)["fields"] == fields(DENSE) and first.endswith("\n")


def test_stderr(watched, capsys):
    def backward(params, stream=None):
        return Status.OK

    assert watched(backward, FA3_CUTE_LOG_CALLS="1")(BACKWARD) == Status.OK
    assert json.loads(capsys.readouterr().err)["fa3_cute"] == "backward"


def test_a_log_that_cannot_be_written_goes_to_stderr(tmp_path, capsys, caplog):
    calls = CallLog(str(tmp_path / "no" / "calls"), False)
    calls.write("forward", DENSE, None)
    calls.write("forward", DENSE, None)
    assert len(capsys.readouterr().err.splitlines()) == 2
    (record,) = caplog.records
    assert "FA3_CUTE_LOG_CALLS" in record.message and "stderr" in record.message


def test_no_params_make_no_line(capsys):
    CallLog("1", True).write("forward", {"q": 1}, None)
    CallLog("1", True).write("merge_attention", DENSE, None)
    assert capsys.readouterr().err == ""


SCRIPT = """
from fa3_cute import FlashAttentionParams, MergeParams, BackwardParams, forward, merge_attention, backward
print(int(forward(FlashAttentionParams(q=16))), int(merge_attention(MergeParams())), int(backward(BackwardParams())))
try:
    forward(3)
except TypeError as error:
    print(error)
"""


def test_the_package_s_own_functions(tmp_path):
    """Refusals are the same, and each has its line; without the variable the functions are not wrapped."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FA3_CUTE_")}

    def said(script, **changes):
        return subprocess.run(
            [sys.executable, "-c", script], env=environment | changes, capture_output=True, text=True, check=True
        ).stdout

    file = tmp_path / "calls"
    assert said(SCRIPT, FA3_CUTE_LOG_CALLS=str(file)) == said(SCRIPT) != ""
    assert [json.loads(line)["fa3_cute"] for line in file.read_text().splitlines()] == list(log.CALLS)
    wrapped = "from fa3_cute import *\nprint([hasattr(f, '__wrapped__') for f in (forward, merge_attention, backward)])"
    assert said(wrapped) == "[False, False, False]\n"
    assert said(wrapped, FA3_CUTE_STATS="1") == "[True, True, True]\n"


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_which_arrays_have_lengths():
    assert lengths_of(PAGED) == {
        "cu_seqlens_q": Ints(1, 4, 4),
        "seqused_k": Ints(1, 3, 3),
        "page_table": Ints(3, 4, 7),
    }
    assert lengths_of(replace(PAGED, kv_batch_idx=at(3), batch_size_k=5, page_table_batch_stride=None)) == {
        "cu_seqlens_q": Ints(1, 4, 4),
        "seqused_k": Ints(1, 3, 3),
        "kv_batch_idx": Ints(1, 3, 3),
        "page_table": Ints(5, 4, 4),
    }
    assert lengths_of(DENSE) == {}


@pytest.fixture
def memory(monkeypatch):
    """Device memory is the host's; the streams that were waited for."""
    waited = []
    monkeypatch.setattr(cuda_driver, "device_made_current", lambda stream: nullcontext())
    monkeypatch.setattr(cuda_driver, "capture_rules_relaxed", nullcontext)
    monkeypatch.setattr(cuda_driver, "is_capturing", lambda stream: stream == 9)
    monkeypatch.setattr(driver, "cuStreamSynchronize", lambda stream: (waited.append(stream), (0,))[1])
    monkeypatch.setattr(driver, "cuMemcpyDtoH", lambda to, source, size: (ctypes.memmove(to, source, size), (0,))[1])
    return waited


def paged_call():
    """A call whose lengths lie in NumPy's arrays, and these."""
    arrays = {
        "cu_seqlens_q": np.array([0, 30, 60, 100], np.int32),
        "seqused_k": np.array([64, 0, 17], np.int32),
        "page_table": np.arange(21, dtype=np.int32).reshape(3, 7)[:, :4],
    }
    return replace(PAGED, **{name: array.ctypes.data for name, array in arrays.items()}), arrays


def test_lengths_are_read_if_asked_for(memory, capsys):
    params, arrays = paged_call()
    CallLog("1", True).write("forward", params, 7)
    found = json.loads(capsys.readouterr().err)["lengths"]
    assert found == {name: array.tolist() for name, array in arrays.items()}
    assert set(memory) == {7}
    CallLog("1", False).write("forward", params, 7)
    assert "lengths" not in json.loads(capsys.readouterr().err) and len(memory) == len(arrays)


@pytest.mark.parametrize(
    "changes, stream, said",
    [({}, 9, "capturing"), ({"seqlen_k": -1}, 7, "seqlen_k=-1"), ({}, "x", "stream must be")],
)
def test_lengths_that_cannot_be_read(changes, stream, said, memory, capsys):
    CallLog("1", True).write("forward", replace(paged_call()[0], **changes), stream)
    found = json.loads(capsys.readouterr().err)["lengths"]
    assert found.startswith("not read: ") and said in found and memory == []


def test_lengths_of_nothing(memory):
    assert log.read(8, Ints(3, 0, 5), 7) == [[], [], []]


# ---- ranges ----------------------------------------------------------------------------------------------------------


class Ranges:
    """The package nvtx: what was begun and ended."""

    def __init__(self):
        self.seen = []

    def annotate(self, message, domain):
        ranges = self

        class Range:
            def __enter__(self):
                ranges.seen.append(f"{domain}: {message}")

            def __exit__(self, *_):
                ranges.seen.append("end")

        return Range()


def test_ranges(watched, monkeypatch):
    ranges = Ranges()
    monkeypatch.setitem(sys.modules, "nvtx", ranges)

    def forward(params, stream=None):
        ranges.seen.append(stream)
        raise TypeError

    with pytest.raises(TypeError):
        watched(forward, FA3_CUTE_NVTX="1")(FlashAttentionParams(), 3)
    assert ranges.seen == ["fa3_cute: forward", 3, "end"]


def test_ranges_without_the_package(watched, monkeypatch, caplog):
    def forward(params, stream=None):
        return Status.OK

    monkeypatch.setitem(sys.modules, "nvtx", None)
    assert watched(forward, FA3_CUTE_NVTX="1") is forward
    (record,) = caplog.records
    assert "FA3_CUTE_NVTX" in record.message and "package nvtx" in record.message
