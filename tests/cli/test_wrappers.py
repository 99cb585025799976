"""bench --suite host --peers fa3: which calls it times, what it says without torch or FA3. No test looks at a time."""

import sys
from types import SimpleNamespace

import pytest
from fake_gpu import FakeStream

from fa3_cute import FlashAttentionParams
from fa3_cute.cli import host, main, wrappers
from fa3_cute.cli.peers import PeerMissing


class Tensor:
    """Which may want a gradient."""

    def __init__(self, *args, **options):
        self.wants_grad = False

    def requires_grad_(self):
        self.wants_grad = True
        return self


@pytest.fixture
def log(monkeypatch):
    """(function, whether its tensors want gradients, whether it has a backward pass) of each call in order."""
    seen = []

    def function(name):
        def call(q, k, v, causal):
            assert causal
            seen.append((name, q.wants_grad and k.wants_grad and v.wants_grad))
            return name if name == "ours" else (name, None)

        return call

    def grad(out, leaves, dout):
        if out == "theirs":
            raise NotImplementedError("built without")
        assert len(leaves) == 3 and isinstance(dout, Tensor)
        seen.append("grad")

    torch = SimpleNamespace(
        randn=Tensor,
        bfloat16=None,
        autograd=SimpleNamespace(grad=grad),
        cuda=SimpleNamespace(synchronize=lambda: seen.append("sync")),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(wrappers, "functions", lambda: {"fa3_cute": function("ours"), "fa3": function("theirs")})
    return seen


def test_ways_and_libraries(log):
    """The backward pass only of the library that has one."""
    found = list(wrappers.rows(1))
    assert [name for name, _, _ in found] == [
        "fa3_cute, no gradient",
        "fa3, no gradient",
        "fa3_cute, autograd",
        "fa3, autograd",
        "fa3_cute, autograd and backward",
    ]
    assert all(value >= 0 and unit == "us" for _, value, unit in found)
    assert {entry for entry in log if entry[0] in ("ours", "theirs")} == {
        (name, wants) for name in ("ours", "theirs") for wants in (False, True)
    }


def test_in_turn(log):
    """A batch of one, then of the other; nothing waits within one."""
    rows = wrappers.rows(2)
    next(rows)
    runs = []
    for entry in log[2:]:  # after each was called once
        if not runs or runs[-1][0] != entry:
            runs.append([entry, 0])
        runs[-1][1] += 1
    batches = 1 + 2 * wrappers.BATCHES_PER_ROUND
    one = [["sync", 1], [("ours", False), wrappers.CALLS], ["sync", 1], [("theirs", False), wrappers.CALLS]]
    assert runs == one * batches + [["sync", 1]]


def test_what_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(wrappers, "FA3_MODULES", ("no_such_module", "nor_this_one"))
    with pytest.raises(PeerMissing, match="torch is not available|no module no_such_module or nor_this_one"):
        list(wrappers.rows(1))
    device = SimpleNamespace(create_stream=FakeStream)
    for name, fake in {
        "hopper_device_problem": lambda: None,
        "open_device": lambda: device,
        "Monitor": lambda device: None,
        "Tensors": lambda cases, stream: SimpleNamespace(params=lambda case: FlashAttentionParams()),
    }.items():
        monkeypatch.setattr(host, name, fake)
    monkeypatch.setattr(host.environment, "describe", lambda *args: {})
    monkeypatch.setattr(host.environment, "sentence", lambda known: "a GPU")
    assert main(["bench", "--suite", "host", "--peers", "fa3"]) == 2
    assert "is not available here" in capsys.readouterr().err
