"""Tensors of the benchmark's backward passes: the forward's, what comes in beside them, gradients, and their errors."""

from dataclasses import fields, replace
from math import prod

import numpy as np

from .. import BackwardParams, FlashAttentionParams, backward_workspace_size
from ..arrays.memory import address, allocate, download, fill
from ..contract.backward_reference import Saved, backward_reference
from ..contract.formats import OUT_BYTES
from ..contract.reference import as_float, to_bits
from .call import call_of
from .case import CHECKED_ROWS, DISTINCT_NUMBERS, Case, Tensors
from .passes import DETERMINISTIC

LSE_BYTES = 4
FORWARD_FIELDS = frozenset(field.name for field in fields(FlashAttentionParams))


class GradientTensors(Tensors):
    """Q, K, V, O, its LSE and its gradient dO (standard normal, seeded), dQ, dK, dV, a workspace on the device, large
    enough for every case of a run."""

    def __init__(self, cases: list[Case], stream):
        super().__init__(cases, stream)
        q_size = max(prod(case.q_shape) for case in cases)
        kv_size = max(prod(case.kv_shape) for case in cases)
        numbers = np.random.default_rng(1).standard_normal(min(q_size, DISTINCT_NUMBERS), np.float32)
        self.host["dout"] = to_bits(numbers, cases[0].dtype)
        self.buffers["dout"] = self.repeated(self.host["dout"], q_size)
        lse_size = max(prod(case.q_shape) // case.head_dim for case in cases)
        written = {"softmax_lse": LSE_BYTES * lse_size}
        written |= {name: OUT_BYTES * size for name, size in (("dq", q_size), ("dk", kv_size), ("dv", kv_size))}
        for name, nbytes in written.items():
            self.buffers[name] = allocate(nbytes, stream=stream)
        self.written = ("out", *written)
        self.workspace_bytes = max(backward_workspace_size(self.without_workspace(case)) for case in cases)
        self.workspace = allocate(self.workspace_bytes, stream=stream)

    def poison_out(self) -> None:
        """The same of all that calls write."""
        for name in self.written:
            fill(self.buffers[name], 0xFF, stream=self.stream)

    def forward_params(self, case: Case) -> FlashAttentionParams:
        """The call of `forward` that makes O and the LSE of a case."""
        call = call_of(case, self.pointers(case))
        return FlashAttentionParams(**{name: value for name, value in call.items() if name in FORWARD_FIELDS})

    def params(self, case: Case, kv_set: int = 0) -> BackwardParams:
        """The case as a call of `backward`."""
        place = {"workspace": address(self.workspace), "workspace_bytes": self.workspace_bytes}
        return replace(self.without_workspace(case), **place)

    def without_workspace(self, case: Case) -> BackwardParams:
        """The same before there is a workspace."""
        return BackwardParams(**call_of(case, self.pointers(case)), deterministic=case.passes == DETERMINISTIC)

    def error_of(self, case: Case, kv_set: int = 0) -> float:
        """The largest of the relative errors (norm) of dQ, dK and dV against the reference, given the device's O and
        LSE: of dQ in the last rows, of dK and dV in the first keys, of the first, the longest and the last sequence,
        for the first, a middle and the last head. Masks have no bound on the left.

        The last rows alone are a problem of their own, as in the forward, and so are the first keys, with all rows.
        """
        there = self.downloaded(case)
        lengths = case.lengths or (case.seqlen_k,)
        longest = lengths.index(max(lengths))
        squares = np.zeros((2, 3))  # of differences and of numbers, by gradient
        for index, head in ((0, 0), (longest, case.num_heads // 2), (case.batch_size - 1, case.num_heads - 1)):
            pairs = [self.of_last_rows(case, index, head, there), *self.of_first_keys(case, index, head, there)]
            squares += [[np.square(got - exact).sum() for got, exact in pairs], [np.square(e).sum() for _, e in pairs]]
        return float(np.sqrt(squares[0] / squares[1]).max())

    def downloaded(self, case: Case) -> dict[str, np.ndarray]:
        """What the device has written: [rows, heads, head_dim], the LSE [rows, heads]."""
        shapes = {"out": case.q_shape, "dq": case.q_shape, "dk": case.kv_shape, "dv": case.kv_shape}
        found = {
            name: download(self.buffers[name], (prod(rows), heads, head_dim), self.out_type, stream=self.stream)
            for name, (*rows, heads, head_dim) in shapes.items()
        }
        lse = download(self.buffers["softmax_lse"], case.lse_shape, np.dtype(np.float32), stream=self.stream)
        return found | {"softmax_lse": lse.swapaxes(-1, -2).reshape(-1, case.num_heads)}

    def of_last_rows(self, case: Case, index: int, head: int, there: dict) -> tuple[np.ndarray, np.ndarray]:
        """(the device's, exact) dQ in the last rows of one head of a sequence."""
        rows = case.rows_of(index, case.seqlen_q)[-CHECKED_ROWS:]
        q, dout, saved = self.of_rows(case, rows, [head], there)
        kv_head = head // (case.num_heads // case.num_heads_k)
        k, v = (self.vectors(name, case.rows_of(index, case.seqlen_k), case.kv_shape, kv_head) for name in "kv")
        exact = backward_reference(q, k, v, dout, saved, window_size=case.visible_bounds)
        return as_float(there["dq"][rows, head]), exact.dq[0, :, 0]

    def of_first_keys(self, case: Case, index: int, head: int, there: dict) -> list[tuple[np.ndarray, np.ndarray]]:
        """The same of dK and of dV in the first keys of the head's KV head."""
        group = case.num_heads // case.num_heads_k
        kv_head = head // group
        heads = list(range(kv_head * group, (kv_head + 1) * group))
        q, dout, saved = self.of_rows(case, case.rows_of(index, case.seqlen_q), heads, there)
        rows = case.rows_of(index, case.seqlen_k)[:CHECKED_ROWS]
        k, v = (self.vectors(name, rows, case.kv_shape, kv_head) for name in "kv")
        left_out = len(case.rows_of(index, case.seqlen_k)) - len(rows)
        _, right = case.visible_bounds
        # The diagonal ends at the last of the keys that are given.
        exact = backward_reference(q, k, v, dout, saved, window_size=(-1, right if right < 0 else right + left_out))
        return [(as_float(there[name][rows, kv_head]), getattr(exact, name)[0, :, 0]) for name in ("dk", "dv")]

    def of_rows(self, case: Case, rows: np.ndarray, heads: list[int], there: dict) -> tuple:
        """q and dout of some rows and heads [1, rows, heads, head_dim], and the device's O and LSE of them."""
        q, dout = (
            np.concatenate([self.vectors(name, rows, case.q_shape, head) for head in heads], axis=2)
            for name in ("q", "dout")
        )
        out, lse = (there[name][rows][:, heads][None] for name in ("out", "softmax_lse"))
        return q, dout, Saved(out=out, softmax_lse=lse.transpose(0, 2, 1))
