"""Gradients by other libraries: FlashAttention-4 and cuDNN are called as they expect. Their memory is made by the
tensors that are there: nothing here imports torch.

`tensors` holds torch views of q, k, v, out, dout, in the case's shapes, and of softmax_lse, FP32 [batch, num_heads,
seqlen_q] or packed [num_heads, total_q]. A launch returns (dq, dk, dv), in memory made once.
"""

from collections.abc import Callable
from typing import Any

from .case import Case
from .passes import BOTH, DETERMINISTIC


def fa4(interface, case: Case, tensors: dict, indices: dict) -> Callable:
    """A launch of FlashAttention-4's kernels in the CuTe DSL; `interface` is its module."""
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    gradients = {f"d{name}": tensors[name].new_empty(tensors[name].shape) for name in "qkv"}
    options: dict[str, Any] = {"softmax_scale": case.head_dim**-0.5, "causal": case.is_causal}
    if case.lengths:
        options |= {f"cu_seqlens_{side}": indices["cu_seqlens"] for side in "qk"}
        options |= {"max_seqlen_q": case.seqlen_q, "max_seqlen_k": case.seqlen_k}
    is_deterministic = case.passes == DETERMINISTIC

    def launch():
        out, lse = tensors["out"], tensors["softmax_lse"]
        if case.passes == BOTH:
            out, lse, *_ = interface._flash_attn_fwd(q, k, v, **options, return_lse=True)
        return interface._flash_attn_bwd(
            q, k, v, out, dout, lse, **options, **gradients, deterministic=is_deterministic
        )

    return launch


def cudnn(library, handle, case: Case, tensors: dict) -> Callable:
    """A launch of cuDNN's graphs; `library` is its Python frontend. Dense problems alone, with a top-left mask."""
    stats = tensors["softmax_lse"].unsqueeze(-1)  # cuDNN's are the natural logarithm too
    memory = {name: tensors[name].transpose(1, 2) for name in ("q", "k", "v", "dout", "out")} | {"stats": stats}
    launches = []
    if case.passes == BOTH:
        out = tensors["out"].new_empty(tensors["out"].shape)
        memory |= {"out": out.transpose(1, 2), "stats": stats.new_empty(stats.shape)}
        launches.append(cudnn_forward(CudnnNode(library, handle, case), memory))
    gradients = {f"d{name}": tensors[name].new_empty(tensors[name].shape) for name in "qkv"}
    memory |= {name: tensor.transpose(1, 2) for name, tensor in gradients.items()}
    launches.append(cudnn_backward(CudnnNode(library, handle, case), memory))

    def launch():
        for execute in launches:
            execute()
        return tuple(gradients.values())

    return launch


def cudnn_forward(node: "CudnnNode", memory: dict) -> Callable:
    inputs = {name: node.reads(name, memory[name]) for name in ("q", "k", "v")}
    out, stats = node.graph.sdpa(**inputs, **node.options, generate_stats=True)
    node.writes(out, memory["out"])
    node.writes(stats, memory["stats"], is_float=True)
    return node.built()


def cudnn_backward(node: "CudnnNode", memory: dict) -> Callable:
    named = {"q": "q", "k": "k", "v": "v", "o": "out", "dO": "dout"}
    inputs = {name: node.reads(name, memory[field]) for name, field in named.items()}
    inputs["stats"] = node.reads("stats", memory["stats"], is_float=True)
    is_deterministic = node.case.passes == DETERMINISTIC
    outputs = node.graph.sdpa_backward(**inputs, **node.options, use_deterministic_algorithm=is_deterministic)
    for described, name in zip(outputs, ("dq", "dk", "dv"), strict=True):
        node.writes(described, memory[name])
    return node.built()


class CudnnNode:
    """One attention node as a graph of its own, and the memory that it reads and writes."""

    def __init__(self, library, handle, case: Case):
        types = library.data_type
        self.case, self.handle, self.modes, self.memory = case, handle, library.heur_mode, {}
        self.io, self.float = {"fp16": types.HALF, "bf16": types.BFLOAT16}[case.dtype], types.FLOAT
        self.graph = library.pygraph(
            io_data_type=self.io,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=handle,
        )
        self.options = {"attn_scale": case.head_dim**-0.5}
        if case.is_causal:  # top-left aligned, which is the default
            self.options["diagonal_band_right_bound"] = 0

    def reads(self, name: str, tensor, is_float: bool = False):
        """An input of the graph, which lies where this tensor does."""
        layout = {"dim": list(tensor.shape), "stride": list(tensor.stride())}
        described = self.graph.tensor(name=name, data_type=self.float if is_float else self.io, **layout)
        self.memory[described] = tensor
        return described

    def writes(self, described, tensor, is_float: bool = False) -> None:
        """Makes a result of the graph an output that lies where this tensor does."""
        described.set_output(True).set_dim(list(tensor.shape)).set_stride(list(tensor.stride()))
        described.set_data_type(self.float if is_float else self.io)
        self.memory[described] = tensor

    def built(self) -> Callable:
        """Builds the graph; returns what executes it."""
        self.graph.build([self.modes.A, self.modes.FALLBACK])
        two_bytes = next(iter(self.memory.values()))
        workspace = two_bytes.new_empty((max(1, -(-self.graph.get_workspace_size() // 2)),))
        return lambda: self.graph.execute(self.memory, workspace, handle=self.handle)
