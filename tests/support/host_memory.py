"""`forward`, `backward` and `merge_attention` of params whose addresses are of host memory, computed by the reference.

What stands between an array library and the kernels is tested with it where there is no GPU: addresses, strides,
lengths and choices are read from the params alone.
"""

import ctypes

import numpy as np


from fa3_cute import BackwardParams, DataType, FlashAttentionParams, MergeParams, api, explain
from fa3_cute.arrays.append import updated_on_host
from fa3_cute.contract.append import new_dtype
from fa3_cute.contract.backward_reference import OPTIONS, Saved, backward_reference
from fa3_cute.contract.fp8_cache import keys_dtype
from fa3_cute.contract.merge_reference import merge_reference
from fa3_cute.contract.params import has_packed_keys, is_packed, tensor_sizes
from fa3_cute.contract.plain import plain
from fa3_cute.contract.reference import attention_reference, to_bits
from fa3_cute.contract.rows import used_rows
from fa3_cute.contract.status import Status

NUMPY = {DataType.FP16: np.float16, DataType.BF16: np.uint16, DataType.FP8_E4M3: np.uint8, DataType.FP32: np.float32}
NAMES = {DataType.FP16: "fp16", DataType.BF16: "bf16", DataType.FP8_E4M3: "fp8_e4m3", DataType.FP32: "fp32"}


class HostMemory:
    """Stands in for the three functions of api.py; `calls` are copies of the params, `streams` what they ran on."""

    def __init__(self):
        self.calls, self.streams = [], []

    def install(self, monkeypatch) -> None:
        """In api.py, until the test ends."""
        for name in ("forward", "backward", "merge_attention"):
            monkeypatch.setattr(api, name, getattr(self, name))

    def _check(self, params, stream) -> None:
        assert explain(params) == []
        fields = {name: getattr(params, name) for name in type(params).__dataclass_fields__}
        self.calls.append(type(params)(**fields))
        self.streams.append(stream)

    def forward(self, params: FlashAttentionParams, stream) -> Status:
        """out and LSE; rows that no sequence uses stay as they are."""
        self._check(params, stream)
        p = plain(params)
        q, k, v, out = (tensor(p, name) for name in ("q", "k", "v", "out"))
        given = options(p)
        if p.k_new or p.rotary_cos:
            q, given = updated_on_host((q, k, v), given | updates(p))
        exact, lse = attention_reference(q, k, v, **given)
        for rows in query_rows(p, out):
            out[rows] = to_bits(exact[rows], NAMES[out_dtype(p)])
        if p.zero_padding:
            out[given["cu_seqlens_q"][-1] :] = 0
        if p.softmax_lse:
            array(p.softmax_lse, lse.shape, np.float32)[...] = lse
        return Status.OK

    def backward(self, params: BackwardParams, stream) -> Status:
        """dq, dk and dv, as forward; and d_s_aux."""
        self._check(params, stream)
        p, names = params, ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
        q, k, v, out, dout, *gradients = (tensor(p, name) for name in names)
        shape = (p.num_heads, p.total_q) if is_packed(p) else (p.batch_size, p.num_heads, p.seqlen_q)
        lse, dlse = (array(address, shape, np.float32) if address else None for address in (p.softmax_lse, p.dlse))
        given = {name: value for name, value in options(p).items() if name in OPTIONS}
        found = backward_reference(q, k, v, dout, Saved(out, lse, dlse), **given)
        for gradient, exact, of in zip(gradients, found, "qkk", strict=True):
            for rows in used_rows(exact, given.get(f"cu_seqlens_{of}"), given.get(f"seqused_{of}")):
                gradient[rows] = to_bits(exact[rows], NAMES[p.dtype])
        if p.d_s_aux:
            array(p.d_s_aux, (p.num_heads,), np.float32)[...] = found.d_s_aux
        return Status.OK

    def merge_attention(self, params: MergeParams, stream) -> Status:
        """out and LSE."""
        self._check(params, stream)
        p = params
        sizes = p.batch_size, p.seqlen_q, p.num_heads
        kind = NUMPY[p.dtype]
        parts = []
        for name in ("a", "b"):
            parts.append(array(getattr(p, f"out_{name}"), (*sizes, p.head_dim), kind, strides_of(p, f"out_{name}")))
            dims = [getattr(p, f"lse_{name}_{dim}_stride") for dim in ("batch", "head", "row")]
            dims[0] = dims[0] if dims[0] is not None else 0
            parts.append(array(getattr(p, f"lse_{name}"), (sizes[0], sizes[2], sizes[1]), np.float32, dims))
        out, lse = merge_reference(*parts)
        array(p.out, out.shape, kind)[...] = to_bits(out, NAMES[p.dtype])
        array(p.lse, lse.shape, np.float32)[...] = lse
        return Status.OK


def array(address: int, shape: tuple, dtype, strides=None) -> np.ndarray:
    """The array at an address; strides in elements, None contiguous."""
    if not address or 0 in shape:
        return np.empty(shape, dtype)
    size = np.dtype(dtype).itemsize
    steps = strides if strides is not None else [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    steps = list(steps) + [1] * (len(shape) - len(steps))
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    raw = np.frombuffer((ctypes.c_char * (reach * size)).from_address(address), dtype)
    return np.lib.stride_tricks.as_strided(raw, shape, [step * size for step in steps])


def strides_of(p, name: str) -> list | None:
    """Of batches, rows and heads; None where all are contiguous. A test gives all of them, or those that matter."""
    given = [getattr(p, f"{name}_{dim}_stride") for dim in ("batch", "row", "head")]
    if given == [None] * 3:
        return None
    return [0 if stride is None else stride for stride in given]


def tensor(p, name: str) -> np.ndarray:
    """q, k, v, out or a gradient, packed ones without their batch."""
    as_q = name in ("q", "q_v", "out", "dout", "dq")
    batch, rows, heads = tensor_sizes(p, "q" if as_q else "k")
    kind = NUMPY[out_dtype(p) if name == "out" else keys_dtype(p) if name in ("k", "v") else p.dtype]
    columns = p.head_dim if name in ("q", "k", "dq", "dk") else p.head_dim_v or p.head_dim
    found = array(getattr(p, name), (batch, rows, heads, columns), kind, strides_of(p, name))
    is_flat = is_packed(p) if as_q else has_packed_keys(p)
    return found[0] if is_flat else found


def out_dtype(p) -> DataType:
    return p.out_dtype if p.out_dtype is not None else DataType.BF16 if p.dtype is DataType.FP8_E4M3 else p.dtype


def options(p) -> dict:
    """Of the reference."""
    found = {
        "causal": p.is_causal,
        "window_size": (p.window_size_left, p.window_size_right),
        "softmax_scale": p.softmax_scale,
        "softcap": p.softcap,
        "attention_chunk": p.attention_chunk,
    }
    shapes = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), (p.batch_size + 1,))
    shapes |= dict.fromkeys(("seqused_q", "seqused_k", "kv_batch_idx", "leftpad_k"), (p.batch_size,))
    for name, shape in shapes.items():
        if getattr(p, name):
            found[name] = array(getattr(p, name), shape, np.int32)
    if p.page_table:
        pages = p.seqlen_k // p.page_size
        stride = p.page_table_batch_stride
        found["page_table"] = array(
            p.page_table, (p.batch_size_k or p.batch_size, pages), np.int32, [pages if stride is None else stride, 1]
        )
    if p.q_v:
        found["q_v"] = tensor(p, "q_v")
    if p.s_aux:
        found["s_aux"] = array(p.s_aux, (p.num_heads,), NUMPY[p.s_aux_dtype or DataType.FP32])
    for name, heads in (("q", p.num_heads), ("k", p.num_heads_k), ("v", p.num_heads_k)):
        if address := getattr(p, f"{name}_descale_ptr"):
            dims = [getattr(p, f"{name}_descale_{dim}_stride") for dim in ("batch", "head")]
            found[f"{name}_descale"] = array(address, (p.batch_size, heads), np.float32, dims)
    return found


def updates(p) -> dict:
    """Options of the reference, of new rows and rotary positions."""
    found = {"rotary_interleaved": p.rotary_interleaved}
    for name, columns in (("k_new", p.head_dim), ("v_new", p.head_dim_v or p.head_dim)):
        shape = (p.seqlen_knew, p.num_heads_k, columns)
        if getattr(p, name):
            rows = array(getattr(p, name), (1 if p.cu_seqlens_k_new else p.batch_size, *shape), NUMPY[new_dtype(p)])
            dims = [getattr(p, f"{name}_{dim}_stride") for dim in ("batch", "row", "head")]
            steps = [
                step if dim is None else dim * rows.itemsize for dim, step in zip(dims, rows.strides, strict=False)
            ]
            rows = np.lib.stride_tricks.as_strided(rows, rows.shape, [*steps, rows.itemsize])
            found[name] = rows[0] if p.cu_seqlens_k_new else rows
    table = (p.rotary_positions, p.rotary_dim // 2)
    for name in ("rotary_cos", "rotary_sin"):
        if getattr(p, name):
            stride = p.rotary_row_stride
            kind = NUMPY[p.dtype if p.rotary_dtype is None else p.rotary_dtype]
            found[name] = array(getattr(p, name), table, kind, [table[1] if stride is None else stride, 1])
    for name, size in (("cu_seqlens_k_new", p.batch_size + 1), ("seqlens_rotary", p.batch_size)):
        if getattr(p, name):
            found[name] = array(getattr(p, name), (size,), np.int32)
    return found


def query_rows(p, out: np.ndarray) -> list[tuple]:
    given = options(p)
    return used_rows(out, given.get("cu_seqlens_q"), given.get("seqused_q"))
