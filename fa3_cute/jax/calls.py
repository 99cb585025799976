"""A call of `attention` as it is traced: checked by its shapes, and written down as what runs later.

A traced call knows shapes and choices, no address. What it becomes in the compiled program is a Program: all fields of
its params but the addresses, as text, and which field each argument and result is the address of.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import api
from ..arrays import call as arrays
from ..contract.backward_params import BackwardParams
from ..contract.params import FlashAttentionParams, names
from ..contract.plain import ENUMS, plain
from ..contract.status import FlashAttentionError, Problem, Status, error_for
from ..planning.operations import checked, operation_of

# Arrays of a call besides q, k and v, by their names in attention(), and those that are gradients' too.
OPTIONAL = ("s_aux", *("cu_seqlens_q", "cu_seqlens_k", "seqused_k"), *("page_table", "kv_batch_idx"), *arrays.DESCALES)
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
RESULTS = ("out", "softmax_lse")
KINDS = {"forward": FlashAttentionParams, "backward": BackwardParams}
_OUT_DTYPE = {"float8_e4m3fn": jnp.bfloat16}  # else that of q
_POINTERS = frozenset(names(kind="pointer")) | {"dout", "dlse", "dq", "dk", "dv", "d_s_aux"}

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """What is no array of attention(), as given."""

    causal: Any = False
    window_size: Any = (-1, -1)
    softmax_scale: Any = None
    softcap: Any = 0.0
    attention_chunk: Any = 0
    num_splits: Any = 0
    max_seqlen_q: Any = 0
    zero_padding: Any = False
    deterministic: Any = False
    return_lse: Any = False


class Program(NamedTuple):
    """One `forward` or `backward`, ready to run but for addresses.

    text               JSON: the function, its fields, and the fields that arguments and then results are addresses of;
                       "" for an argument that is one of no field
    results            shape and dtype of each result; the last is a workspace if there is one
    """

    text: str
    results: tuple[jax.ShapeDtypeStruct, ...]


class _View(NamedTuple):
    """An array as the functions of arrays/call.py read it; the address is any. XLA is asked for contiguous ones."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int = 0
    address: int = arrays.ANY_ADDRESS
    is_readonly: bool = False

    @property
    def is_empty(self) -> bool:
        return 0 in self.shape


def as_tensors(given: Tensors) -> Tensors:
    """The arrays that are given, as JAX's. Raises TypeError for what is none."""
    for name, x in given.items():
        if x is not None and not isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(f"{name} must be a JAX array, not {type(x).__name__}")
    return {name: jnp.asarray(x) for name, x in given.items() if x is not None}


def require_constants(choices: dict[str, Any]) -> None:
    """Raise FlashAttentionError for a choice that is traced: it chooses kernels, or is an argument of them."""
    for name, value in choices.items():
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            sentence = f"{name}: must be a number of Python, not a traced value (static_argnames of jax.jit)"
            raise error_for(Status.INVALID_ARGUMENT, sentence)


# ---- params ----------------------------------------------------------------------------------------------------------


def described(choices: Choices, tensors: Tensors) -> arrays.AttentionCall:
    """The arguments of attention() of fa3_cute."""
    given = {name: getattr(choices, name) for name in Choices.__dataclass_fields__}
    given |= tensors | {
        "numbers": {"softmax_scale": choices.softmax_scale, "softcap": choices.softcap, "p_dropout": 0.0},
        "mod_arrays": (),
        "mod_scalars": (),
    }
    fields = arrays.AttentionCall.__dataclass_fields__
    return arrays.AttentionCall(**{name: given.get(name) for name in fields})  # type: ignore[arg-type]


def forward_params(choices: Choices, tensors: Tensors) -> FlashAttentionParams:
    """The call with placeholders for addresses; raises FlashAttentionError for one that `forward` would refuse."""
    call = described(choices, tensors)
    views = {name: view(x) for name, x in tensors.items()}
    q, k, v = (views[name].dtype for name in "qkv")
    elements = call.element_types(q, k, v, arrays.DEVICE_DTYPES)
    arrays._check_tensors(call, views, elements[0], 0)
    params = plain(arrays._params(call, views, elements))
    found = checked(params)
    if isinstance(found, Problem):
        raise arrays.refusal(found)
    return params


def view(x: Any) -> _View:
    """Of an array, traced or not, that is contiguous."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.append(strides[-1] * size)
    return _View(tuple(x.shape), tuple(reversed(strides[: len(x.shape)])), x.dtype.name)


def result_shapes(q: Any, v: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of out and the LSE."""
    *batch, rows, heads, _ = q.shape
    out = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), _OUT_DTYPE.get(q.dtype.name, q.dtype))
    return out, jax.ShapeDtypeStruct((*batch, heads, rows), jnp.float32)


def forward_program(params: FlashAttentionParams, tensors: Tensors, wants_lse: bool) -> Program:
    """`forward` of q, k, v and the others in their order; its results are out, and the LSE if it is wanted."""
    results = result_shapes(tensors["q"], tensors["v"])[: 1 + wants_lse]
    shape = checked(params)
    assert not isinstance(shape, Problem)
    return _program("forward", params, tensors, RESULTS[: len(results)], results, operation_of(shape).workspace_bytes)


def backward_params(choices: Choices, tensors: Tensors) -> BackwardParams:
    """The call that is differentiated, as params of `backward` without addresses.

    Raises FlashAttentionError, in the words of attention(), where `backward` has no kernel for it.
    """
    forward = forward_params(choices, tensors)
    params = BackwardParams(**{name: getattr(forward, name) for name in FlashAttentionParams.__dataclass_fields__})
    params.q = params.k = params.v = params.out = None
    params.zero_padding = False  # of out; gradients of such rows are 0 already
    params.deterministic = choices.deterministic
    try:
        api.backward_workspace_size(params)
    except FlashAttentionError as error:
        raise arrays.refusal(Problem(Status(error.code), error.detail)) from None
    return params


def backward_program(params: BackwardParams, tensors: Tensors, zeros: int) -> Program:
    """`backward` of the forward's arrays, its results, dout, dlse if there is one, and so many arrays of no field; its
    results are dq, dk, dv, and d_s_aux if there are sinks."""
    results = [jax.ShapeDtypeStruct(tensors[name].shape, tensors[name].dtype) for name in "qkv"]
    if "s_aux" in tensors:
        results.append(jax.ShapeDtypeStruct(tensors["s_aux"].shape, jnp.float32))
    fields = ("dq", "dk", "dv", "d_s_aux")[: len(results)]
    nbytes = api.backward_workspace_size(params)
    return _program("backward", params, {**tensors, **dict.fromkeys(map(str, range(zeros)))}, fields, results, nbytes)


def _program(function: str, params, arguments, fields, results, workspace_bytes: int) -> Program:
    """Of arguments by their names, and results of these fields."""
    if workspace_bytes:
        fields = (*fields, "workspace")
        results = (*results, jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8))
        params = replace(params, workspace_bytes=workspace_bytes)
    kind = KINDS[function]
    defaults = kind()
    values = {name: getattr(params, name) for name in kind.__dataclass_fields__ if name not in _POINTERS}
    values = {name: value for name, value in values.items() if value != getattr(defaults, name)}
    addresses = [f"{name}_ptr" if name in arrays.DESCALES else name for name in arguments]
    addresses = ["" if name.isdigit() else name for name in addresses]
    return Program(json.dumps([function, values, [*addresses, *fields]]), tuple(results))


# ---- programs that run -----------------------------------------------------------------------------------------------


class _Ready(NamedTuple):
    function: str
    params: Any
    fields: list[str]


def run(text: bytes, addresses, stream: int) -> None:
    """Enqueue a Program. Raises FlashAttentionError where it cannot be."""
    import threading

    function, params, fields = _ready(text, threading.get_ident())
    for name, address in zip(fields, addresses, strict=True):
        if name:
            setattr(params, name, address or arrays.ANY_ADDRESS)  # of nothing there is no address
    getattr(api, function)(params, stream).check()


@lru_cache(maxsize=4096)
def _ready(text: bytes, thread: int) -> _Ready:
    """A thread's own: its params are filled in, and used at once."""
    function, values, fields = json.loads(text)
    for name in values.keys() & ENUMS.keys():
        if values[name] is not None:
            values[name] = ENUMS[name](values[name])
    return _Ready(function, KINDS[function](**values), fields)
