"""Says what `forward` would do with a problem of these sizes: every reason to refuse it, in the order in which it finds
them, else the kernels that are launched, in their order: what appends and rotates, unless a decode kernel does that
itself, then the kernel that serves it, or the two of a mixed batch; their grids, their tiles and the measurement behind
that choice, and for decode how K and V are split. Needs no GPU and compiles nothing; exit status 1 if the problem would
be refused.

Tensors are taken to be contiguous. Of a tile's numbers the first are its own, those of other tiles follow
(planning/tables.py says on which machine); they are of kernels that do nothing else to scores. Workspace bytes are
scratch memory for the partial results of splits, which stay in shared memory within one cluster of CTAs, and for
rotated queries. Grids are those of 132 SMs, as H100 and H200 have. With --backward, the same of `backward` and its
kernels, but for grids.
"""

import argparse
import json
from dataclasses import fields
from typing import Any

from ..api import AttentionMode, BackwardParams, DataType, FlashAttentionParams, explain
from ..contract.backward_params import plain_backward
from ..contract.formats import ELEMENT_BYTES, FP8, FP8_OUT_DTYPES, MLA_DIMS, PARTIAL
from ..contract.plain import plain
from ..contract.status import Problem
from ..planning import backward_launch
from ..planning.append import ROTARY, AppendConfig
from ..planning.backward_kernels import reason_of
from ..planning.decode_append import ONE_LAUNCH, AppendingConfig
from ..planning.one_side import OneSidePass
from ..planning.operations import Config, Launch, checked, operation_of
from ..planning.problem import ProblemShape
from ..planning.splits import SplitPlan
from .grids import grid_of

ADDRESS = 1 << 20  # stands for any tensor
GRADIENTS = {"dq": 1 << 50, "dk": 1 << 51, "dv": 1 << 52}  # far from it: they must not overlap it
ANY_WORKSPACE = {"workspace": 1 << 53, "workspace_bytes": 1 << 60}
MODES = {"prefill": AttentionMode.PREFILL, "decode": AttentionMode.DECODE, "varlen": AttentionMode.VARLEN_PREFILL}
PACK_GQA = {"auto": None, "yes": True, "no": False}
MASK_TYPES = {"bool": None, "fp16": DataType.FP16, "bf16": DataType.BF16, "fp32": DataType.FP32}
UNBOUNDED = (-1, -1)
# What the numbers of a tile's reason are.
RELATIVE = "speed relative to FlashAttention-3's C++ at 4k / 16k tokens"
PACKED_US = "us with the window, heads and lengths that are named"
WINDOW_US = "us with window (1023, 0) at 16k / (512, 512) at 4x4k tokens"
DECODE_US = "us by sequences x keys, of a tile tile_n x num_kv_stages x ctas_per_sm"


def add_arguments(parser) -> None:
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--batch-size", **number, default=1, help="default 1; packed: the number of sequences")
    parser.add_argument("--seqlen-q", **number, help="default 4096, 1 with --mode decode")
    parser.add_argument("--seqlen-k", **number, help="default: as --seqlen-q, 4096 with --mode decode")
    parser.add_argument("--num-heads", **number, default=16, help="default 16")
    parser.add_argument("--num-heads-k", **number, help="default: as many as query heads")
    parser.add_argument("--head-dim", **number, default=128, help="default 128")
    parser.add_argument("--head-dim-v", **number, default=0, help="of V and O; default --head-dim")
    parser.add_argument(
        "--dtype",
        choices=list(ELEMENT_BYTES),
        default="bf16",
        help="of Q, K and V; default bf16",
    )
    parser.add_argument("--kv-dtype", choices=list(ELEMENT_BYTES), help="of K and V; default --dtype")
    parser.add_argument(
        "--out-dtype",
        choices=(*FP8_OUT_DTYPES, PARTIAL),
        help=f"of O; default --dtype, bf16 with fp8_e4m3; {PARTIAL}: partial results",
    )
    parser.add_argument("--q-v", action="store_true", help="Q in two parts: --head-dim 64 --head-dim-v 512")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--window",
        type=window,
        default=UNBOUNDED,
        metavar="L,R",
        help="sliding window, negative is unbounded: --window=-1,0",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="prefill",
        help="default prefill; varlen: packed sequences of --seqlen-q and --seqlen-k tokens on average",
    )
    parser.add_argument(
        "--seqused", action="store_const", const="k", default="", help="the used lengths of K and V are on the device"
    )
    parser.add_argument("--page-size", **number, help="varlen: K and V in pages, used lengths on the device")
    parser.add_argument(
        "--max-seqlen-q", **number, default=0, help="varlen: no sequence has more queries; default unknown"
    )
    parser.add_argument("--lse", action="store_true", help="the log-sum-exp is wanted")
    parser.add_argument("--softmax-scale", type=float, metavar="X", help="default 1/sqrt(head_dim)")
    add_append(parser)
    add_scores(parser)
    parser.add_argument("--num-splits", **number, default=0, help="default 0, automatic; 1 is never")
    parser.add_argument("--pack-gqa", choices=PACK_GQA, default="auto", help="default auto")
    parser.add_argument("--backward", action="store_true", help="of the gradients of such a call")
    parser.add_argument(
        "--deterministic", action="store_true", help="with --backward: dq has the same bits in every call"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def add_scores(parser) -> None:
    """What is asked of scores; functions in Python are no options."""
    parser.add_argument("--softcap", type=float, default=0.0, metavar="X", help="default 0: none")
    parser.add_argument("--sinks", action="store_true", help="attention sinks, s_aux")
    parser.add_argument("--alibi", action="store_true", help="slopes of ALiBi, of each head")
    parser.add_argument("--attn-mask", choices=MASK_TYPES, help="bool hides keys, the others are added to scores")
    parser.add_argument("--attention-chunk", type=int, default=0, metavar="N", help="keys of a chunk; default 0: none")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="the probability to drop; default 0")


def add_append(parser) -> None:
    """What is done ahead of attention."""
    parser.add_argument(
        "--append",
        type=int,
        metavar="N",
        help="new rows of K and V that the call writes behind those of each sequence; used lengths are on the device",
    )
    parser.add_argument(
        "--kv-new-dtype",
        choices=list(ELEMENT_BYTES),
        help="of these; default that of K and V; --dtype over FP8: quantised",
    )
    parser.add_argument("--rotary", choices=ROTARY, help="Q and new keys are rotated: which elements turn together")
    parser.add_argument("--rotary-dim", type=int, metavar="N", help="how many elements; default --head-dim")
    parser.add_argument("--rotary-dtype", choices=("fp16", "bf16", PARTIAL), help="of the tables; default --dtype")


def append_of(args) -> dict[str, Any]:
    """The fields of these."""
    rotary_dim = args.rotary_dim if args.rotary_dim is not None else args.head_dim if args.rotary else 0
    found: dict[str, Any] = {
        "rotary_cos": ADDRESS if args.rotary else None,
        "rotary_sin": ADDRESS if args.rotary else None,
        "rotary_dim": rotary_dim,
        "rotary_interleaved": args.rotary == "neighbours",
        "rotary_dtype": dtype_of(args.rotary_dtype),
        "kv_new_dtype": dtype_of(args.kv_new_dtype),
    }
    if args.append is not None:
        found |= {"k_new": ADDRESS, "v_new": ADDRESS, "seqlen_knew": args.append, "seqused_k": ADDRESS}
    return found


def dtype_of(name: str | None) -> DataType | None:
    """By its name; None for None."""
    return DataType[name.upper()] if name else None


def scores_of(args) -> dict[str, Any]:
    """The fields of these."""
    return {
        "softcap": args.softcap,
        "s_aux": ADDRESS if args.sinks else None,
        "alibi_slopes": ADDRESS if args.alibi else None,
        "attn_mask": ADDRESS if args.attn_mask else None,
        "attn_mask_dtype": args.attn_mask and MASK_TYPES[args.attn_mask],
        "attention_chunk": args.attention_chunk,
        "p_dropout": args.dropout,
        "rng_state": ADDRESS if args.dropout else None,
    }


def window(text: str) -> tuple[int, int]:
    """An argparse type: "L,R"."""
    try:
        left, right = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be two ints, L,R") from None
    return left, right


def run(args) -> int:
    params = gradients_of(params_of(args), args.deterministic) if args.backward else params_of(args)
    problems = explain(params)
    facts = {
        "problems": [{"status": status.name, "code": int(status), "detail": detail} for status, detail in problems]
    }
    if not problems:
        facts |= backward_served(params) if isinstance(params, BackwardParams) else served(params)
    if args.json:
        print(json.dumps(facts, indent=1))
    elif problems:
        print(f"{'backward' if args.backward else 'forward'} would refuse this:", *problems, sep="\n  ")
    else:
        said = backward_lines(facts) if args.backward else lines(facts)
        print("\n".join(f"{name:10}{text}" for name, text in said))
    return 1 if problems else 0


def params_of(args) -> FlashAttentionParams:
    """The call, with addresses that stand for tensors."""
    is_decode = args.mode == "decode"
    seqlen_q = args.seqlen_q if args.seqlen_q is not None else 1 if is_decode else 4096
    seqlen_k = args.seqlen_k if args.seqlen_k is not None else 4096 if is_decode else seqlen_q
    rows: dict[str, Any] = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    if args.mode == "varlen":
        rows = {
            "cu_seqlens_q": ADDRESS,
            "cu_seqlens_k": ADDRESS,
            "total_q": args.batch_size * seqlen_q,
            "total_k": args.batch_size * seqlen_k,
        }
    if args.page_size is not None:
        rows = {name: value for name, value in rows.items() if name not in ("cu_seqlens_k", "total_k")}
        rows |= pages_of(args.batch_size, seqlen_k, args.page_size)
    rows |= {"max_seqlen_q": args.max_seqlen_q}
    if args.seqused:
        rows |= {f"seqused_{side}": ADDRESS for side in args.seqused}
    rows |= append_of(args)
    return FlashAttentionParams(
        q=ADDRESS,
        k=ADDRESS,
        v=ADDRESS,
        out=ADDRESS,
        q_v=ADDRESS if args.q_v else None,
        softmax_lse=ADDRESS if args.lse else None,
        **rows,
        batch_size=args.batch_size,
        num_heads=args.num_heads,
        num_heads_k=args.num_heads if args.num_heads_k is None else args.num_heads_k,
        head_dim=args.head_dim,
        head_dim_v=args.head_dim_v,
        dtype=DataType[args.dtype.upper()],
        kv_dtype=dtype_of(args.kv_dtype),
        out_dtype=dtype_of(args.out_dtype),
        is_causal=args.causal,
        window_size_left=args.window[0],
        window_size_right=args.window[1],
        mode=MODES[args.mode],
        softmax_scale=args.softmax_scale,
        **scores_of(args),
        num_splits=args.num_splits,
        pack_gqa=PACK_GQA[args.pack_gqa],
    )


def gradients_of(params: FlashAttentionParams, deterministic: bool) -> BackwardParams:
    """The call that differentiates a forward call, all gradients wanted."""
    of_forward = {field.name: getattr(params, field.name) for field in fields(params)}
    own: dict[str, Any] = (
        {"softmax_lse": ADDRESS, "dout": ADDRESS, "deterministic": deterministic} | GRADIENTS | ANY_WORKSPACE
    )
    return BackwardParams(**of_forward | own)


def pages_of(batch_size: int, seqlen_k: int, page_size: int) -> dict[str, Any]:
    """Fields of sequences of so many keys, in a pool that holds them all."""
    rows = max(1, page_size)
    pages = -(-seqlen_k // rows)
    capacity = {"seqlen_k": pages * rows, "seqused_k": ADDRESS}
    return {"page_table": ADDRESS, "page_size": page_size, "num_pages": batch_size * pages} | capacity


def served(params: FlashAttentionParams) -> dict:
    """Which kernel serves valid params, why, and how a decode call is laid out; "before" has the same of the launches
    before it, in their order."""
    shape = checked(plain(params))
    assert not isinstance(shape, Problem), "the params are valid"
    operation = operation_of(shape)
    *before, last = (facts_of(launch, shape) for launch in operation.launches)
    return last | {"workspace_bytes": operation.workspace_bytes, "before": before}


def facts_of(launch: Launch, shape: ProblemShape) -> dict:
    """One launch."""
    cfg, plan = launch.config, launch.plan
    own: dict[str, Any] = {"kernel": cfg.name, "grid": grid_of(launch, shape), "threads": cfg.num_threads}
    if isinstance(cfg, AppendConfig):
        return own | {"config": cfg.as_dict(), "reason": launch.reason, "reason_unit": "", "plan": None}
    return own | {
        "config": cfg.as_dict() | {"tile_m": cfg.tile_m},
        "reason": launch.reason,
        "reason_unit": reason_unit(cfg),
        "plan": plan and plan._asdict() | {"ctas_per_sm": ctas_per_sm(cfg, plan)},
        "appends": ONE_LAUNCH if isinstance(cfg, AppendingConfig) else "",
    }


def backward_served(params: BackwardParams) -> dict:
    """Which kernels serve valid params, and why."""
    found = backward_launch.checked(params)
    assert not isinstance(found, Problem), "the params are valid"
    cfg = backward_launch.BackwardShape.of(plain_backward(params)).config
    return {
        "kernels": [stage.config.name for stage in found[0].stages],
        "config": cfg.as_dict() if isinstance(cfg, OneSidePass) else cfg.as_dict() | {"tile_n": cfg.tile_n},
        "reason": reason_of(cfg),
        "workspace_bytes": found[0].workspace_bytes,
    }


def backward_lines(facts: dict):
    """As `lines`, of backward_served."""
    cfg = facts["config"]
    of_keys = [pair | {"side": "dk and dv"} for pair in cfg.get("pair", [])]
    tiles = [
        f"{own['tile_m']} rows of Q, {own['tile_n']} of K and V{' of ' + own['side'] if 'side' in own else ''}"
        for own in [*cfg.get("sides", [cfg]), *of_keys]
    ]
    for name, values in (("kernels", facts["kernels"]), ("tile", tiles)):
        yield from zip((name, *[""] * (len(values) - 1)), values, strict=True)
    yield "measured", facts["reason"]
    yield "workspace", f"{facts['workspace_bytes']} bytes"


def splits_in_words(plan: dict) -> str:
    """How K and V are split."""
    if plan["has_shares"]:
        return f"by the lengths on the device, in clusters of {plan['cluster_size']} CTAs"
    clusters = max(1, plan["num_splits"] // plan["cluster_size"])
    return (
        f"{max(plan['num_splits'], plan['cluster_size'])} of K and V, {clusters} cluster{'' if clusters == 1 else 's'} "
        f"of {plan['cluster_size']} CTAs"
    )


def reason_unit(cfg: Config) -> str:
    """What the numbers of the reason for a config are."""
    if cfg.splits_keys:
        return DECODE_US
    if cfg.packs_heads:
        return PACKED_US
    return WINDOW_US if cfg.mask == "local" or cfg.takes_registers else RELATIVE  # as forward_row chooses


def ctas_per_sm(cfg: Config, plan: SplitPlan) -> int:
    """How many CTAs an SM may hold: one where the plan asks for so much shared memory that no second one fits."""
    return 1 if plan.smem_bytes > cfg.smem_bytes else cfg.ctas_per_sm


def lines(facts: dict):
    """Yields (name, text) of what is printed."""
    for launch in (*facts["before"], facts):
        yield from lines_of(launch)
    if facts["workspace_bytes"] or any(launch["plan"] for launch in (*facts["before"], facts)):
        yield "workspace", f"{facts['workspace_bytes']} bytes"


def lines_of(facts: dict):
    """The same of one launch."""
    cfg, plan = facts["config"], facts["plan"]
    yield "kernel", facts["kernel"]
    grid = " x ".join(map(str, facts["grid"])).removesuffix(" x 1").removesuffix(" x 1")
    yield "grid", f"{grid} CTAs of {facts['threads']} threads"
    if "tile_m" not in cfg:
        yield "measured", facts["reason"]
        return
    rings = transposed = ""
    if "num_q_stages" in cfg:
        rings = f"{cfg['num_q_stages']} slots for Q{', one for O' if cfg['dtype'] == FP8 else ' and O'}, "
        transposed = " and for V transposed" if cfg["dtype"] == FP8 else ""
    slots = f"{cfg['num_kv_stages']} for K, {'V in it' if cfg['head_dim'] == MLA_DIMS[0] else 'as many for V'}"
    tile = f"{cfg['tile_m']} rows of Q, {cfg['tile_n']} of K and V; {rings}{slots}{transposed}"
    yield "tile", tile + "; ping-pong" * cfg.get("use_pingpong", False)
    yield "measured", facts["reason"]
    yield "", f"({facts['reason_unit']})"
    if facts["appends"]:
        yield "appends", f"itself: {facts['appends']}"
    packed_heads = (plan or cfg)["packed_heads"]
    if plan or packed_heads > 1:
        yield "heads", f"{packed_heads} query heads share a tile"
    if plan:
        yield "splits", splits_in_words(plan)
        yield "CTAs", f"{'one' if plan['ctas_per_sm'] == 1 else 'up to two'} per SM, {plan['smem_bytes']} bytes each"
