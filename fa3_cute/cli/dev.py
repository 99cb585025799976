"""The loop of someone who edits a kernel: compile one config, check it, time it, and again on every save.

The config is the tables' row for the problem, with the fields of --set replaced. It is compiled and checked against the
reference on a small problem, every row; then problems of fixed size are timed: 16384 tokens of prefill, or 16 sequences
of decode whose keys are in no cache. The change is against the last run of the same problem on the same GPU, in this
session or an earlier one. Watched are the package's kernels/ and planning/; after a change to
anything else, start anew. Each round has fresh processes, which have imported the DSL and uploaded the inputs before
they are needed, and import the package when they are. What fails is printed and the loop goes on; Ctrl-C ends it.

Without a Hopper GPU: registers, spills and shared memory only.

Exit status of --once: 1 if the kernel does not compile, spills or is wrong. 2 if the config asked for is illegal.
"""

import json
import time
from pathlib import Path

from ..contract.formats import HEAD_DIMS
from ..arrays.memory import hopper_device_problem
from ..runtime.disk_cache import cache_dir
from .dtypes import add_dtypes
from .options import cannot_run, count, one_or_more
from .trial import PACKAGE, Question, Rig, compiled, label, rate, times
from .worker import Worker

WATCHED = ("kernels/*/*.py", "planning/*.py")
POLL_SECONDS = 0.1
ROUNDS, BATCH_MS = 5, 30
LAST_RUNS = "dev.json"  # in the cache folder


def add_arguments(parser) -> None:
    add_problem(parser)
    parser.add_argument("--decode", action="store_true", help="the decode kernel, without a window")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="changes",
        help="replace a field of the config, such as tile_n=160 or use_pingpong=0; may be repeated",
    )
    parser.add_argument("--once", action="store_true", help="one round, no watching")


def add_problem(parser) -> None:
    """The options that say which problem, which `tune` has too."""
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, default=128)
    add_dtypes(parser)
    mask = parser.add_mutually_exclusive_group()
    for name in ("full", "causal", "local"):
        mask.add_argument(f"--{name}", action="store_const", const=name, dest="mask")
    parser.add_argument("--seqlen", type=one_or_more(count), default=[], metavar="S,..", help="lengths to time")
    parser.set_defaults(mask="full")


def run(args) -> int:
    changes = tuple((name, value) for name, _, value in (text.partition("=") for text in args.changes))
    question = Question(args.dtype, args.head_dim, args.mask, args.decode, changes, tuple(args.seqlen), args.out_dtype)
    try:
        if args.decode and args.mask == "local":
            raise ValueError("--decode times a query that sees every key, without --local")
        question.config()
    except ValueError as error:
        return cannot_run(error)
    problem = hopper_device_problem()
    if problem:
        print(f"compile, registers and spills only, nothing checked or timed: {problem}")
    return Loop(question, not problem).run(args.once)


class Loop:
    """Rounds and what is between them."""

    def __init__(self, question: Question, has_gpu: bool):
        self.question, self.has_gpu = question, has_gpu
        self.workers: list[Worker] = []
        self.seen = modification_times()

    def run(self, is_once: bool) -> int:
        """Rounds until Ctrl-C, or a single one. Returns the exit status."""
        since, event = time.time(), "start"
        try:
            self.prepare()
            while True:
                is_good = self.round()
                print(f"{time.time() - since:.1f} s from {event} to here", flush=True)
                if is_once:
                    return 0 if is_good else 1
                self.prepare()
                print("watching; Ctrl-C ends", flush=True)
                since, event = self.wait(), "save"
        except KeyboardInterrupt:  # how a watch ends
            if is_once:
                raise
            print()
            return 0
        finally:
            self.stop()

    def prepare(self) -> None:
        """Starts the processes of the next round: the compiler's report in one, while the other checks and times."""
        self.stop()
        tasks = (report_task, measure_task) if self.has_gpu else (report_task,)
        self.workers = [Worker(task, self.question, is_fresh=True) for task in tasks]

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()

    def wait(self) -> float:
        """Waits until watched files change and have been left alone for a moment; when the last was saved."""
        while True:
            time.sleep(POLL_SECONDS)
            now = modification_times()
            if now == self.seen:
                continue
            time.sleep(POLL_SECONDS)
            if now == modification_times():
                break
        changed = [path for path in now if now[path] != self.seen.get(path)]
        gone = [path for path in self.seen if path not in now]
        print(f"\n{time.strftime('%H:%M:%S')} {', '.join(path.name for path in changed + gone)}", flush=True)
        self.seen = now
        return max((now[path] for path in changed), default=time.time_ns()) / 1e9

    def round(self) -> bool:
        """One round; whether all is well."""
        for worker in self.workers:
            worker.send()
        report, *others = self.workers
        found = report.result()
        is_good = print_report(found)
        if "error" not in found and others:
            is_good &= print_measured(others[0].result())
        return is_good


def modification_times() -> dict[Path, int]:
    """Of every watched file, in nanoseconds."""
    found = {}
    for path in (path for pattern in WATCHED for path in PACKAGE.glob(pattern)):
        try:
            found[path] = path.stat().st_mtime_ns
        except FileNotFoundError:  # an editor is replacing it
            continue
    return found


# ---- what is printed -------------------------------------------------------------------------------------------------


def print_report(found: dict) -> bool:
    """What the compiler made of the config; whether it may ship."""
    if "error" in found:
        print(found["error"], flush=True)
        return False
    state = "; ".join(found["problems"]) or "no spills"
    print(
        f"{found['name']}, {found['label']}: {found['registers']} registers, {found['smem_bytes']} bytes of shared "
        f"memory, {state}",
        flush=True,
    )
    return not found["problems"]


def print_measured(found: dict) -> bool:
    """Error and times, each beside the last; whether the result is right. Keeps them as the last run."""
    if "error" in found:
        print(found["error"])
        return False
    is_right = found["worst_row"] < found["wrong"]
    print(
        f"{'right' if is_right else 'WRONG'}: relative error {found['worst_row']:.1e} in the worst row of "
        f"{found['checked']}, at most {found['wrong']:.0e}"
    )
    last = last_runs()
    for row in found["rows"]:
        before = last.get(key := f"{found['gpu']}: {row['name']}")
        print(f"{row['name']}: {row['rate']}{change(row, before)}")
        if is_right:
            last[key] = {"ms": row["ms"], "label": found["label"]}
    keep_last_runs(last)
    return is_right


def change(row: dict, before: dict | None) -> str:
    """The change of the speed against the last run, in words."""
    return f", {before['ms'] / row['ms'] - 1:+.1%} against the last run ({before['label']})" if before else ""


def last_runs() -> dict:
    """What is known of earlier runs; nothing, if there is no such file or it makes no sense."""
    folder = cache_dir()
    try:
        return json.loads((folder / LAST_RUNS).read_text()) if folder else {}
    except (OSError, TypeError, ValueError):
        return {}


def keep_last_runs(runs: dict) -> None:
    """For the next run; where there is nowhere to write, it will know of none."""
    try:
        if folder := cache_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / LAST_RUNS).write_text(json.dumps(runs, indent=1))
    except OSError as error:
        print(f"not kept for the next run: {error}")


# ---- the processes of a round ----------------------------------------------------------------------------------------


def report_task(question: Question):
    """Prepares what the compiler says of the config."""
    import cutlass.cute  # noqa: F401  (half a second)

    def work() -> dict:
        cfg = question.config()
        return compiled(cfg) | {"label": label(cfg)}

    return work


def measure_task(question: Question):
    """Prepares check and times of the config: the inputs are on the device, what is right is known."""
    import cutlass.cute  # noqa: F401

    rig = Rig(question)

    def work() -> dict:
        cfg = question.config()
        found = {
            "gpu": rig.gpu,
            "label": label(cfg),
            "worst_row": rig.error(cfg),
            "wrong": rig.wrong,
            "checked": rig.small.name,
            "rows": [],
        }
        for case in rig.cases:
            batches = rig.stopwatch.rounds({"ours": rig.work(cfg, case)}, ROUNDS, BATCH_MS)["ours"]
            row = times(case, batches)
            found["rows"].append(row | {"rate": rate(case, row["ms"])})
        return found

    return work
