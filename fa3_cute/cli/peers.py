"""Other libraries to time beside ours. torch is imported only when a peer is asked for.

A peer reads the benchmark's own tensors, in place, as torch views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import metadata
from math import prod
from typing import Any

from ..contract.formats import FP8
from . import cache_peers, gradient_peers, latent
from .appended import shapes_of
from .case import Case
from .cudnn_graph import O_SCALE, CudnnGraph
from .measure import CALLS_PER_GRAPH, Work

DECODE_PAGE = 128  # tokens
REPLAYS = 4  # that a call with metadata of its own has to get right
SAME = 2e-2  # relative difference of two calls that cut K and V differently; of O that was never written, NaN
# (typestr of the array interface, name of torch's dtype)
VIEWS = {
    "fp16": ("<i2", "float16"),
    "bf16": ("<i2", "bfloat16"),
    FP8: ("|u1", "float8_e4m3fn"),
    "int32": ("<i4", "int32"),
    "fp32": ("<f4", "float32"),
}


class PeerMissing(Exception):
    """A peer that this machine does not have, or that cannot do a case; the message is one line."""


@dataclass(frozen=True)
class Peer:
    """`make_launch(case, q, k, v, indices)` gets torch views in the case's shapes, indices by name, {} if dense, with
    sinks as "s_aux" in BF16; a launch returns O alike, in FP8 as O * O_SCALE. What it raises says why the peer cannot
    do the case. `features` are the fields of a Feature that it has. `make_backward(case, tensors, indices)` is of cases
    with gradients (gradient_peers.py). What it is not timed for is None."""

    name: str
    version: str
    dtypes: tuple[str, ...]
    make_launch: Callable | None
    features: tuple[str, ...] = ()
    make_backward: Callable | None = None

    def launch(self, case: Case, pointers: dict[str, int]) -> Callable:
        """A call without arguments that queues the case on torch's current stream and returns O."""
        if case.dtype not in self.dtypes:
            raise PeerMissing(f"{self.name} has no {case.dtype} kernels")
        if lacking := case.scores.asked - {*self.features}:
            raise PeerMissing(f"{self.name} has no {', no '.join(sorted(lacking))}")
        make = self.make_backward if case.passes else self.make_launch
        if make is None:
            raise PeerMissing(f"{self.name} is timed {'without gradients' if case.passes else 'for gradients alone'}")
        tensors = views(case, pointers, ("q", "k", "v") + ("out", "dout", "softmax_lse") * bool(case.passes))
        indices = {name: view(pointers[name], shape, "int32") for name, shape in case.index_shapes().items()}
        if case.scores.s_aux:
            indices["s_aux"] = view(pointers["s_aux"], (case.num_heads,), "bf16")
        if case.scores.append:
            indices |= {name: view(pointers[name], shape, case.dtype) for name, shape in shapes_of(case).items()}
        try:
            launch = make(case, *([tensors] if case.passes else tensors.values()), indices)
            launch()
        except PeerMissing:
            raise
        except Exception as error:  # each library refuses in its own way; what it says is the answer
            raise PeerMissing(f"{self.name} refuses {case.name}: {first_line(error)}") from error
        return launch

    def error(self, case: Case, pointers: dict[str, int], launch: Callable) -> float:
        """Relative difference (norm) between the O of `launch` and ours, which is in place; the largest of those of the
        gradients."""
        theirs = launch()
        if case.passes:
            ours = views(case, pointers, ("dq", "dk", "dv")).values()
            pairs = [(mine.float(), other.float()) for mine, other in zip(ours, theirs, strict=True)]
            return max(float((mine - other).norm() / other.norm()) for mine, other in pairs)
        theirs = theirs.float() / (O_SCALE if theirs.element_size() == 1 else 1)
        return float((view(pointers["out"], case.out_shape, case.element_out).float() - theirs).norm() / theirs.norm())


def load(name: str) -> Peer:
    """The peer of that name; raises PeerMissing where it is not installed or does not load."""
    try:
        return PEERS[name]()
    except (ImportError, OSError, RuntimeError) as error:
        raise PeerMissing(f"{name} is not available here ({first_line(error)})") from error


def load_fa3() -> Peer:
    """FlashAttention-3 in C++, as the PyPI wheel fa3-fwd packs it: built without FP16 kernels and without windows."""
    import fa3_fwd_interface as interface

    def make_launch(case, q, k, v, indices):
        if case.page_size:
            raise PeerMissing("fa3 is built without pages")
        if with_cache and case.lengths_k:
            return cache_peers.fa3(with_cache, case, q, k, v, indices)
        call = partial(interface.flash_attn_func, q, k, v)
        if case.lengths:
            cu_seqlens = indices["cu_seqlens"]
            call = partial(
                interface.flash_attn_varlen_func, q, k, v, cu_seqlens, cu_seqlens, case.seqlen_q, case.seqlen_k
            )
        elif case.is_decode:
            call = partial(call, num_splits=0)  # as many as its heuristic wants; its default is one

        def launch():
            out = call(causal=case.is_causal, window_size=case.window)
            return out[0] if isinstance(out, tuple) else out

        return launch

    with_cache = getattr(interface, "flash_attn_with_kvcache", None)
    features = ("append", "rotary") if with_cache else ()
    return Peer("fa3", f"fa3-fwd {metadata.version('fa3-fwd')}", ("bf16", FP8), make_launch, features)


def load_cudnn() -> Peer:
    """cuDNN's fused attention through torch, FP8 through cuDNN's own Python frontend; its causal mask is top-left
    aligned, the same for square problems."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    @cache
    def frontend():
        import cudnn

        handle = cudnn.create_handle()
        cudnn.set_stream(handle, torch.cuda.current_stream().cuda_stream)
        return cudnn, handle

    @lru_cache(maxsize=1)  # the sets of K and V of a case share one
    def graph_of(case):
        return CudnnGraph(case, *frontend(), torch)

    def refuse(case):
        if case.lengths or max(case.window) >= 0:
            raise PeerMissing("cudnn is timed without packed sequences and windows")
        if case.is_causal and case.seqlen_q != case.seqlen_k:
            raise PeerMissing("cudnn has no bottom-right aligned causal mask here")

    def make_backward(case, tensors, indices):
        refuse(case)
        return gradient_peers.cudnn(*frontend(), case, tensors)

    def make_launch(case, q, k, v, indices):
        refuse(case)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if case.dtype == FP8:
            return graph_of(case).launch(q, k, v)
        options = {"is_causal": case.is_causal, "enable_gqa": case.num_heads != case.num_heads_k}

        def launch():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

        return launch

    version = f"cuDNN {torch.backends.cudnn.version()}, torch {torch.__version__}"
    return Peer("cudnn", version, ("fp16", "bf16", FP8), make_launch, make_backward=make_backward)


def load_fa4() -> Peer:
    """FlashAttention-4, whose kernels for Hopper are in the CuTe DSL too; its gradients."""
    from flash_attn.cute import interface

    make_backward = partial(gradient_peers.fa4, interface)
    version = f"flash-attn-4 {metadata_version('flash-attn-4')}"
    return Peer("fa4", version, ("fp16", "bf16"), None, make_backward=make_backward)


def load_vllm() -> Peer:
    """vLLM's fork of FlashAttention-3, called as its engine does: packed queries, over pages or packed keys, O in
    place; with pages, metadata of the scheduler made ahead, once for all layers of a step."""
    import torch

    try:
        from vllm_flash_attn import flash_attn_interface as interface
    except ImportError:
        from vllm.vllm_flash_attn import flash_attn_interface as interface

    def make_launch(case, q, k, v, indices):
        if isinstance(case, latent.LatentCase):
            return latent.vllm_launch(interface, torch, case, q, k, indices)
        if case.page_size == 0:
            raise PeerMissing("vllm is timed over pages alone")
        out = torch.empty(case.out_shape, dtype=getattr(torch, VIEWS[case.element_out][1]), device="cuda")
        options = vllm_tensors(case, q, k, v, out, indices) | {
            "max_seqlen_q": case.seqlen_q,
            "max_seqlen_k": case.seqlen_k,
            "causal": case.is_causal,
            "window_size": list(case.window),
            "num_splits": 0,
        }

        def call(**more):
            interface.flash_attn_varlen_func(
                **options, **more, softcap=case.scores.softcap, softmax_scale=case.head_dim**-0.5, fa_version=3
            )
            return out

        if "block_table" not in options:
            return call
        shared = ("cu_seqlens_q", "max_seqlen_q", "max_seqlen_k", "causal", "window_size", "num_splits")
        metadata = interface.get_scheduler_metadata(
            batch_size=case.batch_size,
            num_heads_q=case.num_heads,
            num_heads_kv=case.num_heads_k,
            headdim=case.head_dim,
            cache_seqlens=options["seqused_k"],
            qkv_dtype=q.dtype,
            page_size=options["k"].shape[1],
            has_softcap=case.scores.softcap > 0,
            **{name: options[name] for name in shared},
        )
        ahead = partial(call, scheduler_metadata=metadata)
        if is_repeatable(ahead, call().float()):
            return ahead
        return Noted(call, f"{case.name}: vllm is wrong when it is replayed with metadata, and is timed without")

    version = f"vllm_flash_attn {metadata_version('vllm_flash_attn', 'vllm')}, torch {torch.__version__}"
    return Peer("vllm", version, ("fp16", "bf16", FP8), make_launch, ("softcap", "s_aux"))


def vllm_tensors(case: Case, q, k, v, out, indices: dict) -> dict:
    """What vLLM's function takes of a case. Dense problems are packed ones to it; of decode K and V are pages, one
    after the other in memory."""
    import torch

    def steps(length: int, number: int):
        return torch.arange(0, length * number, length, dtype=torch.int32, device="cuda")

    sinks = {"s_aux": indices["s_aux"]} if case.scores.s_aux else {}
    tensors = {"q": q, "k": k, "v": v, "out": out} | sinks
    if case.page_size:
        lengths = {"cu_seqlens_q": indices["cu_seqlens"], "seqused_k": indices["seqused_k"]}
        return tensors | lengths | {"block_table": indices["page_table"]}
    if case.lengths:
        return tensors | {"cu_seqlens_q": indices["cu_seqlens"], "cu_seqlens_k": indices["cu_seqlens"]}
    batch = case.batch_size
    starts = {"cu_seqlens_q": steps(case.seqlen_q, batch + 1)}
    if not case.is_decode:
        starts["cu_seqlens_k"] = steps(case.seqlen_k, batch + 1)
        return starts | sinks | {name: tensors[name].flatten(0, 1) for name in ("q", "k", "v", "out")}
    if case.seqlen_k % DECODE_PAGE:
        raise PeerMissing(f"vllm decodes in pages of {DECODE_PAGE} tokens here")
    pages = batch, case.seqlen_k // DECODE_PAGE
    starts |= {name: tensors[name].flatten(0, 1) for name in ("q", "out")}
    starts |= {name: tensors[name].flatten(0, 1).unflatten(0, (-1, DECODE_PAGE)) for name in ("k", "v")}
    used = torch.full((batch,), case.seqlen_k, dtype=torch.int32, device="cuda")
    return starts | sinks | {"seqused_k": used, "block_table": steps(1, pages[0] * pages[1]).view(pages)}


def metadata_version(*packages: str) -> str:
    """The version of the first of these that is installed as a package: files alone have none."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return "of unknown version"


@dataclass(frozen=True)
class Noted:
    """A launch of which the table has to say something."""

    launch: Callable
    note: str

    def __call__(self):
        return self.launch()


def is_repeatable(launch: Callable, right) -> bool:
    """Whether every replay of a call leaves the right O; one that finds no work to do is fast, and leaves what was."""
    out = launch()
    replay = capture(launch, 1).launch
    for _ in range(REPLAYS):
        out.fill_(float("nan"))
        replay()
        if not float((out.float() - right).norm() / right.norm()) < SAME:
            return False
    return True


PEERS = {"fa3": load_fa3, "cudnn": load_cudnn, "vllm": load_vllm, "fa4": load_fa4}


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


def views(case: Case, pointers: dict[str, int], names: Sequence[str]) -> dict[str, Any]:
    """Tensors of a case by name."""
    shapes: dict[str, tuple] = {"k": case.kv_shape, "v": case.v_shape, "dk": case.kv_shape, "dv": case.v_shape}
    shapes |= {"out": case.out_shape, "dout": case.out_shape, "softmax_lse": case.lse_shape}
    types = {"softmax_lse": "fp32"}
    return {name: view(pointers[name], shapes.get(name, case.q_shape), types.get(name, case.dtype)) for name in names}


def view(pointer: int, shape: tuple[int, ...], dtype: str):
    """Device memory as a torch tensor, in place. The interface knows no BF16 and no FP8: integers carry the
    bits over."""
    import torch

    typestr, name = VIEWS[dtype]

    class Memory:
        """prod(shape) words."""

        __cuda_array_interface__ = {"shape": (prod(shape),), "typestr": typestr, "data": (pointer, False), "version": 3}

    return torch.as_tensor(Memory(), device="cuda").view(getattr(torch, name)).view(shape)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
