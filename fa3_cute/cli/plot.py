"""Results of the benchmark as a picture: a bar per implementation and case, and what the hardware allows as a line.

Prefill and the like: TFLOP/s, and the WGMMA peak at the clock that was measured during our batches. Decode: GB/s, and
the rate of a copy on the device. Needs matplotlib, which is imported on use: pip install 'fa3_cute[plot]'.
"""

from collections.abc import Sequence
from pathlib import Path

from .environment import sentence
from .shown import MEMORY, OURS, OURS_8, OURS_16

NAMES = {OURS: "fa3_cute", OURS_16: "fa3_cute in BF16", OURS_8: "fa3_cute in FP8"}
NAMES |= {"fa3": "FA3", "cudnn": "cuDNN", "vllm": "vLLM", "fa4": "FA4"}
# Okabe and Ito's, which colour-blind readers can tell apart; hatches for prints without colour.
STYLES = {
    OURS: ("#0072B2", ""),
    OURS_16: ("#56B4E9", "\\\\"),
    OURS_8: ("#D55E00", "++"),
    "fa3": ("#E69F00", "//"),
    "cudnn": ("#009E73", ".."),
    "vllm": ("#CC79A7", "--"),
    "fa4": ("#F0E442", "xx"),
}
OTHER_STYLE = ("#999999", "xx")
BAR, GAP = 0.21, 0.30  # inches: a bar, the space between two cases
PANEL_HEIGHT, MARGIN = 4.2, 1.4
MAX_CASES = 18  # in a panel; more go on in the next one
DOTS_PER_INCH = 110
TICKS = (
    "d: head_dim, h: query heads (: KV heads); below, sequences x length (queries : keys); "
    "*: the host's time, not the GPU's"
)


def problem(path: str) -> str | None:
    """Why no picture can be drawn into that file, in one sentence; None if one can."""
    try:
        import matplotlib  # noqa: F401
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        return f"--plot needs matplotlib ({error}): pip install 'fa3_cute[plot]'"
    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".") not in kinds:
        return f"--plot {path}: the name must end in one of {', '.join(kinds)}"
    return None


def write_plot(runs: Sequence[dict], suites: dict, path: str) -> None:
    """Draws what bench --json wrote into one image file, a panel per run and mask (decode: warm or cold).

    Raises ValueError if the file's kind is unknown or there is nothing to draw, OSError.
    """
    from matplotlib.figure import Figure

    panels = [(run, name, rows) for run in runs for name, rows in by_variant(run["rows"]).items()]
    if not panels:
        raise ValueError("no results to draw")
    figure = Figure(
        figsize=(max(width(run, rows) for run, _, rows in panels), PANEL_HEIGHT * len(panels)),
        dpi=DOTS_PER_INCH,
        layout="constrained",
    )
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for panel, (run, name, rows) in zip(axes, panels, strict=True):
        suite = suites[run["environment"]["suite"]]
        draw(panel, rows, [OURS, *run["environment"]["peers"]], suite.SHOWN is MEMORY)
        panel.set_title(f"{suite.TITLE}: {name}", loc="left", fontweight="bold")
    sources = dict.fromkeys(sentence(run["environment"]) for run in runs)
    figure.supxlabel("\n".join([TICKS, *sources]), fontsize=8, color="0.3")
    figure.savefig(path)


def by_variant(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Rows by what a panel shows: a page size, warm or cold, where that was looked at, else the mask; long ones in
    parts."""
    found = {}
    for row in rows:
        case = row["case"]
        found.setdefault(case.get("variant") or case.get("l2") or case["mask"], []).append(row)
    return {
        name + ", continued" * (start > 0): rows[start : start + MAX_CASES]
        for name, rows in found.items()
        for start in range(0, len(rows), MAX_CASES)
    }


def width(run: dict, rows: Sequence[dict]) -> float:
    """Inches that these cases need."""
    bars = 1 + len(run["environment"]["peers"])
    return max(9, MARGIN + len(rows) * (bars * BAR + GAP))


def draw(panel, rows: Sequence[dict], names: Sequence[str], is_memory: bool) -> None:
    """One panel: the bars of each case, a line over them at what the hardware allows, our number on our bar."""
    rate, unit = ("gbs", "GB/s") if is_memory else ("tflops", "TFLOP/s")
    bar = 1 / (len(names) + GAP / BAR)  # a case is 1 wide
    start = -bar * len(names) / 2
    for index, name in enumerate(names):
        known = [(place, row["results"][name]) for place, row in enumerate(rows) if name in row["results"]]
        colour, hatch = STYLES.get(name, OTHER_STYLE)
        bars = panel.bar(
            [place + start + bar * (index + 0.5) for place, _ in known],
            [result[rate] for _, result in known],
            bar,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.5,
            label=NAMES.get(name, name),
        )
        texts = [f"{result[rate]:.0f}" * (name == OURS) + "*" * result["host_bound"] for _, result in known]
        panel.bar_label(
            bars,
            texts,
            rotation=90,
            fontsize=7,
            padding=3,
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.4},
        )
    roofs = [(place, roof(row["results"][OURS], is_memory)) for place, row in enumerate(rows)]
    roofs = [(place, value) for place, value in roofs if value]
    if roofs:
        panel.hlines(
            [value for _, value in roofs],
            [place - 0.5 for place, _ in roofs],
            [place + 0.5 for place, _ in roofs],
            color="#D55E00",
            linewidth=1.8,
            label="rate of a copy on the device" if is_memory else "WGMMA peak at the measured clock",
        )
    panel.set_xticks(
        range(len(rows)),
        [tick(row["case"]) for row in rows],
        fontsize=8,
        rotation=0 if len(rows) <= 8 else 50,
        ha="center" if len(rows) <= 8 else "right",
        rotation_mode="anchor",
    )
    panel.set_ylabel(unit)
    panel.set_xlim(-0.6, len(rows) - 0.4)
    panel.margins(y=0.12)
    panel.grid(axis="y", color="0.88")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names) + 1, frameon=False, fontsize=8)


def roof(ours: dict, is_memory: bool) -> float | None:
    """What the hardware allows, in the unit of the bars, from our rate and our share of it; None if unknown."""
    value, part = (ours["gbs"], ours["of_copy"]) if is_memory else (ours["tflops"], ours["peak"])
    return value / part if part else None


def tick(case: dict) -> str:
    """A case under its bars."""
    return "\n".join(
        filter(None, (f"d{case['head_dim']} h{case['heads']}", case["layout"], case.get("scores"), case.get("passes")))
    )
