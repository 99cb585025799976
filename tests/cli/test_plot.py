"""Results as a picture."""

import json
import sys

import pytest
from fake_gpu import install

from fa3_cute.cli import main, plot


def results(suite: str, *cases: dict) -> dict:
    """A run of the benchmark with one peer, as JSON."""
    ours = {"tflops": 600.0, "peak": 0.75, "host_bound": False, "gbs": 3000.0, "of_copy": 0.75}
    rows = [
        {
            "case": {"dtype": "bf16", "head_dim": 128, "heads": "16:2", "layout": "2x512", "mask": "full"} | case,
            "results": {"fa3_cute": ours, "fa3": ours | {"tflops": 500.0, "gbs": 2000.0, "host_bound": True}},
        }
        for case in cases
    ]
    return {
        "environment": {
            "suite": suite,
            "gpu": "NVIDIA H200",
            "sms": 132,
            "clock_problem": "none",
            "dsl": "4.8.1",
            "dsl_cuda": "12.9",
            "peers": {"fa3": "fa3-fwd 0.0.3"},
            "date": "2026-11-22",
        },
        "rows": rows,
        "conclusions": [],
    }


def test_report_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = []
    for suite, cases in (("prefill", [{}, {"mask": "causal"}]), ("decode", [{"l2": "warm"}, {"l2": "cold"}])):
        files.append(tmp_path / f"{suite}.json")
        files[-1].write_text(json.dumps(results(suite, *cases)))
    picture = tmp_path / "out.png"
    assert main(["report", "--plot", str(picture), *map(str, files)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["report", "--plot", str(picture), "--head-dim", "64", *map(str, files)]) == 2
    assert "no results to draw" in capsys.readouterr().err


@pytest.mark.parametrize("is_memory, unit, height, roof", [(False, "TFLOP/s", 500, 800), (True, "GB/s", 2000, 4000)])
def test_bars_and_roofline(is_memory, unit, height, roof):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    plot.draw(panel, results("prefill", {}, {})["rows"], ["fa3_cute", "fa3"], is_memory)
    assert panel.get_ylabel() == unit
    _, theirs = panel.containers
    assert [bar.get_height() for bar in theirs] == [height] * 2
    (lines,) = [
        item
        for item in panel.collections
        if item.get_label() in [text.get_text() for text in panel.get_legend().get_texts()]
    ]
    assert [segment[0][1] for segment in lines.get_segments()] == [roof] * 2
    assert "*" in [text.get_text() for text in panel.texts]


def test_no_roofline_where_the_clock_is_unknown():
    assert plot.roof({"tflops": 600.0, "peak": None}, is_memory=False) is None


def test_long_panels_go_on_in_the_next():
    rows = results("prefill", *[{}] * (plot.MAX_CASES + 1))["rows"]
    assert [len(part) for part in plot.by_variant(rows).values()] == [plot.MAX_CASES, 1]


@pytest.mark.parametrize("argv", [["bench"], ["report", "no.json"]])
def test_without_matplotlib(argv, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*argv, "--plot", "out.png"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--plot needs matplotlib") and "fa3_cute[plot]" in line


def test_bench_plots_what_it_measured(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    install(monkeypatch)
    picture = tmp_path / "out.png"
    assert (
        main(
            [
                "bench",
                "--head-dim",
                "64",
                "--seqlen",
                "96",
                "--batch-size",
                "1",
                "--num-heads",
                "2",
                "--rounds",
                "2",
                "--plot",
                str(picture),
            ]
        )
        == 0
    )
    assert picture.stat().st_size > 1000
