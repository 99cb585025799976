"""What forward reads and writes: strides of every kind, guard bands, 64-bit offsets, and nothing on a refused call."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from cases import FAMILIES, Case
from check import DATA_TYPES, assert_out, make_problem, params_of, results, run, run_and_check
from images import GUARD_BYTES, POISON, STORAGE, Image, contiguous, heads_before_rows, padded

from fa3_cute import AttentionMode, FlashAttentionParams, Status, forward
from fa3_cute.arrays import memory as cuda
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin, to_bits

pytestmark = pytest.mark.gpu


# ---- layouts of dense tensors, besides check.py's -------------------------------------------------------------------


def rows_before_batch(name, shape, dtype):
    """[row, batch, head, head_dim] in memory: the batch stride is the smaller."""
    batch, rows, heads, head_dim = shape
    image = Image((rows, batch, heads, head_dim), dtype)
    return image.tensor(image.whole.transpose(1, 0, 2, 3))


def one_kv_head_for_all(name, shape, dtype):
    """K and V with head stride 0."""
    return _broadcast(name, shape, dtype, axis=2)


def one_kv_for_all_batches(name, shape, dtype):
    """K and V with batch stride 0."""
    return _broadcast(name, shape, dtype, axis=0)


def _broadcast(name, shape, dtype, axis):
    if name not in "kv":
        return contiguous(name, shape, dtype)
    image = Image([1 if i == axis else n for i, n in enumerate(shape)], dtype)
    image.whole[...] = to_bits(np.random.default_rng(ord(name)).standard_normal(image.whole.shape), dtype)
    return image.tensor(np.broadcast_to(image.whole, shape))


LAYOUTS = (padded, heads_before_rows, rows_before_batch, one_kv_head_for_all, one_kv_for_all_batches)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_strided(case, layout, stream):
    """Right results, gaps of the output untouched, inputs unchanged; what lies around K and V is NaN and stays out."""
    problem = make_problem(case, place=layout)
    run_and_check(problem, stream)
    for tensor in (problem.q, problem.k, problem.v):
        assert np.array_equal(tensor.image.download(stream), tensor.image.host), "an input was written to"


def interleaved_qkv(case):
    """Q, K and V as slices of one packed [batch, seqlen, num_heads + 2 * num_heads_k, head_dim] tensor."""
    heads, heads_k = case.num_heads, case.num_heads_k
    image = Image((case.batch, case.seqlen_q, heads + 2 * heads_k, case.head_dim), case.dtype)
    parts = dict(zip("qkv", np.split(image.whole, [heads, heads + heads_k], axis=2), strict=True))
    return lambda name, shape, dtype: image.tensor(parts[name]) if name in parts else contiguous(name, shape, dtype)


@pytest.mark.parametrize("heads_k", [6, 2])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_interleaved_qkv(family, heads_k, stream):
    case = Case(family.dtype, family.head_dim, family.is_causal, 6, heads_k, 333, 333, batch=2)
    run_and_check(make_problem(case, place=interleaved_qkv(case)), stream)


@pytest.mark.parametrize("stride", [0, 7, 8])
@pytest.mark.parametrize("seqlen_q", [1, 130])
@pytest.mark.parametrize("dtype, head_dim", [("fp16", 64), ("bf16", 128), ("bf16", 192)])
def test_strides_of_dimensions_of_size_one_mean_nothing(dtype, head_dim, seqlen_q, stride, stream):
    """Array libraries leave any number there; nothing ever moves along such a dimension."""
    problem = make_problem(Case(dtype, head_dim, False, 1, 1, seqlen_q, 200))
    names = [f"{tensor}_{dim}_stride" for tensor in ("q", "k", "v", "out") for dim in ("batch", "head")]
    names += ["q_row_stride", "out_row_stride"] if seqlen_q == 1 else []
    out, lse = run(problem, stream, **dict.fromkeys(names, stride))
    reference_out, reference_lse = run(problem, stream)
    assert out.tobytes() == reference_out.tobytes() and lse.tobytes() == reference_lse.tobytes()
    run_and_check(problem, stream)


# ---- what is not asked for is not written ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_absent_lse_is_not_written(case, stream):
    problem = make_problem(case)
    forward(params_of(problem, softmax_lse=None), stream).check()
    problem.out.read(stream)
    assert problem.lse.is_untouched(stream)


# Overrides of a good call, and the status that they must give.
REFUSED = {
    "null k": ({"k": None}, Status.NULL_POINTER),
    "head_dim": ({"head_dim": 84}, Status.UNSUPPORTED_HEAD_DIM),
    "heads": ({"num_heads_k": 4}, Status.INVALID_HEADS),
    "causal window": ({"is_causal": True, "window_size_left": 5}, Status.CAUSAL_WINDOW_CONFLICT),
    "one cu_seqlens": ({"mode": AttentionMode.VARLEN_PREFILL}, Status.VARLEN_MISMATCH),
    "negative length": ({"seqlen_k": -1}, Status.INVALID_SHAPE),
    "decode": ({"mode": AttentionMode.DECODE}, Status.MODE_MISMATCH),
    "scale": ({"softmax_scale": float("nan")}, Status.INVALID_ARGUMENT),
    "softcap": ({"softcap": -30.0}, Status.SOFTCAP_UNSUPPORTED),
    "splits": ({"num_splits": 257}, Status.SPLIT_KV_UNSUPPORTED),
    "pages": ({"page_table": 16, "page_size": 128}, Status.PAGED_KV_UNSUPPORTED),
    "rotary": ({"rotary_dim": 64}, Status.ROTARY_UNSUPPORTED),
    "dropout": ({"p_dropout": 0.1}, Status.INVALID_ARGUMENT),
    "left padding": ({"leftpad_k": 16, "attn_mask": 16}, Status.FEATURE_UNSUPPORTED),
}


@pytest.mark.parametrize("overrides, status", REFUSED.values(), ids=REFUSED.keys())
def test_refused_calls_write_nothing(overrides, status, stream):
    problem = make_problem(FAMILIES[0])
    assert forward(params_of(problem, **overrides), stream) == status
    assert problem.out.is_untouched(stream) and problem.lse.is_untouched(stream)


def test_misaligned_pointers_are_refused(stream):
    problem = make_problem(FAMILIES[0])
    for tensor in ("q", "k", "v", "out"):
        params = params_of(problem, **{tensor: getattr(problem, tensor).address + 8})
        assert forward(params, stream) == Status.INVALID_ARGUMENT
    assert problem.out.is_untouched(stream) and problem.lse.is_untouched(stream)


# ---- more than 2^31 elements ---------------------------------------------------------------------------------------


class Huge:
    """A tensor too large for an image on the host: its device block is poisoned, and written and read in pieces."""

    def __init__(self, shape, strides, dtype: str, byte: int = POISON):
        self.shape, self.strides, self.dtype = shape, strides, STORAGE[dtype]
        elements = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        self.buffer = cuda.allocate(2 * GUARD_BYTES + elements * self.dtype.itemsize)
        cuda.fill(self.buffer, byte)
        self.address = cuda.address(self.buffer, GUARD_BYTES)

    def piece(self, index, count: int):
        """The device memory of `count` elements from `index` on."""
        start = sum(i * stride for i, stride in zip(index, self.strides, strict=False))
        return cuda.window(self.buffer, GUARD_BYTES + start * self.dtype.itemsize, count * self.dtype.itemsize)

    def write(self, index, array: np.ndarray) -> None:
        cuda.upload(array, self.piece(index, array.size))

    def read(self, index, shape, stream) -> np.ndarray:
        return cuda.download(self.piece(index, prod(shape)), shape, self.dtype, stream=stream)


@pytest.fixture
def huge(much_memory):
    """Makes Huge tensors, and frees them: also where a test's failure keeps them alive."""
    made = []

    def make(*args, **options) -> Huge:
        made.append(Huge(*args, **options))
        return made[-1]

    yield make
    for tensor in made:
        tensor.buffer.close()


def huge_strides(shape, huge_dim: int) -> tuple[int, ...]:
    """Element strides of a shape: contiguous, but for one dimension whose last index lies past 2^31."""
    strides, packed = [0] * len(shape), 1
    for dim in reversed(range(len(shape))):
        if dim == huge_dim:
            strides[dim] = -(-(2**31) // (shape[dim] - 1)) // 64 * 64 + 64
        else:
            strides[dim], packed = packed, packed * shape[dim]
    return tuple(strides)


HUGE_CASES = [
    Case("fp16", 64, False, 4, 2, 130, 150, batch=3, has_lse=False),
    Case("bf16", 128, True, 4, 2, 130, 150, batch=3, has_lse=False),
    Case("bf16", 256, True, 4, 2, 130, 150, batch=3, has_lse=False),
]


HUGE_DECODE = [replace(case, seqlen_q=2) for case in HUGE_CASES]


@pytest.mark.parametrize("huge_dim", [0, 1, 2], ids=["batch", "row", "head"])
@pytest.mark.parametrize("case", HUGE_CASES + HUGE_DECODE, ids=str)
def test_offsets_beyond_31_bits(case, huge_dim, huge, stream):
    """Strides that put the last batch, row or head more than 2^31 elements from the first, in all four tensors."""
    q_shape = (case.batch, case.seqlen_q, case.num_heads, case.head_dim)
    k_shape = (case.batch, case.seqlen_k, case.num_heads_k, case.head_dim)
    shapes = {"q": q_shape, "k": k_shape, "v": k_shape, "out": q_shape}
    tensors = {name: huge(shape, huge_strides(shape, huge_dim), case.dtype) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    inputs = {name: to_bits(rng.standard_normal(shapes[name], np.float32), case.dtype) for name in "qkv"}
    for name, array in inputs.items():
        for index in np.ndindex(array.shape[:3]):
            tensors[name].write(index, array[index])
    strides = {
        f"{name}_{dim}_stride": stride
        for name, tensor in tensors.items()
        for dim, stride in zip(("batch", "row", "head"), tensor.strides, strict=False)
    }
    params = FlashAttentionParams(
        **{name: tensor.address for name, tensor in tensors.items()},
        **strides,
        batch_size=case.batch,
        seqlen_q=case.seqlen_q,
        seqlen_k=case.seqlen_k,
        num_heads=case.num_heads,
        num_heads_k=case.num_heads_k,
        head_dim=case.head_dim,
        dtype=DATA_TYPES[case.dtype],
        is_causal=case.is_causal,
    )
    forward(params, stream).check()
    out = np.stack([tensors["out"].read(index, (case.head_dim,), stream) for index in np.ndindex(q_shape[:3])])
    judge(out.reshape(q_shape), inputs, case)


@pytest.mark.parametrize("huge_dim", [0, 1], ids=["row", "head"])
@pytest.mark.parametrize("case", HUGE_CASES, ids=str)
def test_packed_offsets_beyond_31_bits(case, huge_dim, huge, stream):
    """The same for packed sequences of unlike lengths."""
    cu_seqlens = {"cu_seqlens_q": [0, 50, 51, 130], "cu_seqlens_k": [0, 20, 140, 150]}
    shapes = {
        name: (rows, heads, case.head_dim)
        for name, rows, heads in (
            ("q", 130, case.num_heads),
            ("k", 150, case.num_heads_k),
            ("v", 150, case.num_heads_k),
            ("out", 130, case.num_heads),
        )
    }
    tensors = {name: huge(shape, huge_strides(shape, huge_dim), case.dtype) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    inputs = {name: to_bits(rng.standard_normal(shapes[name], np.float32), case.dtype) for name in "qkv"}
    for name, array in inputs.items():
        for index in np.ndindex(array.shape[:2]):
            tensors[name].write(index, array[index])
    strides = {
        f"{name}_{dim}_stride": stride
        for name, tensor in tensors.items()
        for dim, stride in zip(("row", "head"), tensor.strides, strict=False)
    }
    offsets = {name: cuda.upload(np.array(values, np.int32)) for name, values in cu_seqlens.items()}
    params = FlashAttentionParams(
        **{name: tensor.address for name, tensor in tensors.items()},
        **strides,
        batch_size=3,
        total_q=130,
        total_k=150,
        **{name: cuda.address(buffer) for name, buffer in offsets.items()},
        mode=AttentionMode.VARLEN_PREFILL,
        num_heads=case.num_heads,
        num_heads_k=case.num_heads_k,
        head_dim=case.head_dim,
        dtype=DATA_TYPES[case.dtype],
        is_causal=case.is_causal,
    )
    forward(params, stream).check()
    out = np.stack([tensors["out"].read(index, (case.head_dim,), stream) for index in np.ndindex(shapes["out"][:2])])
    judge(out.reshape(shapes["out"]), inputs, case, **cu_seqlens)


@pytest.mark.parametrize(
    "case",
    [
        Case("fp16", 128, False, 128, 128, 1024, 1024, batch=129),
        Case("bf16", 128, True, 128, 128, 1024, 1024, batch=129),
    ],
    ids=str,
)
def test_contiguous_tensors_of_more_than_2_31_elements(case, huge, stream):
    """Four tensors of 4.3 GB, zeros but for some batches, which are compared head by head; zeros must give zeros."""
    shape = (case.batch, case.seqlen_q, case.num_heads, case.head_dim)
    assert prod(shape) > 2**31
    strides = tuple(prod(shape[i + 1 :]) for i in range(4))
    tensors = {name: huge(shape, strides, case.dtype, byte=0) for name in "qkv"}
    tensors["out"] = huge(shape, strides, case.dtype)
    lse = huge((case.batch, case.num_heads, case.seqlen_q), (case.num_heads * case.seqlen_q, case.seqlen_q, 1), "fp32")
    rng = np.random.default_rng(0)
    written = {}
    for batch in (0, 65, case.batch - 1):
        written[batch] = {name: to_bits(rng.standard_normal(shape[1:], np.float32), case.dtype) for name in "qkv"}
        for name, array in written[batch].items():
            tensors[name].write((batch,), array)
    params = FlashAttentionParams(
        **{name: tensor.address for name, tensor in tensors.items()},
        softmax_lse=lse.address,
        batch_size=case.batch,
        seqlen_q=case.seqlen_q,
        seqlen_k=case.seqlen_k,
        num_heads=case.num_heads,
        num_heads_k=case.num_heads_k,
        head_dim=case.head_dim,
        dtype=DATA_TYPES[case.dtype],
        is_causal=case.is_causal,
    )
    forward(params, stream).check()
    heads = [0, 77, case.num_heads - 1]
    for batch, inputs in written.items():
        out = tensors["out"].read((batch,), shape[1:], stream)
        judge(out[None, :, heads], {name: array[None, :, heads] for name, array in inputs.items()}, case)
        assert np.isfinite(as_float(out)).all() and np.isfinite(lse.read((batch,), shape[2:0:-1], stream)).all()
    assert not tensors["out"].read((case.batch - 2,), shape[1:], stream).any()


def judge(out, inputs, case, **cu_seqlens):
    """The tolerance rule for an output that has no Problem."""
    q, k, v = (inputs[name] for name in "qkv")
    ref, _ = attention_reference(q, k, v, causal=case.is_causal, **cu_seqlens)
    twin, _ = low_precision_twin(q, k, v, case.dtype, causal=case.is_causal, **cu_seqlens)
    assert_out(as_float(out, np.float64), ref, twin)


def test_outputs_are_fully_overwritten(stream):
    """A second call over the first one's result gives the same bits: nothing is accumulated, nothing left over."""
    problem = make_problem(FAMILIES[0])
    first = run(problem, stream)
    forward(params_of(problem), stream).check()
    for a, b in zip(first, results(problem, stream), strict=True):
        assert a.tobytes() == b.tobytes()
