"""Every scheme in every mode, compared with float64 attention over all rows; gradients too."""

from dataclasses import replace

import numpy as np

from fa3_cute.contract.backward_reference import backward_reference, backward_twin
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin, to_bits

from .plan import Problem
from .schemes import SCHEMES, Gradients, Share
from .shares import share_of

MODES = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"window": 50},
    "packed": {"seqlens": (128, 32, 192)},
    "packed window": {"seqlens": (128, 32, 192), "window": 50},
}
# Times the error of one call that rounds where the kernels must. The ring's result is rounded once, as theirs;
# gradients of keys are rounded by each rank, and when they are added.
ALLOWED = {"fp16": 2, "bf16": 2, "fp8_e4m3": 4}
ALLOWED_OF_GRADIENTS = 4


def inputs(problem: Problem) -> dict[str, np.ndarray]:
    """[heads, total, head_dim], rounded to the problem's dtype."""
    rng = np.random.default_rng(0)
    heads = {"q": problem.num_heads, "k": problem.num_heads_k, "v": problem.num_heads_k, "dout": problem.num_heads}
    shapes = {name: (count, problem.total, problem.head_dim) for name, count in heads.items()}
    return {name: as_float(to_bits(rng.standard_normal(shape), problem.dtype)) for name, shape in shapes.items()}


def options_of(problem: Problem) -> dict:
    """The reference's, of all rows."""
    offsets = np.cumsum((0, *problem.seqlens))
    mask = {"causal": problem.is_causal} if problem.window is None else {"window_size": (problem.window, 0)}
    return {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, **mask}


def rows_first(arrays: dict, names) -> list[np.ndarray]:
    return [arrays[name].swapaxes(0, 1) for name in names]


def compare(comm, engine, base: Problem, meeting=None, is_brief: bool = False) -> int:
    """Prints the largest errors over all ranks, of both passes in 16 bit and of the forward pass in FP8; 1 if one is
    too large, else 0. Brief: of causal modes in 16 bit, a few kernels to compile."""
    is_right = True
    causal = {name: MODES[name] for name in ("causal", "packed")}
    checks = [(errors, base, causal), (gradient_errors, base, causal)]
    if not is_brief:
        in_fp8 = replace(base, dtype="fp8_e4m3")
        checks = [(errors, base, MODES), (gradient_errors, base, MODES), (errors, in_fp8, causal)]
    for check, problem, modes in checks:
        dtype = problem.dtype
        for scheme, mode, error, allowed in check(comm, engine, problem, modes):
            worst = float(np.max(meeting.tell(error) if meeting else error))  # NaN stays
            is_right &= worst <= allowed
            if comm.ranks[0] == 0:
                said = f"{scheme:10} {dtype:8} {mode:16}"
                print(f"{said} largest error {worst:.1e}, allowed {allowed:.1e}", flush=True)
    return 0 if is_right else 1


def errors(comm, engine, base: Problem, modes: dict[str, dict]):
    """Yields (scheme, mode, largest error against float64, what is allowed), over the rows of the ranks held here."""
    for mode, fields in modes.items():
        problem = engine.problem = replace(base, **fields)
        arrays = inputs(problem)
        exact, _ = attention_reference(*rows_first(arrays, "qkv"), **options_of(problem))
        rounded, _ = low_precision_twin(*rows_first(arrays, "qkv"), problem.dtype, **options_of(problem))
        allowed = ALLOWED[problem.dtype] * np.abs(rounded - exact).max() + 1e-5
        for name, scheme in SCHEMES.items():
            if name == "ring" and problem.window is not None or name == "ulysses" and problem.num_heads_k % comm.size:
                continue
            shares = shares_of(engine, problem, arrays, comm.ranks)
            # With LSEs where there can be gradients: those need the same kernels.
            options = {} if name == "ring" else {"is_training": True}
            scheme(comm, engine, problem, **options).forward(shares)
            found = {rank: engine.download(share.out) for rank, share in shares.items()}
            yield name, mode, _largest(problem, found, exact), allowed


def gradient_errors(comm, engine, base: Problem, modes: dict[str, dict]):
    """Yields (scheme, mode and gradient, largest error, allowed)."""
    for mode, fields in modes.items():
        problem = engine.problem = replace(base, **fields)
        arrays = inputs(problem)
        tensors, options = rows_first(arrays, ("q", "k", "v", "dout")), options_of(problem)
        exact, rounded = backward_reference(*tensors, **options), backward_twin(*tensors, problem.dtype, **options)
        for scheme in ("all-gather", "ulysses") if problem.num_heads_k % comm.size == 0 else ("all-gather",):
            gradients = gradients_of(comm, engine, problem, arrays, SCHEMES[scheme])
            for name in ("dq", "dk", "dv"):
                found = {rank: engine.download(getattr(gradient, name)) for rank, gradient in gradients.items()}
                expected = getattr(exact, name)
                allowed = ALLOWED_OF_GRADIENTS * np.abs(getattr(rounded, name) - expected).max() + 1e-5
                yield scheme, f"{mode} {name}", _largest(problem, found, expected), allowed


def gradients_of(comm, engine, problem: Problem, arrays: dict, make) -> dict[int, Gradients]:
    """Of a scheme's forward and backward pass."""
    shares = shares_of(engine, problem, arrays, comm.ranks)
    gradients = {}
    for rank, share in shares.items():
        dout = engine.upload(share_of(problem, arrays["dout"], rank))
        gradients[rank] = Gradients(dout, *(engine.empty(x.shape, "input") for x in (share.q, share.k, share.v)))
    scheme = make(comm, engine, problem, is_training=True)
    scheme.forward(shares)
    scheme.backward(shares, gradients)
    return gradients


def shares_of(engine, problem: Problem, arrays: dict, ranks) -> dict[int, Share]:
    shares = {}
    for rank in ranks:
        q, k, v = (engine.upload(share_of(problem, arrays[name], rank)) for name in "qkv")
        shares[rank] = Share(q, k, v, engine.empty(q.shape, "output"))
    return shares


def _largest(problem: Problem, found: dict, expected) -> float:
    """Over the rows of these ranks; NaN stays."""
    errors = [np.abs(array - share_of(problem, expected.swapaxes(0, 1), rank)).max() for rank, array in found.items()]
    return float(np.max(errors))
