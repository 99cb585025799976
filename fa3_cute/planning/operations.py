"""Which launches serve a problem: kernel, config, plan and scratch memory of each. Pure Python.

The only place that knows one kind of config from another: what differs between the kernels on the host is asked of a
Launch.
"""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from ..contract.arguments import Entry
from ..contract.formats import PARTIAL
from ..contract.params import CHOICES, FlashAttentionParams
from ..contract.plain import plain
from ..contract.rules import first_problem, remaining, walk
from ..contract.sentences import must
from ..contract.status import Problem, Status, shown
from .append import AppendShape, append_plan
from .config import DecodeConfig, FwdConfig
from .decode_append import appending, appends_one_row, may_append
from .decode_rows import row_of
from .dims import dim_fields
from .mla import mla_config
from .packing import packed_heads_of_window
from .problem import Chosen, ProblemShape, chosen_by
from .ragged import is_ragged, kernels_of, ragged_plan_of
from .score_features import features_of
from .splits import is_windowed, plan_of
from .tables import DENSE, KeySource, decode_config, forward_config, forward_row, packed_config, packed_row

Config = FwdConfig | DecodeConfig
MAX_CHOICES = 512  # that are remembered; the next ones start anew
# Kernels divide slopes by softmax_scale: beyond these, slopes as they are become infinite or nothing in FP32.
ALIBI_SCALES = 2.0**-64, 2.0**64


class Launch(NamedTuple):
    """One kernel launch.

    config    the kernel, as its compile-time choices
    reason    the measurement behind the config's row of the tables
    scratch   what it needs of the library's memory: "tile_counter", "splits", "append" or "none"
    plan      of split-KV (a SplitPlan), None where K and V are never split; of what is ahead an AppendPlan
    sm_margin   SMs that a persistent grid leaves free
    ragged      has_padding and decode_queries (arguments.RAGGED_COUNTS) of the forward kernel
    """

    config: Config
    reason: str
    scratch: str
    plan: Any = None
    sm_margin: int = 0
    ragged: tuple[int, int] = (0, 0)

    @property
    def entry(self) -> Entry:
        """What the kernel takes."""
        return self.config.entry

    def counts(self, num_sms: int) -> tuple[int, ...]:
        """What the launch adds to the entry's arguments, in its order, on a device of so many SMs."""
        if self.plan is not None:
            return self.plan.counts
        return max(1, num_sms - self.sm_margin), *self.ragged


class Operation(NamedTuple):
    """What a call does: its launches, one after the other."""

    launches: tuple[Launch, ...]

    @property
    def workspace_bytes(self) -> int:
        """What a caller's workspace must hold."""
        return max((launch.plan.partial_bytes if launch.plan else 0 for launch in self.launches), default=0)


def operation_of(shape: ProblemShape) -> Operation:
    """The operation that serves a problem; what is done ahead of attention is its first launch."""
    if shape.append is None:
        return _attention_of(shape)
    attention = _attention_of(shape) if shape.seqlen_q else Operation(())
    config: Any = shape.append.config
    if one := appending_launch(attention.launches, shape.append):
        return Operation((one,))
    plan = append_plan(shape.append, attention.workspace_bytes)
    return Operation((Launch(config, "as fast as memory", "append", plan), *attention.launches))


def appending_launch(launches: tuple[Launch, ...], append: AppendShape) -> Launch | None:
    """Attention's launch that also does what would be done ahead of it; None where that takes a launch of its own."""
    if len(launches) != 1 or not may_append(launches[0].config) or not appends_one_row(append):
        return None
    config = appending(launches[0].config, append.config.rotary, append.config.table_dtype)
    return launches[0]._replace(config=config)


def _attention_of(shape: ProblemShape) -> Operation:
    dtype, (head_dim, _), out_dtype = shape.dtype, shape.tile_dims, shape.out_dtype
    features = features_of(shape)
    has_decode, has_forward, decode_queries = kernels_of(shape)
    source = source_of(shape) if is_ragged(shape, has_decode) else DENSE
    launches: tuple[Launch, ...] = ()
    if has_decode:
        if shape.has_wide_values:
            cfg = mla_config(dtype, is_windowed(shape), out_dtype, source, shape.tile_dims)
        else:
            fields = features | dim_fields(shape, is_by_tma=False)
            cfg = decode_config(dtype, head_dim, is_windowed(shape), out_dtype, fields, source, shape.kv_dtype)
        launches = (_decode_launch(cfg, shape, decode_queries),)
    if not has_forward:
        return Operation(launches)
    fields = features | dim_fields(shape, is_by_tma=not shape.has_lengths and out_dtype != PARTIAL)
    facts = shape.has_lse, shape.has_lengths, out_dtype, fields, source
    ragged = int(shape.zero_padding), decode_queries
    forward = _forward(dtype, head_dim, shape.mask, facts, packed_heads_of_window(shape), shape.sm_margin, ragged)
    return Operation((*launches, *forward.launches)) if launches else forward


def source_of(shape: ProblemShape) -> KeySource:
    """Where a ragged batch has its K and V."""
    has_leftpad = shape.length("leftpad_k") != 0
    if not shape.is_paged or has_leftpad:
        return KeySource(True, shape.page_size, has_leftpad=has_leftpad)
    is_wide = not (shape.has_fp8_keys or shape.is_padded) and has_wide_boxes(shape)
    return KeySource(True, shape.page_size, is_wide)


def has_wide_boxes(shape: ProblemShape) -> bool:
    """Whether heads and pages of K, and of V, are steps of one stride, few enough for a coordinate of TMA."""
    _, _, _, k_page, _, k_head, v_page, _, v_head, *_ = shape.strides
    return all(
        head and page % head == 0 and page // head >= shape.num_heads_k and shape.num_pages * (page // head) < 1 << 31
        for page, head in ((k_page, k_head), (v_page, v_head))
    )


@cache
def _forward(
    dtype: str, head_dim: int, mask: str, facts: tuple, packed_heads: int, sm_margin: int, ragged: tuple[int, int]
) -> Operation:
    """That of forward_config(dtype, head_dim, mask, *facts), for problems of all lengths."""
    cfg = forward_config(dtype, head_dim, mask, *facts)
    launch = _forward_launch(packed_config(cfg, packed_heads) if packed_heads > 1 else cfg)
    return Operation((launch._replace(sm_margin=sm_margin, ragged=ragged),))


def _forward_launch(cfg: FwdConfig) -> Launch:
    if cfg.packs_heads:
        row = packed_row(cfg.head_dim, cfg.packed_heads, cfg.is_varlen)
    else:
        row = forward_row(cfg.dtype, cfg.head_dim, cfg.mask, cfg.takes_registers, bool(cfg.head_dim_v))
    return Launch(cfg, row.reason, "tile_counter")


def _decode_launch(cfg: DecodeConfig, shape: ProblemShape, decode_queries: int = 0) -> Launch:
    plan = ragged_plan_of(cfg, shape, decode_queries) if cfg.is_ragged else plan_of(cfg, shape)
    return Launch(cfg, row_of(cfg).reason, "splits" if plan.partial_bytes else "none", plan)


def launch_of(cfg: Config, shape: ProblemShape) -> Launch:
    """The launch of a problem through a config, that of the tables or any other one that can serve it alone."""
    return _forward_launch(cfg) if isinstance(cfg, FwdConfig) else _decode_launch(cfg, shape)


# What is known of choices that were good, by the values of CHOICES: chosen_by them, rules that remain.
_good_choices: dict[tuple, tuple[Chosen, tuple]] = {}


def checked(p: FlashAttentionParams, values: tuple | None = None) -> Problem | ProblemShape:
    """Of plain params: the first problem where `forward` refuses them, else their shape.

    values   of params.SHAPE, in its order, where they are known: a call of known choices is asked less
    """
    choices = () if values is None else values[: len(CHOICES)]
    known = _good_choices.get(choices)
    if known is None:
        return _checked(p, choices)
    chosen, rules = known
    for objections in rules:
        if objections(p):
            return _checked(p, ())
    shape = ProblemShape.of(p, chosen)
    return _shape_problem(p, shape) or shape


def _checked(p, choices: tuple) -> Problem | ProblemShape:
    """`checked` by all rules; the choices are remembered, unless ()."""
    if problem := first_problem(p):
        return problem
    if choices:
        if len(_good_choices) >= MAX_CHOICES:
            _good_choices.clear()
        _good_choices[choices] = chosen_by(p), remaining(p)
    shape = ProblemShape.of(p)
    return _shape_problem(p, shape) or shape


def problems(params: FlashAttentionParams) -> list[Problem]:
    """Everything that `forward` would object to, in the order in which it would; [] if the call is good."""
    p = plain(params)
    found = list(walk(p))
    if not found and (problem := _shape_problem(p, ProblemShape.of(p))):
        return [problem]
    return found


def workspace_bytes(params: FlashAttentionParams) -> int | Problem:
    """What a workspace must hold for these params, whatever their tensors and workspace are; else what is wrong."""
    p = plain(replace(params, workspace=None, workspace_bytes=0))
    for problem in walk(p):
        if problem.status is not Status.NULL_POINTER:
            return problem
    return operation_of(ProblemShape.of(p)).workspace_bytes


def _shape_problem(p, shape: ProblemShape) -> Problem | None:
    """What only kernels and plans object to, of a call that is right otherwise."""
    least, most = ALIBI_SCALES
    if shape.has_alibi and not least <= shape.softmax_scale <= most:
        accepted = f"a number from {least:.8g} to {most:.8g} with alibi_slopes"
        return Problem(Status.INVALID_ARGUMENT, must(p, "softmax_scale", accepted))
    return _workspace_problem(p, shape)


def _workspace_problem(p, shape: ProblemShape) -> Problem | None:
    """The rule that needs a plan: what a workspace must hold."""
    if not shape.workspace or p.workspace_bytes >= (needed := operation_of(shape).workspace_bytes):
        return None
    return Problem(
        Status.INVALID_ARGUMENT,
        f"workspace_bytes={shown(p.workspace_bytes)}: must be at least workspace_size(params)={needed}",
    )
