"""Renders results of `bench --json` as markdown: one section per file, one line per problem, the masks side by side.

Prints it or, with --into, replaces what stands between these two lines of a document:

    <!-- performance: begin -->
    <!-- performance: end -->

Exit status 2 if the document has no such lines or a file holds no results of the benchmark.
"""
import json
from pathlib import Path

from ..config import HEAD_DIMS
from . import environment
from .bench import OURS, SUITES, rate
from .table import markdown, one_or_more

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
PEER_NAMES = {"fa3": "FA3", "cudnn": "cuDNN"}


def add_arguments(parser) -> None:
    parser.add_argument("files", nargs="+", metavar="JSON", help="what bench --json wrote")
    parser.add_argument("--head-dim", type=one_or_more(int, HEAD_DIMS), default=list(HEAD_DIMS), metavar="D,..",
                        help="only problems of these head dims")
    parser.add_argument("--into", metavar="FILE", help="write into this document instead of printing")


def run(args) -> int:
    try:
        text = "\n\n".join(section(json.loads(Path(file).read_text()), args.head_dim) for file in args.files)
        if args.into:
            document = Path(args.into)
            document.write_text(replaced(document.read_text(), text))
        else:
            print(text)
    except (OSError, KeyError, ValueError) as error:
        print(f"report: {type(error).__name__}: {error}")
        return 2
    return 0


def replaced(document: str, text: str) -> str:
    """The document with the text between its two lines; ValueError if it lacks one."""
    before, begin, rest = document.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document has no lines {BEGIN} and {END}, in this order")
    return f"{before}{begin}{text}\n{end}{after}"


def section(results: dict, head_dims: list[int]) -> str:
    """Heading, table, conclusions and provenance of one file."""
    known = results["environment"]
    masks = list(dict.fromkeys(row["case"]["mask"] for row in results["rows"]))
    problems: dict[tuple, dict] = {}
    for row in results["rows"]:
        case = row["case"]
        if case["head_dim"] in head_dims:
            key = case["dtype"].upper(), case["head_dim"], case["heads"], case["layout"]
            problems.setdefault(key, {})[case["mask"]] = row["results"]
    peers = [(name, PEER_NAMES[name]) for name in known["peers"]]
    headings = ["type", "head_dim", "heads", "sequences", "us", "TFLOP/s", "of peak"]
    headings += [heading for _, name in peers for heading in (f"{name} TFLOP/s", f"{name} time / ours")]
    rows = [[*key, *cells([by_mask.get(mask, {}) for mask in masks], [name for name, _ in peers])]
            for key, by_mask in problems.items()]
    table = markdown(headings, rows)
    conclusions = [f"- {line}" for line in results["conclusions"]]
    return "\n".join([f"### {SUITES[known['suite']].TITLE}", "", f"In a cell: {' / '.join(masks)}.", "", table, "",
                      *conclusions, *[""] * bool(conclusions),
                      f"{environment.sentence(known)}; sources {known['sources'][:12]}:", "",
                      f"    {known['command']}"])


def cells(by_mask: list[dict], peers: list[str]) -> list[str]:
    """Ours, then each peer's; in a cell one number per mask, "-" where it was not measured."""
    def joined(name, number) -> str:
        return " / ".join(number(results[name]) if name in results else "-" for results in by_mask)

    found = [joined(OURS, lambda result: f"{1000 * result['ms']:.1f}"), joined(OURS, rate),
             joined(OURS, lambda result: "-" if result["peak"] is None else f"{result['peak']:.0%}")]
    for name in peers:
        found += [joined(name, rate), joined(name, lambda result: f"{result['ratio']:.2f}")]
    return found
