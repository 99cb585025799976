"""Times of the schemes between GPUs, beside one GPU alone and beside their exchange alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from statistics import median

from cuda.core import EventOptions


from .plan import Problem, whole_call
from .schemes import AllGather, Gradients, Ring, Share, Ulysses

MIN_REPEATS, ROUNDS, ROUND_MS = 3, 3, 60.0  # a round is so many runs, and takes so long, at least
BACKWARD_FLOPS = 2.5  # times the forward pass's
HEADER = f"{'':36} {'margin':>6} {'ms':>9} {'exchange':>9} {'TFLOP/s a GPU':>14} {'of one GPU':>11}"


@dataclass
class Bench:
    """Of one rank; all ranks make the same calls. `say` prints on rank 0 alone, times are the slowest rank's."""

    comm: object
    engine: object
    meeting: object
    margins: tuple[int, ...]
    say: Callable[[str], None]

    def run(self, base: Problem, totals: list[int], dtypes: list[str], is_backward: bool) -> None:
        for dtype in dtypes:
            for total in totals:
                problem = self.engine.problem = replace(base, seqlens=(total,), dtype=dtype)
                self.say(
                    f"\n{dtype}, causal, {total} tokens, {problem.num_heads}:{problem.num_heads_k} heads of "
                    f"{problem.head_dim}, {self.comm.size} ranks\n{HEADER}"
                )
                self.forward(problem)
                if is_backward and dtype != "fp8_e4m3":
                    self.backward(problem)

    def forward(self, problem: Problem) -> None:
        flops = problem.flops()
        alone = self.alone(problem)
        self.line("one GPU, all rows", flops, alone)
        shares = self.shares(problem, problem.rows)
        scheme = AllGather(self.comm, self.engine, problem)
        scheme.forward(shares)
        per_rank = flops / self.comm.size
        self.line("one GPU, a rank's rows, no exchange", per_rank, self.time(partial(scheme.attend, shares)), alone)
        for name, make in self.schemes(problem).items():
            scheme = make()
            exchange = self.time(partial(scheme.exchange, shares))
            for margin in self.margins if name != "ulysses" and name != "all-gather, 1 group" else (0,):
                self.engine.sm_margin = margin
                found = self.time(partial(scheme.forward, shares))
                self.line(name, per_rank, found, alone, exchange, margin)
            self.engine.sm_margin = 0

    def schemes(self, problem: Problem) -> dict[str, Callable]:
        arguments = self.comm, self.engine, problem
        found = {
            f"all-gather, {groups} group{'s' * (groups > 1)}": lambda groups=groups: AllGather(*arguments, groups)
            for groups in (1, 2, 4, 8)
            if problem.num_heads_k % groups == 0
        }
        found["ring"] = lambda: Ring(*arguments)
        if problem.num_heads_k % self.comm.size == 0:
            found["ulysses"] = lambda: Ulysses(*arguments)
        return found

    def alone(self, problem: Problem) -> float:
        """Milliseconds of all rows on one GPU, every rank for itself."""
        whole, call = self.shares(problem, problem.total)[self.comm.ranks[0]], whole_call(problem)
        return self.time(partial(self.engine.attend, call, whole.q, whole.k, whole.v, whole.out, None))

    def backward(self, problem: Problem) -> None:
        engine, flops, (rank,) = self.engine, BACKWARD_FLOPS * problem.flops(), self.comm.ranks
        whole, call = self.shares(problem, problem.total)[rank], whole_call(problem)
        lse = engine.empty_lse(problem.num_heads, call)
        found = gradients_of(engine, whole)
        engine.attend(call, whole.q, whole.k, whole.v, whole.out, lse)
        alone = self.time(partial(engine.differentiate, call, whole, lse, found))
        self.line("backward: one GPU, all rows", flops, alone)
        del whole, found
        shares = self.shares(problem, problem.rows)
        scheme = AllGather(self.comm, engine, problem, is_training=True)
        scheme.forward(shares)
        gradients = {rank: gradients_of(engine, shares[rank])}
        exchange = self.time(lambda: scheme.scatter(gradients))
        taken = self.time(lambda: scheme.backward(shares, gradients))
        self.line("backward: all-gather", flops / self.comm.size, taken, alone, exchange)

    def shares(self, problem: Problem, rows: int) -> dict[int, Share]:
        heads = (problem.num_heads, problem.num_heads_k, problem.num_heads_k)
        q, k, v = (self.engine.random((count, rows, problem.head_dim)) for count in heads)
        return {self.comm.ranks[0]: Share(q, k, v, self.engine.empty(q.shape, "output"))}

    def time(self, run: Callable) -> float:
        """Milliseconds of one run on the slowest rank, the median of a few rounds."""
        stream = self.engine.compute
        start, stop = (self.engine.device.create_event(EventOptions(timing_enabled=True)) for _ in range(2))

        def round_of(repeats: int) -> float:
            self.meeting.tell()
            run()  # what ranks are apart in time ends with its exchange
            stream.record(start)
            for _ in range(repeats):
                run()
            stream.record(stop)
            stop.sync()
            return (stop - start) / repeats

        run()
        repeats = max(MIN_REPEATS, ceil(ROUND_MS / max(self.meeting.tell(round_of(MIN_REPEATS)))))
        return max(self.meeting.tell(median(round_of(repeats) for _ in range(ROUNDS))))

    def line(self, name: str, flops: float, milliseconds: float, alone=None, exchange=None, margin=0) -> None:
        """flops: of one GPU; alone: milliseconds of all rows on one GPU."""
        share = f"{alone / self.comm.size / milliseconds:10.1%}" if alone else ""
        moved = f"{exchange:9.3f}" if exchange else ""
        rate = flops / milliseconds / 1e9
        self.say(f"{name:36} {margin:6} {milliseconds:9.3f} {moved:>9} {rate:14.0f} {share:>11}")


def gradients_of(engine, share: Share) -> Gradients:
    return Gradients(
        engine.random(share.q.shape), *(engine.empty(x.shape, "input") for x in (share.q, share.k, share.v))
    )
