"""Other libraries to time beside ours. The one module that imports torch, and only when a peer is asked for.

A peer reads the benchmark's own tensors, in place, as torch views.
"""
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from math import prod

from .case import Case


class PeerMissing(Exception):
    """A peer that this machine does not have, or that cannot do a case; the message is one line."""


@dataclass(frozen=True)
class Peer:
    """`make_launch(q, k, v, is_causal)` gets torch views [batch, seqlen, heads, head_dim]; a launch returns O alike."""
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
        launch = self.make_launch(q, k, v, case.is_causal)
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
    """FlashAttention-3 in C++, as the PyPI wheel fa3-fwd packs it: built without FP16 kernels."""
    from fa3_fwd_interface import flash_attn_func

    def make_launch(q, k, v, is_causal):
        def launch():
            out = flash_attn_func(q, k, v, causal=is_causal)
            return out[0] if isinstance(out, tuple) else out
        return launch
    return Peer("fa3", f"fa3-fwd {metadata.version('fa3-fwd')}", ("bf16",), make_launch)


def load_cudnn() -> Peer:
    """cuDNN's fused attention through torch; its causal mask is top-left aligned, the same for square problems."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def make_launch(q, k, v, is_causal):
        if is_causal and q.shape[1] != k.shape[1]:
            raise PeerMissing("cudnn through torch has no bottom-right aligned causal mask")
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        options = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}

        def launch():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=is_causal, **options).transpose(1, 2)
        return launch
    version = f"cuDNN {torch.backends.cudnn.version()}, torch {torch.__version__}"
    return Peer("cudnn", version, ("fp16", "bf16"), make_launch)


PEERS = {"fa3": load_fa3, "cudnn": load_cudnn}


def use_stream(handle: int) -> None:
    """Makes a CUDA stream torch's current one."""
    import torch
    torch.cuda.set_stream(torch.cuda.ExternalStream(handle))


def view(pointer: int, shape: tuple[int, ...], dtype: str):
    """Device memory as a torch tensor, in place. The interface knows no BF16: 16-bit integers carry the bits over."""
    import torch

    class Memory:
        """prod(shape) 16-bit words."""
        __cuda_array_interface__ = {"shape": (prod(shape),), "typestr": "<i2", "data": (pointer, False), "version": 3}

    words = torch.as_tensor(Memory(), device="cuda")
    return words.view({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]).view(shape)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
