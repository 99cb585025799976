"""Other libraries to time beside ours. The one module that imports torch, and only when a peer is asked for.

A peer reads the benchmark's own tensors, in place, as torch views.
"""
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from functools import partial
from math import prod

from .case import Case
from .measure import CALLS_PER_GRAPH, Work


class PeerMissing(Exception):
    """A peer that this machine does not have, or that cannot do a case; the message is one line."""


@dataclass(frozen=True)
class Peer:
    """`make_launch(case, q, k, v, cu_seqlens)` gets torch views in the case's shapes, cu_seqlens None if it is dense; a
    launch returns O alike. It raises PeerMissing for a case that the peer cannot do."""
    name: str
    version: str
    dtypes: tuple[str, ...]
    make_launch: Callable

    def launch(self, case: Case, pointers: dict[str, int]) -> Callable:
        """A call without arguments that queues the case on torch's current stream and returns O."""
        if case.dtype not in self.dtypes:
            raise PeerMissing(f"{self.name} has no {case.dtype} kernels")
        q, k, v = (view(pointers[name], shape, case.dtype)
                   for name, shape in (("q", case.q_shape), ("k", case.kv_shape), ("v", case.kv_shape)))
        cu_seqlens = view(pointers["cu_seqlens"], (case.batch_size + 1,), "int32") if case.lengths else None
        launch = self.make_launch(case, q, k, v, cu_seqlens)
        try:
            launch()
        except Exception as error:      # each library refuses in its own way; what it says is the answer
            raise PeerMissing(f"{self.name} refuses {case.name}: {first_line(error)}") from error
        return launch

    def error(self, case: Case, pointers: dict[str, int], launch: Callable) -> float:
        """Relative difference (norm) between the O of `launch` and ours, which is in place."""
        theirs = launch().float()
        return float((view(pointers["out"], case.q_shape, case.dtype).float() - theirs).norm() / theirs.norm())


def load(name: str) -> Peer:
    """The peer of that name; raises PeerMissing where it is not installed or does not load."""
    try:
        return PEERS[name]()
    except (ImportError, OSError, RuntimeError) as error:
        raise PeerMissing(f"{name} is not available here ({first_line(error)})") from error


def load_fa3() -> Peer:
    """FlashAttention-3 in C++, as the PyPI wheel fa3-fwd packs it: built without FP16 kernels and without windows."""
    from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func

    def make_launch(case, q, k, v, cu_seqlens):
        call = partial(flash_attn_func, q, k, v)
        if case.lengths:
            call = partial(flash_attn_varlen_func, q, k, v, cu_seqlens, cu_seqlens, case.seqlen_q, case.seqlen_k)
        elif case.is_decode:
            call = partial(call, num_splits=0)      # as many as its heuristic wants; its default is one

        def launch():
            out = call(causal=case.is_causal, window_size=case.window)
            return out[0] if isinstance(out, tuple) else out
        return launch
    return Peer("fa3", f"fa3-fwd {metadata.version('fa3-fwd')}", ("bf16",), make_launch)


def load_cudnn() -> Peer:
    """cuDNN's fused attention through torch; its causal mask is top-left aligned, the same for square problems."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def make_launch(case, q, k, v, cu_seqlens):
        if case.lengths or max(case.window) >= 0:
            raise PeerMissing("cudnn through torch has neither packed sequences nor windows")
        if case.is_causal and case.seqlen_q != case.seqlen_k:
            raise PeerMissing("cudnn through torch has no bottom-right aligned causal mask")
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        options = {"is_causal": case.is_causal, "enable_gqa": case.num_heads != case.num_heads_k}

        def launch():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        return launch
    version = f"cuDNN {torch.backends.cudnn.version()}, torch {torch.__version__}"
    return Peer("cudnn", version, ("fp16", "bf16"), make_launch)


PEERS = {"fa3": load_fa3, "cudnn": load_cudnn}


def use_stream(handle: int) -> None:
    """Makes a CUDA stream torch's current one."""
    import torch
    torch.cuda.set_stream(torch.cuda.ExternalStream(handle))


def capture(launch: Callable, calls: int = CALLS_PER_GRAPH) -> Work:
    """So many calls of a peer as one CUDA graph, made by torch: what a call allocates belongs to the graph."""
    import torch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            launch()
    return Work(graph.replay, calls)


def view(pointer: int, shape: tuple[int, ...], dtype: str):
    """Device memory as a torch tensor, in place. The interface knows no BF16: 16-bit integers carry the bits over."""
    import torch

    class Memory:
        """prod(shape) words."""
        __cuda_array_interface__ = {"shape": (prod(shape),), "typestr": "<i4" if dtype == "int32" else "<i2",
                                    "data": (pointer, False), "version": 3}

    words = torch.as_tensor(Memory(), device="cuda")
    return words.view({"fp16": torch.float16, "bf16": torch.bfloat16, "int32": torch.int32}[dtype]).view(shape)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
