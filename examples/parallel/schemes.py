"""Three ways to attend over sequences that several ranks hold: all-gather, ring, Ulysses. See docs/context-parallel.md.

`engine` computes (host.py: NumPy, gpu.py: the kernels), `comm` exchanges. Memory is made once, by the constructors.
Compute and exchange are two streams: `exchange_waits` lets the second wait for what the first has so far, `arrival` is
a mark behind the last exchange, `wait` lets compute wait for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .comm import Comm, all_gather, all_to_all, reduce_scatter, send_recv
from .plan import Call, Problem, gathered_calls, ring_call, whole_call


@dataclass
class Share:
    """What a rank holds of a layer: q, out [num_heads, rows, head_dim], k, v [num_heads_k, rows, head_dim]."""

    q: Any
    k: Any
    v: Any
    out: Any


@dataclass
class Gradients:
    """Of a rank's share; dout is given."""

    dout: Any
    dq: Any
    dk: Any
    dv: Any


@dataclass
class _Group:
    """Some KV heads and their query heads: the first one of each, and how many; a rank's calls, LSEs by call."""

    first_q: int
    heads_q: int
    first_k: int
    heads_k: int
    lses: dict[int, list] = field(default_factory=dict)


class AllGather:
    """Every rank gathers K and V, and attends its own queries over them in one call.

    groups        of KV heads, gathered one after the other: while the keys of one come, those before are attended
    is_training   `backward` comes after: makes memory for it
    """

    def __init__(self, comm: Comm, engine, problem: Problem, groups: int = 1, is_training: bool = False):
        if problem.num_heads_k % groups:
            raise ValueError(f"groups={groups}: must divide num_heads_k={problem.num_heads_k}")
        if is_training and groups > 1:
            raise ValueError(f"groups={groups}: must be 1 in training")
        self.comm, self.engine, self.problem = comm, engine, problem
        self.calls = {rank: gathered_calls(problem, rank) for rank in comm.ranks}
        shape = problem.num_heads_k, problem.total, problem.head_dim
        self.k, self.v = (_of_ranks(comm.ranks, engine.empty, shape, "input") for _ in "kv")
        per_q, per_k = problem.num_heads // groups, problem.num_heads_k // groups
        self.groups = [_Group(number * per_q, per_q, number * per_k, per_k) for number in range(groups)]
        if is_training:
            self._make_gradients()

    def forward(self, shares: dict[int, Share]) -> None:
        self.engine.exchange_waits()
        arrivals = [self._gather(group, shares) for group in self.groups]
        for group, arrival in zip(self.groups, arrivals, strict=True):
            self.engine.wait(arrival)
            self._attend(group, shares)

    def exchange(self, shares: dict[int, Share]) -> None:
        """The exchange alone."""
        self.engine.exchange_waits()
        for group in self.groups:
            self.engine.wait(self._gather(group, shares))

    def attend(self, shares: dict[int, Share]) -> None:
        """Over the keys that were gathered before, without an exchange."""
        for group in self.groups:
            self._attend(group, shares)

    def _gather(self, group: _Group, shares: dict[int, Share]):
        for name, wholes in (("k", self.k), ("v", self.v)):
            parts = {rank: self._keys(group, getattr(share, name)) for rank, share in shares.items()}
            gathered = {rank: self._keys(group, whole) for rank, whole in wholes.items()}
            all_gather(self.comm, self.engine, self.problem, parts, gathered)
        return self.engine.arrival()

    def _attend(self, group: _Group, shares: dict[int, Share]) -> None:
        for rank, share in shares.items():
            q, out = (self.engine.heads(tensor, group.first_q, group.heads_q) for tensor in (share.q, share.out))
            k, v = (self._keys(group, tensors[rank]) for tensors in (self.k, self.v))
            for number, call in enumerate(self.calls[rank]):
                lse = group.lses[rank][number] if group.lses else None
                self.engine.attend(call, q, k, v, out, lse)

    def _keys(self, group: _Group, tensor):
        return self.engine.heads(tensor, group.first_k, group.heads_k)

    def _make_gradients(self) -> None:
        """Memory for `backward`: LSEs, dk and dv of all keys as often as a rank's calls write them, and their mean."""
        (group,), engine, ranks = self.groups, self.engine, self.comm.ranks
        heads, *shape = self.problem.num_heads_k, self.problem.total, self.problem.head_dim
        group.lses = {
            rank: [engine.empty_lse(group.heads_q, call) for call in calls] for rank, calls in self.calls.items()
        }
        self.num_copies = sum(call.key_gradients for call in self.calls[ranks[0]])
        self.copies = {x: _of_ranks(ranks, engine.empty, (self.num_copies * heads, *shape), "input") for x in "kv"}
        self.means = self.copies
        if self.num_copies == 2:
            self.means = {x: _of_ranks(ranks, engine.empty, (heads, *shape), "input") for x in "kv"}

    def backward(self, shares: dict[int, Share], gradients: dict[int, Gradients]) -> None:
        """dq, dk and dv from dout, after `forward`, whose K, V and LSEs are still there.

        A key's gradient is the sum of what the queries of all ranks give it, and on a rank those of both its chunks.
        What merge_attention makes of two results of the same LSE is their mean; the reduction multiplies by 2, exactly.
        """
        (group,) = self.groups
        for rank, share in shares.items():
            for copies in self.copies.values():
                self.engine.clear(copies[rank])  # keys behind a chunk's end get no gradient from it
            number = 0
            for call, lse in zip(self.calls[rank], group.lses[rank], strict=True):
                heads = number * self.problem.num_heads_k, call.key_gradients * self.problem.num_heads_k
                dk, dv = (self.engine.heads(self.copies[x][rank], *heads) for x in "kv")
                number += call.key_gradients
                gradient = gradients[rank]
                found = Gradients(gradient.dout, gradient.dq, dk, dv)
                self.engine.differentiate(call, Share(share.q, self.k[rank], self.v[rank], share.out), lse, found)
            if self.num_copies == 2:
                for x in "kv":
                    self.engine.mean(self.copies[x][rank], self.means[x][rank])
        self.scatter(gradients)

    def scatter(self, gradients: dict[int, Gradients]) -> None:
        """The exchange alone: dk and dv of all keys to the ranks that hold them, where they are added."""
        self.engine.exchange_waits()
        for x in "kv":
            parts = {rank: getattr(gradient, f"d{x}") for rank, gradient in gradients.items()}
            reduce_scatter(self.comm, self.engine, self.problem, self.means[x], parts, factor=self.num_copies)
        self.engine.wait(self.engine.arrival())


class Ring:
    """K and V go round; each rank attends what is there and merges it with what it has. In FP32, rounded at the end."""

    def __init__(self, comm: Comm, engine, problem: Problem):
        if problem.window is not None:
            raise ValueError("window: must be None for a ring, which sends all keys to all ranks; use all-gather")
        self.comm, self.engine, self.problem = comm, engine, problem
        keys = problem.num_heads_k, problem.rows, problem.head_dim
        queries = problem.num_heads, problem.rows, problem.head_dim
        make = partial(_of_ranks, comm.ranks, engine.empty)
        self.k, self.v = ([make(keys, "input"), make(keys, "input")] for _ in "kv")
        self.sums, self.partials = (make(queries, "float32") for _ in range(2))
        self.lses, self.partial_lses = (make(queries[:2], "float32") for _ in range(2))

    def forward(self, shares: dict[int, Share]) -> None:
        steps = self.comm.size
        k, v = ({rank: getattr(share, x) for rank, share in shares.items()} for x in "kv")
        for step in range(steps):
            # For the attention of the step before too: the next keys take the place of its own.
            self.engine.exchange_waits()
            following = self._pass_on(k, v, step) if step + 1 < steps else (k, v)
            arrival = self.engine.arrival()
            for rank, share in shares.items():
                call = ring_call(self.problem, rank, (rank - step) % steps)
                self._attend(rank, call, share.q, k[rank], v[rank], step)
            self.engine.wait(arrival)
            k, v = following
        for rank, share in shares.items():
            self.engine.rounded(self.sums[rank], self.lses[rank], share.out)

    def exchange(self, shares: dict[int, Share]) -> None:
        """The exchange alone."""
        self.engine.exchange_waits()
        k, v = ({rank: getattr(share, x) for rank, share in shares.items()} for x in "kv")
        for step in range(self.comm.size - 1):
            k, v = self._pass_on(k, v, step)
        self.engine.wait(self.engine.arrival())

    def _pass_on(self, k: dict, v: dict, step: int) -> tuple[dict, dict]:
        following = self.k[step % 2], self.v[step % 2]
        for parts, received in zip((k, v), following, strict=True):
            send_recv(self.comm, self.engine, parts, received)
        return following

    def _attend(self, rank: int, call: Call, q, k, v, step: int) -> None:
        if step == 0:
            self.engine.attend(call, q, k, v, self.sums[rank], self.lses[rank])
            return
        if "seqused_q" in call.lengths:
            self.engine.clear_lse(self.partial_lses[rank])  # rows between the chunks saw nothing
        self.engine.attend(call, q, k, v, self.partials[rank], self.partial_lses[rank])
        self.engine.merge(call, self.sums[rank], self.lses[rank], self.partials[rank], self.partial_lses[rank])


class Ulysses:
    """Ranks exchange rows for heads, attend all rows of their share of the heads, and exchange them back."""

    def __init__(self, comm: Comm, engine, problem: Problem, is_training: bool = False):
        if problem.num_heads_k % comm.size:
            raise ValueError(f"num_heads_k={problem.num_heads_k}: must be a multiple of the {comm.size} ranks")
        self.comm, self.engine, self.problem = comm, engine, problem
        self.call = whole_call(problem)
        heads = {"q": problem.num_heads, "k": problem.num_heads_k, "v": problem.num_heads_k, "out": problem.num_heads}
        if is_training:
            heads |= {"dout": heads["q"], "dq": heads["q"], "dk": heads["k"], "dv": heads["v"]}
        self.wholes = {}
        for name, count in heads.items():
            shape = count // comm.size, problem.total, problem.head_dim
            self.wholes[name] = _of_ranks(comm.ranks, engine.empty, shape, "output" if name == "out" else "input")
        heads_q = problem.num_heads // comm.size
        self.lses = _of_ranks(comm.ranks, engine.empty_lse, heads_q, self.call) if is_training else {}

    def forward(self, shares: dict[int, Share]) -> None:
        self._swap(shares, "qkv")
        for rank in self.comm.ranks:
            q, k, v, out = self._of_rank(rank, "q", "k", "v", "out")
            self.engine.attend(self.call, q, k, v, out, self.lses.get(rank))
        self._swap(shares, ("out",), is_back=True)

    def backward(self, shares: dict[int, Share], gradients: dict[int, Gradients]) -> None:
        """dq, dk and dv from dout, after `forward`, whose tensors and LSEs are still there."""
        self._swap(gradients, ("dout",))
        for rank in self.comm.ranks:
            share = Share(*self._of_rank(rank, "q", "k", "v", "out"))
            found = Gradients(*self._of_rank(rank, "dout", "dq", "dk", "dv"))
            self.engine.differentiate(self.call, share, self.lses[rank], found)
        self._swap(gradients, ("dq", "dk", "dv"), is_back=True)

    def _of_rank(self, rank: int, *names: str) -> list:
        return [self.wholes[name][rank] for name in names]

    def exchange(self, shares: dict[int, Share]) -> None:
        """The exchange alone."""
        self._swap(shares, "qkv")
        self._swap(shares, ("out",), is_back=True)

    def _swap(self, shares: dict, names, is_back: bool = False) -> None:
        self.engine.exchange_waits()
        for name in names:
            parts = {rank: getattr(share, name) for rank, share in shares.items()}
            all_to_all(self.comm, self.engine, self.problem, parts, self.wholes[name], is_back)
        self.engine.wait(self.engine.arrival())


def _of_ranks(ranks, make: Callable, *arguments) -> dict[int, Any]:
    return {rank: make(*arguments) for rank in ranks}


SCHEMES = {"all-gather": AllGather, "ring": Ring, "ulysses": Ulysses}
