"""An engine on one Hopper GPU: the package's kernels on a compute stream, copies and NCCL on a stream of their own."""

import numpy as np
from cuda.bindings import driver
from cuda.core import Buffer, StreamOptions

from fa3_cute import backward, backward_workspace_size, forward, merge_attention
from fa3_cute.arrays.memory import allocate, download, open_device, upload
from fa3_cute.contract.reference import as_float, to_bits
from fa3_cute.runtime.cuda_driver import checked

from .calls import (
    DTYPES,
    ITEM_BYTES,
    Tensor,
    backward_params,
    forward_params,
    merge_params,
    output_dtype,
    weighted_params,
)
from .plan import Call, Problem

MINUS_INFINITY = 0xFF800000  # the bits, in FP32


class GpuEngine:
    """Memory, streams and calls of one device. Nothing here waits for the device but uploads and downloads.

    sm_margin   SMs that attention leaves to the exchange that runs beside it
    """

    def __init__(self, problem: Problem, ordinal: int = 0):
        self.problem = problem
        self.device = open_device(ordinal)
        self.compute = self.device.create_stream()
        # Its kernels go first where both streams have one to run.
        self.exchange = self.device.create_stream(options=StreamOptions(priority=-1))
        self.sm_margin = 0
        self.zero, self.nothing = (self._one_lse(value) for value in (0, -np.inf))
        self.lengths: dict[tuple[int, ...], object] = {}
        self.workspace = None

    # ---- memory ------------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], kind: str) -> Tensor:
        """kind: "input" and "output" of the problem's dtype, or "float32"."""
        dtypes = {
            "input": DTYPES[self.problem.dtype],
            "output": output_dtype(self.problem),
            "float32": DTYPES["float32"],
        }
        dtype = dtypes[kind]
        buffer = allocate(int(np.prod(shape)) * ITEM_BYTES[dtype], stream=self.compute)
        return Tensor(int(buffer.handle), tuple(shape), dtype, buffer)

    def empty_lse(self, heads: int, call: Call) -> Tensor:
        return self.empty((heads, call.rows_q), "float32")

    def upload(self, values: np.ndarray, kind: str = "input") -> Tensor:
        """Numbers as a tensor of the problem's dtype."""
        tensor = self.empty(values.shape, kind)
        upload(to_bits(values, _name_of(tensor)), tensor.owner, stream=self.compute)
        return tensor

    def random(self, shape: tuple[int, ...]) -> Tensor:
        """Normal numbers, of which a few thousand rows are repeated: made on the host, they would take their time."""
        heads, rows, dim = shape
        tensor, first = self.empty(shape, "input"), min(rows, 4096)
        some = self.upload(np.random.default_rng(0).standard_normal((1, first, dim), np.float32))
        for head in range(heads):
            for row in range(0, rows, first):
                count = min(first, rows - row)
                self.copy(self.block(tensor, head, row, count), self.block(some, 0, 0, count))
        self.exchange.sync()
        return tensor

    def download(self, tensor: Tensor) -> np.ndarray:
        """A whole tensor's numbers, behind all that was enqueued on either stream."""
        self.wait(self.arrival())
        return self._read(tensor, self.compute)

    def heads(self, tensor: Tensor, first: int, count: int) -> Tensor:
        return Tensor(tensor.at(first), (count, *tensor.shape[1:]), tensor.dtype, tensor.owner)

    def block(self, tensor: Tensor, head: int, first: int, rows: int) -> Tensor:
        return Tensor(tensor.at(head, first), (1, rows, *tensor.shape[2:]), tensor.dtype, tensor.owner)

    def everything(self, tensor: Tensor) -> Tensor:
        return tensor

    def copy(self, target: Tensor, source: Tensor) -> None:
        """On the exchange stream."""
        copied = driver.cuMemcpyDtoDAsync(target.address, source.address, source.nbytes, int(self.exchange.handle))
        checked(copied, "copying")

    def add(self, target: Tensor, parts: list[Tensor], factor: float) -> None:
        """For simulated ranks, by the host, at once: between GPUs NCCL does it."""
        total = factor * sum(self._read(part, self.exchange) for part in parts)
        buffer = Buffer.from_handle(target.address, target.nbytes, owner=target.owner)
        upload(to_bits(total, _name_of(target)), buffer, stream=self.exchange)

    def clear(self, tensor: Tensor) -> None:
        checked(driver.cuMemsetD8Async(tensor.address, 0, tensor.nbytes, int(self.compute.handle)), "clearing")

    def clear_lse(self, lse: Tensor) -> None:
        """To that of rows that see nothing."""
        filled = driver.cuMemsetD32Async(lse.address, MINUS_INFINITY, lse.nbytes // 4, int(self.compute.handle))
        checked(filled, "clearing an LSE")

    # ---- streams -----------------------------------------------------------------------------------------------------

    def exchange_waits(self) -> None:
        self.exchange.wait(self.compute)

    def arrival(self):
        return self.exchange.record()

    def wait(self, arrival) -> None:
        self.compute.wait(arrival)

    # ---- attention ---------------------------------------------------------------------------------------------------

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
        tensors = {"q": q, "k": k, "v": v, "out": out}
        params = forward_params(self.problem, call, tensors, lse, self._lengths(call))
        params.sm_margin = self.sm_margin
        forward(params, self.compute).check()

    def differentiate(self, call: Call, share, lse: Tensor, found) -> None:
        """share: q, k, v, out; found: dout, and dq, dk, dv to be written."""
        tensors = {name: getattr(share, name) for name in ("q", "k", "v", "out")}
        tensors |= {name: getattr(found, name) for name in ("dout", "dq", "dk", "dv")}
        params = backward_params(self.problem, call, tensors, lse, self._lengths(call))
        params.workspace_bytes = backward_workspace_size(params)
        if self.workspace is None or self.workspace.size < params.workspace_bytes:
            self.workspace = allocate(params.workspace_bytes, stream=self.compute)
        params.workspace, params.workspace_bytes = int(self.workspace.handle), self.workspace.size
        backward(params, self.compute).check()

    def merge(self, call: Call, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
        params = merge_params(self.problem, call, (out, other), (lse, other_lse))
        merge_attention(params, self.compute).check()

    def rounded(self, tensor: Tensor, lse: Tensor, target: Tensor) -> None:
        """FP32 to the output's type: merged with nothing."""
        params = weighted_params((tensor, tensor, target), (lse, self.nothing))
        merge_attention(params, self.compute).check()

    def mean(self, pair: Tensor, target: Tensor) -> None:
        """Of the first and the second half of the heads."""
        count = target.shape[0]
        halves = self.heads(pair, 0, count), self.heads(pair, count, count)
        merge_attention(weighted_params((*halves, target), (self.zero, self.zero)), self.compute).check()

    def _read(self, tensor: Tensor, stream) -> np.ndarray:
        kinds = {1: np.uint8, 4: np.float32, 2: np.float16 if tensor.dtype is DTYPES["fp16"] else np.uint16}
        buffer = Buffer.from_handle(tensor.address, tensor.nbytes, owner=tensor.owner)
        return as_float(download(buffer, tensor.shape, kinds[ITEM_BYTES[tensor.dtype]], stream=stream))

    def _lengths(self, call: Call) -> dict[str, int]:
        for values in call.lengths.values():
            if values not in self.lengths:
                self.lengths[values] = upload(np.array(values, np.int32), stream=self.compute)
        return {name: int(self.lengths[values].handle) for name, values in call.lengths.items()}

    def _one_lse(self, value: float) -> Tensor:
        buffer = upload(np.array([[value]], np.float32), stream=self.compute)
        return Tensor(int(buffer.handle), (1, 1), DTYPES["float32"], buffer)


def _name_of(tensor: Tensor) -> str:
    """Of its dtype, as to_bits has it."""
    return "fp32" if tensor.dtype is DTYPES["float32"] else tensor.dtype.name.lower()
