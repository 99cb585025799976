"""flash-attn's functions on a GPU: against the CPU's, on streams, in graphs and compiled, and their gradients."""

import pytest
import torch
from tensors import BF16, CALLS, append, ints, packed, qkv, rand

from fa3_cute.torch import device as on_device
from fa3_cute.torch import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, merge_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch has no CUDA, or there is no GPU"),
]

# Of BF16 results that are about 1, whose P is BF16 too; FP8's is FP8.
TOLERANCE, TOLERANCE_FP8 = 2**-6, 2**-3


@pytest.mark.parametrize("name", CALLS)
def test_as_on_the_cpu(name):
    out, lse = CALLS[name]("cuda")
    expected, expected_lse = CALLS[name]("cpu")
    assert out.is_cuda and out.dtype == expected.dtype
    tolerance = TOLERANCE_FP8 if name == "fp8" else TOLERANCE
    assert (out.cpu().float() - expected.float()).abs().max() <= tolerance
    assert torch.allclose(lse.cpu(), expected_lse, rtol=0, atol=1e-4 if name != "fp8" else 1e-2)


def test_new_rows_are_written():
    """The cache afterwards is the CPU's, bit by bit, where nothing is rotated."""
    caches = {}
    for device in ("cpu", "cuda"):
        caches[device] = [rand(2, 150, 2, 64, device=device, seed=seed) for seed in (1, 2)]
        append(device, caches[device])
    for ours, expected in zip(caches["cuda"], caches["cpu"], strict=True):
        assert torch.equal(ours.cpu(), expected)


def test_merge_attention():
    q, k, v = qkv(device="cuda")
    parts = [
        flash_attn_func(q, k[:, part], v[:, part], return_attn_probs=True) for part in (slice(0, 13), slice(13, None))
    ]
    out, lse = merge_attention(*parts[0], *parts[1])
    whole, whole_lse = flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out - whole).abs().max() <= 2**-5 and (lse - whole_lse).abs().max() <= 1e-4


def test_side_stream_waits_for_nothing_else():
    """Results are those of inputs that the same stream has just written, whatever the default stream does."""
    q, k, v = qkv(seqlen_q=300, seqlen_k=300, device="cuda")
    expected = flash_attn_func(q, k, v)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(20_000_000)
        late.copy_(q)
        out = flash_attn_func(late, k, v)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_device_and_stream_are_those_of_torch_cuda():
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for stream in streams:
        with torch.cuda.stream(stream):
            assert on_device._current_stream(stream.device.index) == torch.cuda.current_stream().cuda_stream
    assert len({stream.cuda_stream for stream in streams}) == 2
    assert on_device._current_device() == torch.cuda.current_device()


@pytest.mark.parametrize("num_splits", [1, 20])
def test_captured_with_lengths_that_change(num_splits):
    """Replays see the lengths of the replay; with splits, two graphs have workspaces and counters of their own."""
    q, k, v = qkv(seqlen_q=1, seqlen_k=4096, dim=64, device="cuda")
    lengths = ints(4096, 17, device="cuda")

    def decode():
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, num_splits=num_splits)

    decode()
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outs.append(decode())
    for values in ((4096, 17), (5, 2000), (4096, 4096)):
        lengths.copy_(ints(*values, device="cuda"))
        for _ in range(2):
            for graph in graphs:
                graph.replay()
        expected = decode()
        assert all(torch.equal(out, expected) for out in outs)


def test_graph_trees():
    q, k, v = qkv(device="cuda")
    compiled = torch.compile(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True) * 2, fullgraph=True, mode="reduce-overhead"
    )
    for seed in range(4):
        x = rand(*q.shape, device="cuda", seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(x, k, v).clone(), flash_attn_func(x, k, v, causal=True) * 2)


def gradients(device, with_lse=True, **options):
    leaves = [x.requires_grad_() for x in qkv(device=device)]
    out, lse = flash_attn_func(*leaves, causal=True, return_attn_probs=True, **options)
    loss = (out * rand(*out.shape, device=device, seed=5)).sum()
    if with_lse:
        loss = loss + (lse * rand(*lse.shape, dtype=torch.float32, device=device, seed=6)).sum()
    return torch.autograd.grad(loss, leaves)


def gradients_packed(device):
    q, k, v, *offsets = packed(device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_varlen_func(*leaves, *offsets, 33, 49, causal=True)
    return torch.autograd.grad(out, leaves, rand(*out.shape, device=device, seed=5))


def gradients_of_scores(device):
    leaves = [x.requires_grad_() for x in (*qkv(device=device), rand(4, device=device))]
    *tensors, s_aux = leaves
    options = {"softcap": 2.0, "attention_chunk": 16, "s_aux": s_aux}
    out, lse = flash_attn_func(*tensors, causal=True, return_attn_probs=True, **options)
    weights = rand(*out.shape, device=device, seed=5), rand(*lse.shape, dtype=torch.float32, device=device, seed=6)
    return torch.autograd.grad((out, lse), leaves, weights)


@pytest.mark.parametrize("call", [gradients, gradients_packed, gradients_of_scores], ids=["dense", "packed", "scores"])
def test_gradients(call):
    for ours, theirs in zip(call("cuda"), call("cpu"), strict=True):
        assert ours.dtype == BF16
        assert (ours.cpu().float() - theirs.float()).abs().max() <= 2**-6 * theirs.float().abs().max()


def test_gradients_of_a_compiled_model():
    leaves = [x.requires_grad_() for x in (*qkv(device="cuda"), rand(4, device="cuda"))]

    def model(q, k, v, s_aux):
        return flash_attn_func(q, k, v, causal=True, deterministic=True, s_aux=s_aux)

    compiled = torch.compile(model, fullgraph=True)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        torch.autograd.grad(model(*leaves).sum(), leaves),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = qkv(device="cuda:1")
    out = flash_attn_func(q, k, v)
    assert out.device.index == 1 and torch.equal(out.cpu(), flash_attn_func(*(x.to("cuda:0") for x in (q, k, v))).cpu())
