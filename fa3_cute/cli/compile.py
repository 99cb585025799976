"""Compiles kernels for sm_90a and prints what the compiler made of them: registers, spills, shared memory,
WGMMA instructions, seconds. Needs no GPU, and leaves the kernels in the disk cache, where the first launch finds them.
Exit status 1 if a kernel spills, draws a compiler warning or does not compile, 2 if there are no such kernels.

Without options these are the prefill kernels of dense tensors, of all element types, head dims and masks. --all takes
some 500: besides the variants that write the log-sum-exp and those of packed sequences, and the decode kernels, of what
the tables do not have those that this package's GPU tests need, or a selection that stands for them: 512 columns of V,
head_dim_v and FP8 caches, dense, in a cache and in pages; head dims between those of tiles; and whatever appends,
rotates or merges. Options choose among them; --varlen, --head-dim, --q-v and --page-size leave the tables' alone.

--page-size has the kernels of pages of one size. Those of softcap, ALiBi, masks, chunks, dropout and functions in
Python are not compiled here: warmup(params) compiles what a call needs. --append has what appends ahead of attention,
and some decode kernels that append themselves; all of those with --head-dim, a mask or --page-size, without which they
are of a cache without pages.
"""

import json
import os
from dataclasses import asdict
from itertools import product
from typing import Any

from ..contract.formats import ELEMENT_BYTES, FP8, FP8_OUT_DTYPES, PARTIAL, WIDE_DIMS
from ..planning.append import AppendConfig
from ..planning.backward_kernels import ROWS, KernelOfPass, kernels_of, pass_config
from ..planning.merge import MergeConfig
from ..planning.mla import MlaConfig
from ..planning.operations import Config
from ..planning.selections import appending_configs
from .kernels import (
    HEAD_DIMS,
    Dims,
    appending,
    appending_steps,
    beside_tables,
    dim_fields,
    fitted,
    is_over_fp8,
    merging,
    misplaced,
    of_tables,
    problem_of,
    with_partials,
)
from .options import cannot_run, count, counted, one_or_more, whole
from .processes import spread
from .table import Table

NAME_WIDTH = 39  # at least
COLUMNS = (("registers", 9), ("spilled bytes", 13), ("smem bytes", 10), ("WGMMA", 5), ("seconds", 7), ("", 0))
MASKS = {"full": "without a mask", "causal": "with the causal mask", "local": "with a sliding window"}
DTYPES, OUT_DTYPES = (*ELEMENT_BYTES, PARTIAL), (*FP8_OUT_DTYPES, PARTIAL)
# Options of attention's kernels, which others do not differ in.
OF_ATTENTION = ("varlen", "page_size", "head_dim", "head_dim_v", "q_v", "masks", "all")
MISPLACED = {
    "append": ("varlen", "q_v", "all", "out_dtype"),
    "merge": (*OF_ATTENTION, "kv_dtype"),
}


def add_arguments(parser) -> None:
    parser.add_argument("--all", action="store_true", help="some 500 kernels, or those of them that options leave")
    parser.add_argument(
        "--varlen",
        action="store_true",
        help="the variants for packed sequences and used lengths instead of the dense ones",
    )
    operation = parser.add_mutually_exclusive_group()
    operation.add_argument("--decode", action="store_true", help="only the decode kernels")
    operation.add_argument(
        "--append",
        action="store_true",
        help="what appends to a cache and rotates, instead; with head dims, pages or a mask decode that does it itself",
    )
    operation.add_argument("--merge", action="store_true", help="what merges attention's results, instead")
    operation.add_argument(
        "--backward",
        action="store_true",
        help="the kernels of backward instead, with --all also those for packed sequences and the deterministic ones",
    )
    add_sizes(parser)
    add_dtypes(parser)
    mask = parser.add_mutually_exclusive_group()
    for name, kind in MASKS.items():
        mask.add_argument(f"--{name}", action="store_const", const=[name], dest="masks", help=f"only kernels {kind}")
    parser.add_argument("--list", action="store_true", help="print the names of the kernels and compile nothing")
    parser.add_argument("--jobs", type=count, default=os.cpu_count(), metavar="N", help="processes (about 300 MB each)")
    parser.add_argument("--json", action="store_true", help="print one JSON list and no table")


def add_sizes(parser) -> None:
    """Pages and columns."""
    parser.add_argument(
        "--page-size",
        type=whole(0),
        metavar="N",
        help="the kernels of calls over pages of N rows, 0: over a cache without pages",
    )
    parser.add_argument(
        "--head-dim",
        type=one_or_more(int, HEAD_DIMS),
        metavar="D,..",
        help="of Q and K; default all that tiles have; 512 and 576 have decode kernels only",
    )
    parser.add_argument(
        "--head-dim-v", type=count, metavar="D", help="of V and O; default --head-dim; of it only with --head-dim"
    )
    parser.add_argument("--q-v", action="store_true", help="only kernels of calls with q_v: 64 and 512 columns")


def add_dtypes(parser) -> None:
    """Element types."""
    parser.add_argument(
        "--dtype",
        type=one_or_more(str, DTYPES),
        metavar="T,..",
        help=f"of {', '.join(ELEMENT_BYTES)}; default all; {PARTIAL}: with --merge only",
    )
    parser.add_argument(
        "--kv-dtype",
        type=one_or_more(str, ELEMENT_BYTES),
        metavar="T,..",
        help=f"of K and V; default all. 16-bit --dtype over {FP8} has decode kernels only",
    )
    parser.add_argument(
        "--out-dtype",
        type=one_or_more(str, OUT_DTYPES),
        metavar="T,..",
        help=f"of O, where it need not be that of Q, K and V: {', '.join(FP8_OUT_DTYPES)} with {FP8}, the default; "
        f"{PARTIAL} with all, for partial results",
    )


def run(args) -> int:
    for kind, others in MISPLACED.items():
        if getattr(args, kind) and (problem := misplaced(args, kind, others)):
            return cannot_run(problem)
    if args.head_dim_v and not args.head_dim:
        return cannot_run("--head-dim-v: only with --head-dim")
    configs = configs_of(args)
    if not configs:
        return cannot_run(
            "there are no such kernels: explain says which head dims, element types and masks go together"
        )
    if args.list:
        names = [cfg.name for cfg in configs]
        print(json.dumps(names, indent=1) if args.json else "\n".join([*names, counted(len(names), "kernel")]))
        return 0
    width = max(len(cfg.name) for cfg in configs)
    table = None if args.json else Table((("kernel", max(NAME_WIDTH, width)), *COLUMNS))
    rows = []
    for row in spread(compile_row, configs, args.jobs):
        rows.append(row)
        if table:
            table.print_row(cells(row))
    failed = [row["name"] for row in rows if row["problems"]]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{counted(len(rows), 'kernel')}, {f'{len(failed)} with problems' if failed else 'all clean'}")
    return 1 if failed else 0


def configs_of(args) -> list[Any]:
    """Every kernel that the options name, each once."""
    dtypes = args.dtype or DTYPES
    if args.append:
        return append_configs(args)
    if args.merge:
        return merging(dtypes, args.out_dtype or DTYPES)
    if args.backward:
        return backward_configs(args)
    return forward_configs(args)


def append_configs(args) -> list[Any]:
    """What appends ahead of attention, and some decode kernels that do it themselves; where head dims, pages or masks
    are named, which only these differ in, all of those."""
    dtypes, kv_dtypes = args.dtype or DTYPES, args.kv_dtype or ELEMENT_BYTES
    ahead, steps = appending(dtypes, kv_dtypes), appending_configs()
    if args.head_dim or args.masks or args.page_size is not None:
        ahead, steps = [], appending_steps(asked_dims(args), args.page_size or 0)
    found = [cfg for cfg in steps if cfg.dtype in dtypes and cfg.dtype in kv_dtypes and has_mask(cfg, args)]
    return list(dict.fromkeys([*ahead, *found]))


def asked_dims(args) -> list[Dims]:
    """The columns of Q and K and of V and O that were named; [] if none were."""
    return [(head_dim, args.head_dim_v or head_dim) for head_dim in args.head_dim or ()]


def forward_configs(args) -> list[Config]:
    """Of `forward`: prefill and decode; with --all also what is beside the tables."""
    tables = of_tables(args.page_size)
    found = [
        cfg for cfg in (with_partials(tables) if PARTIAL in (args.out_dtype or ()) else tables) if is_chosen(cfg, args)
    ]
    if args.head_dim:
        found = [other for cfg in found for dims in asked_dims(args) if (other := of_dims(cfg, dims, args))]
    if args.all and not (args.varlen or args.head_dim or args.q_v or args.page_size is not None):
        found += [cfg for cfg in beside_tables() if is_chosen_beside(cfg, args)]
    return list(dict.fromkeys(found))


def of_dims(cfg: Config, dims: Dims, args) -> Config | None:
    """`fitted`, of columns that are served."""
    refused = problem_of(cfg.dtype, cfg.kv_dtype, dims, args.q_v)
    return None if refused else fitted(cfg, dims, args.page_size)


def backward_configs(args) -> list[KernelOfPass]:
    """Of `backward`, each kernel once."""
    passes = []
    if args.page_size is not None or args.q_v or args.kv_dtype or args.out_dtype:
        return []
    for dtype, dims in product(args.dtype or ELEMENT_BYTES, asked_dims(args) or [None]):
        if dtype in (FP8, PARTIAL) or dims and (dims in WIDE_DIMS or problem_of(dtype, None, dims, False)):
            continue
        columns, fields = dim_fields(dtype, dims, is_by_tma=False) if dims else (None, frozenset())
        passes += [
            pass_config(dtype, head_dim, mask, is_varlen, is_deterministic, is_short=is_short, dims=fields)
            for head_dim, mask in ROWS
            if columns in (None, head_dim) and mask in (args.masks or MASKS)
            for is_varlen in layouts(args)
            for is_deterministic, is_short in product((False, True) if args.all else (False,), repeat=2)
        ]
    return list(dict.fromkeys(kernel for cfg in passes for kernel in kernels_of(cfg)))


def layouts(args) -> tuple[bool, ...]:
    """Whether lengths are on the device."""
    return (True,) if args.varlen else (False, True) if args.all else (False,)


def is_chosen(cfg: Config, args) -> bool:
    """Whether the options but --head-dim ask for this variant."""
    is_wide = isinstance(cfg, MlaConfig)
    if not has_types(cfg, args) or args.q_v and not (is_wide and cfg.has_qv):
        return False
    if not has_mask(cfg, args):
        return False
    if cfg.splits_keys:
        # Of 512 columns of V and of FP8 caches there are no others.
        is_named = is_wide and (args.head_dim or args.q_v) or is_over_fp8(cfg) and FP8 in (args.kv_dtype or ())
        return bool(args.decode or (args.all or is_named) and not args.varlen)
    if args.decode or cfg.has_lse and not args.all:
        return False
    return cfg.is_ragged or cfg.is_varlen in layouts(args)


def has_mask(cfg: Config, args) -> bool:
    """Whether it serves a mask that is asked for; to the decode kernels a causal one is a window."""
    masks = args.masks or MASKS
    return cfg.mask in masks or cfg.splits_keys and cfg.mask == "local" and "causal" in masks


def has_types(cfg: Config, args, out_dtypes: tuple[str, ...] = FP8_OUT_DTYPES) -> bool:
    """Whether Q, K and V, and O have element types that are asked for; out_dtypes: where none is asked for."""
    stored, out_dtypes = cfg.kv_dtype or cfg.dtype, args.out_dtype or out_dtypes
    is_out = cfg.out_dtype in out_dtypes if cfg.out_dtype else {*out_dtypes} != {PARTIAL}
    return cfg.dtype in (args.dtype or DTYPES) and stored in (args.kv_dtype or ELEMENT_BYTES) and is_out


def is_chosen_beside(cfg: Any, args) -> bool:
    """The same of what is beside the tables: there are no others of it, of whatever lengths."""
    if isinstance(cfg, MergeConfig):
        return not (args.decode or args.kv_dtype) and cfg in merging(args.dtype or DTYPES, args.out_dtype or DTYPES)
    if isinstance(cfg, AppendConfig):
        return not args.decode and cfg in appending(args.dtype or DTYPES, args.kv_dtype or ELEMENT_BYTES)
    is_named = has_types(cfg, args, OUT_DTYPES) and has_mask(cfg, args)
    return is_named and (cfg.splits_keys or not args.decode)


def compile_row(cfg: Any) -> dict:
    """Compiles one config, once for the disk cache, once to look inside. Its Report's fields, and "problems"."""
    from ..runtime import compiler

    try:
        with compiler.in_this_process():  # which `spread` started for that
            compiler.get_kernel(cfg)
        report = compiler.compile_report(cfg)
    except compiler.CompileError as error:
        return {"name": cfg.name, "config": cfg.as_dict(), "problems": [str(error)]}
    return asdict(report) | {"problems": report.problems()}


def cells(row: dict) -> list:
    if "registers" not in row:
        return [row["name"], *["-"] * 5, *row["problems"]]
    return [
        row["name"],
        row["registers"],
        row["stack_bytes"],
        row["smem_bytes"],
        row["wgmmas"],
        f"{row['seconds']:.1f}",
        "; ".join(row["problems"]),
    ]
