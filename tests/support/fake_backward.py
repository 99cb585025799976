"""A GPU, torch's tensors, FlashAttention-4 and cuDNN's graphs for the tests of gradients' benchmark, over NumPy."""

from types import SimpleNamespace

import fake_gpu
import numpy as np
from fake_fp8 import Described
from fake_gpu import FakeGpu

from fa3_cute import backward_workspace_size
from fa3_cute.cli import bench
from fa3_cute.cli import case as case_module
from fa3_cute.cli import gradients
from fa3_cute.contract.backward_reference import Saved, backward_reference
from fa3_cute.contract.reference import as_float, attention_reference, to_bits
from fa3_cute.contract.status import Status

BACKWARD_MS = 25.0
DETERMINISTIC_MS = 30.0


class BackwardGpu(FakeGpu):
    """A fake GPU that makes LSEs and gradients; `spoiled` is a gradient of which it leaves out the last row, if any."""

    def __init__(self):
        super().__init__()
        self.spoiled, self.calls = "", []

    def write(self, pointer, values, dtype="bf16"):
        """Puts values at an address."""
        bits = to_bits(values, dtype).reshape(-1).view(np.uint8)
        memory = self.buffers[pointer >> fake_gpu.OFFSET_BITS].bytes
        memory[: bits.size] = bits

    def tensors(self, p, names):
        """(arrays by name, options of the reference) of a call."""
        packing, rows = self.packing_of(p)
        shapes = dict.fromkeys(("k", "v"), (*rows[1], p.num_heads_k, p.head_dim))
        found = {
            name: self.read(getattr(p, name), shapes.get(name, (*rows[0], p.num_heads, p.head_dim))) for name in names
        }
        return found, packing | {"causal": p.is_causal}

    def forward(self, p, stream):
        self.stream.now += self.milliseconds
        self.calls.append("forward")
        found, options = self.tensors(p, "qkv")
        out, lse = attention_reference(*found.values(), **options)
        self.write(p.out, out)
        self.write(p.softmax_lse, lse, "fp32")
        return Status.OK

    def backward(self, p, stream):
        self.stream.now += DETERMINISTIC_MS if p.deterministic else BACKWARD_MS
        self.calls.append("deterministic" if p.deterministic else "backward")
        assert p.workspace_bytes >= backward_workspace_size(p) and p.workspace not in (p.q, p.out, p.dq)
        found, options = self.tensors(p, ("q", "k", "v", "dout", "out"))
        out = found.pop("out")
        *batch, rows, heads, _ = out.shape
        lse = self.read(p.softmax_lse, (*batch, heads, rows), np.float32)
        exact = backward_reference(*found.values(), Saved(out, lse), **options)
        for name in ("dq", "dk", "dv"):
            values = getattr(exact, name)
            values[..., 0 if name != "dq" else -1, :, :] *= name != self.spoiled
            self.write(getattr(p, name), values)
        return Status.OK


def install_backward(monkeypatch) -> BackwardGpu:
    """Makes the benchmark run on a new one."""
    monkeypatch.setattr(fake_gpu, "FakeGpu", BackwardGpu)
    gpu = fake_gpu.install(monkeypatch)
    monkeypatch.setattr(bench, "backward", lambda params, stream: gpu.backward(params, stream))
    for name in ("address", "allocate", "download", "fill"):
        monkeypatch.setattr(gradients, name, getattr(case_module, name))
    return gpu


class FakeTensor:
    """What the peers use of a torch tensor, over a NumPy array; uint16 is BF16."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def stride(self):
        return tuple(stride // self.array.itemsize for stride in self.array.strides)

    def transpose(self, one, other):
        return FakeTensor(np.swapaxes(self.array, one, other))

    def unsqueeze(self, dim):
        return FakeTensor(np.expand_dims(self.array, dim))

    def new_empty(self, shape):
        return FakeTensor(np.full(shape, -1 if self.array.dtype == np.float32 else 0xFFFF, self.array.dtype))

    def float(self):
        return FakeTensor(as_float(self.array))

    def norm(self):
        return np.linalg.norm(self.array)

    def __sub__(self, other):
        return FakeTensor(self.array - other.array)


# ---- FlashAttention-4 ------------------------------------------------------------------------------------------------


class FakeFa4:
    """`flash_attn.cute.interface`; `calls` are the options of each call by function."""

    def __init__(self):
        self.calls = []

    def _flash_attn_fwd(self, q, k, v, *, softmax_scale, causal, return_lse, **packing):
        self.calls.append(("forward", packing))
        assert return_lse
        out, lse = attention_reference(
            q.array, k.array, v.array, softmax_scale=softmax_scale, causal=causal, **offsets_in(packing)
        )
        return FakeTensor(to_bits(out, "bf16")), FakeTensor(lse.astype(np.float32)), None, None, None

    def _flash_attn_bwd(self, *tensors, softmax_scale, causal, deterministic, **more):
        q, k, v, out, dout, lse = tensors
        gradients = [more.pop(name) for name in ("dq", "dk", "dv")]
        packing = more
        self.calls.append(("deterministic" if deterministic else "backward", packing))
        exact = backward_reference(
            *(tensor.array for tensor in (q, k, v, dout)),
            Saved(out.array, lse.array),
            softmax_scale=softmax_scale,
            causal=causal,
            **offsets_in(packing),
        )
        for tensor, values in zip(gradients, exact, strict=True):
            tensor.array[...] = to_bits(values, "bf16")
        return tuple(gradients)


def offsets_in(packing: dict) -> dict:
    """The options of the reference; FA4 takes the longest lengths beside them."""
    offsets = {name: tensor.array for name, tensor in packing.items() if name.startswith("cu_seqlens")}
    assert packing.keys() == offsets.keys() | ({"max_seqlen_q", "max_seqlen_k"} if offsets else set())
    for side in "qk" if offsets else "":
        assert packing[f"max_seqlen_{side}"] == np.diff(offsets[f"cu_seqlens_{side}"]).max()
    return offsets


# ---- cuDNN -----------------------------------------------------------------------------------------------------------


class FakeGraph:
    """A graph of one attention node, which reads and writes memory as it is described."""

    made, refusal = [], ""

    def __init__(self, **options):
        self.options, self.is_built, self.runs = options, False, 0
        FakeGraph.made.append(self)

    def tensor(self, **described):
        return Described(**described)

    def sdpa(self, **arguments):
        self.arguments = arguments
        self.outputs = {name: Described(name=name) for name in ("o", "stats")}
        return list(self.outputs.values())

    def sdpa_backward(self, **arguments):
        self.arguments = arguments
        self.outputs = {name: Described(name=name) for name in ("dq", "dk", "dv")}
        return list(self.outputs.values())

    def build(self, modes):
        if self.refusal:
            raise RuntimeError(self.refusal)
        types = {"stats": "float"}
        described = [
            value for value in (*self.arguments.values(), *self.outputs.values()) if isinstance(value, Described)
        ]
        assert all(tensor.data_type == types.get(tensor.name, "bf16") for tensor in described)
        assert all(tensor.is_output for tensor in self.outputs.values())
        self.is_built = True

    def get_workspace_size(self):
        return 5

    def execute(self, memory, workspace, handle):
        assert self.is_built and handle == self.options["handle"] == "handle" and workspace.array.nbytes >= 5
        self.runs += 1
        inputs = {name: placed(memory, value) for name, value in self.arguments.items() if isinstance(value, Described)}
        options = {"softmax_scale": self.arguments["attn_scale"]}
        options["causal"] = self.arguments.get("diagonal_band_right_bound") == 0
        rows = [inputs[name].swapaxes(1, 2) for name in ("q", "k", "v", "dO") if name in inputs]
        if "stats" in self.outputs:
            assert self.arguments["generate_stats"] is True
            out, lse = attention_reference(*rows, **options)
            placed(memory, self.outputs["o"])[...] = to_bits(out, "bf16").swapaxes(1, 2)
            placed(memory, self.outputs["stats"])[...] = lse[..., None]
            return
        saved = Saved(inputs["o"].swapaxes(1, 2), inputs["stats"][..., 0])
        for described, values in zip(self.outputs.values(), backward_reference(*rows, saved, **options), strict=True):
            placed(memory, described)[...] = to_bits(values, "bf16").swapaxes(1, 2)


def placed(memory: dict, described: Described) -> np.ndarray:
    """A tensor of a graph, where and as it is described."""
    array = memory[described].array
    return np.lib.stride_tricks.as_strided(
        array, described.dim, [array.itemsize * stride for stride in described.stride]
    )


def cudnn_frontend() -> SimpleNamespace:
    """The module, as far as the peer uses it."""
    FakeGraph.made.clear()
    return SimpleNamespace(
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: None,
        pygraph=FakeGraph,
        data_type=SimpleNamespace(HALF="fp16", BFLOAT16="bf16", FLOAT="float"),
        heur_mode=SimpleNamespace(A="A", FALLBACK="F"),
    )
