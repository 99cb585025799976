"""Shows what one kernel is made of: registers, spills, the map of its shared memory, its instructions by unit, and an
estimate of the critical unit. Compiles it, past every cache; needs no GPU. Exit status 1 if the kernel spills, draws a
compiler warning or does not compile, 2 if there is no such kernel.

The instructions are those of the whole kernel, every branch of it, counted in its machine code. "integer" includes
moves and selections, "uniform" is the datapath of a warp's common values, "shared memory" includes mbarriers and
shuffles, "conversion" is to and from 16 and 8 bits and integers.

The critical unit is the one that is busy longest with a K/V tile of one CTA, if every unit ran at its peak and beside
the others. The clocks are counted from the algorithm, for M x N scores and head_dim D, not measured:

  tensor          4 M N D FLOPs at 4096 per clock and SM (FP8 operands: 8192)
  MUFU            an exp2 per score and 4 per row, at 16 per clock
  FP32            a multiply-add and an add per score, a multiply per element of O, on 128 lanes
  ALU             a maximum per score and a conversion per two; in a masked tile 2 comparisons or selections per score,
                  3 with a window; on 64 lanes
  issue           all of MUFU, FP32 and ALU at 4 warp instructions per clock
  shared memory   K and V written once and read by each warpgroup's WGMMAs, Q read once, at 128 bytes per clock; FP8: V
                  read and written once more, to transpose it
  memory          decode only: K and V read from device memory, 4.6 TB/s over 132 SMs at 1830 MHz

A masked tile is one that the mask or the end of K and V cuts. Units wait for one another in a real kernel: a second
unit close to the first one means that neither will be busy all the time. Loops, addresses and barriers are left out,
and so are what softcap and the like do to scores, and reads of K and V from the L2 cache by the forward kernel: the
bytes are stated.
"""

import json

from ..contract.formats import HEAD_DIMS
from ..planning.config import SMEM_BYTES_PER_CTA
from ..planning.operations import Config
from ..planning.rings import HEAD_BYTES
from ..planning.score_features import Features
from ..planning.tables import decode_config, forward_config
from .dtypes import add_dtypes, out_dtype_of
from .options import cannot_run
from .table import Table
from .units import clocks_per_tile, instruction_mix

MASKS = ("full", "causal", "local")
# {option: field of a config}. Functions in Python are no options.
FEATURES = {"softcap": "has_softcap", "alibi": "has_alibi", "attention_chunk": "has_chunks", "dropout": "has_dropout"}
MASK_TYPES = ("bool", "fp16", "bf16", "fp32")


def add_arguments(parser) -> None:
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, default=128, help="default 128")
    add_dtypes(parser)
    parser.add_argument("--mask", choices=MASKS, default="full", help="default full")
    parser.add_argument("--varlen", action="store_true", help="for packed sequences and used lengths")
    parser.add_argument("--lse", action="store_true", help="with the log-sum-exp")
    parser.add_argument(
        "--decode",
        action="store_true",
        help="the decode kernel: it always reads lengths and may write the log-sum-exp, and a causal "
        "mask is a window to it",
    )
    parser.add_argument("--softcap", action="store_true", help="what changes scores, as these:")
    parser.add_argument("--alibi", action="store_true")
    parser.add_argument("--attn-mask", choices=MASK_TYPES, default="", help="bool hides keys, the others are added")
    parser.add_argument("--attention-chunk", action="store_true", help="with --mask local")
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


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
        "registers_after_setmaxnreg": roles(cfg),
        "smem_map": smem_map(cfg),
        "problems": report.problems(),
        "instruction_mix": instruction_mix(code.opcodes),
        "kv_tile_bytes": cfg.tile_n * cfg.kv_bytes_per_token,
        "clocks_per_tile": clocks_per_tile(cfg),
        "clocks_per_masked_tile": clocks_per_tile(cfg, is_masked=True),
    }
    facts["critical"] = critical(facts["clocks_per_tile"])
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print_facts(cfg, facts)
    return 1 if facts["problems"] else 0


def config(args) -> Config:
    """The config asked for; ValueError if there is none."""
    out_dtype = out_dtype_of(args.dtype, args.out_dtype)
    if args.attention_chunk and args.mask != "local":
        raise ValueError(f"--attention-chunk: only with --mask local, not {args.mask}, as chunks are windows")
    if args.decode:
        return decode_config(args.dtype, args.head_dim, args.mask != "full", out_dtype, features(args))
    return forward_config(args.dtype, args.head_dim, args.mask, args.lse, args.varlen, out_dtype, features(args))


def features(args) -> Features:
    """What the kernel does to scores."""
    asked = {field: getattr(args, option) for option, field in FEATURES.items()} | {"attn_mask": args.attn_mask}
    return frozenset((field, value) for field, value in asked.items() if value)


def roles(cfg: Config) -> dict[str, int] | None:
    """Registers per thread after setmaxnreg; None for a kernel that has none."""
    return dict(zip(("producer", "consumer"), cfg.registers, strict=True)) if cfg.uses_setmaxnreg else None


def smem_map(cfg: Config) -> list[dict]:
    """The parts of a CTA's shared memory in their order: name, slots, bytes."""
    parts = [{"name": ring.label, "slots": ring.slots, "bytes": ring.nbytes} for ring in cfg.rings if ring.nbytes]
    return [{"name": "barriers", "slots": 1, "bytes": HEAD_BYTES}, *parts]


def critical(clocks: dict[str, float]) -> str:
    """The unit that is busy longest."""
    return max(clocks, key=lambda unit: clocks[unit])


def print_facts(cfg: Config, facts: dict) -> None:
    shares = facts["registers_after_setmaxnreg"]
    moved = f"; after setmaxnreg {shares['producer']} (producer), {shares['consumer']} (consumer)" if shares else ""
    print(
        f"{cfg.name}, tile {cfg.tile_m}x{cfg.tile_n}, {cfg.num_threads} threads\n"
        f"registers per thread  {facts['registers']}{moved}\n"
        f"spills                {facts['stack_bytes']} bytes of stack, {facts['spill_stores']} stores, "
        f"{facts['spill_loads']} loads\n"
        f"shared memory         {facts['smem_bytes']} bytes of {SMEM_BYTES_PER_CTA}\n"
    )
    print_smem(facts)
    print_instructions(facts)
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
