"""A config of one's choice on trial: what the compiler makes of it, whether it is right, how fast it is.

`dev` runs trials in processes of their own that prepare all that does not depend on the kernels, and then import the
package anew; hence the imports within functions here.
"""

import traceback
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..contract.formats import ELEMENT_BYTES
from ..arrays.memory import download, open_device
from ..contract.reference import as_float, attention_reference
from .case import Case, Tensors
from .dtypes import out_dtype_of
from .measure import Batch, Stopwatch, Work, in_turn
from .suites import prefill
from .suites import window

PACKAGE = Path(__file__).resolve().parent.parent
# Relative error (norm) of a right row on normal inputs, by the bytes of an element of Q: BF16 rounding of P and of O
# leaves at most 4e-3, E4M3 rounding of P at most 4.4e-2 in the rows of the small problem.
WRONG = {1: 8e-2, 2: 1e-2}
# What the problem decides, as it does features; every other field of a config is ours to set.
GIVEN_FIELDS = (
    *("dtype", "out_dtype", "head_dim", "is_causal", "is_local", "has_lse", "is_varlen"),
    *("head_dim_v", "is_padded", "is_ragged", "page_box", "box_is_wide"),
)
SWITCHES = {"0": False, "1": True, "false": False, "true": True}
PREFILL_SEQLENS, DECODE_SEQLENS = (4096,), (8192,)


@dataclass(frozen=True)
class Question:
    """What is tried, in plain values.

    mask       full, causal or local; decode has one query per sequence, which sees every key either way
    changes    (field, text) pairs that replace fields of the config in the tables' row
    seqlens    of the problems to time; () are the default ones
    out_dtype  of O where it need not be that of Q, K and V; None is the default
    """

    dtype: str
    head_dim: int
    mask: str = "full"
    is_decode: bool = False
    changes: tuple[tuple[str, str], ...] = ()
    seqlens: tuple[int, ...] = ()
    out_dtype: str | None = None

    def config(self):
        """The config of the tables' row with the changes made. ValueError, in FwdConfig's words if it is illegal."""
        from ..planning.score_features import FEATURES
        from ..planning.tables import decode_config, forward_config

        out_dtype = out_dtype_of(self.dtype, self.out_dtype)
        if self.is_decode:
            cfg = decode_config(self.dtype, self.head_dim, is_local=False, out_dtype=out_dtype)
        else:
            cfg = forward_config(
                self.dtype, self.head_dim, self.mask, has_lse=False, is_varlen=False, out_dtype=out_dtype
            )
        kinds = {field.name: field.type for field in fields(cfg) if field.name not in (*GIVEN_FIELDS, *FEATURES)}
        return replace(cfg, **{name: value_of(name, text, kinds) for name, text in self.changes})

    def cases(self) -> list[Case]:
        """The problems to time: prefill as in the benchmark's suite, decode with nothing in the L2 cache."""
        if self.is_decode:
            return [
                Case(self.dtype, self.head_dim, False, 1, seqlen, 16, 16, 2, l2="cold", out_dtype=self.out_dtype)
                for seqlen in self.seqlens or DECODE_SEQLENS
            ]
        sizes = SimpleNamespace(dtype=self.dtype, num_heads=None, num_heads_k=None, batch_size=None)
        return [
            replace(
                prefill.case(sizes, self.head_dim, seqlen, self.mask == "causal", self.window(window.WINDOWS[0])),
                out_dtype=self.out_dtype,
            )
            for seqlen in self.seqlens or PREFILL_SEQLENS
        ]

    def small_case(self) -> Case:
        """The problem to check: several sequences, heads that share K and V, lengths that no tile divides."""
        if self.is_decode:
            return Case(self.dtype, self.head_dim, False, 1, 1999, 3, 16, 2, out_dtype=self.out_dtype)
        return Case(
            self.dtype,
            self.head_dim,
            self.mask == "causal",
            333,
            717,
            2,
            4,
            2,
            self.window((200, 0)),
            out_dtype=self.out_dtype,
        )

    @property
    def wrong(self) -> float:
        """The relative error of a row from which on it is wrong."""
        return WRONG[ELEMENT_BYTES[self.dtype]]

    def window(self, bounds: tuple[int, int]) -> tuple[int, int]:
        """The window of a case: these bounds if the mask is one."""
        return bounds if self.mask == "local" else (-1, -1)


def value_of(name: str, text: str, kinds: dict[str, Any]):
    """What a text says for a field; ValueError if there is no such field or the text is no value of its kind."""
    if name not in kinds:
        raise ValueError(f"{name}: not one of {', '.join(kinds)}")
    try:
        return SWITCHES[text.lower()] if kinds[name] is bool else kinds[name](text)
    except (KeyError, ValueError):
        raise ValueError(f"{name}={text!r}: must be {'0 or 1' if kinds[name] is bool else 'an integer'}") from None


def label(cfg) -> str:
    """The choices of a config in short, as tables.py writes them: tiles, stages and what is not the default."""
    name = f"{cfg.tile_m}x{cfg.tile_n} q{cfg.num_q_stages} kv{cfg.num_kv_stages}"
    if cfg.splits_keys:
        return f"{name}, {cfg.ctas_per_sm} CTAs per SM"
    return (
        name
        + " without ping-pong" * (not cfg.use_pingpong and cfg.num_consumer_wgs > 1)
        + " rescaling before PV" * cfg.rescale_before_pv
        + f" packing {cfg.packed_heads} heads" * cfg.packs_heads
    )


def compiled(cfg) -> dict:
    """What the compiler made of a config: name, registers, smem_bytes, and as "problems" why it must not ship.

    "error" instead, if it does not compile.
    """
    from ..runtime import compiler

    try:
        report = compiler.compile_report(cfg)
    except compiler.CompileError as error:
        return {"name": cfg.name, "error": said(error)}
    return {
        "name": cfg.name,
        "registers": report.registers,
        "smem_bytes": report.smem_bytes,
        "problems": report.problems(),
    }


def said(error: BaseException) -> str:
    """An error in full, and the lines of the kernels on the way to it and to what caused it."""
    lines, cause = traceback.format_exception_only(error), error
    while cause:
        places = [
            frame
            for frame in traceback.extract_tb(cause.__traceback__)
            if PACKAGE / "kernels" in Path(frame.filename).parents
        ]
        if places:
            lines.append(f"{type(cause).__name__}\n")
        lines += [f"  at {Path(frame.filename).name}:{frame.lineno}: {frame.line}\n" for frame in places[-3:]]
        cause = cause.__cause__
    return "".join(lines).rstrip()


class Rig:
    """A Hopper GPU with the inputs of a question, ready to check and time any config that answers it."""

    def __init__(self, question: Question):
        device = open_device()
        self.gpu, self.cases, self.small = device.name, question.cases(), question.small_case()
        self.wrong, self.stream = question.wrong, device.create_stream()
        self.stopwatch = Stopwatch(device, self.stream)
        self.tensors = Tensors([self.small, *self.cases], self.stream)
        shapes = {"q": self.small.q_shape, "k": self.small.kv_shape, "v": self.small.kv_shape}
        inputs = [self.tensors.numbers(name, 0, shape) for name, shape in shapes.items()]
        self.exact, _ = attention_reference(*inputs, window_size=self.small.visible_bounds)

    def launch(self, cfg, case: Case, kv_set: int = 0):
        """A function that queues the forward of a case through this config."""
        from ..runtime.launch import launch_through

        params, handle = self.tensors.params(case, kv_set), int(self.stream.handle)
        return lambda: launch_through(params, cfg, handle)

    def error(self, cfg) -> float:
        """Relative error (norm) of the worst row of the small problem; not below `wrong`, perhaps NaN, if wrong."""
        self.tensors.poison_out()
        self.launch(cfg, self.small)()
        out = download(
            self.tensors.buffers["out"], (prod(self.small.q_shape),), self.tensors.out_type, stream=self.stream
        )
        difference = as_float(out.reshape(self.small.q_shape)) - self.exact
        return float(np.max(np.linalg.norm(difference, axis=-1) / np.linalg.norm(self.exact, axis=-1)))

    def work(self, cfg, case: Case) -> Work:
        """What to time: a case through this config, replayed from a CUDA graph where calls are short."""
        work = Work(in_turn([self.launch(cfg, case, kv_set) for kv_set in range(case.kv_sets)]))
        if case.l2 or self.stopwatch.is_short(work):
            work.launch()  # loads the kernel and makes its scratch memory: a capture allows neither
            return self.stopwatch.capture(work.launch, case.calls_per_graph)
        return work


def times(case: Case, batches: list[Batch]) -> dict:
    """A case's medians over the rounds."""
    milliseconds = median(batch.milliseconds for batch in batches)
    return {
        "name": case.name,
        "ms": milliseconds,
        "tflops": case.flops / milliseconds / 1e9,
        "gbs": case.nbytes / milliseconds / 1e6,
    }


def rate(case: Case, milliseconds: float) -> str:
    """A time as people compare it: TFLOP/s of prefill, microseconds and GB/s of decode."""
    if case.is_decode:
        return f"{1000 * milliseconds:.1f} us, {case.nbytes / milliseconds / 1e6:.0f} GB/s"
    return f"{case.flops / milliseconds / 1e9:.1f} TFLOP/s, {1000 * milliseconds:.1f} us"
