"""Times the forward on this machine's Hopper GPU with CUDA events, beside other libraries if asked to.

Every implementation reads the same standard-normal inputs and is checked before it is timed. Rounds are interleaved and
each batch of launches lasts long enough for the clock to settle; numbers are medians over rounds, ratios to a peer the
median of each round's ratio (above 1: the peer is slower). Where a call is so short that launching it one by one would
show, every implementation is replayed from a CUDA graph. TFLOP/s counts nominal FLOPs, half of them under a causal
mask, and with a window those of the keys that a query sees. "peak" is the share of the WGMMA peak, 4096 FLOP per clock
and SM, at the SM clock that NVML reports during the batches. "host us" is the host's time for one forward() call on an
int stream handle. A number marked with * is the host's, not the GPU's: launching took as long as running, or short
calls could not be captured.

Decode is always replayed, twice per problem. warm: every call reads the same K and V, which the L2 cache may hold.
cold: calls take turns on sets of K and V that are together larger than 300 MB; a larger problem is its own set, and its
two rows are the same work. GB/s counts K and V once, Q and O. "copy" is that rate over the one, bytes read plus bytes
written, at which the driver copies 1 GiB on the device, in the same rounds.

Exit status 1 if a result is wrong, 2 without a Hopper GPU or where the suite decides an option itself.
"""
import json
from statistics import median

from .. import forward
from ..config import ELEMENT_BYTES, HEAD_DIMS
from ..device import hopper_device_problem, open_device
from . import environment, peers, plot
from .case import COPIED_BYTES, Case, Tensors
from .measure import Batch, Stopwatch, Work, in_turn
from .shown import ARITHMETIC, OURS, Shown
from .suites import decode, prefill, varlen, window
from .table import Table, one_or_more

SUITES = {"prefill": prefill, "varlen": varlen, "window": window, "decode": decode}
COPY = "copy"
FLOPS_PER_CLOCK_AND_SM = 4096       # dense WGMMA with 16-bit operands
# Relative error (norm) of a right answer: BF16 rounding of P and of O leaves about 2e-3 on normal inputs.
WRONG = 1e-2


def add_arguments(parser) -> None:
    parser.add_argument("--suite", choices=SUITES, default="prefill")
    parser.add_argument("--head-dim", type=one_or_more(int, HEAD_DIMS), metavar="D,..", help="default: the suite's")
    parser.add_argument("--seqlen", type=one_or_more(int), metavar="S,..", help="default: the suite's")
    parser.add_argument("--dtype", choices=ELEMENT_BYTES, default="bf16", help="default bf16, which every peer has")
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument("--causal", action="store_const", const=[True], dest="masks", help="only causal cases")
    mask.add_argument("--full", action="store_const", const=[False], dest="masks", help="only cases without a mask")
    parser.add_argument("--batch-size", type=int, metavar="B", help="default: the suite's, like the heads")
    parser.add_argument("--num-heads", type=int, metavar="H")
    parser.add_argument("--num-heads-k", type=int, metavar="H", help="default: as many as query heads")
    parser.add_argument("--peers", type=one_or_more(str, peers.PEERS), default=[], metavar="P,..",
                        help=f"of {', '.join(peers.PEERS)}; those that are not installed are left out")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--batch-ms", type=float, default=40, metavar="MS", help="length of one timed batch")
    parser.add_argument("--json", metavar="FILE", help="also write environment, rows and conclusions to FILE")
    parser.add_argument("--plot", metavar="PNG", help="also draw bars and the roofline into PNG; needs matplotlib")


def run(args) -> int:
    suite = SUITES[args.suite]
    if args.plot and (missing := plot.problem()):
        print(missing)
        return 2
    problem = hopper_device_problem()
    fixed = [name for name in suite.FIXED if getattr(args, name) is not None]
    if fixed or problem:
        print(f"the {args.suite} suite has its own {', '.join(fixed)}" if fixed
              else f"bench needs a Hopper GPU: {problem}")
        return 2
    device = open_device()
    cases = suite.cases(args)
    bench = Bench(args, device, cases)
    print(environment.sentence(bench.environment))
    table = Table(columns(bench.peers, suite.SHOWN))
    results = {"environment": bench.environment, "rows": [], "conclusions": []}
    times = {}
    for case in cases:
        row = bench.row(case)
        times[case] = row["results"][OURS]["ms"]
        table.print_row(cells(row, bench.peers, suite.SHOWN))
        results["rows"].append(row)
        write(results, args.json)       # a run that is cut short leaves what it has
    results["conclusions"] = suite.conclusions(times, results["rows"])
    write(results, args.json)
    if args.plot:
        plot.write_plot([results], SUITES, args.plot)
    rows = results["rows"]
    wrong = [f"{row['name']}: {name} is off by {error:.1e}"
             for row in rows for name, error in row["errors"].items() if not error < WRONG]
    notes = dict.fromkeys(note for row in rows for note in row["notes"])
    print("\n".join(["", *results["conclusions"], *notes, *wrong]).rstrip())
    return 1 if wrong else 0


def write(results: dict, path: str | None) -> None:
    """Leaves the results in a JSON file, if there is to be one."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


class Bench:
    """One run: a device, a stream, the tensors, the peers that are here."""

    def __init__(self, args, device, cases: list[Case]):
        self.args = args
        self.num_sms = device.properties.multiprocessor_count
        self.stream = device.create_stream()
        self.handle = int(self.stream.handle)
        self.stopwatch = Stopwatch(device, self.stream)
        self.tensors = Tensors(cases, self.stream)
        self.peers = self.find_peers(args.peers)
        self.environment = environment.describe(device, self.stopwatch.monitor, self.peers, args)

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

    def row(self, case: Case) -> dict:
        """Checks and times one case."""
        launches, errors, notes = self.checked(case)
        works = {name: Work(launch) for name, launch in launches.items()}
        is_short = bool(case.l2) or any(self.stopwatch.is_short(work) for work in works.values())
        if is_short:
            works = {name: self.captured(name, work, case.calls_per_graph, notes) for name, work in works.items()}
        copy = {COPY: Work(self.tensors.copy_much)} if case.l2 else {}
        batches = self.stopwatch.rounds(works | copy, self.args.rounds, self.args.batch_ms)
        results = {name: self.result(case, batches[name], batches[OURS]) for name in works}
        for name, work in works.items():
            results[name]["replayed"] = work.calls > 1
            results[name]["host_bound"] |= is_short and work.calls == 1
            results[name] |= bandwidths(case, batches[name], batches[COPY]) if copy else {}
        return {"name": case.name, "case": case.as_dict(), "errors": errors, "notes": notes,
                "host_us": self.host_microseconds(case), "results": results}

    def checked(self, case: Case) -> tuple[dict, dict, list[str]]:
        """By implementation a launch, whose calls take turns on the case's sets of K and V, and its relative error on
        the last set; with them the notes on what cannot do the case."""
        last = case.kv_sets - 1
        every_params = [self.tensors.params(case, kv_set) for kv_set in range(case.kv_sets)]
        every_pointers = [self.tensors.pointers(case, kv_set) for kv_set in range(case.kv_sets)]
        self.tensors.poison_out()
        forward(every_params[last], self.handle).check()
        launches = {OURS: in_turn([lambda p=params: forward(p, self.handle).check() for params in every_params])}
        errors, notes = {OURS: self.tensors.error_of_last_rows(case, last)}, []
        for name, peer in self.peers.items():
            try:
                theirs = [peer.launch(case, pointers) for pointers in every_pointers]
                errors[name] = peer.error(case, every_pointers[last], theirs[last])
                launches[name] = in_turn(theirs)
            except peers.PeerMissing as missing:
                notes.append(str(missing))
        return launches, errors, notes

    def captured(self, name: str, work: Work, calls: int, notes: list[str]) -> Work:
        """So many calls of the work as a CUDA graph; the work as it is, with a note, if it cannot be captured."""
        try:
            return (self.stopwatch.capture if name == OURS else peers.capture)(work.launch, calls)
        except Exception as error:      # torch, the driver and each library have their own kinds
            notes.append(f"{name} cannot be captured into a CUDA graph: {peers.first_line(error)}")
            return work

    def host_microseconds(self, case: Case) -> float:
        """Host time of one forward() call. A long problem is shortened until the GPU keeps up; decode is not, since
        how its keys are split is part of the call."""
        params = self.tensors.params(case if case.is_decode else case.shortened(128))
        return self.stopwatch.host_microseconds(lambda: forward(params, self.handle))

    def result(self, case: Case, batches: list[Batch], ours: list[Batch]) -> dict:
        """Medians over the rounds of one implementation, and its time over ours, round by round."""
        milliseconds = median(batch.milliseconds for batch in batches)
        tflops = case.flops / milliseconds / 1e9
        clock, power = (middle(getattr(batch, name) for batch in batches) for name in ("clock_mhz", "power_watts"))
        ratios = [theirs.milliseconds / our.milliseconds for theirs, our in zip(batches, ours, strict=True)]
        return {"ms": milliseconds, "tflops": tflops,
                "peak": clock and tflops * 1e6 / (self.num_sms * FLOPS_PER_CLOCK_AND_SM * clock),
                "clock_mhz": clock, "power_watts": power, "ratio": median(ratios),
                "host_bound": sum(batch.is_host_bound for batch in batches) > len(batches) / 2,
                "rounds_ms": [batch.milliseconds for batch in batches]}


def bandwidths(case: Case, batches: list[Batch], copies: list[Batch]) -> dict:
    """GB/s of one implementation and of the copy, medians over the rounds, and the first over the second, per round."""
    def rates(nbytes: int, timed: list[Batch]) -> list[float]:
        return [nbytes / batch.milliseconds / 1e6 for batch in timed]

    own, copy = rates(case.nbytes, batches), rates(2 * COPIED_BYTES, copies)
    return {"gbs": median(own), "copy_gbs": median(copy),
            "of_copy": median(mine / theirs for mine, theirs in zip(own, copy, strict=True))}


def middle(values) -> float | None:
    """The median of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def columns(names, shown: Shown = ARITHMETIC) -> list[tuple[str, int]]:
    return [("case", 38), *((heading, width) for heading, width, _ in shown.printed), ("host us", 7), ("error", 7),
            *(column for name in names for column in ((name, shown.peer[1]), (f"vs {name}", 6)))]


def cells(row: dict, names, shown: Shown = ARITHMETIC) -> list[str]:
    numbers = [text(row["results"][OURS]) for _, _, text in shown.printed]
    numbers += [f"{row['host_us']:.1f}", f"{row['errors'][OURS]:.1e}"]
    for name in names:
        theirs = row["results"].get(name)
        numbers += [shown.peer[2](theirs), f"{theirs['ratio']:.3f}"] if theirs else ["-", "-"]
    return [row["name"], *numbers]
