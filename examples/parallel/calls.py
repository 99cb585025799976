"""A rank's calls as the package's params: addresses, sizes and strides of tensors [heads, rows, head_dim]."""

from dataclasses import dataclass

from fa3_cute import AttentionMode, BackwardParams, DataType, FlashAttentionParams, MergeParams

from .plan import Call, Problem

DTYPES = {"fp16": DataType.FP16, "bf16": DataType.BF16, "fp8_e4m3": DataType.FP8_E4M3, "float32": DataType.FP32}
ITEM_BYTES = {DataType.FP16: 2, DataType.BF16: 2, DataType.FP8_E4M3: 1, DataType.FP32: 4}


@dataclass(frozen=True)
class Tensor:
    """Heads of a contiguous tensor on a device, or an LSE, whose shape then has no head_dim; `owner` keeps it alive."""

    address: int
    shape: tuple[int, ...]
    dtype: DataType
    owner: object = None

    @property
    def head_stride(self) -> int:
        size = 1
        for extent in self.shape[1:]:
            size *= extent
        return size

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.head_stride * ITEM_BYTES[self.dtype]

    def at(self, head: int, row: int = 0) -> int:
        """The address of a row of a head."""
        width = self.head_stride // self.shape[1]
        return self.address + (head * self.head_stride + row * width) * ITEM_BYTES[self.dtype]


def output_dtype(problem: Problem) -> DataType:
    return DataType.BF16 if problem.dtype == "fp8_e4m3" else DTYPES[problem.dtype]


def forward_params(problem: Problem, call: Call, tensors: dict[str, Tensor], lse: Tensor | None, lengths: dict):
    """The call of q, k, v and out; lengths are the addresses of the call's, by name."""
    params = FlashAttentionParams(**_fields(problem, call, tensors, lengths))
    params.out_dtype = tensors["out"].dtype
    params.softmax_lse = lse and lse.address
    return params


def backward_params(problem: Problem, call: Call, tensors: dict[str, Tensor], lse: Tensor, lengths: dict):
    """The same with dout, dq, dk and dv, which have every sequence's own rows of dk and dv."""
    params = BackwardParams(**_fields(problem, call, tensors, lengths))
    params.softmax_lse = lse.address
    if call.shares_keys:
        params.dk_batch_stride = params.dv_batch_stride = tensors["k"].shape[0] * tensors["k"].head_stride
    return params


def _fields(problem: Problem, call: Call, tensors: dict[str, Tensor], lengths: dict) -> dict:
    fields = {"batch_size": call.batch, "head_dim": problem.head_dim, "dtype": DTYPES[problem.dtype], **lengths}
    fields |= {"num_heads": tensors["q"].shape[0], "num_heads_k": tensors["k"].shape[0]}
    if call.is_packed:
        fields |= {"mode": AttentionMode.VARLEN_PREFILL, "total_q": call.rows_q, "total_k": call.rows_k}
    else:
        fields |= {"seqlen_q": call.seqlen_q, "seqlen_k": call.seqlen_k}
    if call.is_masked and problem.window is not None:
        fields |= {"window_size_left": problem.window, "window_size_right": 0}
    else:
        fields["is_causal"] = call.is_masked
    for name, tensor in tensors.items():
        is_key = name.lstrip("d") in ("k", "v")
        fields[name] = tensor.at(0, 0 if is_key else call.first_q)
        fields |= {f"{name}_row_stride": problem.head_dim, f"{name}_head_stride": tensor.head_stride}
        if call.batch > 1 and not call.is_packed:
            fields[f"{name}_batch_stride"] = 0 if is_key else call.seqlen_q * problem.head_dim
    return fields


def merge_params(problem: Problem, call: Call, pair: tuple[Tensor, Tensor], lses: tuple[Tensor, Tensor]):
    """The second result, of the call's rows, into the first, which has the rank's; FP32."""
    (out, other), (lse, other_lse) = pair, lses
    strides = {}
    for name in ("out_a", "out_b", "out"):
        strides |= {f"{name}_row_stride": problem.head_dim, f"{name}_head_stride": out.head_stride}
    for name, stride in (("lse_a", lse.head_stride), ("lse_b", call.rows_q), ("lse", lse.head_stride)):
        strides |= {f"{name}_row_stride": 1, f"{name}_head_stride": stride}
    return MergeParams(
        out_a=out.at(0, call.first_q),
        lse_a=lse.at(0, call.first_q),
        out_b=other.at(0, call.first_q),
        lse_b=other_lse.address,
        out=out.at(0, call.first_q),
        lse=lse.at(0, call.first_q),
        seqlen_q=call.rows_q,
        num_heads=out.shape[0],
        head_dim=problem.head_dim,
        dtype=DataType.FP32,
        **strides,
    )


def weighted_params(tensors: tuple[Tensor, Tensor, Tensor], lses: tuple[Tensor, Tensor | None]):
    """(a, b, out) of the same shape, row by row, where each LSE is a tensor's or one number for all rows: what has
    nothing to merge with is rounded so, and two of the same LSE give their mean."""
    strides = {}
    for name, tensor in zip(("out_a", "out_b", "out"), tensors, strict=True):
        strides |= {f"{name}_row_stride": tensor.shape[2], f"{name}_head_stride": tensor.head_stride}
    for name, lse in zip(("lse_a", "lse_b"), lses, strict=True):
        is_one = lse.shape == (1, 1)
        strides |= {f"{name}_row_stride": 0 if is_one else 1, f"{name}_head_stride": 0 if is_one else lse.head_stride}
    heads, rows, head_dim = tensors[0].shape
    return MergeParams(
        out_a=tensors[0].address,
        lse_a=lses[0].address,
        out_b=tensors[1].address,
        lse_b=lses[1].address,
        out=tensors[2].address,
        seqlen_q=rows,
        num_heads=heads,
        head_dim=head_dim,
        dtype=tensors[0].dtype,
        out_dtype=tensors[2].dtype,
        **strides,
    )
