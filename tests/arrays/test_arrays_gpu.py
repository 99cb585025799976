"""attention over arrays of CuPy, PyTorch, JAX and cuda.core on the GPU. A library that is not installed is left out."""

import os
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from check import RULE_16_BIT, RULE_FP8
from descales import spread
from tolerance import FP8_SCORE_ERROR

from fa3_cute import FlashAttentionError, attention
from fa3_cute.arrays import memory as cuda
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin

pytestmark = pytest.mark.gpu

HEADS, HEADS_K, HEAD_DIM = 8, 2, 128
CU_Q, CU_K = np.array([0, 70, 70, 200], np.int32), np.array([0, 90, 150, 300], np.int32)
CASES = {
    "dense": ((2, 200), (2, 300), {"causal": True}),
    "packed": ((200,), (300,), {"causal": True, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}),
    "decode": ((2, 1), (2, 700), {"seqused_k": np.array([700, 33], np.int32)}),
}


def cupy_library():
    cupy = pytest.importorskip("cupy")
    return SimpleNamespace(put=cupy.asarray, take=cupy.from_dlpack, get=cupy.asnumpy)


def torch_library():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA")

    def put(array):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
        if array.dtype == ml_dtypes.float8_e4m3fn:
            return torch.from_numpy(array.view(np.uint8)).cuda().view(torch.float8_e4m3fn)
        return torch.from_numpy(array).cuda()

    return SimpleNamespace(put=put, take=torch.from_dlpack, get=lambda tensor: tensor.float().cpu().numpy())


def jax_library():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX without CUDA")
    return SimpleNamespace(put=jax.device_put, take=jax.dlpack.from_dlpack, get=np.asarray)


LIBRARIES = {"cupy": cupy_library, "torch": torch_library, "jax": jax_library}


def inputs(rows_q, rows_k, dtype=np.float16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (*rows_q, HEADS, HEAD_DIM), (*rows_k, HEADS_K, HEAD_DIM), (*rows_k, HEADS_K, HEAD_DIM)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8_e4m3"}


def check(qkv, out, lse=None, options=None):
    """Against float64, within what the tolerance rule allows the largest error."""
    options = options or {}
    dtype = DTYPES[qkv[0].dtype.name]
    is_fp8 = dtype == "fp8_e4m3"
    exact, exact_lse = attention_reference(*qkv, **options)
    rounded, _ = low_precision_twin(*qkv, dtype, **options)
    rule = RULE_FP8 if is_fp8 else RULE_16_BIT
    allowed = rule.max_factor * np.abs(rounded - exact).max() + rule.max_slack
    error = np.abs(np.asarray(out, np.float64) - exact).max()
    assert error <= allowed, f"largest error {error:.2e}, allowed {allowed:.2e}"
    if lse is not None:
        largest = HEAD_DIM**-0.5 * np.prod(
            [  # |q| |k|, as the scores have it
                np.linalg.norm(as_float(tensor), axis=-1).max() * np.max(options.get(f"{name}_descale", 1))
                for name, tensor in zip("qk", qkv, strict=False)
            ]
        )
        np.testing.assert_allclose(lse, exact_lse, rtol=0, atol=1e-4 + is_fp8 * largest * FP8_SCORE_ERROR)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LIBRARIES)
def test_results_taken_over(name, case, device):
    """Inputs of the library, out and LSE of ours, taken over by the library."""
    library = LIBRARIES[name]()
    rows_q, rows_k, options = CASES[case]
    qkv = inputs(rows_q, rows_k)
    arrays = {key: library.put(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    q, k, v = map(library.put, qkv)
    out, lse = attention(q, k, v, return_lse=True, **arrays)
    check(qkv, library.get(library.take(out)), library.get(library.take(lse)), options)


@pytest.mark.parametrize("name", ["cupy", "torch"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "seqused_k": np.array([300, 33], np.int32)}], ids=str)
def test_second_queries(name, options, device):
    """q and q_v as columns of one array, k and v as columns of another; against the reference of both parts."""
    library = LIBRARIES[name]()
    rng = np.random.default_rng(3)
    q, k = (
        rng.standard_normal(shape, np.float32).astype(np.float16) for shape in ((2, 3, HEADS, 576), (2, 300, 1, 576))
    )
    q_gpu, k_gpu = library.put(q), library.put(k)
    arrays = {key: library.put(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    parts = q_gpu[..., 512:], k_gpu[..., 512:], k_gpu[..., :512]
    out, lse = attention(*parts, q_v=q_gpu[..., :512], return_lse=True, **arrays)
    qkv = q[..., 512:], k[..., 512:], k[..., :512]
    check(qkv, library.get(library.take(out)), library.get(library.take(lse)), options | {"q_v": q[..., :512]})


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_bfloat16(name, device):
    library = LIBRARIES[name]()
    qkv = inputs((2, 200), (2, 300), ml_dtypes.bfloat16)
    q, k, v = map(library.put, qkv)
    out = library.take(attention(q, k, v, causal=True))
    assert "bfloat16" in str(out.dtype)
    check(qkv, library.get(out), options={"causal": True})


@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_views_and_out_in_place(name, device):
    """Heads before rows, a slice of a longer cache, one K head for all; out in the middle of a larger array."""
    library = LIBRARIES[name]()
    q, k, v = inputs((2, 200), (2, 300))
    q_gpu = library.put(np.ascontiguousarray(q.swapaxes(1, 2))).swapaxes(1, 2)
    k_gpu, v_gpu = (library.put(np.pad(x, [(0, 0), (0, 20), (0, 0), (0, 0)]))[:, :300] for x in (k, v))
    whole = library.put(np.full((2, 202, HEADS, HEAD_DIM), 7, np.float16))
    out = whole[:, 1:201]
    assert attention(q_gpu, k_gpu, v_gpu, out=out, causal=True) is out
    result = library.get(whole)
    check((q, k, v), result[:, 1:201], options={"causal": True})
    assert (result[:, [0, 201]] == 7).all()


def test_broadcast_keys(device):
    torch = pytest.importorskip("torch")
    library = torch_library()
    q, k, v = inputs((2, 200), (2, 300))
    k, v = (np.ascontiguousarray(np.broadcast_to(x[:1], x.shape)) for x in (k, v))
    one_k, one_v = (library.put(x[:1].copy()).expand(2, -1, -1, -1) for x in (k, v))
    assert one_k.stride(0) == 0
    out = attention(library.put(q), one_k, one_v, causal=True)
    check((q, k, v), library.get(torch.from_dlpack(out)), options={"causal": True})


@pytest.mark.parametrize("is_object", [True, False])
def test_streams_are_ordered(is_object, stream):
    """PyTorch writes q late on a stream of its own; ours waits for that, and PyTorch's next stream waits for ours."""
    torch = pytest.importorskip("torch")
    library = torch_library()
    qkv = inputs((2, 200), (2, 300))
    q, k, v = map(library.put, qkv)
    late = torch.zeros_like(q)
    attention(q, k, v, causal=True, stream=stream)  # compiles and loads, so that the next call is quick
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = attention(late, k, v, causal=True, stream=stream if is_object else int(stream.handle))
    with torch.cuda.stream(torch.cuda.Stream()):
        result = library.get(torch.from_dlpack(out).clone())
    check(qkv, result, options={"causal": True})


def test_capture_by_pytorch(device):
    """A call with out is captured; a replay reads what is in the arrays then."""
    torch = pytest.importorskip("torch")
    library = torch_library()
    qkv = inputs((2, 200), (2, 300))
    q, k, v = map(library.put, qkv)
    out, later = torch.zeros_like(q), q.clone()
    own = torch.cuda.Stream()
    with torch.cuda.stream(own):
        attention(q, k, v, out=out, causal=True, stream=own.cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    q.zero_()
    with torch.cuda.graph(graph, stream=own):
        attention(q, k, v, out=out, causal=True, stream=own.cuda_stream)
        with pytest.raises(FlashAttentionError, match="capturing"):
            attention(q, k, v, causal=True, stream=own.cuda_stream)
    out.zero_()
    q.copy_(later)
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    check(qkv, library.get(out), options={"causal": True})


def test_arrays_without_a_library(stream):
    """cuda.core's own views in, our buffers out; and a result as the next call's input."""
    from cuda.core.utils import StridedMemoryView

    qkv = inputs((2, 200), (2, 300))
    q, k, v = (StridedMemoryView.from_buffer(cuda.upload(x, stream=stream), x.shape, dtype=x.dtype) for x in qkv)
    out, lse = attention(q, k, v, causal=True, stream=stream, return_lse=True)
    again = attention(out, k, v, causal=True, stream=stream)
    first, second = (cuda.download(x.buffer, x.shape, np.float16, stream=stream) for x in (out, again))
    check(qkv, first, cuda.download(lse.buffer, lse.shape, np.float32, stream=stream), {"causal": True})
    check((first, *qkv[1:]), second, options={"causal": True})


def test_array_interface_in_and_out(device):
    """Through __cuda_array_interface__ only, as numba's arrays come."""
    cupy = pytest.importorskip("cupy")
    qkv = inputs((2, 200), (2, 300))
    arrays = [cupy.asarray(x) for x in qkv]
    q, k, v = (SimpleNamespace(__cuda_array_interface__=x.__cuda_array_interface__) for x in arrays)
    out = attention(q, k, v, causal=True)
    check(qkv, cupy.asnumpy(cupy.asarray(out)), options={"causal": True})


# ---- FP8 -----------------------------------------------------------------------------------------------------------


def fp8_inputs(rows_q, rows_k):
    """Real values are 1/32, 1/16 and twice what is stored: by head and sequence they may differ, by descales."""
    return [
        (x * factor).astype(ml_dtypes.float8_e4m3fn)
        for x, factor in zip(inputs(rows_q, rows_k, np.float32), (32, 16, 0.5), strict=True)
    ]


def fp8_descales(shapes=((), (), ())) -> dict:
    """FP32 arrays for `fp8_inputs` of these shapes for q, k and v; their values lie within a factor of 4."""
    return {
        f"{name}_descale": np.asarray(one * spread("q", shape), np.float32)
        for name, one, shape in zip("qkv", (1 / 32, 1 / 16, 2), shapes, strict=True)
    }


def bytes_of(library, qkv):
    return [library.put(x.view(np.uint8)) for x in qkv]


def attention_of_bytes(name, library, qkv, options):
    """(out, LSE) of FP8 inputs given as bytes, options as arrays of the library. CuPy has no BF16: FP16 there."""
    arrays = {key: library.put(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    out = {"out": library.put(np.full(qkv[0].shape, np.nan, np.float16))} if name == "cupy" else {}
    result, lse = attention(*bytes_of(library, qkv), dtype="float8_e4m3fn", return_lse=True, **arrays, **out)
    return library.get(result if out else library.take(result)), library.get(library.take(lse))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LIBRARIES)
def test_fp8_as_bytes(name, case, device):
    library = LIBRARIES[name]()
    rows_q, rows_k, options = CASES[case]
    qkv, options = fp8_inputs(rows_q, rows_k), options | fp8_descales()
    check(qkv, *attention_of_bytes(name, library, qkv, options), options)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_fp8_as_itself(name, device):
    """Where the library exports it: DLPack has names for FP8 since 1.1. Elsewhere the refusal says what to do."""
    library = LIBRARIES[name]()
    qkv, descales = fp8_inputs((2, 200), (2, 300)), fp8_descales()
    arrays = {key: library.put(value) for key, value in descales.items()}
    try:
        out = library.take(attention(*map(library.put, qkv), causal=True, **arrays))
    except FlashAttentionError as error:
        if "cannot be had through DLPack" not in str(error):
            raise
        assert "view it as uint8 and say dtype='float8_e4m3fn'" in str(error)
        pytest.skip(f"this {name} does not export FP8")
    assert "bfloat16" in str(out.dtype)
    check(qkv, library.get(out), options={"causal": True, **descales})


# Of q, k and v.
DESCALE_SHAPES = {
    "one": ((), (), ()),
    "per head": ((HEADS,), (HEADS_K,), (HEADS_K,)),
    "per batch": ((2, 1),) * 3,
    "per batch and head": ((2, HEADS), (2, HEADS_K), (2, HEADS_K)),
    "each its own": ((2, HEADS), (2, 1), (HEADS_K,)),
}


@pytest.mark.parametrize("shapes", DESCALE_SHAPES.values(), ids=DESCALE_SHAPES.keys())
@pytest.mark.parametrize("name", LIBRARIES)
def test_fp8_descales(name, shapes, device):
    library = LIBRARIES[name]()
    qkv, options = fp8_inputs((2, 200), (2, 300)), fp8_descales(shapes) | {"causal": True}
    check(qkv, *attention_of_bytes(name, library, qkv, options), options)


@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_fp8_descales_of_packed_sequences_by_view(name, device):
    """Per sequence and head, as a transposed view; out of FP16, in place."""
    library = LIBRARIES[name]()
    rows_q, rows_k, options = CASES["packed"]
    qkv, descales = fp8_inputs(rows_q, rows_k), fp8_descales(((3, HEADS), (3, HEADS_K), (3, HEADS_K)))
    views = {key: library.put(np.ascontiguousarray(value.T)).T for key, value in descales.items()}
    arrays = {key: library.put(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    out = library.put(np.full(qkv[0].shape, np.nan, np.float16))
    attention(*bytes_of(library, qkv), dtype="float8_e4m3fn", out=out, **arrays, **views)
    check(qkv, library.get(out), options=options | descales)


@pytest.mark.parametrize("name", LIBRARIES)
def test_refusals(name, device):
    library = LIBRARIES[name]()
    qkv = inputs((2, 200), (2, 300))
    q, k, v = map(library.put, qkv)
    with pytest.raises(FlashAttentionError, match="k is a numpy.ndarray in host memory"):
        attention(q, qkv[1], v)
    with pytest.raises(FlashAttentionError, match="k is a .*: must be a NumPy array, as q is"):
        attention(qkv[0], k, v)
    if name == "jax":
        with pytest.raises(FlashAttentionError, match="out is a .*read-only"):
            attention(q, k, v, out=q)
