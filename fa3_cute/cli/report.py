"""Renders results of `bench --json` as markdown: one section per file, one line per problem, the masks side by side,
or warm and cold, or page sizes; of the suite scores, a line per row.

Prints it; with --plot, draws it instead; with --into, replaces what stands between these two lines of a document:

    <!-- performance: begin -->
    <!-- performance: end -->

A suite may have a place of its own in it, between "<!-- performance of decode: begin -->" and its end, say: its
sections then go there and the others stay, so that one suite can be measured anew without the others. Whatever was
measured in FP8 goes to the place of "fp8".

Exit status 2 if the document has no such lines or a file holds no results of the benchmark.
"""

import json
from pathlib import Path

from ..contract.formats import FP8, HEAD_DIMS
from . import environment
from . import plot
from .bench import SUITES
from .options import cannot_run, new_file, one_or_more
from .shown import OURS, OURS_8, OURS_16, Shown
from .table import markdown

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
OWN = "performance of {}:"  # what "performance:" is in the lines of one suite
FP8_PLACE = "fp8"
PEER_NAMES = {OURS_16: "BF16", OURS_8: "FP8", "fa3": "FA3", "cudnn": "cuDNN", "vllm": "vLLM", "fa4": "FA4"}


def add_arguments(parser) -> None:
    parser.add_argument("files", nargs="+", metavar="JSON", help="what bench --json wrote")
    parser.add_argument(
        "--head-dim",
        type=one_or_more(int, HEAD_DIMS),
        default=list(HEAD_DIMS),
        metavar="D,..",
        help="only problems of these head dims",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--into", metavar="FILE", help="write into this document instead of printing")
    instead.add_argument(
        "--plot", type=new_file, metavar="PNG", help="draw bars into this file instead; needs matplotlib"
    )


def run(args) -> int:
    if args.plot and (missing := plot.problem(args.plot)):
        return cannot_run(missing)
    try:
        runs = [results_in(Path(file)) for file in args.files]
        if args.plot:
            plot.write_plot([chosen(run, args.head_dim) for run in runs], SUITES, args.plot)
            return 0
        sections = [(place(run), section(run, args.head_dim)) for run in runs]
        if args.into:
            document = Path(args.into)
            document.write_text(updated(document.read_text(), sections))
        else:
            print("\n\n".join(text for _, text in sections))
    except (OSError, KeyError, ValueError) as error:
        return cannot_run(f"report: {type(error).__name__}: {error}")
    return 0


def results_in(file: Path) -> dict:
    """What `bench --json` wrote; ValueError if it is of a suite without tables."""
    results = json.loads(file.read_text())
    if results["environment"]["suite"] not in SUITES:
        raise ValueError(f"the {results['environment']['suite']} suite has no tables")
    return results


def chosen(results: dict, head_dims: list[int]) -> dict:
    """One file's results, of these head dims only."""
    return results | {"rows": [row for row in results["rows"] if row["case"]["head_dim"] in head_dims]}


def place(results: dict) -> str:
    """What the place of one file's section is called: as its suite, or all FP8 alike."""
    is_fp8 = any(row["case"]["dtype"] == FP8 for row in results["rows"])
    return FP8_PLACE if is_fp8 else results["environment"]["suite"]


def updated(document: str, sections: list[tuple[str, str]]) -> str:
    """The document with the sections, (name of its place, text) each, between its two lines or those of their
    places."""
    places: dict[tuple[str, str], list[str]] = {}
    for name, text in sections:
        begin, end = (line.replace("performance:", OWN.format(name)) for line in (BEGIN, END))
        places.setdefault((begin, end) if begin in document else (BEGIN, END), []).append(text)
    for (begin, end), texts in places.items():
        document = replaced(document, "\n\n".join(texts), begin, end)
    return document


def replaced(document: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The document with the text between its two lines; ValueError if it lacks one."""
    before, first, rest = document.partition(f"{begin}\n")
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"the document has no lines {begin} and {end}, in this order")
    return f"{before}{first}{text}\n{last}{after}"


def section(results: dict, head_dims: list[int]) -> str:
    """Heading, table, conclusions and provenance of one file."""
    known = results["environment"]
    suite = SUITES[known["suite"]]
    shown = suite.SHOWN
    variant_of = variant if shown.has_variants else lambda case: ""
    variants = list(dict.fromkeys(variant_of(row["case"]) for row in results["rows"]))
    problems: dict[tuple, dict] = {}
    for row in results["rows"]:
        case = row["case"]
        if case["head_dim"] in head_dims:
            key = tuple(case[name].upper() if name == "dtype" else case[name] for _, name in shown.problem)
            problems.setdefault(key, {})[variant_of(case)] = row["results"]
    peers = [(name, PEER_NAMES[name]) for name in known["peers"]]
    headings = [heading for heading, *_ in (*shown.problem, *shown.markdown)]
    headings += [heading for _, name in peers for heading in (f"{name} {shown.peer[0]}", f"{name} time / ours")]
    rows = [
        [*key, *cells([by_variant.get(name, {}) for name in variants], [name for name, _ in peers], shown)]
        for key, by_variant in problems.items()
    ]
    table = markdown(headings, rows)
    conclusions = [f"- {line}" for line in results["conclusions"]]
    return "\n".join(
        [
            f"### {suite.TITLE}",
            "",
            *([f"In a cell: {' / '.join(variants)}.", ""] if shown.has_variants else []),
            table,
            "",
            *conclusions,
            *[""] * bool(conclusions),
            f"{environment.sentence(known)}; sources {known['sources'][:12]}:",
            "",
            f"    {known['command']}",
        ]
    )


def variant(case: dict) -> str:
    """What stands side by side in a cell: pages, or warm and cold, where these were looked at, else the masks."""
    return case.get("variant") or case.get("l2") or case["mask"]


def cells(by_variant: list[dict], peers: list[str], shown: Shown) -> list[str]:
    """Ours, then each peer's; in a cell one number per variant, "-" where it was not measured."""

    def joined(name, number) -> str:
        return " / ".join(number(results[name]) if name in results else "-" for results in by_variant)

    found = [joined(OURS, text) for _, _, text in shown.markdown]
    for name in peers:
        found += [joined(name, shown.peer[2]), joined(name, lambda result: f"{result['ratio']:.2f}")]
    return found
