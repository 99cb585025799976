"""Times attention on this machine's Hopper GPU with CUDA events, beside other libraries if asked to.

Every implementation reads the same standard-normal inputs and is checked before it is timed. Rounds are interleaved and
each batch of launches lasts long enough for the clock to settle; numbers are medians over rounds, ratios to a peer the
median of each round's ratio (above 1: the peer is slower). Where a call is so short that launching it one by one would
show, every implementation is replayed from a CUDA graph. TFLOP/s counts nominal FLOPs, half of them under a causal
mask, and with a window those of the keys that a query sees. "peak" is the share of the WGMMA peak, 4096 FLOP per clock
and SM (FP8: 8192), at the SM clock that NVML reports during the batches. "host us" is the host's time for one forward()
call on an int stream handle. A number marked with * is the host's, not the GPU's: launching took as long as running, or
short calls could not be captured.

FP8, the suite fp8 or --dtype fp8_e4m3, has Q, K and V in E4M3 without descales, O in BF16. "ours bf16" is then our own
BF16 kernel on a problem of the same sizes, in the same rounds.

The suite fp8cache has 16-bit queries over K and V in E4M3; "ours bf16" is our own kernel over K and V in BF16, "ours
fp8" the one with Q in E4M3 too, in the same rounds; the latter not of steps that, as in the suite append, rotate what
they append, and quantise it. It has no other libraries.

Decode is always replayed, twice per problem. warm: every call reads the same K and V, which the L2 cache may hold.
cold: calls take turns on sets of K and V that are together larger than 300 MB; a larger problem is its own set, and its
two rows are the same work. GB/s counts K and V once, Q and O. "copy" is that rate over the one, bytes read plus bytes
written, at which the driver copies 1 GiB on the device, in the same rounds.

The suite serving is replayed too, and reads the same K and V in every call. Beside packed queries over pages stand our
own calls over contiguous K and V, where one call can do the same. The peer vllm is called as vLLM's engine does, with
the scheduler's metadata made ahead; where replays of that are wrong, without, and a line says so.

The suite scores times what changes scores beside the same problem without: the rows of one problem, and the peer's, are
timed in the same rounds. "of first" is a row's time over that of the first row of its problem, the median of each
round's ratio.

The suite append is decode steps that write their new key and value to the cache and rotate them and Q, beside the same
steps without, whose keys are all there; the suite dims head dims of V and of kernels whose tiles have more columns. "of
first" is as before.

The suite backward times dQ, dK and dV, given O and its LSE, which forward() has made before; its TFLOP/s are 2.5 times
the forward's, those of forward and backward together 3.5 times. "deterministic" is the pass with the same bits in every
call, in the same rounds as without. The peers are fa4 and cudnn; they read our O and LSE.

The suite host has no other libraries and no pictures: CPU time of a forward() call, by how shapes change from call to
call, and the time to a process's first result with and without its kernel on disk.

Exit status 1 if a result is wrong, 2 without a Hopper GPU, where the suite decides an option itself, or if there are no
kernels for what is asked.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import groupby

from .. import backward, forward
from ..contract.formats import (
    ELEMENT_BYTES,
    FP8,
    FP8_CACHE_HEAD_DIMS,
    FP8_SERVED_DIMS,
    LARGE_DIM,
    HEAD_DIMS,
    SERVED_DIMS,
)
from ..arrays.memory import hopper_device_problem, open_device
from . import environment
from . import host
from . import peers
from . import plot
from .case import Case, Tensors
from .gradients import GradientTensors
from .latent import LatentCase, LatentTensors
from .measure import Stopwatch, Work, in_turn
from .passes import BOTH, FORWARD
from .options import cannot_run, count, milliseconds, new_file, one_or_more
from .results import bandwidths, medians, ratio
from .shown import ARITHMETIC, OURS, OURS_8, OURS_16, Shown
from .suites import append
from .suites import backward as gradients
from .suites import decode
from .suites import dims
from .suites import fp8
from .suites import fp8cache
from .suites import mla
from .suites import prefill
from .suites import scores
from .suites import serving
from .suites import varlen
from .suites import window
from .table import Table

SUITES = {
    "prefill": prefill,
    "varlen": varlen,
    "window": window,
    "decode": decode,
    "fp8": fp8,
    "fp8cache": fp8cache,
    "serving": serving,
    "mla": mla,
    "scores": scores,
    "append": append,
    "dims": dims,
    "backward": gradients,
}
HOST = "host"  # a suite of its own kind: host.py
COPY = "copy"
CASE_WIDTH = 38  # at least
# Relative error (norm) of a right answer on normal inputs, by the bytes of an operand's element. BF16 rounding of P and
# of O leaves about 2e-3. E4M3 has 4 significant bits: rounding P to it leaves 2.6e-2, in a peer's O too, which may
# itself be E4M3.
WRONG = {1: 6e-2, 2: 1e-2}


def add_arguments(parser) -> None:
    parser.add_argument(
        "--suite", choices=[*SUITES, HOST], default="prefill", help=f"{HOST}: what a call and a start cost the host"
    )
    parser.add_argument("--head-dim", type=one_or_more(int, HEAD_DIMS), metavar="D,..", help="default: the suite's")
    parser.add_argument("--seqlen", type=one_or_more(count), metavar="S,..", help="default: the suite's")
    parser.add_argument("--dtype", choices=ELEMENT_BYTES, help="default bf16, which every peer has; fp8 has its own")
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument("--causal", action="store_const", const=[True], dest="masks", help="only causal cases")
    mask.add_argument("--full", action="store_const", const=[False], dest="masks", help="only cases without a mask")
    parser.add_argument("--batch-size", type=count, metavar="B", help="default: the suite's, like the heads")
    parser.add_argument("--num-heads", type=count, metavar="H")
    parser.add_argument("--num-heads-k", type=count, metavar="H", help="default: as many as query heads")
    parser.add_argument(
        "--peers",
        type=one_or_more(str, peers.PEERS),
        default=[],
        metavar="P,..",
        help=f"of {', '.join(peers.PEERS)}; those that are not installed are left out",
    )
    parser.add_argument("--rounds", type=count, default=7, metavar="N")
    parser.add_argument("--batch-ms", type=milliseconds, default=40, metavar="MS", help="length of one timed batch")
    parser.add_argument(
        "--settle-ms",
        type=milliseconds,
        default=0.0,
        metavar="MS",
        help="how long the same work runs before each timed batch; default: not at all",
    )
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="also write environment, rows and conclusions to FILE"
    )
    parser.add_argument(
        "--plot", type=new_file, metavar="PNG", help="also draw bars and the roofline into PNG; needs matplotlib"
    )


def run(args) -> int:
    if args.suite == HOST:
        return host.run(args)
    suite = SUITES[args.suite]
    if args.plot and (missing := plot.problem(args.plot)):
        return cannot_run(missing)
    if fixed := [name for name in suite.FIXED if getattr(args, name) is not None]:
        return cannot_run(f"the {args.suite} suite has its own {', '.join(fixed)}")
    cases = suite.cases(args)
    if unserved := [case.name for case in cases if case.head_dim not in served(case)]:
        return cannot_run(f"there are no kernels for {unserved[0]}")
    if uneven := [case.name for case in cases if case.num_heads % case.num_heads_k]:
        return cannot_run(f"{uneven[0]}: the query heads must be a multiple of the KV heads")
    if problem := hopper_device_problem():
        return cannot_run(f"bench needs a Hopper GPU: {problem}")
    bench = Bench(args, open_device(), cases)
    compared = bench.environment["peers"]
    print(environment.sentence(bench.environment))
    table = Table(columns(compared, suite.SHOWN, max(len(case.name) for case in cases)))
    results = {"environment": bench.environment, "rows": [], "conclusions": []}
    times = {}
    for _, together in groupby(cases, lambda case: case.group or case):
        for case, row in bench.rows(list(together)).items():
            times[case] = row["results"][OURS]["ms"]
            table.print_row(cells(row, compared, suite.SHOWN))
            results["rows"].append(row)
        write(results, args.json)  # a run that is cut short leaves what it has
    results["conclusions"] = suite.conclusions(times, results["rows"])
    write(results, args.json)
    if args.plot:
        plot.write_plot([results], SUITES, args.plot)
    rows = results["rows"]
    wrong = [
        f"{row['name']}: {name} is off by {error:.1e}"
        for row in rows
        for name, error in row["errors"].items()
        if not error < limit(row["case"]["dtype"], name)
    ]
    notes = dict.fromkeys(note for row in rows for note in row["notes"])
    print("\n".join(["", *results["conclusions"], *notes, *wrong]).rstrip())
    return 1 if wrong else 0


def write(results: dict, path: str | None) -> None:
    """Leaves the results in a JSON file, if there is to be one."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


def served(case: Case) -> Collection[int]:
    """The head dims that there are kernels for."""
    if isinstance(case, LatentCase):
        return () if case.dtype == FP8 else (case.head_dim,)
    if case.head_dim == LARGE_DIM:
        return () if case.dtype == FP8 or case.passes != FORWARD else (LARGE_DIM,)
    if case.kv_dtype:
        return () if case.dtype == FP8 else FP8_CACHE_HEAD_DIMS
    if case.passes == FORWARD:
        return FP8_SERVED_DIMS if case.dtype == FP8 else SERVED_DIMS
    return () if case.dtype == FP8 else SERVED_DIMS


def limit(dtype: str, name: str) -> float:
    """The error of one implementation's result from which on it is wrong."""
    return WRONG[ELEMENT_BYTES[{OURS_16: "bf16", OURS_8: FP8}.get(name, dtype)]]


def own(case: Case) -> dict[str, Case]:
    """What our own implementations do of a case: OURS the case, and beside FP8 OURS_16 the same sizes in BF16; beside
    16-bit queries over an FP8 cache OURS_8 besides, with FP8 queries, which are not rotated."""
    if case.kv_dtype:
        others = {OURS_16: "bf16"} | ({} if case.scores.rotary else {OURS_8: FP8})
        return {OURS: case} | {name: replace(case, dtype=dtype, kv_dtype=None) for name, dtype in others.items()}
    return {OURS: case} | ({OURS_16: replace(case, dtype="bf16")} if case.dtype == FP8 else {})


class Bench:
    """One run: a device, a stream, the tensors of our own implementations (the peers read those of OURS), the peers
    that are here."""

    def __init__(self, args, device, cases: list[Case]):
        self.args = args
        self.num_sms = device.properties.multiprocessor_count
        self.stream = device.create_stream()
        self.handle = int(self.stream.handle)
        self.stopwatch = Stopwatch(device, self.stream)
        kind = GradientTensors if cases[0].passes else LatentTensors if isinstance(cases[0], LatentCase) else Tensors
        owned = [own(case) for case in cases]
        names = dict.fromkeys(name for each in owned for name in each)
        self.tensors = {name: kind([each[name] for each in owned if name in each], self.stream) for name in names}
        self.peers = self.find_peers(args.peers)
        self.environment = environment.describe(device, self.stopwatch.monitor, self.peers, args)
        others = {name: "" for name in self.tensors if name != OURS}
        self.environment["peers"] = others | self.environment["peers"]

    def find_peers(self, names: list[str]) -> dict[str, peers.Peer]:
        """Loads the peers asked for; says in one line each which are not here."""
        found = {}
        for name in names:
            try:
                found[name] = peers.load(name)
            except peers.PeerMissing as missing:
                print(missing)
        if found:
            peers.use_stream(self.handle)
        return found

    def rows(self, cases: list[Case]) -> dict[Case, dict]:
        """Checks cases, and times them in the same rounds."""
        checked = {case: self.checked(case) for case in cases}
        # By case and implementation, and the problem that this implementation solves.
        problems = {
            (case, name): own(case).get(name, case) for case, (launches, *_) in checked.items() for name in launches
        }
        works = {key: Work(checked[key[0]][0][key[1]]) for key in problems}
        is_short = any(case.l2 for case in cases) or any(self.stopwatch.is_short(work) for work in works.values())
        if is_short:
            works = {
                (case, name): self.captured(name, work, problems[case, name].calls_per_graph, checked[case][2])
                for (case, name), work in works.items()
            }
        copy = {COPY: Work(self.tensors[OURS].copy_much)} if cases[0].l2 else {}
        batches = self.stopwatch.rounds(works | copy, self.args.rounds, self.args.batch_ms, self.args.settle_ms)
        results: dict[Case, dict] = {case: {} for case in cases}
        for (case, name), work in works.items():
            result = medians(problems[case, name], batches[case, name], batches[case, OURS], self.num_sms)
            result["replayed"] = work.calls > 1
            result["host_bound"] |= is_short and work.calls == 1
            result |= bandwidths(problems[case, name], batches[case, name], batches[COPY]) if copy else {}
            if case.group and (cases[0], name) in batches:
                result["of_first"] = ratio(batches[case, name], batches[cases[0], name])
            results[case][name] = result
        return {case: self.row(case, checked[case], results[case]) for case in cases}

    def row(self, case: Case, checked: tuple[dict, dict, list[str]], results: dict) -> dict:
        """A row of the results."""
        _, errors, notes = checked
        return {
            "name": case.name,
            "case": case.as_dict(),
            "errors": errors,
            "notes": notes,
            "host_us": self.host_microseconds(case),
            "results": results,
        }

    def checked(self, case: Case) -> tuple[dict, dict, list[str]]:
        """By implementation a launch, whose calls take turns on the case's sets of K and V, and its relative error on
        the last set; with them the notes on what cannot do the case."""
        launches, errors, notes = {}, {}, []
        for name, our_case in own(case).items():
            launches[name], errors[name] = self.ours(self.tensors[name], our_case)
        every_pointers = [self.tensors[OURS].pointers(case, kv_set) for kv_set in range(case.kv_sets)]
        for name, peer in ({} if case.kv_dtype else self.peers).items():  # which have one type for all
            try:
                theirs = [peer.launch(case, pointers) for pointers in every_pointers]
                notes += filter(None, [getattr(theirs[-1], "note", "")])
                errors[name] = peer.error(case, every_pointers[-1], theirs[-1])
                launches[name] = in_turn(theirs)
            except peers.PeerMissing as missing:
                notes.append(str(missing))
        return launches, errors, notes

    def ours(self, tensors: Tensors, case: Case) -> tuple[Callable, float]:
        """The same of ours."""
        calls = [self.call(tensors, case, kv_set) for kv_set in range(case.kv_sets)]
        tensors.poison_out()
        if isinstance(tensors, GradientTensors):
            forward(tensors.forward_params(case), self.handle).check()
        calls[-1]().check()
        launch = in_turn([lambda call=call: call().check() for call in calls])
        return launch, tensors.error_of(case, case.kv_sets - 1)

    def call(self, tensors: Tensors, case: Case, kv_set: int = 0) -> Callable:
        """What is timed of a case, as a call without arguments that returns its status."""
        handle = self.handle
        if not isinstance(tensors, GradientTensors):
            params = tensors.params(case, kv_set)
            return lambda: forward(params, handle)
        of_gradients, ahead = tensors.params(case, kv_set), tensors.forward_params(case)
        if case.passes == BOTH:
            return lambda: forward(ahead, handle) or backward(of_gradients, handle)
        return lambda: backward(of_gradients, handle)

    def captured(self, name: str, work: Work, calls: int, notes: list[str]) -> Work:
        """So many calls of the work as a CUDA graph; the work as it is, with a note, if it cannot be captured."""
        try:
            return (self.stopwatch.capture if name in self.tensors else peers.capture)(work.launch, calls)
        except Exception as error:  # torch, the driver and each library have their own kinds
            notes.append(f"{name} cannot be captured into a CUDA graph: {peers.first_line(error)}")
            return work

    def host_microseconds(self, case: Case) -> float:
        """Host time of one forward() call. A long problem is shortened until the GPU keeps up; decode is not, since
        how its keys are split is part of the call, nor is a batch over pages, which may be two launches."""
        measured = case if case.is_decode or case.page_size else case.shortened(128)
        return self.stopwatch.host_microseconds(self.call(self.tensors[OURS], measured))


def columns(names, shown: Shown = ARITHMETIC, longest: int = 0) -> list[tuple[str, int]]:
    """Those of the printed table; `longest` is how long the names of its cases get."""
    return [
        ("case", max(CASE_WIDTH, longest)),
        *((heading, width) for heading, width, _ in shown.printed),
        ("host us", 7),
        ("error", 7),
        *(column for name in names for column in ((name, shown.peer[1]), (f"vs {name}", 6))),
    ]


def cells(row: dict, names, shown: Shown = ARITHMETIC) -> list[str]:
    numbers = [text(row["results"][OURS]) for _, _, text in shown.printed]
    numbers += [f"{row['host_us']:.1f}", f"{row['errors'][OURS]:.1e}"]
    for name in names:
        theirs = row["results"].get(name)
        numbers += [shown.peer[2](theirs), f"{theirs['ratio']:.3f}"] if theirs else ["-", "-"]
    return [row["name"], *numbers]
