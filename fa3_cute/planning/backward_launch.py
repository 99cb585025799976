"""A call of `backward` -> its launches and what they are given. Pure Python.

A pass is prepare and main, or prepare and launches of one or two gradients, over the caller's workspace. Of rows,
blocks and keys there is nothing to do where there are none: such launches are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from ..contract.backward_params import (
    ARGUMENTS,
    BACKWARD,
    INPUTS,
    LSES,
    OUTPUTS,
    SCORE_INPUTS,
    SCORE_OUTPUTS,
    BackwardParams,
    plain_backward,
    strides_of,
)
from ..contract.backward_rules import first_problem, walk
from ..contract.formats import ELEMENT_BYTES
from ..contract.head_dims import columns_of
from ..contract.params import DTYPE_NAMES, DataType, are_constants
from ..contract.scores import ELEMENT_BYTES as SCORE_BYTES
from ..contract.scores import MASK_STRIDES
from ..contract.sentences import must
from ..contract.status import Problem, Status, shown
from .backward import SINK_WARPS, SIZE_NAMES, BackwardConfig
from .backward_kernels import (
    GRADIENT,
    SCRATCH,
    ClearConfig,
    KernelOfPass,
    KeysConfig,
    SinksConfig,
    has_work,
    kernels_of,
    pass_config,
)
from .backward_tables import SHORT_QUERIES
from .dims import dim_fields
from .known import MAX_SHAPES, Known
from .one_side import BIAS, OneSidePass
from .problem import ProblemShape
from .score_features import features_of
from .sections import floats_of_shares, launch_values, num_blocks, sums_of

PART_ALIGNMENT = 16  # of the parts of a workspace, in bytes
TENSORS = (*INPUTS, *OUTPUTS)
_CHANGING = tuple(name for name, item in ARGUMENTS.items() if item.changes and BACKWARD in item.takers)
# Addresses that are other ones in every call, in the order of the fields; the workspace's is the last. Behind it those
# of what scores are changed with, and of its gradients, in calls that have one of them.
SCORES = tuple(name for name in (*SCORE_INPUTS, *SCORE_OUTPUTS) if name in _CHANGING)
POINTERS = tuple(name for name in _CHANGING if name not in SCORES)
WORKSPACE = ("workspace", "workspace_bytes")
# What kernels are given: these, and the parts of the workspace.
PLACES = (*POINTERS, *SCORES, *SCRATCH)
MASK_BYTES = {DTYPE_NAMES[dtype]: nbytes for dtype, nbytes in SCORE_BYTES.items()}  # else a byte
_NO_SCORES = (0,) * len(SCORES)
# Of addresses, in their order.
_IS_WRITTEN = (*(name in OUTPUTS for name in POINTERS), True, *(name in SCORE_OUTPUTS for name in SCORES))
# All else is the same in every call of a shape.
read_shape = attrgetter(*(name for name in ARGUMENTS if name not in POINTERS + SCORES + WORKSPACE))
read_pointers, read_scores = attrgetter(*POINTERS, *WORKSPACE), attrgetter(*SCORES)


class BackwardShape(NamedTuple):
    """A valid call in plain values, without the addresses that change with every call.

    forward            the call that is differentiated
    strides            (tensor, its strides along batches, rows and heads, in elements; of packed ones 0 along batches)
    is_deterministic   the same bits in every call
    """

    forward: ProblemShape
    strides: tuple[tuple[str, tuple[int, int, int]], ...]
    is_deterministic: bool

    @staticmethod
    def of(p: BackwardParams) -> "BackwardShape":
        """Of plain params that the rules accept."""
        forward = ProblemShape.of(p)._replace(workspace=0)
        strides = tuple((name, strides_of(p, name)) for name in TENSORS)
        if forward.is_packed:
            strides = tuple((name, (0, row, head)) for name, (_, row, head) in strides)
        if not forward.seqlen_k:  # which may have any
            columns = [columns_of(forward, name) if name in ("k", "v", "dk", "dv") else 0 for name, _ in strides]
            strides = tuple((name, (n, n, n) if n else own) for n, (name, own) in zip(columns, strides, strict=True))
        return BackwardShape(forward, strides, p.deterministic)

    @property
    def config(self) -> BackwardConfig | OneSidePass:
        """What the tables have for it."""
        of = self.forward
        queries = of.seqlen_q // of.batch_size if of.is_packed else of.seqlen_q  # in the mean
        facts = of.dtype, of.tile_dims[0], of.mask, of.has_lengths, self.is_deterministic, features_of(of)
        return pass_config(*facts, queries <= SHORT_QUERIES, dim_fields(of, is_by_tma=False))


@dataclass(frozen=True, eq=False)
class Stage:
    """One launch, as operations.Launch, and what it takes of the shape, as problem.ProblemShape.

    pick   of addresses in the order of PLACES those that the kernel takes, in the order of its entry
    """

    config: KernelOfPass
    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    scales: tuple[float, ...]
    pick: Callable[[tuple[int, ...]], tuple[int, ...]]

    scratch = "nothing"  # of the library's
    plan = None
    mod_values = ()
    optionals = ()

    def counts(self, num_sms: int) -> tuple[int, ...]:
        """What the launch adds to the entry's arguments: the persistent kernel's number of CTAs."""
        return (num_sms,) if isinstance(self.config, BackwardConfig) else ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The gradients without which it is left out, if none of them is wanted; () if it is never."""
        own = {SinksConfig: "d_s_aux", ClearConfig: "d_bias"}
        if isinstance(self.config, KeysConfig):
            return "dk", "dv"
        side = own.get(type(self.config)) or getattr(self.config, "side", "")
        return (side,) * bool(side)


@dataclass(eq=False)
class Pass:
    """How a shape is served.

    stages            the launches, one after the other; one is left out if none of its gradients is wanted
    workspace_bytes   what the caller's workspace must hold; its parts begin at `offsets`, in the order of SCRATCH
    extents           bytes from the address of each of POINTERS to behind its last element
    scores            (bytes likewise, alignment) of each of SCORES; () in calls without
    has_keys          else TMA's descriptors, whose boxes are loaded and not used, are made of other tensors
    apart             addresses that were found not to overlap
    """

    stages: tuple[Stage, ...]
    workspace_bytes: int
    offsets: tuple[int, ...]
    extents: tuple[int, ...]
    scores: tuple[tuple[int, int], ...] = ()
    has_keys: bool = True
    apart: tuple[int, ...] = ()

    def places(self, addresses: tuple[int, ...]) -> tuple[int, ...]:
        """In the order of PLACES, of the addresses of a call (`checked`).

        Where there is no query or no key, tensors may have no address, but TMA's descriptors are made of one.
        """
        q, k, v, out, lse, dout, dlse, dq, dk, dv, workspace, *scores = addresses
        if not self.has_keys:
            k, v = q, dout
        tensors = q or k, k, v, out, lse, dout or k, dlse, dq, dk, dv
        return (*tensors, *(scores or _NO_SCORES), *[workspace + offset for offset in self.offsets])


@lru_cache(MAX_SHAPES)
def pass_of(shape: BackwardShape) -> Pass:
    """How it is served."""
    of, cfg = shape.forward, shape.config
    prepare, *others = kernels_of(cfg)
    has_queries, has_keys, has_sinks = of.seqlen_q > 0, of.seqlen_k > 0, "s_aux" in of.optionals
    kernels = [prepare] * has_queries + [kernel for kernel in others if has_work(kernel, has_queries, has_keys)]
    kernels += [SinksConfig()] * has_sinks
    rows, sums = num_blocks(of, cfg.tile_m) * of.num_heads * has_queries, sums_of(cfg, of)
    elements = {
        "shift": rows * cfg.tile_m,
        "delta": rows * cfg.tile_m,
        "dq_sum": sums.blocks * cfg.tile_m * cfg.head_dim * has_queries,
        "progress": 2 * sums.units * has_queries,
        "order": rows * cfg.has_sums,
        "tile_counter": int(cfg.has_sums and has_queries),
        "shared_sums": floats_of_shares(cfg, of),
        "sink_sums": rows * SINK_WARPS * has_sinks,
    }
    sizes = [-(-elements[part] * SCRATCH[part][1] // PART_ALIGNMENT) * PART_ALIGNMENT for part in SCRATCH]
    *offsets, total = accumulate(sizes, initial=0)
    stages, scores = tuple(_stage(kernel, shape) for kernel in kernels), _scores_of(shape) if of.optionals else ()
    return Pass(stages, total, tuple(offsets), _extents(shape), scores, has_keys)


def _stage(cfg: KernelOfPass, shape: BackwardShape) -> Stage:
    of = shape.forward
    values = {
        **{name: getattr(of, name) for name in SIZE_NAMES},
        "window_size_left": of.window_left,
        "window_size_right": of.window_right,
        "attention_chunk": of.attention_chunk,
        "softmax_scale": of.softmax_scale,
        "softcap": of.number("softcap"),
        "p_dropout": of.number("p_dropout"),
        **dict(zip(("alibi_batch_stride", *MASK_STRIDES), of.strides[-4:], strict=True)),
        "s_aux_dtype": of.sink_dtype,
        "num_blocks": num_blocks(of, shape.config.tile_m) if of.seqlen_q else 0,
        **launch_values(cfg, shape.config, of),
    }
    for tensor, strides in shape.strides:
        names = (f"{tensor}_{dim}_stride" for dim in ("batch", "row", "head"))
        values |= dict(zip(names, strides, strict=True))
    own = getattr(cfg, "side", "")  # what `gradient` stands for
    own = "dq" if own == BIAS else own  # which has no gradient of that kind, and leaves it alone
    strides, sizes, scales = (
        tuple(
            values[name.replace(GRADIENT, own)] for name, kind in cfg.arguments if kind == wanted and name != "num_sms"
        )
        for wanted in ("int64", "int32", "float32")
    )
    picked = [PLACES.index(name.replace(GRADIENT, own)) for name in cfg.entry.per_call if name != "stream"]
    return Stage(cfg, of.lengths, strides, sizes, scales, _picker(*picked))


def _extents(shape: BackwardShape) -> tuple[int, ...]:
    of, strides = shape.forward, dict(shape.strides)
    batches = 1 if of.is_packed else of.batch_size
    rows_of_all = batches * of.seqlen_q * of.num_heads
    found: dict[str, int] = dict.fromkeys(LSES, 4 * rows_of_all)
    for tensor in TENSORS:
        is_of_q = tensor in ("q", "out", "dout", "dq")
        sizes = (batches, of.seqlen_q, of.num_heads) if is_of_q else (batches, of.seqlen_k, of.num_heads_k)
        steps = sum(stride * (size - 1) for stride, size in zip(strides[tensor], sizes, strict=True))
        found[tensor] = (steps + columns_of(of, tensor)) * ELEMENT_BYTES[of.dtype] if all(sizes) else 0
    return tuple(found[name] for name in POINTERS)


def _picker(first: int, *more: int) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Of a tuple these elements, as a tuple also if it is one."""
    return itemgetter(first, *more) if more else itemgetter(slice(first, first + 1))


def _scores_of(shape: BackwardShape) -> tuple[tuple[int, int], ...]:
    """Pass.scores of a shape with some of them."""
    of = shape.forward
    sink, element = SCORE_BYTES[DataType(of.sink_dtype)], MASK_BYTES.get(of.attn_mask, 1)
    sizes = of.batch_size, of.num_heads, of.seqlen_q
    scores = sum(stride * (size - 1) for stride, size in zip(of.strides[-3:], sizes, strict=True)) + of.seqlen_k
    found = {
        "s_aux": (of.num_heads * sink, sink),
        "alibi_slopes": (4 * ((of.batch_size - 1) * of.strides[-4] + of.num_heads), 4),
        "attn_mask": (element * scores, element),
        "rng_state": (16, 8),
        "d_s_aux": (4 * of.num_heads, 4),
        "d_bias": (4 * scores, 4),
    }
    return tuple(found[name] for name in SCORES)


# ---- checking --------------------------------------------------------------------------------------------------------

_known: Known[Pass] = Known()  # by their `_key`


def _are_absent(scores: tuple) -> bool:
    """Whether all are None; by their types, since comparing an array may raise."""
    return {type(None)}.issuperset(map(type, scores))


def _key(values: tuple, scores: tuple) -> tuple:
    """Of the values of read_shape and read_scores: which of the latter there are is part of the shape."""
    if _are_absent(scores):
        return values
    given = tuple([type(address) is int and address != 0 for address in scores])
    return (values, given) if any(given) else values


def checked(params: BackwardParams) -> Problem | tuple[Pass, tuple[int, ...]]:
    """The first problem of a call, or how it is served and the addresses of POINTERS, of the workspace, and if there is
    one of them of SCORES; 0 for absent ones.

    Of a shape that has come before only the addresses are looked at. Raises TypeError for what is no BackwardParams.
    """
    require(params)
    values, scores = read_shape(params), read_scores(params)
    known = _known.get(_key(values, scores))
    if known is not None and (addresses := _addresses(known, read_pointers(params), scores)):
        return known, addresses
    p = plain_backward(params)
    if problem := first_problem(p):
        return problem
    shape = BackwardShape.of(p)
    found = pass_of(shape)
    if problem := _workspace_problem(p, found):
        return problem
    *given, _ = [address or 0 for address in read_pointers(p)]
    if found.scores:
        given += [address or 0 for address in read_scores(p)]
    if are_constants(values) and shape.forward.seqlen_q and shape.forward.seqlen_k:
        _known.remember(_key(values, read_scores(p)), found)
        found.apart = tuple(given)
    return found, tuple(given)


def _addresses(known: Pass, given: tuple[Any, ...], scores: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Good addresses in plain ints; None if the rules have to look."""
    *addresses, nbytes = given
    if known.scores or not _are_absent(scores):
        addresses += scores
    found = tuple([0 if address is None else address for address in addresses])
    if not {int}.issuperset(map(type, found)) or type(nbytes) is not int or nbytes < known.workspace_bytes:
        return None
    if not known.scores:  # all of them are 0
        found = found[: len(POINTERS) + 1]
    if found != known.apart and not _are_good(known, found):
        return None
    known.apart = found
    return found


def _are_good(known: Pass, addresses: tuple[int, ...]) -> bool:
    """Whether those that must be there are, aligned, and no output lies between another tensor's first byte and its
    last; that is not asked of columns of one buffer, which the rules look at."""
    q, k, v, out, lse, dout, dlse, dq, dk, dv, workspace, *scores = addresses
    extents = (*known.extents, known.workspace_bytes)
    if scores:
        given = zip(scores, known.scores, strict=True)
        if any(address % alignment or address >> 64 for address, (_, alignment) in given):
            return False
        extents += tuple([extent for extent, _ in known.scores])
    # LSEs are aligned to 4 bytes, the others to 16.
    bits = q | k | v | out | dout | dq | dk | dv | workspace | (lse | dlse) << 2
    if bits & 15 or bits >> 64 or not (q and k and v and out and lse and dout and workspace and (dq or dk or dv)):
        return False
    end_of_any = end_of_outputs = 0
    for start, extent, is_output in sorted(zip(addresses, extents, _IS_WRITTEN, strict=False)):
        if start < end_of_outputs or is_output and 0 < start < end_of_any:
            return False
        if start:
            end_of_any = max(end_of_any, start + extent)
            end_of_outputs = end_of_any if is_output else end_of_outputs
    return True


def _workspace_problem(p: BackwardParams, found: Pass) -> Problem | None:
    """The rule that needs a plan: what a workspace must hold."""
    needed = found.workspace_bytes
    if not needed:
        return None
    if p.workspace and p.workspace_bytes >= needed:
        return _overlap_problem(p, found)
    if not p.workspace:
        accepted = f"the device address of backward_workspace_size(params)={needed} bytes"
        return Problem(Status.NULL_POINTER, must(p, "workspace", accepted))
    return Problem(
        Status.INVALID_ARGUMENT,
        f"workspace_bytes={shown(p.workspace_bytes)}: must be at least backward_workspace_size(params)={needed}",
    )


def _overlap_problem(p: BackwardParams, found: Pass) -> Problem | None:
    """Of the workspace with a tensor."""
    begin, end = p.workspace or 0, (p.workspace or 0) + found.workspace_bytes
    extents = dict(zip(POINTERS, found.extents, strict=True))
    if found.scores:
        extents |= {name: extent for name, (extent, _) in zip(SCORES, found.scores, strict=True)}
    for name, extent in extents.items():
        address = getattr(p, name)
        if address and address < end and begin < address + extent:
            detail = f"workspace={begin:#x}: its {found.workspace_bytes} bytes overlap {name}={address:#x}"
            return Problem(Status.INVALID_ARGUMENT, detail)
    return None


def problems(params: BackwardParams) -> list[Problem]:
    """Everything that `backward` would object to, in the order in which it would; [] if the call is good."""
    require(params)
    p = plain_backward(params)
    found = list(walk(p))
    if not found and (problem := _workspace_problem(p, pass_of(BackwardShape.of(p)))):
        return [problem]
    return found


def workspace_bytes(params: BackwardParams) -> int | Problem:
    """What a workspace must hold for these params, whatever their tensors and workspace are; else what is wrong."""
    require(params)
    p = plain_backward(replace(params, workspace=None, workspace_bytes=0))
    for problem in walk(p):
        if problem.status is not Status.NULL_POINTER:
            return problem
    return pass_of(BackwardShape.of(p)).workspace_bytes


def require(params) -> None:
    """TypeError for what is no BackwardParams."""
    if not isinstance(params, BackwardParams):
        raise TypeError(f"params must be a BackwardParams, not {type(params).__name__}")
