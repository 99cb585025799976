"""Compiles kernels for sm_90a and prints what the compiler made of them: registers, spills, shared memory,
WGMMA instructions, seconds. Needs no GPU, and leaves the kernels in the disk cache, where the first launch finds them.
Exit status 1 if a kernel spills, draws a compiler warning or does not compile, 2 if there are no such kernels.
"""

import json
import os
from dataclasses import asdict
from itertools import product
from typing import Any

from ..contract.formats import ELEMENT_BYTES, FP8, FP8_OUT_DTYPES, HEAD_DIMS
from ..planning.backward_kernels import ROWS, KernelOfPass, kernels_of, pass_config
from ..planning.operations import Config
from ..planning.tables import configs_over, dense_configs
from .options import cannot_run, count, counted, one_or_more, whole
from .processes import spread
from .table import Table

NAME_WIDTH = 39  # at least
COLUMNS = (("registers", 9), ("spilled bytes", 13), ("smem bytes", 10), ("WGMMA", 5), ("seconds", 7), ("", 0))
MASKS = {"full": "without a mask", "causal": "with the causal mask", "local": "with a sliding window"}


def add_arguments(parser) -> None:
    mask = parser.add_mutually_exclusive_group()
    parser.add_argument(
        "--all",
        action="store_true",
        help="also the variants that write the log-sum-exp and, without --varlen, the varlen ones and "
        "the decode kernels",
    )
    parser.add_argument(
        "--varlen",
        action="store_true",
        help="the variants for packed sequences and used lengths instead of the dense ones",
    )
    operation = parser.add_mutually_exclusive_group()
    operation.add_argument("--decode", action="store_true", help="only the decode kernels")
    operation.add_argument(
        "--backward",
        action="store_true",
        help="the kernels of backward instead, with --all also those for packed sequences and the deterministic ones",
    )
    parser.add_argument(
        "--page-size",
        type=whole(0),
        metavar="N",
        help="the kernels of calls over pages of N rows, 0: over a cache without pages",
    )
    parser.add_argument("--head-dim", type=one_or_more(int, HEAD_DIMS), default=list(HEAD_DIMS), metavar="D,..")
    parser.add_argument(
        "--dtype",
        type=one_or_more(str, ELEMENT_BYTES),
        default=list(ELEMENT_BYTES),
        metavar="T,..",
        help=f"of {', '.join(ELEMENT_BYTES)}",
    )
    parser.add_argument(
        "--out-dtype",
        type=one_or_more(str, FP8_OUT_DTYPES),
        default=list(FP8_OUT_DTYPES),
        metavar="T,..",
        help=f"of O, where it need not be that of Q, K and V ({FP8})",
    )
    for name, kind in MASKS.items():
        mask.add_argument(f"--{name}", action="store_const", const=[name], dest="masks", help=f"only kernels {kind}")
    parser.add_argument("--jobs", type=count, default=os.cpu_count(), metavar="N", help="processes (about 300 MB each)")
    parser.add_argument("--json", action="store_true", help="print one JSON list and no table")
    parser.set_defaults(masks=list(MASKS))


def run(args) -> int:
    configs = backward_configs(args) if args.backward else forward_configs(args)
    if not configs:
        return cannot_run(
            "there are no such kernels: explain says which head dims, element types and masks go together"
        )
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


def forward_configs(args) -> list[Config]:
    """Of `forward`, prefill and decode."""
    return [
        cfg
        for cfg in (dense_configs() if args.page_size is None else configs_over(args.page_size))
        if cfg.head_dim in args.head_dim
        and cfg.dtype in args.dtype
        and cfg.mask in args.masks
        and cfg.out_dtype in (None, *args.out_dtype)
        and is_chosen(cfg, args)
    ]


def backward_configs(args) -> list[KernelOfPass]:
    """Of `backward`, each kernel once."""
    if args.page_size is not None:
        return []
    passes = [
        pass_config(dtype, head_dim, mask, is_varlen, is_deterministic, is_short=is_short)
        for dtype in args.dtype
        if dtype != FP8
        for head_dim, mask in ROWS
        if head_dim in args.head_dim and mask in args.masks
        for is_varlen in layouts(args)
        for is_deterministic, is_short in product((False, True) if args.all else (False,), repeat=2)
    ]
    return list(dict.fromkeys(kernel for cfg in passes for kernel in kernels_of(cfg)))


def layouts(args) -> tuple[bool, ...]:
    """Whether lengths are on the device."""
    return (True,) if args.varlen else (False, True) if args.all else (False,)


def is_chosen(cfg: Config, args) -> bool:
    """Whether the options ask for this variant."""
    if cfg.is_ragged and not cfg.splits_keys:
        return not args.decode and (args.all or not cfg.has_lse)
    if cfg.splits_keys:
        return args.decode or args.all and not args.varlen
    return not args.decode and cfg.is_varlen in layouts(args) and (args.all or not cfg.has_lse)


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
