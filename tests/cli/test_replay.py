"""replay: which arrays it makes for a logged call, what it says of its outcome, what it cannot repeat."""

import argparse
import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import FakeGpu
from logged_calls import APPEND, BACKWARD, CALLS, DECODE, DENSE, FORWARD, FP8, MERGE, PACKED, PAGED, SCORES, STRIDED, at

from fa3_cute import MaskMod, Status, explain, workspace_size
from fa3_cute.api import kernel_config
from fa3_cute.cli import replay, replayed
from fa3_cute.contract.reference import attention_reference, to_bits
from fa3_cute.contract.status import record_error
from fa3_cute.runtime.tracing.record import Unreadable, fields_of, line_of, params_of, parsed

every_call = pytest.mark.parametrize("call, params", CALLS.values(), ids=CALLS)


def read_back(call, params):
    """The params of the line of a call."""
    record = parsed(line_of(call, params))
    assert record is not None
    return params_of(record)


def arrays(call, params, lengths=None):
    """{field: array} of a call from its line."""
    return replayed.arrays_of(replayed.stood_in(read_back(call, params)), lengths or {})


def made(array):
    """All numbers of an array."""
    return array.make(np.random.default_rng(0), array.size)


def run(*argv: str) -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser()
    replay.add_arguments(parser)
    return replay.run(parser.parse_args(argv))


@pytest.fixture
def file_of(tmp_path):
    """file_of(call, params, ...): a log of them."""

    def write(*calls, lines=()):
        path = tmp_path / "calls"
        path.write_text("".join(f"{line}\n" for line in (*(line_of(*call) for call in calls), *lines)))
        return str(path)

    return write


# ---- addresses -------------------------------------------------------------------------------------------------------


@every_call
def test_the_same_call_comes_out(call, params):
    """Same fields, same alignments, same addresses the same; nothing overlaps that did not."""
    found = replayed.stood_in(read_back(call, params))
    assert fields_of(call, found) == fields_of(call, params)
    assert explain(found) == []
    if call == "forward":
        assert kernel_config(found) == kernel_config(params) and workspace_size(found) == workspace_size(params)


@pytest.mark.parametrize("shown", ["nothing", "softmax_lse", "v", 0.5, 512, -1, True])
def test_a_bad_pointer_is_said(shown):
    with pytest.raises(Unreadable, match="q="):
        replayed.stood_in(replace(DENSE, q=shown, k=1, v=1, out=1))


# ---- arrays ----------------------------------------------------------------------------------------------------------


SIZES = [
    (DENSE, {"q": 2 * 70 * 4 * 64, "k": 2 * 90 * 2 * 64, "v": 2 * 90 * 2 * 64, "out": 2 * 70 * 4 * 64}),
    (STRIDED, {"k": (1 << 20) + 89 * 128 + 64 + 64, "v": 2 * 90 * 2 * 64}),
    (PACKED, {"q": 100 * 4 * 64, "v": 100 * 2 * 64, "softmax_lse": 4 * 100, "cu_seqlens_q": 4}),
    (PAGED, {"q": 100 * 4 * 64, "k": 12 * 16 * 2 * 64, "page_table": 2 * 7 + 4, "seqused_k": 3, "cu_seqlens_q": 4}),
    (
        APPEND,
        {"k_new": 31 * 2 * 64, "v_new": 30 * 256 + 2 * 64, "rotary_cos": 59 * 24 + 16, "rotary_sin": 59 * 24 + 16},
    ),
    (FP8, {"q_descale_ptr": 9 + 3 * 2 + 1, "k_descale_ptr": 1, "out": 2 * 70 * 4 * 64}),
    (SCORES, {"s_aux": 4, "alibi_slopes": 8, "attn_mask": 6400 + 69 * 90 + 90, "rng_state": 2}),
    (
        replace(DENSE, head_dim_v=512, q_v=6 << 45, q_v_head_stride=576, q_v_row_stride=4 * 576),
        {"q": 2 * 70 * 4 * 64, "q_v": 70 * 4 * 512 + 69 * 4 * 576 + 3 * 576 + 512, "v": 2 * 90 * 2 * 512},
    ),
    (DECODE, {"workspace": 1 << 20, "tile_counter": workspace_size(DECODE) // 8 + 16}),
]


@pytest.mark.parametrize("params, sizes", SIZES)
def test_arrays_are_as_large_as_the_call(params, sizes):
    found = arrays("forward", params)
    assert {name: found[name].size for name in sizes} == sizes
    assert all(len(made(array)) == array.size for array in found.values())


def test_arrays_of_a_merge_and_of_gradients():
    merged, gradients = arrays("merge_attention", MERGE), arrays("backward", BACKWARD)
    rows = 33 * 3
    assert {name: array.size for name, array in merged.items()} == {
        "out_a": rows * 40,
        "lse_a": rows,
        "out_b": rows * 40,
        "lse_b": rows,
    }
    assert merged["out_a"].written == "fp16", "out is the same memory"
    q, k = 2 * 70 * 4 * 64, 2 * 90 * 2 * 64
    sizes = {"q": q, "k": k, "v": k, "out": q, "softmax_lse": 2 * 70 * 4, "dout": q, "dq": q, "dk": k, "dv": k}
    assert {name: array.size for name, array in gradients.items()} == sizes | {"workspace": 1 << 22}
    assert {name for name, array in gradients.items() if array.written} == {"dq", "dk", "dv"}


def test_types():
    found = arrays("forward", FP8) | {"mask": arrays("forward", SCORES)["attn_mask"]}
    types = {name: made(array).dtype.name for name, array in found.items()}
    assert types == {
        "q": "uint8",
        "k": "uint8",
        "v": "uint8",
        "out": "float16",
        "q_descale_ptr": "float32",
        "k_descale_ptr": "float32",
        "mask": "uint8",
    }
    assert found["out"].written == "fp16" and set(made(found["mask"]).tolist()) == {0, 1}


def test_a_shared_array_is_as_large_as_its_largest_user():
    for seqlen_q, seqlen_k, size in ((300, 90, 2 * 300 * 4 * 64), (70, 900, 2 * 900 * 2 * 64)):
        found = arrays("forward", replace(DENSE, q=at(2), seqlen_q=seqlen_q, seqlen_k=seqlen_k))
        assert found["q"].size == size and "k" not in found


def test_lengths_that_are_not_known_use_all_rows():
    found = {name: made(array).tolist() for name, array in arrays("forward", PAGED).items() if name not in "qkv"}
    assert found["cu_seqlens_q"] == [0, 33, 66, 100] and found["seqused_k"] == [64, 64, 64]
    pages = [found["page_table"][row : row + 4] for row in (0, 7, 14)]
    assert sorted(sum(pages, [])) == list(range(12)), "each page once"
    cache = replace(PAGED, kv_batch_idx=at(30), batch_size_k=2, seqused_q=at(31))
    found = arrays("forward", cache)
    assert made(found["kv_batch_idx"]).tolist() == [0, 1, 0] and made(found["seqused_q"]).tolist() == [33, 33, 34]


def test_new_keys_fit_behind_those_before():
    """11 rows at most in each sequence, of 60 positions and 64 keys."""
    found = {name: made(array).tolist() for name, array in arrays("forward", APPEND).items() if "seq" in name}
    assert found == {
        "cu_seqlens_q": [0, 33, 66, 100],
        "cu_seqlens_k_new": [0, 10, 20, 31],
        "seqused_k": [60 - 11] * 3,
        "seqlens_rotary": [60 - 11] * 3,
    }
    dense = arrays("forward", replace(APPEND, cu_seqlens_k_new=None, seqlen_knew=5, rotary_positions=0))
    assert made(dense["seqused_k"]).tolist() == [64 - 5] * 3
    assert dense["k_new"].size == 3 * 5 * 2 * 64 and dense["rotary_cos"].size == 63 * 24 + 16


def test_known_lengths_are_taken():
    lengths = {"cu_seqlens_q": [0, 5, 5, 100], "seqused_k": [1, 2, 3], "page_table": [[4] * 4, [5] * 4, [6] * 4]}
    found = arrays("forward", PAGED, lengths)
    assert made(found["cu_seqlens_q"]).tolist() == lengths["cu_seqlens_q"]
    assert made(found["page_table"])[7:11].tolist() == [5] * 4
    with pytest.raises(Unreadable, match="page_table"):
        arrays("forward", PAGED, {"page_table": [1, 2]})


def test_a_pointer_that_nothing_is_known_of(monkeypatch):
    monkeypatch.setattr(replayed, "_scores", lambda p: {})
    with pytest.raises(Unreadable, match="s_aux, alibi_slopes, attn_mask, rng_state: what it points at"):
        arrays("forward", SCORES)


# ---- the command -----------------------------------------------------------------------------------------------------


class Memory(FakeGpu):
    """Device memory in NumPy; `calls` are those that were made."""

    def __init__(self):
        super().__init__()
        self.allocate(1)  # no address is 0
        self.calls = []

    def forward(self, params, stream):
        """The reference, into out, but a row of it where a call has a softmax scale."""
        self.calls.append(params)
        shapes = {"q": (2, 70, 4, 64), "k": (2, 90, 2, 64), "v": (2, 90, 2, 64)}
        out, _ = attention_reference(*[self.read(getattr(params, name), shape) for name, shape in shapes.items()])
        bits = to_bits(out, "bf16").reshape(-1)
        if params.softmax_scale:
            bits[:5] = 0x7FC0  # NaN
        memory = self.read(params.out, (bits.size,))
        memory[...] = bits
        return Status.OK


@pytest.fixture
def memory(monkeypatch):
    """A fake device under the command."""
    fake = Memory()
    fakes = {
        "address": lambda buffer, offset=0: buffer.handle + offset,
        "window": fake.window_of,
        "allocate": fake.allocate,
        "upload": fake.upload,
        "download": fake.download,
        "forward": lambda params, stream: fake.forward(params, stream),
        "hopper_device_problem": lambda: None,
        "open_device": lambda: SimpleNamespace(create_stream=lambda: fake.stream),
    }
    for name, item in fakes.items():
        monkeypatch.setattr(replay, name, item)
    return fake


def test_a_call_is_repeated(memory, file_of, capsys):
    odd = replace(DENSE, q=at(1, 16), out=at(4, 32))
    assert run(file_of(("forward", odd), lines=["other text"])) == 0
    assert capsys.readouterr().out == "line 1: forward: OK\n"
    (found,) = memory.calls
    assert fields_of("forward", found) == fields_of("forward", odd)
    given = memory.read(found.q, (2 * 70 * 4 * 64,))
    assert len(np.unique(given)) > 1000, "random numbers"


def test_numbers_repeat(memory, monkeypatch, file_of):
    """Of arrays that are longer than what is drawn."""
    monkeypatch.setattr(replay, "DISTINCT_NUMBERS", 1001)
    assert run(file_of(("forward", DENSE))) == 0
    given = memory.read(memory.calls[0].k, (2 * 90 * 2 * 64,))
    assert (given[1001:] == given[:-1001]).all() and len(np.unique(given[:1001])) > 500


def test_what_is_not_finite_is_counted(memory, file_of, capsys):
    assert run(file_of(("forward", DENSE), ("forward", replace(DENSE, softmax_scale=0.125)))) == 1
    assert capsys.readouterr().out.splitlines()[1] == "line 2: forward: OK, 5 of out are not finite"


@pytest.mark.parametrize("name, count", [("softmax_lse", 1), ("out", 2)])
def test_minus_infinity_is_no_fault_of_an_lse(name, count, memory):
    values = np.array([0, -np.inf, np.inf, 1], np.float32)
    assert replay.not_finite(name, replayed.written(4, "fp32"), memory.upload(values), memory.stream) == count


def test_json(memory, file_of, capsys):
    assert run(file_of(("forward", DENSE), ("forward", replace(DENSE, head_dim=65))), "--json") == 1
    first, second = json.loads(capsys.readouterr().out)["calls"]
    assert first == {"line": 1, "call": "forward", "not_finite": {}}
    assert (second["line"], second["call"]) == (2, "forward") and "head_dim=65" in second["problem"]


def test_a_failure_is_said(memory, monkeypatch, file_of, capsys):
    monkeypatch.setattr(replay, "forward", lambda params, stream: record_error(Status.CUDA_ERROR, "launching failed"))
    assert run(file_of(("forward", DENSE))) == 1
    assert capsys.readouterr().out == "line 1: forward: CUDA_ERROR (-100): launching failed\n"


def test_the_rest_is_left_where_the_device_has_failed(memory, monkeypatch, file_of, capsys):
    def fail():
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(memory.stream, "sync", fail, raising=False)
    assert run(file_of(("forward", DENSE), ("forward", DENSE))) == 1
    assert capsys.readouterr().out == "line 1: forward: RuntimeError: an illegal address\n"


def test_explain_names_kernels_without_a_device(file_of, capsys):
    names = list(CALLS)
    assert run(file_of(*CALLS.values()), "--explain") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == [call for call, _ in CALLS.values()]
    for name, params in FORWARD.items():
        assert kernel_config(params).name in lines[names.index(name)]
    assert "bwd" in lines[names.index("backward")] and "merge" in lines[names.index("merge")]


def test_a_call_without_queries(file_of, capsys):
    assert run(file_of(("forward", replace(PACKED, total_q=0))), "--explain") == 0
    assert capsys.readouterr().out == "line 1: forward: nothing to launch\n"


def test_one_line(file_of, capsys):
    path = file_of(("forward", DENSE), ("merge_attention", MERGE))
    assert run(path, "--explain", "--line", "2") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("line 2: merge_attention")


def test_refused_and_unreadable_calls_need_no_device(file_of, capsys):
    mod = MaskMod(lambda batch, head, query, key, info, aux: key < 5, name="first_five")
    calls = [("forward", replace(DENSE, num_heads_k=3)), ("forward", replace(DENSE, mask_mod=mod))]
    assert run(file_of(*calls, lines=['{"fa3_cute": "forward", "fie'])) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert "INVALID_HEADS (-4)" in first
    assert (
        second
        == "line 2: forward: cannot be repeated: mask_mod is a function, or belongs to one, which a line does not hold"
    )
    assert third.startswith("line 3: a call: cannot be repeated: the line is damaged")


def test_it_cannot_run(tmp_path, file_of, monkeypatch, capsys):
    monkeypatch.setattr(replay, "hopper_device_problem", lambda: "no CUDA driver on this machine")

    def said(path):
        assert run(path) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    assert "cannot be read" in said(str(tmp_path / "nothing"))
    assert "there is no call" in said(file_of(lines=["text"]))
    assert "needs a Hopper GPU, --explain does not: no CUDA driver" in said(file_of(("forward", DENSE)))


def test_stdin(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(line_of("forward", DENSE)))
    assert run("-", "--explain") == 0
    assert capsys.readouterr().out.startswith("line 1: forward: fwd_bf16_d64")


# ---- on the GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_the_gpu(file_of, capsys):
    """Status and numbers are good of a call of each function, and of each way in which sequences lie."""
    calls = [CALLS[name] for name in ("dense", "packed", "decode", "merge", "backward")]
    assert run(file_of(*calls)) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count(": OK\n") == len(calls)
