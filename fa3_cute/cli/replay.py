"""Repeats the calls that FA3_CUTE_LOG_CALLS has logged, on random data of the same sizes, strides and alignments: a log
is a bug report that anybody can run. Lines of other programs are passed over, so a whole stderr will do.

Of each call its status is printed, and how many numbers of its results are not finite. Sequences are as even as they
can be, and pages are in random order, unless FA3_CUTE_LOG_LENGTHS=1 was set beside it. Calls with functions in Python
(score_mod, mask_mod) cannot be repeated: a line does not hold them. --explain says what would happen, without a GPU.
Exit status 1 if a call is refused, fails, cannot be repeated or makes numbers that are not finite; 2 if there is no
call, the file cannot be read or there is no Hopper GPU.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import BackwardParams, MergeParams, backward, explain, forward, last_error, merge_attention
from ..arrays.memory import address, allocate, download, hopper_device_problem, open_device, upload, window
from ..contract.merge import out_dtype_of, plain_merge
from ..contract.params import DTYPE_NAMES
from ..contract.plain import plain
from ..contract.reference import as_float, to_bits
from ..contract.status import Problem
from ..planning.merge import merge_config
from ..planning.operations import checked, operation_of
from ..runtime.tracing.record import KEY, MAX_ALIGNMENT, Params, Unreadable, params_of, parsed
from .explain import backward_served
from .options import FAILED, cannot_run, count
from .replayed import DISTINCT_NUMBERS, Array, arrays_of, placed, stood_in

STDIN = "-"


def add_arguments(parser) -> None:
    parser.add_argument("file", metavar="FILE", help="the log; - is stdin")
    parser.add_argument("--line", type=count, metavar="N", help="the call of this line alone, the first is 1")
    parser.add_argument(
        "--explain", action="store_true", help="say what is wrong with each call, or which kernels serve it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args) -> int:
    try:
        calls = list(read(args.file, args.line))
    except OSError as error:
        return cannot_run(f"replay: {args.file} cannot be read: {error}")
    if not calls:
        place = f"line {args.line} of {args.file}" if args.line else args.file
        return cannot_run(f"replay: there is no call in {place}: FA3_CUTE_LOG_CALLS={args.file} writes them")
    stream = None
    if not args.explain and any("problem" not in call for call in calls):
        if problem := hopper_device_problem():
            return cannot_run(f"replay needs a Hopper GPU, --explain does not: {problem}")
        stream = open_device().create_stream()
    rows = []
    for call in calls:
        rows.append(call | ({} if "problem" in call else outcome(call, stream)))
        if not args.json:
            print(sentence(rows[-1]), flush=True)
        if rows[-1].get("is_lost"):
            break  # the context is
    if args.json:
        print(json.dumps({"calls": [shown(row) for row in rows]}, indent=1))
    return FAILED if any(row.get("problem") or row.get("not_finite") for row in rows) else 0


def read(name: str, wanted: int | None) -> Iterator[dict[str, Any]]:
    """The calls of a log, each with its line, its record and its params; or with the problem that it has."""
    if name == STDIN:
        lines = sys.stdin.readlines()
    else:
        with open(name, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    for number, line in enumerate(lines, 1):
        if wanted not in (None, number):
            continue
        facts: dict[str, Any] = {"line": number, "call": "a call"}
        try:
            if (record := parsed(line)) is None:
                continue
            facts |= {"call": record[KEY], "record": record}
            facts["params"] = params_of(record)
            problems = explain(stood_in(facts["params"]))
            yield facts | ({"problem": str(problems[0])} if problems else {})
        except Unreadable as error:
            yield facts | {"problem": f"cannot be repeated: {error}"}


def outcome(call: dict[str, Any], stream: Any) -> dict[str, Any]:
    """What becomes of a good call; without a stream, what would."""
    params = call["params"]
    if stream is None:
        return {"kernels": kernels_of(stood_in(params))}
    lengths = call["record"].get("lengths", {})
    try:
        arrays = arrays_of(stood_in(params), lengths if isinstance(lengths, dict) else {})
        return repeated(params, arrays, stream)
    except Unreadable as error:
        return {"problem": f"cannot be repeated: {error}"}
    except Exception as error:  # of the driver, each with a type of its own: no memory, or a kernel that failed
        return {"problem": f"{type(error).__name__}: {error}", "is_lost": True}


def kernels_of(params: Params) -> list[str]:
    """The names of those that serve good params, in their order."""
    if isinstance(params, MergeParams):
        p = plain_merge(params)
        return [merge_config(DTYPE_NAMES[p.dtype], DTYPE_NAMES[out_dtype_of(p)]).name]
    if isinstance(params, BackwardParams):
        return backward_served(params)["kernels"]
    shape = checked(plain(params))
    assert not isinstance(shape, Problem), "the params are valid"
    return [launch.config.name for launch in operation_of(shape).launches] if shape.seqlen_q else []


def repeated(params: Params, arrays: dict[str, Array], stream: Any) -> dict[str, Any]:
    """Make the arrays, call, wait, and look at what was written."""
    rng, buffers = np.random.default_rng(0), {}

    def place(name: str, alignment: int) -> int:
        buffers[name] = filled(arrays[name], alignment % MAX_ALIGNMENT, rng, stream)
        return address(buffers[name])

    good = placed(params, place)
    call = {MergeParams: merge_attention, BackwardParams: backward}.get(type(params), forward)
    status = call(good, stream)
    stream.sync()
    if status:
        error = last_error()
        return {"problem": str(Problem(status, error.detail if error else ""))}
    found = {name: not_finite(name, arrays[name], buffers[name], stream) for name in buffers if arrays[name].written}
    return {"not_finite": {name: number for name, number in found.items() if number}}


def filled(array: Array, offset: int, rng: np.random.Generator, stream: Any) -> Any:
    """A buffer that begins so many bytes behind an aligned address; its numbers repeat after DISTINCT_NUMBERS."""
    numbers = array.make(rng, min(array.size, DISTINCT_NUMBERS))
    nbytes, step = array.size * numbers.itemsize, numbers.nbytes
    whole = window(allocate(nbytes + MAX_ALIGNMENT, stream=stream), offset, max(1, nbytes))
    for start in range(0, nbytes, step or 1):
        part = numbers[: (nbytes - start) // numbers.itemsize]
        upload(part, window(whole, start, part.nbytes), stream=stream)
    return whole


def not_finite(name: str, array: Array, buffer: Any, stream: Any) -> int:
    """How many numbers of what a call wrote are NaN or Inf; of an LSE, -inf is none: it says that there is no key."""
    dtype = to_bits(np.zeros(0, np.float32), array.written).dtype
    values = as_float(download(buffer, (array.size,), dtype, stream=stream))
    are_wrong = ~np.isfinite(values)
    return int(np.count_nonzero(are_wrong & ~np.isneginf(values) if "lse" in name else are_wrong))


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Of a call, what is printed with --json."""
    return {name: value for name, value in row.items() if name not in ("record", "params", "is_lost")}


def sentence(row: dict[str, Any]) -> str:
    """The same as a line of text."""
    start = f"line {row['line']}: {row['call']}"
    if problem := row.get("problem"):
        return f"{start}: {problem}"
    if "kernels" in row:
        return f"{start}: {', '.join(row['kernels']) or 'nothing to launch'}"
    wrong = [f"{number} of {name} are not finite" for name, number in row["not_finite"].items()]
    return f"{start}: OK{''.join(f', {each}' for each in wrong)}"
