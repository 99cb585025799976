"""Shows what one kernel is made of: registers, spills, the map of its shared memory, its instructions by unit, and an
estimate of the critical unit. Compiles it, past every cache; needs no GPU. Exit status 1 if the kernel spills, draws a
compiler warning or does not compile, 2 if there is no such kernel.

The instructions are those of the whole kernel, every branch of it, counted in its machine code. "integer" includes
moves and selections, "uniform" is the datapath of a warp's common values, "shared memory" includes mbarriers and
shuffles, "conversion" is to and from 16 and 8 bits and integers.

The critical unit is the one that is busy longest with a K/V tile of one CTA, if every unit ran at its peak and beside
the others. The clocks are counted from the algorithm, for M x N scores and head_dim D, not measured:

  tensor          4 M N D FLOPs at 4096 per clock and SM (FP8 operands: 8192); where V has other columns than K, each
                  GEMM's
  MUFU            an exp2 per score and 4 per row, at 16 per clock
  FP32            a multiply-add and an add per score, a multiply per element of O, on 128 lanes
  ALU             a maximum per score and a conversion per two; in a masked tile 2 comparisons or selections per score,
                  3 with a window; a conversion per two elements of K and V that are widened; on 64 lanes
  issue           all of MUFU, FP32 and ALU at 4 warp instructions per clock
  shared memory   K and V written once and read by each warpgroup's WGMMAs, Q read once, at 128 bytes per clock; FP8: V
                  read and written once more, to transpose it; an FP8 cache under 16-bit queries: K and V read, and
                  written in 16 bit, to widen them; 512 columns of V: read once in all, and P written and read
  memory          decode only: K and V read from device memory, 4.6 TB/s over 132 SMs at 1830 MHz

A masked tile is one that the mask or the end of K and V cuts. Units wait for one another in a real kernel: a second
unit close to the first one means that neither will be busy all the time. Loops, addresses and barriers are left out,
and so are what softcap and the like do to scores, and reads of K and V from the L2 cache by the forward kernel: the
bytes are stated.

The kernels that append, rotate or merge have neither tiles nor shared memory: there is no map and no estimate of them.
"""

import json
from typing import Any

from ..contract.formats import ELEMENT_BYTES, FP8, FP8_OUT_DTYPES, PARTIAL, WIDE_DIMS
from ..planning.append import ROTARY, AppendConfig, append_config
from ..planning.config import SMEM_BYTES_PER_CTA, DecodeConfig
from ..planning.merge import MergeConfig, merge_config
from ..planning.mla import mla_config
from ..planning.operations import Config
from ..planning.rings import HEAD_BYTES
from ..planning.score_features import Features
from ..planning.tables import decode_config, forward_config
from .dtypes import DEFAULT, out_dtype_of
from .kernels import dim_fields, misplaced, problem_of
from .options import cannot_run
from .table import Table
from .units import clocks_per_tile, instruction_mix

MASKS = ("full", "causal", "local")
# {option: field of a config}. Functions in Python are no options.
FEATURES = {"softcap": "has_softcap", "alibi": "has_alibi", "attention_chunk": "has_chunks", "dropout": "has_dropout"}
MASK_TYPES = ("bool", "fp16", "bf16", "fp32")


# Options that the kernels of others do not differ in.
OF_SCORES = (*FEATURES, "attn_mask")
OF_ATTENTION = ("head_dim", "head_dim_v", "q_v", "mask", "varlen", "lse", *OF_SCORES)
MISPLACED = {
    "append": ("out_dtype", *OF_ATTENTION),
    "merge": ("kv_dtype", "rotary", "rotary_dtype", *OF_ATTENTION),
}
HEAD_DIM = 128


def add_arguments(parser) -> None:
    parser.add_argument("--head-dim", type=int, metavar="D", help=f"of Q and K; default {HEAD_DIM}")
    parser.add_argument("--head-dim-v", type=int, metavar="D", help="of V and O; default --head-dim")
    parser.add_argument("--q-v", action="store_true", help="of calls with q_v: --head-dim 64 --head-dim-v 512")
    parser.add_argument(
        "--dtype",
        choices=(*ELEMENT_BYTES, PARTIAL),
        default=DEFAULT,
        help=f"of Q, K and V, of new rows, of what is merged; default {DEFAULT}; {PARTIAL}: with --merge only",
    )
    parser.add_argument("--kv-dtype", choices=ELEMENT_BYTES, help="of K and V; default --dtype")
    parser.add_argument(
        "--out-dtype",
        choices=(*FP8_OUT_DTYPES, PARTIAL),
        help=f"of O: default --dtype, {FP8_OUT_DTYPES[0]} with {FP8}, which has a choice; {PARTIAL}: partial results",
    )
    parser.add_argument("--mask", choices=MASKS, help="default full")
    parser.add_argument("--varlen", action="store_true", help="for packed sequences and used lengths")
    parser.add_argument("--lse", action="store_true", help="with the log-sum-exp")
    add_kinds(parser)
    parser.add_argument("--softcap", action="store_true", help="what changes scores, as these:")
    parser.add_argument("--alibi", action="store_true")
    parser.add_argument("--attn-mask", choices=MASK_TYPES, default="", help="bool hides keys, the others are added")
    parser.add_argument("--attention-chunk", action="store_true", help="with --mask local")
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def add_kinds(parser) -> None:
    """Other kernels than that of prefill."""
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--decode",
        action="store_true",
        help="the decode kernel: it always reads lengths and may write the log-sum-exp, and a causal "
        "mask is a window to it; 512 columns of V and 16-bit queries over an FP8 cache have no other",
    )
    kind.add_argument(
        "--append",
        action="store_true",
        help="of new rows of --dtype for a cache of --kv-dtype, and of rotary positions",
    )
    kind.add_argument("--merge", action="store_true", help="of results in --dtype, merged in --out-dtype")
    parser.add_argument("--rotary", choices=ROTARY, help="with --append: which elements of a row turn together")
    parser.add_argument(
        "--rotary-dtype", choices=("fp16", "bf16", PARTIAL), help="with --rotary: of the tables; default --dtype"
    )


def run(args) -> int:
    from ..runtime import compiler  # the DSL takes half a second to import

    try:
        cfg = config(args)
    except ValueError as error:
        return cannot_run(error)
    try:
        report, code = compiler.compile_and_read(cfg)
    except compiler.CompileError as error:
        print(json.dumps({"name": cfg.name, "problems": [str(error)]}, indent=1) if args.json else error)
        return 1
    facts = report.as_dict() | {
        "problems": report.problems(),
        "instruction_mix": instruction_mix(code.opcodes),
        **facts_of_tiles(cfg),
    }
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print_facts(cfg, facts)
    return 1 if facts["problems"] else 0


def facts_of_tiles(cfg: Any) -> dict:
    """What follows from the tiles of a kernel of attention; of others nothing."""
    if isinstance(cfg, AppendConfig | MergeConfig):
        return {}
    facts = {
        "registers_after_setmaxnreg": roles(cfg),
        "smem_map": smem_map(cfg),
        "kv_tile_bytes": cfg.tile_n * cfg.kv_bytes_per_token,
        "clocks_per_tile": clocks_per_tile(cfg),
        "clocks_per_masked_tile": clocks_per_tile(cfg, is_masked=True),
    }
    return facts | {"critical": critical(facts["clocks_per_tile"])}


def config(args) -> Any:
    """The config asked for; ValueError if there is none."""
    for kind, others in MISPLACED.items():
        if getattr(args, kind) and (problem := misplaced(args, kind, others)):
            raise ValueError(problem)
    if args.append:
        return of_append(args)
    if args.merge:
        return merge_config(*(checked_of_merge(name, dtype) for name, dtype in merged_dtypes(args)))
    if args.rotary or args.rotary_dtype:
        raise ValueError("--rotary and --rotary-dtype: only with --append, whose kernel rotates")
    if args.attention_chunk and args.mask != "local":
        mask = args.mask or MASKS[0]
        raise ValueError(f"--attention-chunk: only with --mask local, not {mask}, as chunks are windows")
    return of_attention(args)


def of_append(args) -> AppendConfig:
    """What appends or rotates."""
    if args.dtype == PARTIAL:
        raise ValueError(f"--dtype {PARTIAL}: must be one of {', '.join(ELEMENT_BYTES)} with --append")
    stored = args.kv_dtype or args.dtype
    if stored not in (args.dtype, FP8):
        raise ValueError(f"--kv-dtype {stored}: must be {args.dtype}, as new rows are, or {FP8}")
    if args.rotary and args.dtype == FP8:
        raise ValueError(f"--rotary: not with --dtype {FP8}: rows are rotated before they are quantised")
    if args.rotary_dtype and not args.rotary:
        raise ValueError("--rotary-dtype: only with --rotary")
    table = (args.rotary_dtype or args.dtype) if args.rotary else ""
    return append_config(args.dtype, args.rotary or "", table, "" if stored == args.dtype else stored)


def merged_dtypes(args) -> tuple[tuple[str, str], tuple[str, str]]:
    """(option, element type) of what is merged, and of the result."""
    return ("--dtype", args.dtype), ("--out-dtype", args.out_dtype or args.dtype)


def checked_of_merge(option: str, dtype: str) -> str:
    """One of them; ValueError if none is merged."""
    if dtype == FP8:
        raise ValueError(f"{option} {dtype}: must be fp16, bf16 or {PARTIAL} with --merge")
    return dtype


def of_attention(args) -> Config:
    """The prefill kernel or the decode kernel."""
    head_dim = args.head_dim or HEAD_DIM
    dims, mask = (head_dim, args.head_dim_v or head_dim), args.mask or MASKS[0]
    if args.dtype == PARTIAL:
        raise ValueError(f"--dtype {PARTIAL}: only with --merge")
    if problem := problem_of(args.dtype, args.kv_dtype, dims, args.q_v):
        raise ValueError(problem.detail)
    out_dtype = PARTIAL if args.out_dtype == PARTIAL else out_dtype_of(args.dtype, args.out_dtype)
    kv_dtype = None if args.kv_dtype == args.dtype else args.kv_dtype
    is_wide, asked = dims in WIDE_DIMS, features(args)
    if asked and (is_wide or kv_dtype):
        what = "512 columns of V" if is_wide else f"16-bit queries over {kv_dtype}"
        raise ValueError(f"--{', --'.join(sorted(given_of_scores(args)))}: there are no such kernels of {what}")
    if is_wide:
        if mask == "local":
            raise ValueError("--mask local: full or causal with 512 columns of V, which have no windows")
        return mla_config(args.dtype, mask == "causal", out_dtype, dims=dims)
    is_decode = bool(args.decode or kv_dtype)
    by_tma = not (is_decode or args.varlen or out_dtype == PARTIAL)
    columns, fields = dim_fields(args.dtype, dims, is_by_tma=by_tma)
    if is_decode:
        return decode_config(args.dtype, columns, mask != "full", out_dtype, asked | fields, kv_dtype=kv_dtype)
    return forward_config(args.dtype, columns, mask, args.lse, args.varlen, out_dtype, asked | fields)


def given_of_scores(args) -> list[str]:
    """The options of OF_SCORES that are given, as they are written."""
    return [name.replace("_", "-") for name in OF_SCORES if getattr(args, name)]


def features(args) -> Features:
    """What the kernel does to scores."""
    asked = {field: getattr(args, option) for option, field in FEATURES.items()} | {"attn_mask": args.attn_mask}
    return frozenset((field, value) for field, value in asked.items() if value)


def roles(cfg: Config) -> dict[str, int | None] | None:
    """Registers per thread after setmaxnreg; None for a kernel that has none."""
    if not cfg.uses_setmaxnreg:
        return None
    if isinstance(cfg, DecodeConfig) or getattr(cfg, "is_split", False):
        return {role.name: role.registers for role in cfg.roles}
    return dict(zip(("producer", "consumer"), cfg.registers, strict=True))


def smem_map(cfg: Config) -> list[dict]:
    """The parts of a CTA's shared memory in their order: name, slots, bytes."""
    parts = [{"name": ring.label, "slots": ring.slots, "bytes": ring.nbytes} for ring in cfg.rings if ring.nbytes]
    return [{"name": "barriers", "slots": 1, "bytes": HEAD_BYTES}, *parts]


def critical(clocks: dict[str, float]) -> str:
    """The unit that is busy longest."""
    return max(clocks, key=lambda unit: clocks[unit])


def print_facts(cfg: Any, facts: dict) -> None:
    shares = facts.get("registers_after_setmaxnreg") or {}
    moved = ", ".join(f"{registers} ({name})" for name, registers in shares.items())
    tile = f", tile {cfg.tile_m}x{cfg.tile_n}" if "smem_map" in facts else ""
    print(
        f"{cfg.name}{tile}, {cfg.num_threads} threads\n"
        f"registers per thread  {facts['registers']}{f'; after setmaxnreg {moved}' if moved else ''}\n"
        f"spills                {facts['stack_bytes']} bytes of stack, {facts['spill_stores']} stores, "
        f"{facts['spill_loads']} loads\n"
        f"shared memory         {facts['smem_bytes']} bytes of {SMEM_BYTES_PER_CTA}\n"
    )
    if "smem_map" in facts:
        print_smem(facts)
    print_instructions(facts)
    if "clocks_per_tile" in facts:
        print_clocks(facts)
    print(*facts["problems"], sep="\n", end="\n" if facts["problems"] else "")


def print_smem(facts: dict) -> None:
    table = Table((("shared memory", 22), ("slots", 5), ("bytes", 8)))
    for part in facts["smem_map"]:
        table.print_row([part["name"], part["slots"], part["bytes"]])
    print()


def print_instructions(facts: dict) -> None:
    table = Table((("instructions of", 22), ("count", 5), ("share", 8)))
    for unit, count in facts["instruction_mix"].items():
        table.print_row([unit, count, f"{count / facts['instructions']:.1%}"])
    table.print_row(["all", facts["instructions"], ""])
    print()


def print_clocks(facts: dict) -> None:
    clocks, masked = facts["clocks_per_tile"], facts["clocks_per_masked_tile"]
    longest = clocks[facts["critical"]]
    table = Table((("estimate per K/V tile", 22), ("clocks", 6), ("share", 5), ("masked tile", 11)))
    for unit in sorted(clocks, key=clocks.get, reverse=True):
        table.print_row([unit, f"{clocks[unit]:.0f}", f"{clocks[unit] / longest:.0%}", f"{masked[unit]:.0f}"])
    print(
        f"critical: {facts['critical']}, {longest:.0f} clocks; in a masked tile {critical(masked)}\n"
        f"a tile of K and V: {facts['kv_tile_bytes']} bytes, {facts['kv_tile_bytes'] / longest:.1f} per clock"
    )
