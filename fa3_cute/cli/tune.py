"""Sweeps the tiles and stages of one problem and prints the row of tables.py that the numbers speak for.

Candidates are all that FwdConfig allows: tile_m, tile_n, num_q_stages, use_pingpong and rescale_before_pv, of FP8 also
num_kv_stages (2 or 3), the nearest to the row in force first. What does not compile, spills or makes the compiler
serialise WGMMA is left out. The others are checked against the reference, every row of a small problem, in a process
that is given up if a kernel hangs; the right ones are timed in interleaved rounds, and a number is the median over
them. The best has the highest geometric mean of the rates over the lengths. A row is worth changing if it is ahead by
more than the numbers scatter: try the best few again with --limit or --tile-n and more --rounds.

Without a Hopper GPU: the survivors with registers and shared memory, no times.

Exit status 1 if nothing survives or a survivor is wrong or hangs, 2 if there are no such kernels.
"""

import os
import textwrap
from dataclasses import MISSING, fields, replace
from datetime import UTC, datetime
from itertools import product
from math import prod
from typing import cast

from ..runtime.compiler import CompileError, get_kernel
from ..contract.formats import ELEMENT_BYTES
from ..planning.config import FwdConfig
from ..arrays.memory import hopper_device_problem
from ..planning.tables import Row
from .dev import add_problem
from .options import cannot_run, count, counted, milliseconds, one_or_more
from .processes import spread
from .table import Table
from .trial import Question, Rig, compiled, label, times
from .worker import HUNG_SECONDS, Worker

KV_STAGES_OF_FP8 = (2, 3)
TILE_MS, TILE_NS, Q_STAGES = (64, 128, 192), tuple(range(32, 257, 16)), (1, 2)
SEQLENS = (4096, 16384)
RUNNERS_UP = 3  # named in the row's reason


def add_arguments(parser) -> None:
    add_problem(parser)
    parser.add_argument("--tile-m", type=one_or_more(int, TILE_MS), default=TILE_MS, metavar="M,..")
    parser.add_argument(
        "--tile-n",
        type=one_or_more(int, TILE_NS),
        default=TILE_NS,
        metavar="N,..",
        help="default: every multiple of 16, FP8 32, from 32 to 256",
    )
    parser.add_argument("--limit", type=count, metavar="N", help="only the N candidates nearest to the row in force")
    parser.add_argument("--jobs", type=count, default=os.cpu_count(), metavar="N", help="processes (about 300 MB each)")
    parser.add_argument("--rounds", type=count, default=5, metavar="N")
    parser.add_argument("--batch-ms", type=milliseconds, default=20, metavar="MS", help="length of one timed batch")


def run(args) -> int:
    question = Question(
        args.dtype, args.head_dim, args.mask, seqlens=tuple(args.seqlen) or SEQLENS, out_dtype=args.out_dtype
    )
    try:
        row = cast(FwdConfig, question.config())  # no decode kernel is asked for
    except ValueError as error:
        return cannot_run(error)
    configs = candidates(row, args.tile_m, args.tile_n)
    chosen = configs[: args.limit]
    problem = hopper_device_problem()
    print(
        counted(len(configs), "legal config")
        + f", of which {len(chosen)}" * (len(chosen) < len(configs))
        + f" are compiled, {args.jobs} at a time",
        flush=True,
    )
    survivors = print_survivors(chosen, args.jobs)
    if not survivors:
        return 1
    if problem:
        print(f"no times: {problem}")
        return 0
    list(spread(stored, survivors, args.jobs))  # the launches find them on disk
    watched = Watched(question)
    try:
        right = [cfg for cfg in survivors if is_right(watched, cfg)]
        rates = watched.rates(right, args) if right else {}
    finally:
        watched.stop()
    if rates:
        print_best(watched, row, rates)
    return 0 if len(rates) == len(survivors) else 1


def candidates(base: FwdConfig, tile_ms, tile_ns) -> list[FwdConfig]:
    """Every legal variant of a config, itself included, the nearest first: fewest other choices, then nearest tile.

    A single warpgroup has no other to take turns with: without ping-pong only.
    """
    found = {base}
    choices = {
        "tile_m": tile_ms,
        "tile_n": tile_ns,
        "num_q_stages": Q_STAGES,
        "use_pingpong": (False, True),
        "rescale_before_pv": (False, True),
    }
    if base.is_fp8:
        choices |= {"num_kv_stages": KV_STAGES_OF_FP8}
    for values in product(*choices.values()):
        variant = dict(zip(choices, values, strict=True))
        if variant["use_pingpong"] and variant["tile_m"] == 64:
            continue
        try:
            found.add(replace(base, **variant))
        except ValueError:  # illegal
            continue

    def distance(cfg: FwdConfig) -> tuple:
        differ = [
            getattr(cfg, field.name) != getattr(base, field.name) for field in fields(base) if field.name != "tile_n"
        ]
        chosen = [getattr(cfg, name) for name in choices]
        return sum(differ), abs(cfg.tile_m * cfg.tile_n - base.tile_m * base.tile_n), *chosen

    return sorted(found, key=distance)


def print_survivors(configs: list[FwdConfig], jobs: int) -> list[FwdConfig]:
    """Compiles configs and prints, as they come, those that may ship; returns them."""
    table, survivors = Table((("config", 48), ("registers", 9), ("smem bytes", 10))), []
    for cfg, found in zip(configs, spread(compiled, configs, jobs), strict=True):
        if not found.get("problems", [found.get("error")]):
            survivors.append(cfg)
            table.print_row([label(cfg), found["registers"], found["smem_bytes"]])
    print(
        f"{len(survivors)} of {len(configs)} survive; the others spill, serialise WGMMA or do not compile", flush=True
    )
    return survivors


def stored(cfg: FwdConfig) -> None:
    """Leaves a kernel in the disk cache."""
    try:
        get_kernel(cfg)
    except CompileError as error:  # the launch will meet it again
        print(error)


def rig_task(question: Question):
    """The task of a worker: checks one config, or times some that are right."""
    rig = Rig(question)

    def work(configs: list[FwdConfig], rounds: int = 0, batch_ms: float = 0.0) -> dict:
        if rounds:
            return {"gpu": rig.gpu, "rates": list(measured(rig, configs, rounds, batch_ms).values())}
        (cfg,) = configs
        error = rig.error(cfg)
        if error < rig.wrong:  # a kernel may hang in a long problem alone
            for case in rig.cases:
                rig.work(cfg, case)
        return {"worst_row": error}

    return work


class Watched:
    """A process with a rig. A config that hangs or kills it is reported, and the next one gets a new process."""

    def __init__(self, question: Question):
        self.question, self.cases, self.gpu = question, question.cases(), ""
        self.worker = Worker(rig_task, question)

    def ask(self, *request, seconds: float = HUNG_SECONDS) -> dict:
        found = self.worker.ask(*request, seconds=seconds)
        if "error" in found:  # whatever happened, its CUDA context may be unusable from now on
            self.worker.stop()
            self.worker = Worker(rig_task, self.question)
        return found

    def rates(self, configs: list[FwdConfig], args) -> dict[FwdConfig, list[float]]:
        """TFLOP/s of each config for each case; says so if there are none to be had."""
        batches = len(configs) * len(self.cases) * (args.rounds + 3)  # with calibration and the unrecorded round
        seconds = HUNG_SECONDS + batches * (1 + 4 * args.batch_ms / 1000)
        found = self.ask(configs, args.rounds, args.batch_ms, seconds=seconds)
        if "error" in found:
            print(f"not timed: {found['error']}")
            return {}
        self.gpu = found["gpu"]
        return dict(zip(configs, found["rates"], strict=True))

    def stop(self) -> None:
        self.worker.stop()


def is_right(watched: Watched, cfg: FwdConfig) -> bool:
    """Whether a config's result is right; says so if not, or if there is none."""
    found, limit = watched.ask([cfg]), watched.question.wrong
    checked = watched.question.small_case().name
    if "error" in found:
        print(f"{label(cfg)}: {found['error']}", flush=True)
        return False
    error = found["worst_row"]
    if not error < limit:
        print(f"{label(cfg)} is WRONG: relative error {error:.1e} in the worst row of {checked}")
    return error < limit


def measured(rig: Rig, configs: list[FwdConfig], rounds: int, batch_ms: float) -> dict[FwdConfig, list[float]]:
    """TFLOP/s of each config for each case, all of them interleaved."""
    rates = {cfg: [] for cfg in configs}
    for case in rig.cases:
        works = {cfg: rig.work(cfg, case) for cfg in configs}
        for cfg, batches in rig.stopwatch.rounds(works, rounds, batch_ms).items():
            rates[cfg].append(times(case, batches)["tflops"])
    return rates


def print_best(watched: Watched, row: FwdConfig, rates: dict[FwdConfig, list[float]]) -> None:
    """The table of rates, best first, each beside the row in force, and the row to paste."""
    ranked = sorted(rates, key=lambda cfg: -prod(rates[cfg]))
    base = row if row in rates else ranked[0]
    table = Table((("config", 48), *((f"{case.seqlen_q} TFLOP/s", 13) for case in watched.cases), ("relative", 8)))
    for cfg in ranked:
        ratio = (prod(rates[cfg]) / prod(rates[base])) ** (1 / len(watched.cases))
        table.print_row([label(cfg), *(f"{rate:.1f}" for rate in rates[cfg]), f"{ratio:.3f}"])
    print(
        f"\n1.000 is {label(base)}, {'the row in force' if base is row else 'the best: the row in force failed'}. "
        "The best as a row of tables.py:\n\n"
        + table_row(ranked, rates, f"TFLOP/s at {tokens(watched.cases)} tokens, {watched.gpu}, {datetime.now(UTC):%F}")
    )


def table_row(ranked: list[FwdConfig], rates: dict[FwdConfig, list[float]], what: str) -> str:
    """The line of FORWARD for the first of these configs, its reason the rates of it and of the next ones."""
    best, *others = ranked
    numbers = [" / ".join(f"{rate:.0f}" for rate in rates[cfg]) for cfg in ranked]
    named = [f"{label(cfg)} {text}" for cfg, text in zip(others[:RUNNERS_UP], numbers[1:], strict=False)]
    reason = "; ".join([f"{numbers[0]} {what}", *named])
    unusual = [
        f"{field.name}={getattr(best, field.name)}"
        for field in fields(Row)
        if field.default is not MISSING and getattr(best, field.name) != field.default
    ]
    key = (ELEMENT_BYTES[best.dtype], best.head_dim, best.mask)
    start = f"    {key}: Row(".replace("'", '"') + f"{best.tile_m}, {best.tile_n}, {best.num_q_stages}, "
    lines = textwrap.wrap(reason, 112 - len(start), drop_whitespace=False)
    quoted = f"\n{' ' * len(start)}".join(f'"{line}"' for line in lines)
    return start + ", ".join([quoted, *unusual]) + "),"


def tokens(cases) -> str:
    """Lengths in short: 4k / 16k."""
    lengths = [case.seqlen_q for case in cases]
    return " / ".join(f"{length}" if length % 1024 else f"{length // 1024}k" for length in lengths)
