"""A GPU, torch's tensors and cuDNN's graphs for the tests of the benchmark in FP8, over NumPy."""

from math import prod

import fake_gpu
import numpy as np
from fake_gpu import FakeGpu, install

from fa3_cute import DataType
from fa3_cute.contract.formats import FP8
from fa3_cute.contract.reference import as_float, attention_reference, to_bits


class Fp8Gpu(FakeGpu):
    """A fake GPU that reads FP8 where the call says so; it counts the calls of each type."""

    def __init__(self):
        super().__init__()
        self.bits, self.calls = np.uint16, []

    def forward(self, p, stream):
        self.bits = np.uint8 if p.dtype is DataType.FP8_E4M3 else np.uint16
        self.calls.append(p.dtype)
        assert p.out_dtype is DataType.BF16
        self.stream.now += 10 * (p.dtype is DataType.BF16)
        return super().forward(p, stream)

    def read(self, pointer, shape, dtype=None):
        return super().read(pointer, shape, dtype or self.bits)


def install_fp8(monkeypatch) -> Fp8Gpu:
    """Makes the benchmark run on a new one."""
    monkeypatch.setattr(fake_gpu, "FakeGpu", Fp8Gpu)
    return install(monkeypatch)


class FakeTensor:
    """What the peers use of a torch tensor, over a NumPy array; uint8 is FP8."""

    def __init__(self, array):
        self.array = array

    def transpose(self, one, other):
        return FakeTensor(np.swapaxes(self.array, one, other))

    def float(self):
        return FakeTensor(as_float(self.array))

    def element_size(self):
        return self.array.itemsize

    def norm(self):
        return np.linalg.norm(self.array)

    def __sub__(self, other):
        return FakeTensor(self.array - other.array)

    def __truediv__(self, number):
        return FakeTensor(self.array / number)

    def in_memory(self, described) -> np.ndarray:
        """This memory as a cuDNN descriptor has it."""
        strides = [self.array.itemsize * stride for stride in described.stride]
        return np.lib.stride_tricks.as_strided(self.array, described.dim, strides)


class Described:
    """A tensor of cuDNN's graph."""

    def __init__(self, dim=None, stride=None, data_type=None, name=""):
        self.dim, self.stride, self.data_type, self.name, self.is_output = dim, stride, data_type, name, False

    def set_output(self, value):
        self.is_output = value
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self


class FakeCudnnGraph:
    """cuDNN's graph, which reads and writes the memory that it is told of, as it is described, by NumPy."""

    made, refusal = [], None

    def __init__(self, **options):
        self.options, self.is_built, self.executed = options, False, []
        FakeCudnnGraph.made.append(self)

    def tensor(self, **described):
        return Described(**described)

    def sdpa_fp8(self, **arguments):
        self.arguments = arguments
        self.outputs = [Described(name=name) for name in ("o", "amax_s", "amax_o")]
        return [self.outputs[0], None, *self.outputs[1:]]

    def build(self, modes):
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.is_built = True

    def get_workspace_size(self):
        return 0

    def execute(self, memory, workspace, handle):
        assert self.is_built and handle == self.options["handle"] and workspace.array.size
        self.executed.append(memory)
        out, *_ = self.outputs
        assert {tensor.name for tensor in memory} == {
            "q",
            "k",
            "v",
            "descale_q",
            "descale_k",
            "descale_v",
            "descale_s",
            "scale_s",
            "scale_o",
            "o",
            "amax_s",
            "amax_o",
        } and all(tensor.is_output for tensor in self.outputs)
        q, k, v = (memory[self.arguments[name]].in_memory(self.arguments[name]).swapaxes(1, 2) for name in "qkv")
        scales = [
            memory[self.arguments[name]].array.item()
            for name in ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        ]
        exact, _ = attention_reference(
            q, k, v, causal=self.arguments["use_causal_mask"], softmax_scale=self.arguments["attn_scale"]
        )
        memory[out].in_memory(out)[...] = to_bits(prod(scales) * exact, FP8).swapaxes(1, 2)
