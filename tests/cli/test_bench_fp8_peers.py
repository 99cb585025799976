"""Other libraries' FP8 beside ours: cuDNN and FlashAttention-3 are called as they expect, what they refuse is said."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from fake_fp8 import FakeCudnnGraph, FakeTensor, install_fp8

from fa3_cute.cli import case as case_module
from fa3_cute.cli import peers
from fa3_cute.cli.case import Case
from fa3_cute.contract.formats import FP8


@pytest.fixture
def cudnn(monkeypatch):
    """torch and cuDNN's frontend, as far as the peer uses them."""
    FakeCudnnGraph.made.clear()
    streams = []
    sdpa = SimpleNamespace(SDPBackend=SimpleNamespace(CUDNN_ATTENTION=1), sdpa_kernel=lambda backend: nullcontext())
    torch = SimpleNamespace(
        __version__="2",
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91900)),
        cuda=SimpleNamespace(current_stream=lambda: SimpleNamespace(cuda_stream=7)),
        float32=np.float32,
        uint8=np.uint8,
        float8_e4m3fn=np.uint8,
        empty=lambda shape, dtype, device: FakeTensor(np.zeros(shape, dtype)),
        full=lambda shape, value, dtype, device: FakeTensor(np.full(shape, value, dtype)),
    )
    frontend = SimpleNamespace(
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: streams.append((handle, stream)),
        pygraph=FakeCudnnGraph,
        data_type=SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float"),
        heur_mode=SimpleNamespace(A="A", FALLBACK="F"),
        streams=streams,
    )
    for name, module in {
        "torch": torch,
        "torch.nn": SimpleNamespace(),
        "torch.nn.attention": sdpa,
        "cudnn": frontend,
        "torch.nn.functional": SimpleNamespace(scaled_dot_product_attention=None),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return frontend


@pytest.fixture
def tensors(monkeypatch):
    """The tensors of a case, for the peers to see; our O has been computed."""
    gpu = install_fp8(monkeypatch)

    def of(case):
        found = case_module.Tensors([case], gpu.stream)
        found.poison_out()
        gpu.forward(found.params(case), 1)
        return found

    def view(pointer, shape, dtype):
        return FakeTensor(gpu.read(pointer, shape, {FP8: np.uint8, "bf16": np.uint16, "int32": np.int32}[dtype]))

    monkeypatch.setattr(peers, "view", view)
    return of


@pytest.mark.parametrize("case", [Case(FP8, 64, True, 70, 70, 2, 4, 2), Case(FP8, 128, False, 30, 50, 1, 2, 2)])
def test_cudnn_is_called_as_it_expects(case, cudnn, tensors):
    """It computes our O from our memory, to E4M3's rounding; graph and workspace are made once, the stream is set."""
    ours = tensors(case)
    peer = peers.load("cudnn")
    launches = [peer.launch(case, ours.pointers(case)) for _ in range(2)]
    assert 1e-3 < peer.error(case, ours.pointers(case), launches[-1]) < 4e-2
    (graph,) = FakeCudnnGraph.made
    assert len(graph.executed) == 3 and cudnn.streams == [("handle", 7)]
    assert graph.options["io_data_type"] == "e4m3" and graph.outputs[0].data_type == "e4m3"
    assert graph.arguments["generate_stats"] is False and type(graph.arguments["attn_scale"]) is float
    graph.executed[0][graph.arguments["scale_o"]].array[:] *= 1.5  # the comparison is one
    assert peer.error(case, ours.pointers(case), launches[-1]) > 0.3


@pytest.mark.parametrize(
    "case, said",
    [
        (Case(FP8, 128, False, 40, 40, 2, 2, 2, lengths=(3, 40), label="3+40"), "without packed sequences"),
        (Case(FP8, 128, False, 40, 40, 2, 2, 2, (9, 0)), "without packed sequences and windows"),
        (Case(FP8, 128, True, 40, 50, 2, 2, 2), "bottom-right"),
        (Case(FP8, 96, False, 40, 40, 1, 2, 2), "cudnn refuses fp8_e4m3 d96 full h2 1x40: no such head$"),
    ],
)
def test_what_cudnn_refuses_is_one_line(case, said, cudnn, tensors, monkeypatch):
    monkeypatch.setattr(FakeCudnnGraph, "refusal", "no such head\nand where")
    peer = peers.load("cudnn")
    with pytest.raises(peers.PeerMissing, match=said):
        peer.launch(case, tensors(case).pointers(case))


def test_cudnn_without_its_frontend(cudnn, tensors, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    case = Case(FP8, 128, False, 40, 40, 1, 2, 2)
    with pytest.raises(peers.PeerMissing, match="^cudnn refuses fp8_e4m3 d128 full h2 1x40: .*cudnn"):
        peers.load("cudnn").launch(case, tensors(case).pointers(case))


@pytest.mark.parametrize(
    "case",
    [
        Case(FP8, 128, True, 40, 40, 2, 16, 2, lengths=(3, 40), label="3+40"),
        Case(FP8, 64, False, 50, 50, 3, 16, 16),
        Case(FP8, 64, False, 1, 50, 3, 16, 16),
    ],
)
def test_fa3_reads_fp8(case, monkeypatch):
    """It takes E4M3 tensors as they are, descales being 1, and answers in BF16."""
    seen = []
    fake = {
        name: lambda *args, **options: seen.append((args, options)) or FakeTensor(np.ones(1, np.uint16))
        for name in ("flash_attn_func", "flash_attn_varlen_func")
    }
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(**fake))
    monkeypatch.setattr(peers.metadata, "version", lambda name: "0")
    monkeypatch.setattr(peers, "view", lambda pointer, shape, dtype: (shape, dtype))
    peers.load("fa3").launch(case, {"q": 1, "k": 2, "v": 3, "cu_seqlens": 4})
    ((args, options),) = seen
    assert [dtype for _, dtype in args[:3]] == [FP8] * 3 and not {name for name in options if "descale" in name}
    assert ("num_splits" in options) == case.is_decode


@pytest.mark.parametrize(
    "dtype, typestr, name, bits",
    [
        (FP8, "|u1", "float8_e4m3fn", 8),
        ("bf16", "<i2", "bfloat16", 16),
        ("fp16", "<i2", "float16", 16),
        ("int32", "<i4", "int32", 32),
    ],
)
def test_views(dtype, typestr, name, bits, monkeypatch):
    """Integers of the type's size carry the bits over."""
    seen = []

    class Words:
        def view(self, what):
            seen.append(what)
            return self

    def as_tensor(memory, device):
        seen.append(memory.__cuda_array_interface__)
        return Words()

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(as_tensor=as_tensor, **{name: f"torch's {name}"}))
    peers.view(4096, (2, 3), dtype)
    assert seen == [{"shape": (6,), "typestr": typestr, "data": (4096, False), "version": 3}, f"torch's {name}", (2, 3)]
    assert 8 * np.dtype(typestr).itemsize == bits
